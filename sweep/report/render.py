"""One trial's report as text: Markdown for people, JSON for programs. Opens no file, knows no path."""

import json
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import pyarrow as pa

from sweep.config.targets import Target
from sweep.core.groups import short_group
from sweep.core.sizes import n_samples_of
from sweep.report.analysis import summarize
from sweep.report.markdown import (
    columns_text,
    facts_table,
    groups_table,
    kinds_table,
    pairs_text,
    sentences,
    tokens_table,
    tokens_text,
)
from sweep.report.rows import Report
from sweep.store.records import ATTRIBUTES, NUMBERS, RECIPE, UNKNOWN, FinishedTrial

REPORT_VERSION = 1  # of the JSON's layout


def render_markdown(report: Report) -> str:
    """The report for people."""
    trial = report.trial
    parts = [
        f"# Layer sensitivity: {trial.title}",
        facts_table(report),
        "## Summary",
        "\n".join(f"- {sentence}" for sentence in sentences(report)),
    ]
    if report.rows:
        parts += [
            "## Predicted KL by layer",
            kinds_table(report),
            "## Layer groups, most sensitive first",
            columns_text(trial.method),
            groups_table(report),
        ]
    if report.interactions is not None:
        parts += ["## Pairs of layer groups", pairs_text(report.interactions)]
    if report.token_shares is not None:
        parts += ["## By kind of token", tokens_text(report), tokens_table(report)]
    if report.not_measured:
        names = "\n".join(f"- `{row.name}`" for row in report.not_measured)
        parts += [
            "## Not measured",
            f"Never called on these samples, so nothing is known about them; they are not counted as 0.\n\n{names}",
        ]
    return "\n\n".join(parts) + "\n"


_SCORE_UNITS: Final = {
    "gradient": "nats squared, summed over tokens and outputs",
    "fisher": "nats squared, summed over samples: of each the mean over draws of (sum over tokens and outputs)^2",
    "kl_div": "nats, summed over predictions",
}


def render_json(report: Report) -> str:
    """Everything of the report in machine form; equal trials give equal text.

    `scheme`, `model`, `dataset` and `layer_sensitivity` have the origin's keys; `sensitivity` is per prediction here.
    """
    trial, summary, stability = report.trial, report.summary, report.stability
    document = {
        "report_version": REPORT_VERSION,
        "scheme": {
            "name": "_".join([trial.quant_pair, trial.quant_granularity, trial.coverage, *trial.variant]),
            "quant_algorithm": trial.algorithm,
            "scales": trial.scales,
            "dtype": trial.dtype,
            **({"tp": trial.tp} if trial.tp > 1 else {}),
            **({"calibration": trial.calibration} if trial.calibration is not None else {}),
            **({"draws": trial.draws} if trial.draws is not None else {}),
            "auto_quantize_bits": summary.effective_bits,
            "auto_quantize_method": trial.method,
            "auto_quantize_score_size": summary.n_samples,
            "coverage_mode": trial.coverage,
            "coverage_fraction": summary.n_measured / summary.n_groups if summary.n_groups else 0.0,
            "engine": trial.engine,
            "quant_formats": [report.pair.format_name or trial.quant_pair],
            "quant_granularity": report.section("quant_granularity") or {"name": trial.quant_granularity},
            "quant_pair": report.section("quant_pair") or {"name": trial.quant_pair},
            "served_as": report.served_as,
        },
        "model": {**report.section("model"), "id": trial.model, "revision": trial.model_revision},
        "dataset": {
            **report.section("dataset"),
            "name": trial.dataset,
            "size": trial.size,
            "revision": trial.dataset_revision,
            "num_calib_samples": summary.n_samples,
            "n_predictions": summary.n_predictions,
        },
        "weights": report.weights,
        "trial": {"trial_id": trial.trial_id, "cell_id": trial.cell_id, "versions": report.versions},
        "units": _units(report),
        "totals": {
            "predicted_kl": summary.total_predicted_kl,
            "predicted_kl_interval": report.total_interval,
            "effective_bits": summary.effective_bits,
            "n_groups_carrying_half": summary.n_groups_half,
            "token_shares": report.token_shares,
        },
        "rank_stability": {
            "spearman": stability.spearman,
            "top_k": stability.top_k,
            "top_k_overlap": stability.top_overlap,
            "between": "even and odd samples",
        }
        if stability
        else None,
        **({} if report.interactions is None else {"interactions": report.interactions}),
        "layer_sensitivity": report.rows,
        "not_measured": report.not_measured,
    }
    return json.dumps(msgspec.to_builtins(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _units(report: Report) -> dict[str, str | None]:
    return {
        "score": _SCORE_UNITS[report.trial.method],
        "sensitivity": "score per prediction",
        "predicted_kl": "nats per prediction",
        "intervals": "90% bootstrap over samples, 6 digits" if report.total_interval else None,
        "token_shares": "parts of the score by kind of the token at whose position the error arises",
        "size_cost": "weights of the group in 16-bit units",
    }


def largest(finished: Iterable[FinishedTrial]) -> list[FinishedTrial]:
    """Of trials that differ in their size alone the one with the most samples; in the order given."""
    best: dict[tuple[str, ...], FinishedTrial] = {}
    for one in finished:
        key = tuple(str(getattr(one.trial, name) or UNKNOWN) for name in (*ATTRIBUTES, *NUMBERS) if name != "size")
        if key not in best or n_samples_of(best[key].trial.size) < n_samples_of(one.trial.size):
            best[key] = one
    return [*best.values()]


def summary_table(finished: Sequence[FinishedTrial], top: int, target: Target) -> list[tuple[str, ...]]:
    """A table for the end of a run: a heading, then one row a trial.

    A row has the trial's `top` most sensitive layer groups, and how the target runs its recipe; its method, where there
    are several.
    """
    methods = ("method",) if len({one.trial.method for one in finished}) > 1 else ()
    names = (name.removeprefix("quant_") for name in RECIPE)
    groups = "most sensitive layer groups (share of the total)"
    rows = [(*names, *methods, "size", "bits", "KL/pred.", f"on {target.name}", groups)]
    for one in finished:
        trial, summary = one.trial, summarize(one.scores)
        served = target.status(trial.quant_pair, trial.quant_granularity, trial.algorithm).words
        kl = "-" if summary.total_predicted_kl is None else f"{summary.total_predicted_kl:.3g}"
        groups = ", ".join(most_sensitive(one.scores, top)) or "nothing measured"
        rows.append(
            (
                *trial.recipe,
                *(getattr(trial, name) for name in methods),
                trial.size,
                f"{summary.effective_bits:.2f}",
                kl,
                served,
                groups,
            )
        )
    return rows


def most_sensitive(scores: pa.Table, top: int) -> list[str]:
    """The `top` most sensitive layer groups of one cell, each with its share of the total."""
    summary = summarize(scores)
    modules = dict(zip(scores["group"].to_pylist(), scores["modules"].to_pylist(), strict=True))
    return [
        f"{short_group(group, modules[group])} {share:.0%}"
        for group, share in zip(summary.top_groups[:top], summary.top_shares, strict=False)
    ]
