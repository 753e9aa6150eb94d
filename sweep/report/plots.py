"""Plots as SVG. The home of `matplotlib`, which is imported when a plot is asked for."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

_KL_LABEL: Final = "KL, nats per prediction"
FRONT_BEGINS: Final = re.compile(f"(?s)<\\?xml .*>{_KL_LABEL}<".encode())  # by which such a picture is known again

_FONT: Final = 6  # of names, in points, as all below
_LETTER: Final = 3.4  # width, at most on average
_LINE: Final = 7.0  # height
_GAP: Final = 6.0  # between a point and its name


Point = Mapping[str, Any]  # `effective_bits`, `gb` (None: unknown), `predicted_kl`, and a name


def front_picture(front: Sequence[Point], uniform: Sequence[Point], chosen: Sequence[Point]) -> bytes:
    """Predicted KL over size: the front, one format for all, and chosen recipes; with measured KL where there is any.

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
        line = {"color": "tab:blue", "marker": ".", "label": "best mix, predicted"}
        axes.plot(*_columns(_above_zero(front), x, "predicted_kl"), **line)
        _marks(axes, uniform, x, "o", "0.6", "one format for all, predicted")
        _marks(axes, _above_zero(chosen), x, "D", "tab:orange", "recipe, predicted")
        if measured := [point for point in chosen if point.get("measured_kl")]:
            axes.plot(*_columns(measured, x, "measured_kl"), "x", color="tab:red", label="recipe, measured")
        axes.set(xlabel=label, ylabel=_KL_LABEL, yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
        shown = _above_zero([*uniform, *chosen])
        names = [point.get("name") or point["format"] for point in shown]
        _annotate(axes, list(zip(*_columns(shown, x, "predicted_kl"), names, strict=True)))
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def _above_zero(points: Sequence[Point]) -> list[Point]:
    """The points that a logarithmic axis can show."""
    return [point for point in points if point["predicted_kl"] > 0]


def _columns(points: Sequence[Point], x: str, y: str) -> tuple[list[float], list[float]]:
    return [point[x] for point in points], [point[y] for point in points]


def _marks(axes: Any, points: Sequence[Point], x: str, marker: str, color: str, label: str) -> None:
    """Draw a marker at each point's predicted KL, with one entry in the legend."""
    for index, point in enumerate(points):
        axes.plot(point[x], point["predicted_kl"], marker, color=color, label=None if index else label)


def _annotate(axes: Any, named: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, below the names that are in the way, with a line to the point."""
    axes.figure.draw_without_rendering()  # settles where points lie
    scale = 72 / axes.figure.dpi
    right_edge = axes.get_window_extent().x1 * scale
    transform = axes.transData.transform
    pixels = [transform((x, y)) for x, y, _ in named]
    anchors = [(float(x) * scale, float(y) * scale) for x, y in pixels]
    labels = [(x, y, len(text) * _LETTER) for (x, y), (_, _, text) in zip(anchors, named, strict=True)]
    boxes = spread(labels, right_edge)
    for (x, y, text), anchor, (left, bottom) in zip(named, anchors, boxes, strict=True):
        line = {"arrowstyle": "-", "lw": 0.4, "color": "0.6", "shrinkA": 0, "shrinkB": 2}
        offset = left - anchor[0], bottom - anchor[1]
        axes.annotate(
            text, (x, y), fontsize=_FONT, color="0.3", xytext=offset, textcoords="offset points", arrowprops=line
        )


def spread(labels: Sequence[tuple[float, float, float]], right_edge: float) -> list[tuple[float, float]]:
    """Places of labels so that none covers another.

    A label goes right of its point, or left of it at the edge, and as far down as it takes.

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
