"""What one task has in the store and still lacks: its parts, and why it ends before its time."""

from collections.abc import Collection, Mapping, Sequence

from sweep.store import Store
from workers.data import Plan
from workers.scoring import Job
from workers.task import Part, Progress, Task


class Book:
    """The accounts of one task."""

    def __init__(self, task: Task, plan: Plan, parts: Sequence[Part], share: Collection[str], store: Store) -> None:
        """Look up what the store has.

        Args:
            task: with the cells that are wanted.
            plan: of its data set.
            parts: all of them, in the model's order.
            share: names of those that are to be scored.
            store: where parts and cells go.
        """
        self.task = task
        self.failure: str | None = None
        self._plan, self._share = plan, [part for part in parts if part.name in share]
        names = {part.name for part in parts}
        self.done: Mapping[str, set[str]] = {  # parts that need no scoring, by size; a worker may have died between a cell's end and ours
            size: set(names) if store.is_finished(cell) else names & store.finished_parts(cell) for size, cell in task.cells.items()
        }

    @property
    def n_segments(self) -> int:
        """Leading segments of the plan that the task needs."""
        return max(self._plan.segments_of(size) for size in self.task.cells)

    def lacks(self, part: Part) -> bool:
        """Whether a cell has yet to get a part, here or elsewhere."""
        return self.failure is None and any(part.name not in done for done in self.done.values())

    def wants(self, part: Part) -> bool:
        """Whether a part is to be scored here."""
        return part in self._share and self.lacks(part)

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
        """Layer groups done of the share, over all cells."""
        done = sum(len(part.groups) for names in self.done.values() for part in self._share if part.name in names)
        total = sum(len(part.groups) for part in self._share) * len(self.done)
        return Progress(task_id=self.task.task_id, share=self._share[0].name, done=done, total=total, failure=self.failure)
