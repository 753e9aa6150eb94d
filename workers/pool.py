"""Who scores what: the pool lends free workers to trials, with recipes to score together, and hands out the decoder layers one by one."""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Any, Final

from sweep.machine import Hardware
from workers.task import Task, part_names

POOL: Final = "sweep-pool"  # the actor's name

_PARTS_EACH: Final = 4  # a worker: where there are fewer, recipes are split as well
_SPLIT: Final = 4  # into as many what killed a worker is split, to find what kills workers
_MAX_DEATHS: Final = 3  # a task under which, alone, so many workers died is the cause
_REST_SECONDS: Final = 1.0  # of a worker after its second death; each further one doubles it
_MAX_REST_SECONDS: Final = 60.0


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
    are, and nobody waits longer than a layer at the end. Where GPUs are unlike, a worker is given what its own can
    score.
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
        self._free: dict[str, str] = {}  # worker -> revision of the model that it holds, as far as is known
        self._ended: dict[str, str | None] = {}  # task id -> why it failed, None if it is done
        self._workers: set[str] = set()  # all that were admitted
        self._hardware: dict[str, Hardware] = {}  # by worker, as far as they have told
        self._deaths: dict[str, int] = {}  # by worker
        self._unfit: dict[str, dict[str, str]] = {}  # model revision -> why it does not load, by worker
        self._broken: str | None = None
        self._resting: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    async def placed(self, worker: str, hardware: Hardware) -> None:
        """Where a worker has started, before it is admitted; or started again."""
        self._hardware[worker] = hardware

    async def admit(self, worker: str) -> None:
        """A worker, named, is there to be lent out: at once, or later and later if it goes on dying."""
        async with self._changed:
            self._workers.add(worker)
        if (seconds := rest_seconds(self._deaths.get(worker, 0))) == 0:
            await self._set_free(worker)
            return

        async def rest() -> None:
            await asyncio.sleep(seconds)
            await self._set_free(worker)

        resting = asyncio.get_running_loop().create_task(rest())
        self._resting.add(resting)
        resting.add_done_callback(self._resting.discard)

    async def lost(self) -> list[str]:
        """Workers that died since this was last asked; each is lent out again once it is admitted again."""
        lost, self._lost = self._lost, []
        return lost

    async def forget(self, worker: str) -> None:
        """A worker will not come back."""
        async with self._changed:
            self._workers.discard(worker)
            for revision in self._unfit:
                self._check_loadable(revision)
            self._changed.notify_all()

    async def settle(self) -> None:
        """No worker is about to come: what none that is there can score has failed."""
        async with self._changed:
            for task in [task for batch in self._batches for task in batch.tasks.values()]:
                refusals = [why for worker in self._workers if (why := self._refusal(worker, task)) is not None]
                if refusals and len(refusals) == len(self._workers):
                    self._ended.setdefault(task.task_id, refusals[0])
            self._changed.notify_all()

    async def figures(self) -> dict[str, int]:
        """Workers that are `idle` and `busy`, and `deaths` of workers that had something to do."""
        return {"idle": len(self._free), "busy": len(self._loans), "deaths": sum(self._deaths.values())}

    async def stop(self, reason: str) -> None:
        """Nothing more can be done, for a reason that is no task's own; what is left has not failed."""
        self._broken = reason
        await self.give_up(reason)

    async def broken(self) -> str | None:
        """Why the pool was stopped, if it was."""
        return self._broken

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
            await self._changed.wait_for(lambda: task_id in self._ended or self._possible())
            waiting = self._possible()
            if not waiting:
                return Ended(dict(self._ended))
            # A batch that nobody is at, and the trial's own, if it can be; else help with another.
            batch = min(waiting, key=lambda batch: (batch.n_out, task_id not in batch.tasks))
            fit = self._fit(batch)
            worker = next((name for name in fit if self._free[name] == batch.first.model.revision), fit[0])
            if beyond := [task for task in batch.tasks.values() if self._refusal(worker, task) is not None]:
                self._split_off(batch, beyond)  # for the others
            first = batch.tasks.get(task_id, batch.first)
            if not self._loans and not self._ended and len(batch.tasks) > 1 and first.plan_id not in self._windowed:
                batch = self._split_off(batch, [first])  # a result to look at while the others are scored
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

    async def give_back(self, lease: Lease, ended: Mapping[str, str | None], death: str | None = None, unfit: str | None = None) -> None:
        """The worker is free again, or lost.

        Args:
            lease: what it was lent out with.
            ended: how it came to an end with its tasks, as far as it did: why they failed, None if what it took is done.
            death: what killed the worker; what has not ended waits again, with fewer tasks at a time.
            unfit: why the worker cannot load the model; what has not ended waits for the others, and fails if there are none.
        """
        revision = lease.tasks[0].model.revision
        async with self._changed:
            if death is None:
                self._free[lease.worker] = "" if unfit else revision
            else:  # lent out while it restarts, it would seem to die again
                self._lost.append(lease.worker)
                self._deaths[lease.worker] = self._deaths.get(lease.worker, 0) + 1
            loan = self._loans.pop(lease.number)
            batch = loan.batch
            batch.n_out -= 1
            for task_id, failure in ended.items():
                if failure is not None:
                    self._ended.setdefault(task_id, failure)
            left = {task.task_id: task for task in lease.tasks if task.task_id not in ended}
            if left and unfit:
                batch.tasks |= left  # some may have been split off meanwhile, without the parts that it had taken
                batch.parts[:] = [name for name in part_names(batch.first) if name in {*loan.taken, *batch.parts}]
                self._unfit.setdefault(revision, {})[lease.worker] = unfit
                self._check_loadable(revision)
            elif left:
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

    def _possible(self) -> list[_Batch]:
        """Batches with parts to take, for which there is a free worker."""
        return [batch for batch in self._batches if batch.parts and self._fit(batch)]

    def _fit(self, batch: _Batch) -> list[str]:
        """Free workers that can score some of a batch."""
        return [name for name in self._free if any(self._refusal(name, task) is None for task in batch.tasks.values())]

    def _refusal(self, worker: str, task: Task) -> str | None:
        """Why a worker cannot score a task, because of its model or of what it needs; None: it can."""
        if (unfit := self._unfit.get(task.model.revision, {}).get(worker)) is not None:
            return unfit
        hardware = self._hardware.get(worker)
        return None if hardware is None else hardware.refusal(task.needs)

    async def _set_free(self, worker: str) -> None:
        async with self._changed:
            self._free[worker] = ""
            self._changed.notify_all()

    def _check_loadable(self, revision: str) -> None:
        """Tasks of a model that no worker can load have failed."""
        unfit = self._unfit[revision]
        if unfit.keys() >= self._workers:
            why = next(iter(unfit.values()))
            self._ended |= {task_id: why for batch in self._batches for task_id, task in batch.tasks.items() if task.model.revision == revision}

    def _split_off(self, batch: _Batch, tasks: Sequence[Task]) -> _Batch:
        """Make some of its tasks a batch of their own."""
        apart = _Batch({task.task_id: batch.tasks.pop(task.task_id) for task in tasks}, list(batch.parts))
        self._batches.append(apart)
        return apart

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


def rest_seconds(n_deaths: int) -> float:
    """How long a worker is left alone after so many deaths: what is wrong with its machine may pass."""
    return 0.0 if n_deaths <= 1 else min(_REST_SECONDS * 2.0 ** (n_deaths - 2), _MAX_REST_SECONDS)


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
