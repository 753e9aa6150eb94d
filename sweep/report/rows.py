"""The content of one trial's report, before it is text."""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sweep.config.targets import served_as
from sweep.report.analysis import (
    FloatArray,
    RankStability,
    Summary,
    bootstrap_interval,
    float_column,
    ranking,
    sample_matrix,
    score_shares,
    split_half_stability,
    summarize,
)
from sweep.store.records import FinishedTrial, TrialRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The content that Markdown and JSON reports share."""

    trial: TrialRow
    config: dict[str, Any]
    versions: dict[str, str]
    served_as: dict[str, dict[str, str | None]]  # by target
    rows: list[dict[str, Any]]  # groups that were measured, most sensitive first, as in the JSON
    not_measured: list[dict[str, Any]]
    summary: Summary
    total_interval: list[float] | None
    stability: RankStability | None


def analyse(finished: FinishedTrial) -> Report:
    """Rank a finished trial's rows, with intervals and stability where per-sample scores were kept."""
    scores = finished.scores
    score = float_column(scores, "score")
    summary = summarize(scores)
    samples = sample_matrix(scores)
    interval, total_interval = None, None
    if samples is not None and summary.n_predictions > 0:
        with_total = np.vstack([samples, np.nansum(samples, axis=0)])
        interval = bootstrap_interval(with_total, summary.n_predictions, finished.trial.cell_id or "")
        kl_per_sensitivity = ratio(
            np.nansum(float_column(scores, "predicted_kl")), np.nansum(float_column(scores, "sensitivity"))
        )
        total_interval = _rounded(interval[:, -1] * kl_per_sensitivity)
    shares = score_shares(score)
    rows: list[dict[str, Any]] = []
    not_measured: list[dict[str, Any]] = []
    names = [name for name in scores.column_names if name != "sample_scores"]
    table: list[dict[str, Any]] = scores.select(names).to_pylist()
    for i in ranking(score).tolist():
        row = {key: _finite(value) for key, value in table[i].items()}
        if row["score"] is None:
            not_measured.append({"layer": row["group"], "modules": row["modules"], "layer_index": row["layer_index"]})
            continue
        ends = None if interval is None else interval[:, i]
        to_kl = ratio(row["predicted_kl"] or 0.0, row["sensitivity"] or 0.0)
        rows.append(
            {
                "rank": len(rows) + 1,
                "layer": row["group"],
                "modules": row["modules"],
                "layer_index": row["layer_index"],
                "score": row["score"],
                "sensitivity": row["sensitivity"],
                "sensitivity_interval": None if ends is None else _rounded(ends),
                "predicted_kl": row["predicted_kl"],
                "predicted_kl_interval": None if ends is None else _rounded(ends * to_kl),
                "share": float(shares[i]),
                "output_rel_error": row["output_rel_error"],
                "output_sqnr_db": row["output_sqnr_db"],
                "weight_rel_error": row["weight_rel_error"],
                "input_amax": row["input_amax"],
                "weight_elements": row["weight_elements"],
                "num_bits": row["effective_bits"],
                "size_cost": row["weight_elements"] * row["effective_bits"] / 16,
            }
        )
    return Report(
        trial=finished.trial,
        config=portable_config(finished.trial),
        versions=json.loads(finished.trial.versions),
        served_as=served_as_of(finished.trial),
        rows=rows,
        not_measured=not_measured,
        summary=summary,
        total_interval=total_interval,
        stability=None if samples is None else split_half_stability(samples),
    )


def served_as_of(trial: TrialRow) -> dict[str, dict[str, str | None]]:
    """How every target runs the trial's recipe, whichever target it was run for."""
    return served_as(trial.quant_pair, trial.quant_granularity, algorithm_of(trial))


def algorithm_of(trial: TrialRow) -> str:
    """The calibration algorithm; records older than the key have `max`."""
    return json.loads(trial.config).get("sensitivity", {}).get("quant_algorithm", "max")


def portable_config(trial: TrialRow) -> dict[str, Any]:
    """The composed config without the values that may differ between equal runs.

    Leaves out `store`, `cluster`, `output_layout` and `target`; an absolute path keeps only its last part; whole-number
    keys, which JSON turned into text (``block_sizes: {-1: 64}``), are numbers again.
    """
    config = json.loads(trial.config)
    return {
        key: _portable(value)
        for key, value in config.items()
        if key not in ("store", "cluster", "output_layout", "target")
    }


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(key) if key.removeprefix("-").isdecimal() else key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or value[1:3] in (":\\", ":/")):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value


def ratio(part: float, whole: float) -> float:
    """Part of the whole; 0 of nothing."""
    return float(part / whole) if whole else 0.0


def _rounded(values: FloatArray) -> list[float]:
    # Six digits: the last ones of a matrix product differ between machines.
    return [float(f"{value:.6g}") for value in values.tolist()]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
