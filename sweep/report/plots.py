"""Pictures for people, as SVG. The home of `matplotlib`, which is imported when a picture is asked for."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

_DAMAGE: Final = "KL, nats per prediction"
FRONT_BEGINS: Final = re.compile(f"(?s)<\\?xml .*>{_DAMAGE}<".encode())  # by which such a picture is known again

_FONT: Final = 6  # of names, in points, as all below
_LETTER: Final = 3.4  # width, at most on average
_LINE: Final = 7.0  # height
_GAP: Final = 6.0  # between a point and its name


def front_picture(
    front: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]]
) -> bytes:
    """Predicted damage over size: the front, one format for all, and recipes that were chosen; with measured damages where there are any.

    Args:
        front: `effective_bits`, `gb` (None: unknown) and `predicted_kl` of each point.
        uniform: the same with `format`.
        chosen: the same with `name`, and `measured_kl` if it was measured.

    Returns: an SVG file, always the same for the same points.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    known = all(point["gb"] is not None for point in [*front, *uniform, *chosen])
    x, label = ("gb", "weights, GB") if known else ("effective_bits", "bits a weight")
    with mpl.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "none"}):
        figure: Any = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        shown = [point for point in front if point["predicted_kl"] > 0]  # the axis is logarithmic
        axes.plot(
            [point[x] for point in shown],
            [point["predicted_kl"] for point in shown],
            color="tab:blue",
            marker=".",
            label="best mix, predicted",
        )
        for index, point in enumerate(uniform):
            axes.plot(
                point[x],
                point["predicted_kl"],
                "o",
                color="0.6",
                label="one format for all, predicted" if index == 0 else None,
            )
        for index, point in enumerate(point for point in chosen if point["predicted_kl"] > 0):
            axes.plot(
                point[x],
                point["predicted_kl"],
                "D",
                color="tab:orange",
                label="recipe, predicted" if index == 0 else None,
            )
        measured = [point for point in chosen if point.get("measured_kl")]
        if measured:
            axes.plot(
                [point[x] for point in measured],
                [point["measured_kl"] for point in measured],
                "x",
                color="tab:red",
                label="recipe, measured",
            )
        axes.set(xlabel=label, ylabel=_DAMAGE, yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
        named = [
            (point[x], point["predicted_kl"], point.get("name") or point["format"])
            for point in [*uniform, *chosen]
            if point["predicted_kl"] > 0
        ]
        _annotate(axes, named)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def _annotate(axes: Any, named: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, below the names that are in the way, with a line to the point."""
    axes.figure.draw_without_rendering()  # settles where points lie
    scale = 72 / axes.figure.dpi
    right_edge = axes.get_window_extent().x1 * scale
    anchors = [tuple(float(at) * scale for at in axes.transData.transform((x, y))) for x, y, _ in named]
    boxes = spread(
        [(x, y, len(text) * _LETTER) for (x, y), (_, _, text) in zip(anchors, named, strict=True)], right_edge
    )
    for (x, y, text), anchor, (left, bottom) in zip(named, anchors, boxes, strict=True):
        line = {"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 2}
        offset = left - anchor[0], bottom - anchor[1]
        axes.annotate(
            text, (x, y), fontsize=_FONT, color="0.3", xytext=offset, textcoords="offset points", arrowprops=line
        )


def spread(labels: Sequence[tuple[float, float, float]], right_edge: float) -> list[tuple[float, float]]:
    """Where labels go so that none covers another: right of their points, or left of them at the edge, and as far down as it takes.

    Args:
        labels: place of the point and width of the label, of each, in typographical points.
        right_edge: where the picture ends.

    Returns: left and bottom of each.
    """
    placed: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(labels)), key=lambda index: -labels[index][1]):
        x, y, width = labels[index]
        left, bottom = x + _GAP if x + _GAP + width < right_edge else x - _GAP - width, y
        others = [(at[0], at[0] + labels[other][2], at[1]) for other, at in placed.items()]
        while any(begin < left + width and left < end and abs(other - bottom) < _LINE for begin, end, other in others):
            bottom -= 1.0
        placed[index] = left, bottom
    return [placed[index] for index in range(len(labels))]
