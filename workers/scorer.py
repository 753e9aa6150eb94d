"""One worker's work, without Ray: hold a model and its capture, score tasks together, put finished parts into the store."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sweep.store import Store
from workers import modeling
from workers.book import Book, Measured, Part
from workers.capture import Rows, capture
from workers.data import Plan
from workers.quantization import auto_quantize_scores
from workers.scoring import Engine, GroupScore, NotFinite, Scores
from workers.task import GroupSpec, ModelSpec, Progress, Task

_WRITERS = 4  # threads that put parts on disk while the next layer is scored


@dataclass(frozen=True, slots=True)
class _Captured:
    plan_id: str
    n_segments: int
    modules: frozenset[str]
    rows: Mapping[str, Rows]


class Scorer:
    """Scores tasks; loads a model only when tasks need another one, and captures only what no earlier task had captured."""

    def __init__(self, store_uri: str, device: str) -> None:
        """Prepare an empty worker.

        Args:
            store_uri: absolute path or URL of the store.
            device: "cpu" or "cuda".
        """
        if device == "cpu":
            torch.set_num_threads(1)  # more threads beside other workers cost 60x, and would change bits
        self.store = Store(store_uri)
        self.device = torch.device(device)
        self.model_loads = 0
        self._model: Any = None
        self._model_spec: ModelSpec | None = None
        self._engine: Engine | None = None
        self._captured: _Captured | None = None
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="part-writer")

    def load(self, spec: ModelSpec) -> None:
        """Hold this model, and no other."""
        if spec == self._model_spec:
            return
        self._model, self._model_spec, self._captured = None, None, None
        self._model = modeling.load(Path(spec.path), dtype=getattr(torch, spec.dtype), device=str(self.device))
        self._engine = Engine(self.device)
        self._model_spec = spec
        self.model_loads += 1

    def score(self, tasks: Sequence[Task], plan: Plan) -> Iterator[Progress]:
        """Score what the tasks' cells lack, layer by layer; each part is on disk before its progress is yielded.

        Args:
            tasks: of one model, plan, method, engine and set of layer groups; a layer is visited once for all of them.
            plan: theirs.

        Yields: progress of each task; a task that meets a NaN or an infinity ends with a failure, the others go on.
        """
        first = tasks[0]
        self.load(first.model)
        parts = [Part(name, tuple(members)) for name, members in groupby(first.groups, key=lambda group: group.part)]
        books = {task.task_id: Book(task, plan, parts, self.store) for task in tasks}
        for book in books.values():
            yield book.progress()
        measured = self._stock(books, plan, parts) if first.engine == "modelopt" else self._layerwise(books, plan, parts)
        for part, found in measured:
            writes = [self._writers.submit(books[task_id].write, part, rows) for task_id, rows in found.items()]
            for task_id, done in zip(found, writes, strict=True):
                done.result()
                yield books[task_id].progress()
        for done in [self._writers.submit(book.complete) for book in books.values()]:
            done.result()

    def _layerwise(self, books: Mapping[str, Book], plan: Plan, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, Measured]]]:
        """Our engine. On a GPU a part is started before the one before it is waited for, so that the GPU always has work."""
        assert self._engine is not None
        started: list[tuple[Part, list[Book], list[Callable[[], list[Scores] | None]]]] = []
        for window, rows in self._windows(books, plan, parts):
            for part in window:
                asking = [book for book in books.values() if book.lacks(part)]
                if not asking:
                    continue
                jobs = [book.job(part) for book in asking]
                started.append((part, asking, [self._engine.score_group(self._weights(group), rows, jobs) for group in part.groups]))
                if len(started) > (self.device.type == "cuda"):
                    yield _measured(*started.pop(0))
        for rest in started:
            yield _measured(*rest)

    def _windows(self, books: Mapping[str, Book], plan: Plan, parts: Sequence[Part]) -> Iterator[tuple[Sequence[Part], Mapping[str, Rows]]]:
        """The parts that are still wanted, as many at a time as memory holds, with what their linears saw."""
        wanted = [part for part in parts if any(book.lacks(part) for book in books.values())]
        n_segments = max((book.n_segments for book in books.values()), default=0)
        if not wanted:
            return
        first = next(iter(books.values())).task
        modules = tuple(name for part in wanted for group in part.groups for name in group.modules)
        yield wanted, self._rows(first.plan_id, plan, n_segments, modules)

    def _rows(self, plan_id: str, plan: Plan, n_segments: int, modules: tuple[str, ...]) -> Mapping[str, Rows]:
        """Capture, or what an earlier capture of at least as much left."""
        if (held := self._captured) is None or held.plan_id != plan_id or held.n_segments < n_segments or not set(modules) <= held.modules:
            self._captured = held = None  # frees its memory first
            rows = capture(self._model, plan.segments[:n_segments], modules)
            self._captured = held = _Captured(plan_id, n_segments, frozenset(modules), rows)
        return held.rows

    def _weights(self, group: GroupSpec) -> dict[str, torch.Tensor]:
        return {name: self._model.get_submodule(name).weight.detach() for name in group.modules}

    def _stock(self, books: Mapping[str, Book], plan: Plan, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, Measured]]]:
        """The cross-check: ModelOpt's own searcher, one recipe and size at a time."""
        for task_id, book in books.items():
            task = book.task
            covered = [name for group in task.groups for name in group.modules]
            scores = {size: auto_quantize_scores(self._model, task.quant_cfg, task.algorithm, list(plan.batches(size)), covered) for size in task.cells}
            for part in parts:
                yield part, {task_id: _stock_columns(part, task.label, scores)}


def _measured(part: Part, books: Sequence[Book], waiting: Sequence[Callable[[], list[Scores] | None]]) -> tuple[Part, dict[str, Measured]]:
    """Wait for a part's groups: the measured columns of each task, by size, a row a group; or what went wrong."""
    by_group = [wait() for wait in waiting]
    result: dict[str, Measured] = {}
    for index, book in enumerate(books):
        columns: dict[str, list[dict[str, Any]]] = {size: [] for size in book.job(part).sizes}
        broken: NotFinite | None = None
        for scores in by_group:
            found = None if scores is None else scores[index]
            if isinstance(found, NotFinite):
                broken = broken or found
                continue
            for size, rows in columns.items():
                rows.append(_columns(None if found is None else found[size]))
        result[book.task.task_id] = broken or columns
    return part, result


def _stock_columns(part: Part, label: str, scores: Mapping[str, Mapping[str, float]]) -> Measured:
    """The measured columns of a part by size, from ModelOpt's scores by size and layer group."""
    for group in part.groups:
        if not all(math.isfinite(found.get(group.name, 0.0)) for found in scores.values()):
            return NotFinite(f"Layer group {group.name} under {label}: its score is NaN or infinite.")
    return {size: [{"score": found.get(group.name)} for group in part.groups] for size, found in scores.items()}


def _columns(score: GroupScore | None) -> dict[str, Any]:
    """The measured columns; all NULL for a group that was never called."""
    if score is None:
        return {"score": None}
    relative = _ratio(score.dy_square_sum, score.y_square_sum)
    return {
        "score": score.score,
        "output_rel_error": relative,
        "output_sqnr_db": -20 * math.log10(relative) if relative else None,
        "weight_rel_error": _ratio(score.dw_square_sum, score.w_square_sum),
        "input_amax": score.input_amax,
        "sample_scores": score.sample_scores.astype(np.float32),
    }


def _ratio(error_square: float, signal_square: float) -> float | None:
    return math.sqrt(error_square / signal_square) if signal_square else None
