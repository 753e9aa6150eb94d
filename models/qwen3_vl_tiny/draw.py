"""Draws `sensitivity.svg`, the picture of the project's README, from the published scores of this model.

python models/qwen3_vl_tiny/draw.py
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from sweep.core.groups import short_group

HERE = Path(__file__).parent
RUN = "lm_only-wordnet_glosses-large-gradient"
TRIALS = {  # directories of the published tree, in the order of the legend
    "INT4 weights, INT8 inputs per tensor": ("weight-int4-act-int8/default", "tab:red", "o"),
    "INT8 weights, INT8 inputs per tensor": ("weight-int8-act-int8/default", "tab:orange", "s"),
    "INT8 weights, INT8 inputs per token": ("weight-int8-act-int8/a_per_token_dynamic", "tab:blue", "D"),
}


def draw() -> Figure:
    """Predicted KL of each layer group, in the model's order, under three formats."""
    figure: Any = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    names: list[str] = []
    for label, (folder, color, marker) in TRIALS.items():
        rows = pq.read_table(HERE / "layer-analysis" / folder / RUN / "scores.parquet").to_pylist()
        names = [short_group(row["group"], row["modules"]).removeprefix("layers.") for row in rows]
        values = [1e3 * row["predicted_kl"] for row in rows]
        axes.plot(names, values, color=color, marker=marker, markersize=5, linewidth=0.8, label=label)
    axes.set(yscale="log", ylabel="predicted KL, mnat per prediction", xlabel="decoder layer and linears of the group")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.14), frameon=False)
    return figure


if __name__ == "__main__":
    with mpl.rc_context({"svg.hashsalt": "sweep"}):
        draw().savefig(HERE / "sensitivity.svg", metadata={"Date": None})
