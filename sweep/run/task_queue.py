"""The queue of tasks: workers are assigned tasks to score together, and take their decoder layers one by one.

The queue lives in the driver. A Ray actor in its place would be killed with the workers when a node runs out of memory.
"""

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Final

from sweep.core.machine import Hardware
from workers.task import Task, part_names

_PARTS_EACH: Final = 4  # parts a worker: where there are fewer, recipes are split as well
_SPLIT: Final = 4  # batches that the tasks of a dead worker are split into, to find the one that kills workers
_MAX_DEATHS: Final = 3  # a task under which, alone, so many workers died is the cause


@dataclass(frozen=True, slots=True)
class Assignment:
    """Tasks that a worker scores together; it takes their parts from the queue as it comes to them."""

    number: int
    worker: str
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Why an assignment came back unfinished: its worker has died, or cannot load the model."""

    reason: str
    is_unfit: bool = False  # another worker may load the model
    is_blameless: bool = False  # the machine was short of memory, whatever was being scored


@dataclass(slots=True, eq=False)
class _Batch:
    """Tasks that a worker scores together, and the parts that nobody has taken yet."""

    tasks: dict[str, Task]
    parts: list[str]
    deaths: int = 0  # of workers that had it, if it is one task alone
    n_assigned: int = 0  # assignments that are not finished

    @property
    def first(self) -> Task:
        return next(iter(self.tasks.values()))


@dataclass(slots=True)
class _Unfinished:
    """The batch of an assignment that is not finished, and the parts that its worker has taken."""

    batch: _Batch
    taken: list[str] = field(default_factory=list[str])


class TaskQueue:
    """Assigns tasks to workers, and remembers how each task ended. Every method may be called from any thread.

    Tasks that share a capture are assigned together, to several workers if need be: each takes a decoder layer at a
    time and scores it for all recipes. Errors of the weights and of the inputs that the recipes share there are
    computed once, however many workers there are, and no worker waits longer than a layer at the end. Where GPUs are
    unlike, a worker is assigned what its own can score.
    """

    def __init__(self, n_workers: int, tasks: Iterable[Task], windowed: frozenset[str] = frozenset()) -> None:
        """Start with every task waiting.

        Args:
            n_workers: expected number of workers, by which recipes are split.
            tasks: in the order in which they are wanted.
            windowed: ids of plans whose capture is made anew for every assignment.
        """
        self._windowed = windowed
        tasks = list(tasks)
        self._rank = {task.task_id: index for index, task in enumerate(tasks)}
        self._batches = _batches(tasks, n_workers)  # with parts to take, or assigned
        self._unfinished: dict[int, _Unfinished] = {}
        self._numbers = count()
        self._ended: dict[str, str | None] = {}  # task id -> why it failed, None if it is done
        self._workers: set[str] = set()
        self._unfit: dict[str, dict[str, str]] = {}  # model revision -> why it does not load, by worker
        self._hardware: dict[str, Hardware] = {}  # of each worker, as far as it is known
        self.broken: str | None = None  # why the queue was stopped, if it was
        self._changed = threading.Condition()

    def add_worker(self, worker: str) -> None:
        """Register a worker that may ask for assignments; adding it again changes nothing."""
        with self._changed:
            self._workers.add(worker)

    def place(self, worker: str, hardware: Hardware) -> None:
        """A worker has started on a machine, or again on another one; it is assigned what its GPUs can score."""
        with self._changed:
            self._hardware[worker] = hardware
            self._drop_impossible()
            self._changed.notify_all()

    def remove_worker(self, worker: str) -> None:
        """Unregister a worker that will not ask any more."""
        with self._changed:
            self._workers.discard(worker)
            self._drop_impossible()
            self._changed.notify_all()

    @property
    def n_busy(self) -> int:
        """Workers that have an assignment."""
        return len(self._unfinished)

    @property
    def is_over(self) -> bool:
        """Whether no task is left to score."""
        return not self._batches

    def failures(self) -> dict[str, str]:
        """Why tasks failed, by task id."""
        with self._changed:
            return {task_id: reason for task_id, reason in self._ended.items() if reason is not None}

    def has_ended(self, task_id: str) -> bool:
        """Whether a task has its scores, or has failed."""
        return task_id in self._ended

    def stop(self, reason: str) -> None:
        """End the queue for a reason that is no task's own; the caller reports it instead of the tasks' failures."""
        self.broken = reason
        self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """Fail every task that is not done, with this reason."""
        with self._changed:
            for batch in self._batches:
                self._ended |= dict.fromkeys(batch.tasks, reason)
            self._batches.clear()
            self._changed.notify_all()

    def assign(self, worker: str, holds: str | None) -> Assignment | None:
        """Wait for tasks that a worker can score, and assign them.

        Args:
            worker: its name; it has been added.
            holds: revision of the model that it has loaded.

        Returns: None: there will be nothing more.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._batches or self._possible(worker))
            waiting = self._possible(worker)
            if not waiting:
                return None
            # The fewest workers first, then the model that is loaded, then the order in which tasks are wanted.
            batch = min(
                waiting, key=lambda batch: (batch.n_assigned, batch.first.model.revision != holds, self._rank_of(batch))
            )
            if beyond := [task for task in batch.tasks.values() if self._refusal(worker, task) is not None]:
                self._split_off(batch, beyond)  # for other workers
            first = min(batch.tasks.values(), key=lambda task: self._rank[task.task_id])
            if (
                not self._unfinished
                and not self._ended
                and len(batch.tasks) > 1
                and first.plan_id not in self._windowed
            ):
                batch = self._split_off(batch, [first])  # a result to look at while the others are scored
            batch.n_assigned += 1
            number = next(self._numbers)
            self._unfinished[number] = _Unfinished(batch)
            return Assignment(number, worker, (first, *(task for task in batch.tasks.values() if task is not first)))

    def take(self, number: int) -> tuple[str, ...]:
        """Names of the parts that the worker of an assignment should score next; none: it is done."""
        with self._changed:
            unfinished = self._unfinished[number]
            parts = unfinished.batch.parts
            n = len(parts) if unfinished.batch.first.engine == "modelopt" else 1  # which scores a model as a whole
            taken = tuple(parts[:n])
            del parts[:n]
            unfinished.taken += taken
            return taken

    def finish(self, assignment: Assignment, ended: Mapping[str, str | None], loss: Loss | None = None) -> None:
        """Take back an assignment whose worker is done with it, or lost.

        Args:
            assignment: the one that the worker had.
            ended: by id of each task that the worker has finished: why it failed, None if all parts taken are done.
            loss: why the worker has not finished the others: they wait again, with fewer tasks at a time, or for
                workers that can load the model.
        """
        revision = assignment.tasks[0].model.revision
        with self._changed:
            unfinished = self._unfinished.pop(assignment.number)
            batch = unfinished.batch
            batch.n_assigned -= 1
            for task_id, failure in ended.items():
                if failure is not None:
                    self._ended.setdefault(task_id, failure)
            left = {task.task_id: task for task in assignment.tasks if task.task_id not in ended}
            if left and loss is not None and loss.is_unfit:
                batch.tasks |= left  # some may have been split off meanwhile, without the parts that it had taken
                batch.parts[:] = [name for name in part_names(batch.first) if name in {*unfinished.taken, *batch.parts}]
                self._unfit.setdefault(revision, {})[assignment.worker] = loss.reason
                self._drop_impossible()
            elif left and loss is not None:
                self._again(batch, left, unfinished.taken, loss)
            self._forget_ended()
            busy = {task_id for each in self._batches for task_id in each.tasks}
            self._ended |= {
                task.task_id: self._ended.get(task.task_id) for task in assignment.tasks if task.task_id not in busy
            }
            self._changed.notify_all()

    def _forget_ended(self) -> None:
        """Drop tasks that have ended, and batches with nothing left."""
        for batch in self._batches:
            batch.tasks = {task_id: task for task_id, task in batch.tasks.items() if task_id not in self._ended}
        self._batches = [batch for batch in self._batches if batch.tasks and (batch.parts or batch.n_assigned)]

    def _rank_of(self, batch: _Batch) -> int:
        return min(self._rank[task_id] for task_id in batch.tasks)

    def _possible(self, worker: str) -> list[_Batch]:
        """Batches with parts to take, of which the worker can score some tasks."""
        return [batch for batch in self._batches if batch.parts and self._can_score_some(worker, batch)]

    def _can_score_some(self, worker: str, batch: _Batch) -> bool:
        return any(self._refusal(worker, task) is None for task in batch.tasks.values())

    def _refusal(self, worker: str, task: Task) -> str | None:
        """Why a worker cannot score a task: its model, or what it needs; None: it can, as far as is known."""
        if (unfit := self._unfit.get(task.model.revision, {}).get(worker)) is not None:
            return unfit
        hardware = self._hardware.get(worker)
        return None if hardware is None else hardware.refusal(task.needs)

    def _drop_impossible(self) -> None:
        """Tasks that no worker can score have failed."""
        for batch in self._batches:
            for task in batch.tasks.values():
                refusals = [self._refusal(worker, task) for worker in self._workers]
                if refusals and (why := refusals[0]) is not None and None not in refusals:
                    self._ended.setdefault(task.task_id, why)
        self._forget_ended()

    def _split_off(self, batch: _Batch, tasks: Sequence[Task]) -> _Batch:
        """Move tasks into a batch of their own."""
        apart = _Batch({task.task_id: batch.tasks.pop(task.task_id) for task in tasks}, list(batch.parts))
        self._batches.append(apart)
        return apart

    def _again(self, batch: _Batch, tasks: Mapping[str, Task], taken: Sequence[str], loss: Loss) -> None:
        """Queue the tasks of a dead worker again, a quarter of them at a time.

        Parts that no worker had taken are queued with them: they may be the cause of the next death.
        """
        names = {*taken, *batch.parts}
        parts = [name for name in part_names(batch.first) if name in names]
        batch.parts.clear()
        alone = len(batch.tasks) == 1 and not loss.is_blameless
        deaths = batch.deaths + alone
        if deaths == _MAX_DEATHS:
            self._ended |= dict.fromkeys(tasks, f"{deaths} workers died while scoring it: {loss.reason}")
            return
        size = math.ceil(len(tasks) / _SPLIT)
        ids = list(tasks)
        for start in range(0, len(ids), size):
            some = {task_id: tasks[task_id] for task_id in ids[start : start + size]}
            self._batches.append(_Batch(some, list(parts), deaths))


def _batches(tasks: Iterable[Task], n_workers: int) -> list[_Batch]:
    """Tasks that share a capture; in slices, if their parts alone are too few to keep all workers busy to the end."""
    batches: list[_Batch] = []
    for family in _families(tasks):
        parts = part_names(family[0])
        n_slices = min(len(family), 1 if n_workers == 1 else math.ceil(_PARTS_EACH * n_workers / len(parts)))
        # Recipes with equal weight formats in one slice: they share a product.
        ordered = sorted(family, key=lambda task: task.format.weight_id)
        costs = [task.cost for task in ordered]
        places = [min(n_slices - 1, int(before / sum(costs) * n_slices)) for before in accumulate(costs, initial=0.0)]
        slices: list[dict[str, Task]] = [{} for _ in range(n_slices)]
        for task, place in zip(ordered, places, strict=False):
            slices[place][task.task_id] = task
        batches += [_Batch(some, list(parts)) for some in slices if some]
    return batches


def _families(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that share a capture; those of kl_div, which share nothing that counts, stay alone."""
    families: list[list[Task]] = []
    for task in tasks:
        family = next(
            (each for each in families if task.method != "kl_div" and task.shares_capture_with(each[0])), None
        )
        if family is None:
            families.append([task])
        else:
            family.append(task)
    return families
