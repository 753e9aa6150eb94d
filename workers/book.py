"""What one task has in the store and still lacks: its parts, and why it ends before its time."""

from collections.abc import Mapping, Sequence

from sweep.store import Store
from workers.data import Plan
from workers.scoring import Job
from workers.task import Part, Progress, Task


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
        self._plan, self._parts = plan, parts
        names = {part.name for part in parts}
        self.done: Mapping[str, set[str]] = {  # parts that need no scoring, by size; a worker may have died between a cell's end and ours
            size: set(names) if store.is_finished(cell) else names & store.finished_parts(cell) for size, cell in task.cells.items()
        }

    @property
    def n_segments(self) -> int:
        """Leading segments of the plan that the task needs."""
        return max(self._plan.segments_of(size) for size in self.task.cells)

    def lacks(self, part: Part) -> bool:
        """Whether a part is to be scored."""
        return self.failure is None and any(part.name not in done for done in self.done.values())

    def job(self, part: Part) -> Job:
        """What the engine must do for a part: the sizes that lack it."""
        task = self.task
        return Job(
            name=task.label,
            weight=task.weight_attributes,
            inputs=task.input_attributes,
            calibrates_inputs=task.calibrates_inputs,
            sizes={size: self._plan.segments_of(size) for size, done in self.done.items() if part.name not in done},
        )

    def progress(self) -> Progress:
        """Layer groups done, over all cells."""
        done = sum(len(part.groups) for names in self.done.values() for part in self._parts if part.name in names)
        return Progress(task_id=self.task.task_id, done=done, total=self.task.n_steps, failure=self.failure)
