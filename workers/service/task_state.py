"""The state of one task on a worker: parts that are in the store, parts still to be scored, and a failure."""

from collections.abc import Mapping, Sequence

from sweep.core.batches import Plan
from sweep.core.groups import Part
from sweep.core.sizes import n_samples_of
from sweep.store.store import Store
from workers.scoring.gradient import Job
from workers.task import Progress, Task


class TaskState:
    """The parts of one task that are assigned, finished and missing, and why the task has failed."""

    def __init__(self, task: Task, plan: Plan, parts: Sequence[Part], store: Store) -> None:
        """Look up what the store has.

        Args:
            task: with the cells to be completed.
            plan: of its data set.
            parts: all parts of the model, in its order.
            store: of parts and cells.
        """
        self.task = task
        self.failure: str | None = None
        self._plan, self._store = plan, store
        names = {part.name for part in parts}
        # By size. A cell may be finished already: the worker that completed it may have died before it reported so.
        self.done: Mapping[str, set[str]] = {
            size: set(names) if store.is_finished(cell) else set() for size, cell in task.cells.items()
        }
        self._there = {size: done or names & store.part_names(task.cells[size]) for size, done in self.done.items()}
        self._taken: list[Part] = []
        self._n_found = 0

    @property
    def n_segments(self) -> int:
        """Leading segments of the plan that the task needs."""
        return max(self._plan.segments_of(size) for size in self.task.samples)

    def lacks(self, part: Part) -> bool:
        """Whether a cell has no file of a part yet, which this worker or another will write; the file is not read."""
        return any(part.name not in names for names in self._there.values())

    def take(self, part: Part) -> None:
        """Add a part to those assigned to this worker; it is done for the cells that hold it undamaged."""
        self._taken.append(part)
        for size, cell in self.task.cells.items():
            if part.name in self.done[size] or (
                part.name in self._there[size] and self._store.has_part(cell, part.name)
            ):
                self.done[size].add(part.name)
                self._n_found += len(part.groups)

    def wants(self, part: Part) -> bool:
        """Whether an assigned part is still to be scored."""
        return self.failure is None and any(part.name not in done for done in self.done.values())

    def job(self, part: Part) -> Job:
        """The engine's job for a part: the task's recipe in the sizes that lack the part."""
        task = self.task
        return Job(
            name=task.label,
            format=task.format,
            sizes={size: n_samples_of(size) for size, done in self.done.items() if part.name not in done},
            calibration=None if task.calibration is None else n_samples_of(task.calibration),
        )

    def progress(self) -> Progress:
        """Layer groups done of the assigned parts, over all cells."""
        done = sum(len(part.groups) for names in self.done.values() for part in self._taken if part.name in names)
        return Progress(task_id=self.task.task_id, done=done, found=self._n_found, failure=self.failure)
