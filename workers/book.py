"""What one task has in the store and still lacks: its parts, its rows, its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sweep.records import SCORES_SCHEMA
from sweep.store import Store
from workers.data import SIZES, Plan
from workers.scoring import Job, NotFinite
from workers.task import GroupSpec, Progress, Task

Measured = Mapping[str, Sequence[Mapping[str, Any]]] | NotFinite  # columns of each group of a part, by size


@dataclass(frozen=True, slots=True)
class Part:
    """Layer groups whose rows go into one file: a decoder layer, or a top-level block."""

    name: str
    groups: tuple[GroupSpec, ...]


class Book:
    """The accounts of one task; parts are written from several threads, one part of one task in each."""

    def __init__(self, task: Task, plan: Plan, parts: Sequence[Part], store: Store) -> None:
        """Look up what the store has.

        Args:
            task: with the cells that are wanted.
            plan: of its data set.
            parts: all of them, in the model's order.
            store: where parts and cells go.
        """
        self.task = task
        self.failure: str | None = None
        self._plan, self._parts, self._store = plan, parts, store
        self._n_predictions = {size: plan.n_predictions(size) for size in task.cells}
        self._tables: dict[str, dict[str, pa.Table | None]] = {}  # by size and part; None: on disk since an earlier run
        for size, cell in task.cells.items():
            there = store.finished_parts(cell)
            self._tables[size] = {part.name: None for part in parts if part.name in there}

    @property
    def n_segments(self) -> int:
        """Leading segments of the plan that the task needs."""
        return max(self._plan.segments_of(size) for size in self.task.cells)

    def lacks(self, part: Part) -> bool:
        """Whether a part is to be scored."""
        return self.failure is None and any(part.name not in done for done in self._tables.values())

    def job(self, part: Part) -> Job:
        """What the engine must do for a part: the sizes that lack it."""
        task = self.task
        return Job(
            name=task.label,
            weight=task.weight_attributes,
            inputs=task.input_attributes,
            calibrates_inputs=task.calibrates_inputs,
            sizes={size: self._plan.segments_of(size) for size, done in self._tables.items() if part.name not in done},
        )

    def progress(self) -> Progress:
        """Layer groups done, over all cells."""
        done = sum(len(part.groups) for tables in self._tables.values() for part in self._parts if part.name in tables)
        return Progress(task_id=self.task.task_id, done=done, total=self.task.n_steps, failure=self.failure)

    def write(self, part: Part, measured: Measured) -> None:
        """Put a part's rows into the store, or note why the task ends here."""
        if self.failure is not None:
            return
        if isinstance(measured, NotFinite):
            self.failure = str(measured)
            return
        for size, columns in measured.items():
            rows = [self._row(group, size, found) for group, found in zip(part.groups, columns, strict=True)]
            table = pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)
            self._store.write_part(self.task.cells[size], part.name, table)
            self._tables[size][part.name] = table

    def complete(self) -> None:
        """Turn the parts of each cell into its scores."""
        if self.failure is None:
            for size, tables in self._tables.items():
                self._store.complete(self.task.cells[size], {part.name: tables[part.name] for part in self._parts})

    def _row(self, group: GroupSpec, size: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        n_predictions, score = self._n_predictions[size], columns["score"]
        return {
            "cell_id": self.task.cells[size],
            "group": group.name,
            "modules": list(group.modules),
            "layer_index": group.layer_index,
            "sensitivity": None if score is None else score / n_predictions,
            "predicted_kl": None if score is None else score / (n_predictions if self.task.method == "kl_div" else 2 * n_predictions),
            "n_predictions": n_predictions,
            "n_samples": SIZES[size],
            "weight_elements": group.weight_elements,
            "effective_bits": self.task.effective_bits,
            **columns,
        }
