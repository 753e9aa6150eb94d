"""One worker's work, without Ray: hold a model and its capture, score tasks, put finished parts into the store."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from sweep.store import Store
from workers import modeling
from workers.capture import Rows, capture
from workers.data import SIZES, Plan
from workers.quantization import auto_quantize_scores
from workers.scoring import Formats, GroupScore, score_group
from workers.task import GroupSpec, ModelSpec, Progress, Task


class Scorer:
    """Scores tasks one after another; loads a model only when a task needs another one."""

    def __init__(self, store_uri: str, device: str) -> None:
        """Prepare an empty worker.

        Args:
            store_uri: absolute path or URL of the store.
            device: "cpu" or "cuda".
        """
        if device == "cpu":
            torch.set_num_threads(1)  # more threads beside other workers cost 60x, and would change bits
        self.store = Store(store_uri)
        self.device = device
        self.model_loads = 0
        self._model: Any = None
        self._model_spec: ModelSpec | None = None
        self._capture_key: tuple[str, tuple[str, ...]] | None = None
        self._segments: list[dict[str, Rows]] = []

    def load(self, spec: ModelSpec) -> None:
        """Hold this model, and no other."""
        if spec == self._model_spec:
            return
        self._model, self._model_spec, self._capture_key, self._segments = None, None, None, []
        self._model = modeling.load(Path(spec.path), dtype=getattr(torch, spec.dtype), device=self.device)
        self._model_spec = spec
        self.model_loads += 1

    def score(self, task: Task, plan: Plan) -> Iterator[Progress]:
        """Score what the task's cells lack, part by part; each part is on disk before its progress is yielded.

        Raises: NotFinite: a NaN or infinity; parts written before stay.
        """
        self.load(task.model)
        parts = [(name, list(members)) for name, members in groupby(task.groups, key=lambda group: group.part)]
        finished = {size: self.store.finished_parts(cell) for size, cell in task.cells.items()}
        done = sum(len(members) for name, members in parts for size in task.cells if name in finished[size])
        yield Progress(done=done, total=task.n_steps)
        stock = {size: self._stock_scores(task, plan, size) for size in task.cells} if task.engine == "modelopt" else {}
        for name, members in parts:
            sizes = [size for size in task.cells if name not in finished[size]]
            if not sizes:
                continue
            rows: dict[str, list[dict[str, Any]]] = {size: [] for size in sizes}
            for group in members:
                scores = None if stock else self._group_scores(task, plan, group, sizes)
                for size in sizes:
                    measured = _stock_columns(stock[size].get(group.name)) if stock else _columns(scores and scores[size])
                    rows[size].append(_row(task, plan, group, size, measured))
            for size in sizes:
                self.store.write_part(task.cells[size], name, rows[size])
                done += len(members)
            yield Progress(done=done, total=task.n_steps)
        for cell in task.cells.values():
            self.store.complete(cell, [name for name, _ in parts])

    def _group_scores(self, task: Task, plan: Plan, group: GroupSpec, sizes: Sequence[str]) -> dict[str, GroupScore] | None:
        segments = self._captured(task, plan, max(plan.segments_of(size) for size in sizes))
        formats = Formats(name=task.label, weight=task.weight_attributes, inputs=task.input_attributes, calibrates_inputs=task.calibrates_inputs)
        weights = {name: self._model.get_submodule(name).weight.detach() for name in group.modules}
        return score_group(weights, formats, segments, {size: plan.segments_of(size) for size in sizes})

    def _captured(self, task: Task, plan: Plan, n_segments: int) -> list[dict[str, Rows]]:
        modules = tuple(name for group in task.groups for name in group.modules)
        key = (task.plan_id, modules)
        if key != self._capture_key:
            self._capture_key, self._segments = key, []
        for batches in plan.segments[len(self._segments) : n_segments]:
            self._segments.append(capture(self._model, batches, modules))
        return self._segments[:n_segments]

    def _stock_scores(self, task: Task, plan: Plan, size: str) -> dict[str, float]:
        covered = [name for group in task.groups for name in group.modules]
        return auto_quantize_scores(self._model, task.quant_cfg, task.algorithm, list(plan.batches(size)), covered)


def _row(task: Task, plan: Plan, group: GroupSpec, size: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    n_predictions = plan.n_predictions(size)
    score = measured["score"]
    return {
        "cell_id": task.cells[size],
        "group": group.name,
        "modules": list(group.modules),
        "layer_index": group.layer_index,
        "sensitivity": None if score is None else score / n_predictions,
        "predicted_kl": None if score is None else score / (2 * n_predictions),
        "n_predictions": n_predictions,
        "n_samples": SIZES[size],
        "weight_elements": group.weight_elements,
        "effective_bits": task.effective_bits,
        **measured,
    }


def _stock_columns(score: float | None) -> dict[str, Any]:
    """The columns that mtq.auto_quantize can fill."""
    return {"score": score}


def _columns(score: GroupScore | None) -> dict[str, Any]:
    """The measured columns; all NULL for a group that was never called."""
    if score is None:
        return {"score": None}
    relative = _ratio(score.dy_square_sum, score.y_square_sum)
    return {
        "score": score.sample_scores.sum().item(),
        "output_rel_error": relative,
        "output_sqnr_db": -20 * math.log10(relative) if relative else None,
        "weight_rel_error": _ratio(score.dw_square_sum, score.w_square_sum),
        "input_amax": score.input_amax,
        "sample_scores": score.sample_scores.tolist(),
    }


def _ratio(error_square: float, signal_square: float) -> float | None:
    return math.sqrt(error_square / signal_square) if signal_square else None
