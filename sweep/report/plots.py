"""Plots as SVG. The home of `matplotlib`, which is imported when a plot is asked for."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import structs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KL_LABEL: Final = "KL, nats per prediction"
FRONT_BEGINS: Final = re.compile(f"(?s)<\\?xml .*>{_KL_LABEL}<".encode())  # by which such a picture is known again

_FONT: Final = 6  # of names, in points, as all below
_LETTER: Final = 3.4  # width, at most on average
_LINE: Final = 7.0  # height
_GAP: Final = 6.0  # between a point and its name


class Point(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Size and KL of a recipe."""

    name: str = ""
    format: str = ""  # its name if it is one format for all layer groups
    effective_bits: float  # a weight of the covered layer groups
    checkpoint_bits: float | None = None  # a weight of all; None: unknown, as in the next line
    gb: float | None  # 1e9 bytes of all weights
    predicted_kl: float  # nats per prediction
    measured_kl: float | None = None  # None: not measured

    def x(self, in_gb: bool) -> float:
        """Its size."""
        return self.gb if in_gb and self.gb is not None else self.effective_bits


def front_picture(front: Sequence[Point], uniform: Sequence[Point], chosen: Sequence[Point], title: str) -> bytes:
    """Predicted KL over size: the front, one format for all, and chosen recipes; with measured KL where there is any.

    Args:
        front: best mixes.
        uniform: one format for all, with `format`.
        chosen: recipes, with `name`.
        title: of the picture.

    Returns: an SVG file, always the same for the same points.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    in_gb = all(point.gb is not None for point in (*front, *uniform, *chosen))
    with mpl.rc_context({"svg.hashsalt": "sweep", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()

        best, recipes = _above_zero(front), _above_zero(chosen)
        measured = [structs.replace(point, predicted_kl=point.measured_kl) for point in recipes if point.measured_kl]
        for points, style, color, label in (
            (best, ".-", "tab:blue", "best mix, predicted"),
            (uniform, "o", "0.6", "one format for all, predicted"),
            (recipes, "D", "tab:orange", "recipe, predicted"),
            (measured, "x", "tab:red", "recipe, measured"),
        ):
            if points:
                xs, ys = [point.x(in_gb) for point in points], [point.predicted_kl for point in points]
                axes.plot(xs, ys, style, color=color, label=label)
        axes.set(xlabel="weights, GB" if in_gb else "bits a weight", ylabel=_KL_LABEL, yscale="log")
        axes.set_title(title, fontsize=8)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
        shown = [*_above_zero(uniform), *recipes]
        _annotate(figure, axes, [(point.x(in_gb), point.predicted_kl, point.name or point.format) for point in shown])
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()


def _above_zero(points: Sequence[Point]) -> list[Point]:
    """The points that a logarithmic axis can show."""
    return [point for point in points if point.predicted_kl > 0]


def _annotate(figure: "Figure", axes: "Axes", named: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, below the names that are in the way, with a line to the point."""
    figure.draw_without_rendering()  # settles where points lie
    scale = 72 / figure.dpi
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
