"""Cells of smaller sizes from the samples' scores of larger ones, which are in the store: no worker is needed.

A sample's score depends on no other sample, unless its recipe finds ranges or scales of the inputs in the data. The
samples' scores are kept as float32, so a sum of them is a score to 1e-7 of it. What is kept for all samples together
only, errors of outputs and the largest input, is NULL in such rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import pyarrow as pa

from sweep.config.schema import SweepConfig
from sweep.core.batches import TOKEN_KINDS
from sweep.core.errors import SweepError
from sweep.core.machine import Device
from sweep.core.sizes import n_samples_of
from sweep.plan.trials import PlannedTrial, SweepPlan, plan_sweep
from sweep.store.records import SCORES_SCHEMA, TrialRow, per_prediction
from sweep.store.store import Store

_ALIKE: Final = ("model_revision", "dtype", "tp")  # attributes of a planned trial and of a row that must be equal
_NAMED: Final = ("model", "dataset", "quant_pair", "quant_granularity")  # sections of the config that have names


def take_prefixes(plan: SweepPlan, store: Store, device: Device) -> int:
    """Complete cells that are prefixes of finished ones.

    Args:
        plan: of the grid that is asked for.
        store: receives them.
        device: as for `plan_sweep`.

    Returns: number of cells completed.
    """
    lacking = [trial for trial in plan.trials if _is_lacking(trial, plan, store)]
    rows = [row for row in store.trials().values() if row.state == "done"] if lacking else []
    wanted: list[tuple[PlannedTrial, SweepConfig]] = []  # with the same point in a larger size
    for trial in lacking:
        sizes = {row.size for row in rows if _is_larger(row, trial)}
        wanted += [(trial, _in_size(trial.config, size)) for size in sorted(sizes, key=n_samples_of)]
    if not wanted:
        return 0
    try:
        found = plan_sweep([point for _, point in wanted], device)
    except SweepError:  # the data set has become shorter
        return 0
    taken: set[str] = set()
    for (trial, _), larger in zip(wanted, found.trials, strict=True):
        assert trial.cell_id is not None
        if trial.cell_id not in taken and (table := _prefix(trial, larger, found, store)) is not None:
            store.complete(trial.cell_id, {"all": table})
            taken.add(trial.cell_id)
    return len(taken)


def _is_lacking(trial: PlannedTrial, plan: SweepPlan, store: Store) -> bool:
    """Whether a trial's cell is not in the store, and could be the leading samples of another."""
    if trial.cell_id is None or trial.task_id is None or plan.tasks[trial.task_id].format.calibrates_inputs:
        return False
    return not store.is_finished(trial.cell_id)


def _in_size(point: SweepConfig, size: str) -> SweepConfig:
    return replace(point, dataset=replace(point.dataset, size=size))


def _prefix(trial: PlannedTrial, larger: PlannedTrial, plan: SweepPlan, store: Store) -> pa.Table | None:
    """The rows of a trial's cell, out of a larger one's; None: that is not finished, or its data are others."""
    if larger.cell_id is None or larger.task_id is None or not store.is_finished(larger.cell_id):
        return None
    size, method = trial.config.dataset.size, trial.config.sensitivity.method
    data = plan.plans[plan.tasks[larger.task_id].plan_id]
    scores = store.whole_scores(larger.cell_id)
    if scores is None or data.digest(size) != trial.dataset_revision:
        return None
    return prefix_rows(scores, trial.cell_id or "", data.sample_predictions(size), method)


def _is_larger(row: TrialRow, trial: PlannedTrial) -> bool:
    """Whether a row is a trial of the same recipe on more samples, as far as names tell."""
    config = trial.config
    names = all(getattr(row, section) == getattr(config, section).name for section in _NAMED)
    sensitivity = config.sensitivity
    kind = (sensitivity.coverage, sensitivity.method, sensitivity.draws)
    kind += (sensitivity.engine, sensitivity.quant_algorithm)
    return (
        names
        and kind == (row.coverage, row.method, row.draws, row.engine, row.algorithm)
        and sensitivity.scales == row.scales
        and all(getattr(row, name) == getattr(trial, name) for name in _ALIKE)
        and n_samples_of(row.size) > n_samples_of(config.dataset.size)
    )


def prefix_rows(scores: pa.Table, cell_id: str, predictions: Sequence[int], method: str) -> pa.Table | None:
    """The rows of a cell whose samples are the leading ones of another.

    Args:
        scores: the other's (SCORES_SCHEMA).
        cell_id: of the cell.
        predictions: of each of its samples.
        method: gradient, fisher or kl_div.

    Returns: None: the rows keep no scores of single samples, or none of these samples reaches some layer group.
    """
    n_samples, n_predictions = len(predictions), sum(predictions)
    rows = scores.to_pylist()
    for row in rows:
        row |= {"cell_id": cell_id, "n_predictions": n_predictions, "n_samples": n_samples}
        row |= {"sample_predictions": list(predictions), "score_top_token": None, "input_amax": None}
        row |= {"output_rel_error": None, "output_sqnr_db": None}
        if row["score"] is None:
            continue
        if not row["sample_scores"] or (row["score"] and not any(row["sample_scores"][:n_samples])):
            return None
        if row["projections"] is not None:
            n_draws = len(row["projections"]) // len(row["sample_scores"])
            row["projections"] = row["projections"][: n_samples * n_draws]
        row["sample_scores"] = row["sample_scores"][:n_samples]
        samples = np.array(row["sample_scores"], dtype=np.float64)
        score = float(samples.sum())
        row |= per_prediction(score, samples, predictions, method) | _kinds(row, score, n_samples)
    return pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)


def _kinds(row: Mapping[str, list[float] | float | None], score: float, n_samples: int) -> dict[str, object]:
    """The columns of a row that split its score by kind of token."""
    if row["score_prompt"] is None:
        return {}
    found: dict[str, object] = {}
    sums: dict[str, float] = {}
    for kind in TOKEN_KINDS:
        if kind != "prompt":
            samples = row[f"sample_scores_{kind}"]
            leading = samples[:n_samples] if isinstance(samples, list) else []
            sums[kind] = float(np.sum(leading, dtype=np.float64))
            found[f"sample_scores_{kind}"] = leading if any(leading) else None
    rest = score - sum(sums.values())
    # Without a prompt what is left is rounding, and belongs to the largest. Squares are never negative; parts of
    # projections may be.
    if row["score_prompt"] == 0 or (rest < 0 and row["projections"] is None):
        sums[max(sums, key=sums.__getitem__)] += rest
        rest = 0.0
    return found | {f"score_{kind}": sums.get(kind, rest) for kind in TOKEN_KINDS}
