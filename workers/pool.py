"""Who scores what: the pool lends free workers to trials, with recipes to score together, and hands out the decoder layers one by one."""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, Final

from workers.task import Task, part_names

POOL: Final = "sweep-pool"  # the actor's name

_PARTS_EACH: Final = 4  # a worker: where there are fewer, recipes are split as well
_SPLIT: Final = 4  # into as many what killed a worker is split, to find what kills workers
_MAX_DEATHS: Final = 3  # a task under which, alone, so many workers died is the cause


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker, and the tasks to give it; it takes their parts from the pool as it comes to them."""

    number: int
    worker: str
    tasks: tuple[Task, ...]
    plan: list[Any]  # its object reference, in a list so that Ray does not fetch it on the way


@dataclass(frozen=True, slots=True)
class Ended:
    """The task that was asked for needs no worker any more; nor do these."""

    failures: Mapping[str, str | None]  # by task id: why it has no scores, None if it has


@dataclass(slots=True, eq=False)
class _Batch:
    """Tasks that a worker scores together, and the parts that nobody has taken yet."""

    tasks: dict[str, Task]
    parts: list[str]
    deaths: int = 0  # of workers that had it, if it is one task alone
    n_out: int = 0  # leases

    @property
    def first(self) -> Task:
        return next(iter(self.tasks.values()))


@dataclass(slots=True)
class _Loan:
    batch: _Batch
    taken: list[str] = field(default_factory=list[str])


class Pool:
    """Lends free workers, and remembers how each task ended.

    Tasks that share a capture go out together, and several workers may be at them: each takes a decoder layer at a time and scores it for
    all recipes. What these have in common there (errors of the weights, errors of the inputs) is computed once, however many workers there
    are, and nobody waits longer than a layer at the end.
    """

    def __init__(self, n_workers: int, tasks: Mapping[str, Task], plans: Mapping[str, list[Any]], windowed: frozenset[str] = frozenset()) -> None:
        """Start with every task waiting for workers that are yet to be admitted.

        Args:
            n_workers: number of workers to reckon with.
            tasks: by task id.
            plans: object references of the plans, each in a list so that Ray does not fetch it, by plan id.
            windowed: ids of plans whose capture is made anew for every lease.
        """
        self._plans, self._windowed = plans, windowed
        self._batches = _batches(tasks.values(), n_workers)  # that are not over
        self._loans: dict[int, _Loan] = {}
        self._numbers = count()
        self._lost: list[str] = []  # workers that died and have not been called back
        self._deaths = 0
        self._free: dict[str, str] = {}  # worker -> revision of the model that it holds, as far as is known
        self._ended: dict[str, str | None] = {}  # task id -> why it failed, None if it is done
        self._changed = asyncio.Condition()

    async def admit(self, worker: str) -> None:
        """A worker, named, is there to be lent out."""
        async with self._changed:
            self._free[worker] = ""
            self._changed.notify_all()

    async def lost(self) -> list[str]:
        """Workers that died since this was last asked; each is lent out again once it is admitted again."""
        lost, self._lost = self._lost, []
        return lost

    async def figures(self) -> dict[str, int]:
        """Workers that are `idle` and `busy`, and `deaths` of workers that had something to do."""
        return {"idle": len(self._free), "busy": len(self._loans), "deaths": self._deaths}

    async def give_up(self, reason: str) -> None:
        """No task that waits will be scored."""
        async with self._changed:
            for batch in self._batches:
                self._ended |= dict.fromkeys(batch.tasks, reason)
            self._batches.clear()
            self._changed.notify_all()

    async def lease(self, task_id: str) -> Lease | Ended:
        """Wait for work: a free worker with tasks, this one's first; or for the task's end.

        A trial whose task has ended is given what else is left before it is let go: the next trial that wants some may be hundreds further on.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: task_id in self._ended or (self._free and self._waiting()))
            waiting = self._waiting()
            if not (self._free and waiting):
                return Ended(dict(self._ended))
            # A batch that nobody is at, and the trial's own, if it can be; else help with another.
            batch = min(waiting, key=lambda batch: (batch.n_out, task_id not in batch.tasks))
            first = batch.tasks.get(task_id, batch.first)
            if not self._loans and not self._ended and len(batch.tasks) > 1 and first.plan_id not in self._windowed:
                batch = self._split_off(batch, first)  # a result to look at while the others are scored
            worker = next((name for name, model in self._free.items() if model == first.model.revision), next(iter(self._free)))
            del self._free[worker]
            batch.n_out += 1
            number = next(self._numbers)
            self._loans[number] = _Loan(batch)
            return Lease(number, worker, (first, *(task for task in batch.tasks.values() if task is not first)), self._plans[first.plan_id])

    async def take(self, number: int) -> tuple[str, ...]:
        """Names of the parts that the worker of a lease should score next; none: it is done."""
        loan = self._loans[number]
        parts = loan.batch.parts
        n = len(parts) if loan.batch.first.engine == "modelopt" else 1  # which scores a model as a whole
        taken = tuple(parts[:n])
        del parts[:n]
        loan.taken += taken
        return taken

    async def give_back(self, lease: Lease, ended: Mapping[str, str | None], death: str | None = None) -> None:
        """The worker is free again, or lost.

        Args:
            lease: what it was lent out with.
            ended: how it came to an end with its tasks, as far as it did: why they failed, None if what it took is done.
            death: what killed the worker; what has not ended waits again, with fewer tasks at a time.
        """
        async with self._changed:
            if death is None:
                self._free[lease.worker] = lease.tasks[0].model.revision
            else:  # lent out while it restarts, it would seem to die again
                self._lost.append(lease.worker)
                self._deaths += 1
            loan = self._loans.pop(lease.number)
            batch = loan.batch
            batch.n_out -= 1
            for task_id, failure in ended.items():
                if failure is not None:
                    self._ended.setdefault(task_id, failure)
            left = {task.task_id: task for task in lease.tasks if task.task_id not in ended}
            if left:
                self._again(batch, left, loan.taken, f"{death}")
            for each in self._batches:
                each.tasks = {task_id: task for task_id, task in each.tasks.items() if task_id not in self._ended}
            self._batches = [each for each in self._batches if each.tasks and (each.parts or each.n_out)]
            busy = {task_id for each in self._batches for task_id in each.tasks}
            for task in lease.tasks:
                if task.task_id not in busy:
                    self._ended.setdefault(task.task_id, None)
            self._changed.notify_all()

    async def failures(self) -> dict[str, str]:
        """Why tasks failed, by task id."""
        return {task_id: reason for task_id, reason in self._ended.items() if reason is not None}

    def _waiting(self) -> list[_Batch]:
        return [batch for batch in self._batches if batch.parts]

    def _split_off(self, batch: _Batch, task: Task) -> _Batch:
        """Make a task a batch of its own."""
        del batch.tasks[task.task_id]
        alone = _Batch({task.task_id: task}, list(batch.parts))
        self._batches.append(alone)
        return alone

    def _again(self, batch: _Batch, tasks: Mapping[str, Task], taken: Sequence[str], death: str) -> None:
        """What a dead worker had waits again, a quarter of the tasks at a time; so does what nobody had taken, since one of them may be what kills."""
        names = {*taken, *batch.parts}
        parts = [name for name in part_names(batch.first) if name in names]
        batch.parts.clear()
        alone = len(batch.tasks) == 1
        deaths = batch.deaths + alone
        if deaths == _MAX_DEATHS:
            self._ended |= dict.fromkeys(tasks, f"{deaths} workers died while scoring it: {death}")
            return
        size = math.ceil(len(tasks) / _SPLIT)
        ids = list(tasks)
        again = [{task_id: tasks[task_id] for task_id in ids[start : start + size]} for start in range(0, len(ids), size)]
        self._batches += [_Batch(some, list(parts), deaths) for some in again]


def _batches(tasks: Iterable[Task], n_workers: int) -> list[_Batch]:
    """Tasks that share a capture; in slices, if their parts alone are too few to keep all workers busy to the end."""
    families: list[list[Task]] = []
    for task in tasks:
        # Those that share nothing that counts stay alone.
        family = next((family for family in families if task.method != "kl_div" and task.shares_capture_with(family[0])), None)
        if family is None:
            families.append([task])
        else:
            family.append(task)
    batches: list[_Batch] = []
    for family in families:
        parts = part_names(family[0])
        n_slices = min(len(family), 1 if n_workers == 1 else math.ceil(_PARTS_EACH * n_workers / len(parts)))
        # Recipes with equal weights in one slice: they share a product.
        ordered = sorted(family, key=lambda task: repr(task.weight_attributes))
        costs = [task.cost for task in ordered]
        places = [min(n_slices - 1, int(before / sum(costs) * n_slices)) for before in accumulate(costs, initial=0.0)]
        slices: list[dict[str, Task]] = [{} for _ in range(n_slices)]
        for task, place in zip(ordered, places, strict=False):
            slices[place][task.task_id] = task
        batches += [_Batch(some, list(parts)) for some in slices if some]
    return batches
