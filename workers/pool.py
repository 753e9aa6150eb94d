"""Who scores what: the pool lends free workers to trials, with recipes and the decoder layers to score them on."""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from workers.data import SIZES
from workers.task import Part, Task, parts_of

_VISIT_COST: Final = 0.3  # of a task's quantizing and summing beside one product
_FIRST_SHARE: Final = 0.8  # of a worker's even share: its first lease; the rest goes out in smaller ones, so that all end together
_LEASES_EACH: Final = 2  # that an even share of what is left is worth
_PARTS_EACH: Final = 4  # a worker: where there are fewer, recipes are split as well
_SPLIT: Final = 4  # into as many leases what a dead worker held is split, to find what kills workers
_MAX_DEATHS: Final = 3  # a task under which, alone, so many workers died is the cause


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker, and what to give it."""

    worker: str
    tasks: tuple[Task, ...]
    parts: tuple[str, ...]  # names of those to score
    plan: list[Any]  # its object reference, in a list so that Ray does not fetch it on the way


@dataclass(frozen=True, slots=True)
class Ended:
    """The task that was asked for needs no worker any more; nor do these."""

    failures: Mapping[str, str | None]  # by task id: why it has no scores, None if it has


@dataclass(slots=True)
class _Work:
    """A task, and what of it nobody has scored or been lent yet."""

    task: Task
    family: int  # equal for tasks that a worker scores together
    slice: int  # of its family
    whole: tuple[Part, ...]
    parts: tuple[Part, ...]  # of them those that wait
    lent: int = 0  # leases that are out
    together: float = math.inf  # with how many tasks it may go out at most
    deaths: int = 0  # of workers that scored it alone

    @property
    def cost(self) -> float:
        return _cost(self.task)


class Pool:
    """Lends free workers, and remembers how each task ended.

    Tasks that share a capture go out together, some decoder layers at a time: a layer is visited once, by one worker, for all recipes, since
    what they share there (the weights' errors, the inputs' errors) is a tenth of the work. A worker's first lease is a little less
    than its even share of everything; later ones are even shares of what is left, so that nobody waits long at the end.
    """

    def __init__(self, n_workers: int, tasks: Mapping[str, Task], plans: Mapping[str, list[Any]], windowed: frozenset[str] = frozenset()) -> None:
        """Start with every task waiting for workers that are yet to be admitted.

        Args:
            n_workers: number of workers to reckon with.
            tasks: by task id.
            plans: object references of the plans, each in a list so that Ray does not fetch it, by plan id.
            windowed: ids of plans whose capture is made anew for every lease.
        """
        self._plans, self._windowed, self._n_workers = plans, windowed, n_workers
        self._works = {work.task.task_id: work for work in _works(tasks.values(), n_workers)}
        self._waiting = dict.fromkeys(self._works)  # ids of those with parts that wait, in order
        self._free: dict[str, str] = {}  # worker -> revision of the model that it holds, as far as is known
        self._ended: dict[str, str | None] = {}  # task id -> why it failed, None if it is done
        self._leased = False
        self._begun: set[tuple[str, str]] = set()  # worker, plan id: has had its first lease
        self._changed = asyncio.Condition()

    async def admit(self, worker: str) -> None:
        """A worker, named, is there to be lent out."""
        async with self._changed:
            self._free[worker] = ""
            self._changed.notify_all()

    async def give_up(self, reason: str) -> None:
        """No task that waits will be scored."""
        async with self._changed:
            for task_id in list(self._waiting):
                self._end(self._works[task_id], reason)
            self._changed.notify_all()

    async def lease(self, task_id: str) -> Lease | Ended:
        """Wait for work: a free worker with tasks, this one's first; or for the task's end.

        A trial whose task has ended is given what else is left before it is let go: the next trial that wants some may be hundreds further on.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: task_id in self._ended or (self._free and self._waiting))
            if not (self._free and self._waiting):
                return Ended(dict(self._ended))
            first = self._works[task_id if task_id in self._waiting else next(iter(self._waiting))]
            revision, plan_id = first.task.model.revision, first.task.plan_id
            worker = next((name for name, model in self._free.items() if model == revision), next(iter(self._free)))
            del self._free[worker]
            works, parts = self._share(worker, first)
            self._leased = True
            for work in works:
                work.parts = work.parts[len(parts) :]
                work.lent += 1
                if not work.parts:
                    del self._waiting[work.task.task_id]
        return Lease(worker, tuple(work.task for work in works), tuple(part.name for part in parts), self._plans[plan_id])

    async def give_back(self, lease: Lease, ended: Mapping[str, str | None], death: str | None = None) -> None:
        """The worker is free again.

        Args:
            lease: what it was lent out with.
            ended: how it came to an end with its tasks, as far as it did: why they failed, None if the parts are done.
            death: what killed the worker; what has not ended waits again, with fewer tasks at a time.
        """
        async with self._changed:
            self._free[lease.worker] = "" if death else lease.tasks[0].model.revision
            for task in lease.tasks:
                work = self._works[task.task_id]
                work.lent -= 1
                if task.task_id in self._ended:
                    continue
                if task.task_id not in ended:
                    self._again(work, lease, death)
                elif (failure := ended[task.task_id]) is not None or not (work.parts or work.lent):
                    self._end(work, failure)
            self._changed.notify_all()

    async def failures(self) -> dict[str, str]:
        """Why tasks failed, by task id."""
        return {task_id: reason for task_id, reason in self._ended.items() if reason is not None}

    def _end(self, work: _Work, failure: str | None) -> None:
        self._ended[work.task.task_id] = failure
        self._waiting.pop(work.task.task_id, None)

    def _again(self, work: _Work, lease: Lease, death: str | None) -> None:
        """What a dead worker held waits again."""
        alone = len(lease.tasks) == 1
        work.together = min(work.together, math.ceil(len(lease.tasks) / _SPLIT))
        work.deaths += alone
        if work.deaths == _MAX_DEATHS:
            self._end(work, f"{work.deaths} workers died while scoring it: {death}")
            return
        left = {*lease.parts, *(part.name for part in work.parts)}
        work.parts = tuple(part for part in work.whole if part.name in left)
        self._waiting[work.task.task_id] = None

    def _share(self, worker: str, first: _Work) -> tuple[Sequence[_Work], Sequence[Part]]:
        """Tasks for a worker, and the leading ones of the parts that all of them lack."""
        task, is_windowed = first.task, first.task.plan_id in self._windowed
        family = [work for name in self._waiting if (work := self._works[name]).family == first.family]
        is_to_show = not self._leased and not is_windowed and len(family) > 1  # a result to look at while the others are scored
        if is_to_show or task.method == "kl_div" or task.engine == "modelopt":  # which share nothing that counts
            return [first], first.parts
        others = [work for work in family if work is not first and (work.slice, work.parts, work.together) == (first.slice, first.parts, first.together)]
        works = [first, *others][: int(min(first.together, len(family)))]
        is_new = (worker, task.plan_id) not in self._begun
        self._begun.add((worker, task.plan_id))
        left = sum(work.cost * _elements(work.parts) for work in family)
        if self._n_workers == 1:
            room = left
        elif is_windowed or is_new:
            whole = sum(work.cost for work in self._works.values() if work.family == first.family) * _elements(first.whole)
            room = whole / self._n_workers * (1 if is_windowed else _FIRST_SHARE)
        else:
            room = left / (self._n_workers * _LEASES_EACH)
        cost = sum(work.cost for work in works)
        costs = accumulate((cost * _elements([part]) for part in first.parts), initial=0.0)
        n = sum(before + cost * _elements([part]) / 2 <= room for part, before in zip(first.parts, costs, strict=False))
        return works, first.parts[: max(n, 1)]


def _works(tasks: Iterable[Task], n_workers: int) -> list[_Work]:
    """All work, in families that share a capture, each in slices if its parts alone are too few to keep all workers busy to the end."""
    families: list[list[Task]] = []
    for task in tasks:
        family = next((family for family in families if task.shares_capture_with(family[0])), None)
        if family is None:
            families.append([task])
        else:
            family.append(task)
    works: list[_Work] = []
    for index, family in enumerate(families):
        parts = parts_of(family[0].groups)
        n_slices = 1 if n_workers == 1 else math.ceil(_PARTS_EACH * n_workers / len(parts))
        # Recipes with equal weights in one slice: they share a product.
        ordered = sorted(family, key=lambda task: repr(task.weight_attributes))
        total = sum(map(_cost, ordered))
        slices = [min(n_slices - 1, int(before / total * n_slices)) for before in accumulate(map(_cost, ordered), initial=0.0)]
        slice_of = {task.task_id: place for task, place in zip(ordered, slices, strict=False)}
        works += [_Work(task, index, slice_of[task.task_id], parts, parts) for task in family]
    return works


def _cost(task: Task) -> float:
    """About a task's time on a part beside others, in products of all rows of the largest size."""
    sizes = [SIZES[size] / max(SIZES.values()) for size in task.cells]
    products = 0.0 if task.input_attributes is None else sum(sizes) if task.calibrates_inputs else max(sizes)
    return _VISIT_COST + products


def _elements(parts: Iterable[Part]) -> int:
    return sum(group.weight_elements for part in parts for group in part.groups)
