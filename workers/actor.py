"""Ray's side of a worker, and the pool that lends workers to trials. No arithmetic and no file formats live here."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import ray

from workers.data import SIZES, Plan
from workers.task import Progress, Task

_TELL_SECONDS = 0.2  # between messages; one costs Ray about a millisecond
_VISIT_COST = 0.3  # of a task's quantizing and summing beside one product
_MAX_DEATHS = 3  # a task under which so many workers died is the cause


class Worker:
    """A named actor that holds one loaded model and scores the tasks that it is lent out for."""

    def __init__(self, store_uri: str, device: str, memory_gb: float | None, n_workers: int) -> None:
        """Import the heavy libraries and prepare an empty worker; see workers.scorer.Scorer."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
        from workers.scorer import Scorer

        self._scorer = Scorer(store_uri, device, memory_gb=memory_gb, n_workers=n_workers)

    def load(self, task: Task) -> None:
        """Load the task's model before the first trial asks for it."""
        self._scorer.load(task.model)

    def warm_up(self, extensions: frozenset[str]) -> None:
        """Build CUDA extensions; workers of one machine wait for the one that came first."""
        from workers.quantization import build_extensions

        build_extensions(extensions)

    def info(self) -> dict[str, Any]:
        """Node, process, and what its scorer says of itself."""
        return {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), **self._scorer.info()}

    def score(self, tasks: Sequence[Task], plan: Plan) -> Iterator[list[Progress]]:
        """Stream progress, the latest of each task, a few times a second; what it counts is in the store already."""
        latest: dict[str, Progress] = {}
        told = time.monotonic()
        try:
            for progress in self._scorer.score(tasks, plan):
                latest[progress.task_id] = progress.after(latest.get(progress.task_id))
                if time.monotonic() - told > _TELL_SECONDS:
                    yield list(latest.values())
                    latest.clear()
                    told = time.monotonic()
        except BrokenProcessPool:  # a writer was killed: this worker starts anew, and its tasks go on
            os._exit(1)
        yield list(latest.values())


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker, and the tasks to give it."""

    worker: str
    tasks: tuple[Task, ...]
    plan: list[Any]  # its object reference, in a list so that Ray does not fetch it on the way


@dataclass(frozen=True, slots=True)
class Ended:
    """The task that was asked for needs no worker any more; nor do these."""

    failures: Mapping[str, str | None]  # by task id: why it has no scores, None if it has


class Pool:
    """Lends free workers, with tasks that a worker can score together, and remembers how each task ended.

    Tasks that share a capture go out in bundles, so that a layer is visited once for many recipes. A worker's first bundle is its
    even share of everything, since a second one would visit every layer again; from then on it gets its even share of what is left.
    """

    def __init__(self, n_workers: int, tasks: Mapping[str, Task], plans: Mapping[str, list[Any]], windowed: frozenset[str] = frozenset()) -> None:
        """Start with every task waiting for workers that are yet to be admitted.

        Args:
            n_workers: number of workers to reckon with.
            tasks: by task id.
            plans: object references of the plans, each in a list so that Ray does not fetch it, by plan id.
            windowed: ids of plans whose capture is made anew for every bundle.
        """
        self._plans, self._windowed, self._n_workers = plans, windowed, n_workers
        self._waiting = dict(tasks)
        self._free: dict[str, str] = {}  # worker -> revision of the model that it holds, as far as is known
        self._ended: dict[str, str | None] = {}  # task id -> why it failed, None if it is done
        self._deaths: dict[str, int] = {}
        self._leased = False
        self._lent: dict[str, Task] = {}
        self._begun: set[tuple[str, str]] = set()  # worker, plan id: has had its first bundle
        self._changed = asyncio.Condition()

    async def admit(self, worker: str) -> None:
        """A worker, named, is there to be lent out."""
        async with self._changed:
            self._free[worker] = ""
            self._changed.notify_all()

    async def give_up(self, reason: str) -> None:
        """No task that waits will be scored."""
        async with self._changed:
            self._ended |= dict.fromkeys(self._waiting, reason)
            self._waiting.clear()
            self._changed.notify_all()

    async def lease(self, task_id: str) -> Lease | Ended:
        """Wait for work: a free worker with tasks, this one's first; or for the task's end.

        A trial whose task has ended is given what else is left before it is let go: the next trial that wants some may be hundreds further on.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: task_id in self._ended or (self._free and self._waiting))
            if not (self._free and self._waiting):
                return Ended(dict(self._ended))
            first = self._waiting.get(task_id) or next(iter(self._waiting.values()))
            worker = next((name for name, model in self._free.items() if model == first.model.revision), next(iter(self._free)))
            del self._free[worker]
            bundle = self._bundle(worker, first)
            self._leased = True
            for task in bundle:
                self._lent[task.task_id] = self._waiting.pop(task.task_id)
        return Lease(worker, bundle, self._plans[first.plan_id])

    async def give_back(self, lease: Lease, ended: Mapping[str, str | None], death: str | None = None) -> None:
        """The worker is free again.

        Args:
            lease: what it was lent out with.
            ended: how its tasks ended, as far as they did: why they failed, None if they are done.
            death: what killed the worker; tasks that have not ended wait again, from now on one at a time.
        """
        async with self._changed:
            self._free[lease.worker] = "" if death else lease.tasks[0].model.revision
            self._ended |= ended
            for task in lease.tasks:
                del self._lent[task.task_id]
                if task.task_id not in ended:
                    self._deaths[task.task_id] = deaths = self._deaths.get(task.task_id, 0) + 1
                    if deaths < _MAX_DEATHS:
                        self._waiting[task.task_id] = task
                    else:
                        self._ended[task.task_id] = f"{deaths} workers died while scoring it: {death}"
            self._changed.notify_all()

    async def failures(self) -> dict[str, str]:
        """Why tasks failed, by task id."""
        return {task_id: reason for task_id, reason in self._ended.items() if reason is not None}

    def _bundle(self, worker: str, first: Task) -> tuple[Task, ...]:
        """Tasks for a worker, those with equal weights beside each other: they share a product."""
        is_to_show = not self._leased and first.plan_id not in self._windowed  # a result to look at while the others are scored
        if first.task_id in self._deaths or is_to_show or first.method == "kl_div":  # which shares nothing that counts
            return (first,)
        others = [task for task in self._waiting.values() if task is not first and task.shares_capture_with(first) and task.task_id not in self._deaths]
        others.sort(key=lambda task: (task.weight_attributes != first.weight_attributes, repr(task.weight_attributes)))
        beside = [task for task in self._lent.values() if task.shares_capture_with(first)]
        is_new = (worker, first.plan_id) not in self._begun
        self._begun.add((worker, first.plan_id))
        room = sum(_cost(task) for task in (first, *others, *(beside if is_new else ()))) / self._n_workers
        costs = accumulate(map(_cost, others), initial=_cost(first))
        return (first, *(task for task, before in zip(others, costs, strict=False) if before + _cost(task) / 2 <= room))


def _cost(task: Task) -> float:
    """About a task's time in a bundle, in products of all rows of the largest size."""
    sizes = [SIZES[size] / max(SIZES.values()) for size in task.cells]
    products = 0.0 if task.input_attributes is None else sum(sizes) if task.calibrates_inputs else max(sizes)
    return _VISIT_COST + products
