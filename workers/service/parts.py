"""What one task has in the store and still lacks: its parts, and why it ends before its time."""

from collections.abc import Mapping, Sequence

from sweep.core.batches import Plan
from sweep.core.groups import Part
from sweep.store.store import Store
from workers.scoring.gradient import Job
from workers.task import Progress, Task


class Book:
    """The accounts of one task."""

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
        self._plan, self._store = plan, store
        names = {part.name for part in parts}
        # A worker may have died between a cell's end and ours.
        self.done: Mapping[str, set[str]] = {
            size: set(names) if store.is_finished(cell) else set() for size, cell in task.cells.items()
        }
        self._there = {size: done or names & store.part_names(task.cells[size]) for size, done in self.done.items()}
        self._taken: list[Part] = []
        self._n_found = 0

    @property
    def n_segments(self) -> int:
        """Leading segments of the plan that the task needs."""
        return max(self._plan.segments_of(size) for size in self.task.cells)

    def lacks(self, part: Part) -> bool:
        """Whether a cell has yet to get a part, here or elsewhere; by its name alone."""
        return any(part.name not in names for names in self._there.values())

    def take(self, part: Part) -> None:
        """A part is to be scored here, unless the store has it whole."""
        self._taken.append(part)
        for size, cell in self.task.cells.items():
            if part.name in self.done[size] or (
                part.name in self._there[size] and self._store.has_part(cell, part.name)
            ):
                self.done[size].add(part.name)
                self._n_found += len(part.groups)

    def wants(self, part: Part) -> bool:
        """Whether a part that was taken is still to be scored."""
        return self.failure is None and any(part.name not in done for done in self.done.values())

    def job(self, part: Part) -> Job:
        """What the engine must do for a part: the sizes that lack it."""
        task = self.task
        return Job(
            name=task.label,
            weight=task.weight_attributes,
            inputs=task.input_attributes,
            calibrates_inputs=task.calibrates_inputs,
            algorithm=task.algorithm,
            fused=task.fused,
            sizes={size: self._plan.segments_of(size) for size, done in self.done.items() if part.name not in done},
        )

    def progress(self) -> Progress:
        """Layer groups done of the parts that were taken, over all cells."""
        done = sum(len(part.groups) for names in self.done.values() for part in self._taken if part.name in names)
        return Progress(task_id=self.task.task_id, done=done, found=self._n_found, failure=self.failure)
