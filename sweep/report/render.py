"""One trial's report as text: Markdown for people, JSON for programs. Opens no file, knows no path."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from sweep.config.targets import Target
from sweep.core.groups import short_group
from sweep.core.text import aligned
from sweep.report.analysis import summarize
from sweep.report.markdown import columns_text, facts_table, groups_table, kinds_table, sentences
from sweep.report.rows import Report, algorithm_of
from sweep.store.records import FinishedTrial

REPORT_VERSION = 1  # of the JSON's layout


def render_markdown(report: Report) -> str:
    """The report for people."""
    trial = report.trial
    parts = [
        f"# Layer sensitivity: {trial.model}, {trial.quant_pair}, {trial.quant_granularity}",
        facts_table(report),
        "## Summary",
        "\n".join(f"- {sentence}" for sentence in sentences(report)),
    ]
    if report.rows:
        parts += [
            "## Where the damage sits",
            kinds_table(report),
            "## Layer groups, most sensitive first",
            columns_text(trial.method),
            groups_table(report),
        ]
    if report.not_measured:
        names = "\n".join(f"- `{short_group(row['layer'], row['modules'])}`" for row in report.not_measured)
        parts += [
            "## Not measured",
            f"Never called on these samples, so nothing is known about them; they are not counted as 0.\n\n{names}",
        ]
    return "\n\n".join(parts) + "\n"


def render_json(report: Report) -> str:
    """Everything of the report in machine form; equal trials give equal text.

    `scheme`, `model`, `dataset` and `layer_sensitivity` have the origin's keys; `sensitivity` is per prediction here.
    """
    trial, summary, stability = report.trial, report.summary, report.stability
    pair: dict[str, Any] = report.config.get("quant_pair", {})
    document = {
        "report_version": REPORT_VERSION,
        "scheme": {
            "name": f"{trial.quant_pair}_{trial.quant_granularity}_{trial.coverage}",
            "auto_quantize_bits": summary.effective_bits,
            "auto_quantize_method": trial.method,
            "auto_quantize_score_size": summary.n_samples,
            "coverage_mode": trial.coverage,
            "coverage_fraction": summary.n_measured / summary.n_groups if summary.n_groups else 0.0,
            "engine": trial.engine,
            "quant_formats": [pair.get("format_name", trial.quant_pair)],
            "quant_granularity": report.config.get("quant_granularity", {"name": trial.quant_granularity}),
            "quant_pair": pair or {"name": trial.quant_pair},
            "served_as": report.served_as,
        },
        "model": {**report.config.get("model", {}), "id": trial.model, "revision": trial.model_revision},
        "dataset": {
            **report.config.get("dataset", {}),
            "name": trial.dataset,
            "size": trial.size,
            "revision": trial.dataset_revision,
            "num_calib_samples": summary.n_samples,
            "n_predictions": summary.n_predictions,
        },
        "trial": {"trial_id": trial.trial_id, "cell_id": trial.cell_id, "versions": report.versions},
        "units": {
            "score": "nats squared, summed over tokens and outputs"
            if trial.method == "gradient"
            else "nats, summed over predictions",
            "sensitivity": "score per prediction",
            "predicted_kl": "nats per prediction",
            "intervals": "90% bootstrap over samples, 6 digits" if report.total_interval else None,
            "size_cost": "weights of the group in 16-bit units",
        },
        "totals": {
            "predicted_kl": summary.total_predicted_kl,
            "predicted_kl_interval": report.total_interval,
            "effective_bits": summary.effective_bits,
            "n_groups_carrying_half": summary.n_groups_half,
        },
        "rank_stability": {
            "spearman": stability.spearman,
            "top_k": stability.top_k,
            "top_k_overlap": stability.top_overlap,
            "between": "even and odd samples",
        }
        if stability
        else None,
        "layer_sensitivity": report.rows,
        "not_measured": report.not_measured,
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def summary_lines(finished: Sequence[FinishedTrial], top: int, target: Target) -> list[str]:
    """A table for the end of a run: a heading, then one line a trial.

    A line has the trial's `top` most sensitive layer groups, and how the target runs its recipe.
    """
    measured = ("pair", "granularity", "size", "bits", "KL/pred.")
    cells: list[tuple[str, ...]] = [
        (*measured, f"on {target.name}", "most sensitive layer groups (share of the total)")
    ]
    for one in finished:
        summary = summarize(one.scores)
        served = target.status(one.trial.quant_pair, one.trial.quant_granularity, algorithm_of(one.trial)).words
        groups = ", ".join(most_sensitive(one.scores, top))
        kl = "-" if summary.total_predicted_kl is None else f"{summary.total_predicted_kl:.3g}"
        facts = (
            one.trial.quant_pair,
            one.trial.quant_granularity,
            one.trial.size,
            f"{summary.effective_bits:.2f}",
            kl,
            served,
        )
        cells.append((*facts, groups or "nothing measured"))
    return aligned(cells)


def most_sensitive(scores: pa.Table, top: int) -> list[str]:
    """The `top` most sensitive layer groups of one cell, each with its share of the total."""
    summary = summarize(scores)
    modules = dict(zip(scores["group"].to_pylist(), scores["modules"].to_pylist(), strict=True))
    return [
        f"{short_group(group, modules[group])} {share:.0%}"
        for group, share in zip(summary.top_groups[:top], summary.top_shares, strict=False)
    ]
