"""Pictures for people, as SVG. The home of `matplotlib`, which is imported when a picture is asked for."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


def front_picture(front: Sequence[Mapping[str, Any]], uniform: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]]) -> bytes:
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
        axes.plot([point[x] for point in shown], [point["predicted_kl"] for point in shown], color="tab:blue", marker=".", label="best mix, predicted")
        for index, point in enumerate(uniform):
            axes.plot(point[x], point["predicted_kl"], "o", color="0.6", label="one format for all, predicted" if index == 0 else None)
            axes.annotate(point["format"], (point[x], point["predicted_kl"]), fontsize=6, color="0.4", xytext=(3, 3), textcoords="offset points")
        for index, point in enumerate(chosen):
            axes.plot(point[x], point["predicted_kl"], "D", color="tab:orange", label="recipe, predicted" if index == 0 else None)
            axes.annotate(point["name"], (point[x], point["predicted_kl"]), fontsize=7, xytext=(4, -9), textcoords="offset points")
        measured = [point for point in chosen if point.get("measured_kl")]
        if measured:
            axes.plot([point[x] for point in measured], [point["measured_kl"] for point in measured], "x", color="tab:red", label="recipe, measured")
        axes.set(xlabel=label, ylabel="KL, nats per prediction", yscale="log")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    return data.getvalue()
