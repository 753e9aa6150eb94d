"""The pool of a run's workers, with one thread of the driver for each.

A worker is started, assigned tasks until there are none, started again when it dies, and stopped.
"""

import functools
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self

from sweep.run import cluster  # before ray: sets what Ray reads from the environment

# isort: split
import ray
from ray.actor import ActorClass
from ray.exceptions import ActorAlreadyExistsError, OutOfMemoryError, RayError, RayTaskError

from sweep.core.batches import Plan
from sweep.core.errors import MemoryShort, StoreFailed, SweepError, Unfit, WorkerLost
from sweep.core.machine import Hardware, Workers
from sweep.run.task_queue import Assignment, Loss, TaskQueue
from workers.service.actor import Worker
from workers.service.clock import WorkerInfo
from workers.task import Progress, Task

_LOOK_SECONDS: Final = 1.0  # between looks at whether nodes have joined, or the pool is being stopped
_REST_SECONDS: Final = 1.0  # until a worker is started again after its second death; each further one doubles it
_MAX_REST_SECONDS: Final = 60.0
_MAX_RESTARTS: Final = 20  # of a worker, over a whole sweep
# Kills in a row for lack of memory, with nothing scored between them, until a worker is not started again.
_MAX_SHORTAGES: Final = 3
_NAME_SECONDS: Final = 0.2  # between attempts to take a dead worker's name
_INFO_SECONDS: Final = 10.0  # until a worker that does not answer is left out of the record
_STOP_SECONDS: Final = 5.0  # until a thread whose worker has been stopped is left behind
_SHORTAGE: Final = re.compile(r"was (\S+) used / (\S+) limit.*?threshold of \S+ \(([\d.]+)%", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Arguments that every worker of a run is started with."""

    store_uri: str
    memory_gb: float | None  # that each may use, 1e9 bytes; None: see workers.service.scorer.Scorer
    first: Task  # whose model is loaded before there is an assignment
    mark: str | None  # see workers.service.actor.Worker.load
    extensions: frozenset[str]  # ModelOpt's CUDA extensions to build first


class PoolEvents(Protocol):
    """Callbacks of a pool, from its threads, one at a time."""

    def ready(self) -> None:
        """The first worker holds the first task's model."""
        ...

    def warn(self, text: str) -> None:
        """A warning for people."""
        ...

    def progress(self, progress: Progress) -> None:
        """Rows of a task have reached the store."""
        ...


class _WorkerDied(Exception):
    """A worker's process has died, or cannot be used any more; another one may be started in its place."""

    def __init__(self, reason: str, *, short_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.short_of_memory = short_of_memory


@dataclass(slots=True)
class _Member:
    """State of one worker."""

    name: str
    actor: Any = None  # handle of its workers.service.actor.Worker
    holds: str | None = None  # revision of the model that it has loaded
    is_ready: bool = False
    n_deaths: int = 0
    n_halvings: int = 0  # of its memory for captures, after it was killed for lack of memory
    n_shortages: int = 0  # such kills since it last scored something


class WorkerPool:
    """Workers that score the tasks of a queue, until it is over or none of them is left."""

    def __init__(
        self,
        workers: Workers,
        spec: WorkerSpec,
        queue: TaskQueue,
        plan_refs: "Mapping[str, ray.ObjectRef[Plan]]",
        events: PoolEvents,
    ) -> None:
        """Create an empty pool; entering it starts the workers.

        Args:
            workers: their number, device and nodes.
            spec: arguments that they are started with.
            queue: tasks that they score.
            plan_refs: object references of the plans, by plan id.
            events: callbacks.
        """
        self._workers, self._spec, self._queue, self._plan_refs, self._events = workers, spec, queue, plan_refs, events
        remote = ray.remote(concurrency_groups={"parts": 1})  # pyright: ignore[reportCallIssue] -- annotations lack it
        self._class: ActorClass[Worker] = remote(Worker)
        self._members: list[_Member] = []
        self._threads: list[threading.Thread] = []
        self._events_lock = threading.Lock()
        self._stopped = threading.Event()
        self._is_ready = False
        # Why workers were lost before one was ready; if no worker is left, the last one's reason ends the run instead.
        self._early_losses: list[str] = []
        self._n_present = 0
        self._error: BaseException | None = None
        self.n_deaths = 0  # of workers that had an assignment
        self.n_replaced = 0  # workers that work again after they had died

    def __enter__(self) -> Self:
        self._start(self._workers.count)
        if self._workers.elastic:
            self._start_thread(self._grow)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._queue.give_up("the run is being stopped")
        for member in self._members:
            if member.actor is not None:
                ray.kill(member.actor)
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    @property
    def has_failed(self) -> bool:
        """Whether the model does not load, `ready` has failed, or no worker is left."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error that the pool has failed with, if it has."""
        if self._error is not None:
            raise self._error

    def counts(self) -> dict[str, int]:
        """Workers by state: `starting` (or waiting for room), `idle`, `busy`."""
        n_ready, n_busy = sum(member.is_ready for member in self._members), self._queue.n_busy
        return {"starting": max(0, self._n_present - n_ready), "idle": max(0, n_ready - n_busy), "busy": n_busy}

    def infos(self) -> list[WorkerInfo]:
        """Facts of the workers that answer in time; see workers.service.actor.Worker.info."""
        asked = [member.actor.info.remote() for member in self._members if member.is_ready]
        found: list[WorkerInfo] = []
        for answer in ray.wait(asked, num_returns=len(asked), timeout=_INFO_SECONDS)[0] if asked else []:
            with suppress(RayError):  # it has died
                found.append(ray.get(answer))
        return found

    def _start(self, count: int) -> None:
        """Start workers until there are `count`."""
        added = [_Member(f"{cluster.WORKER}{index}") for index in range(len(self._members), count)]
        self._members += added
        with self._events_lock:
            self._n_present += len(added)  # before the first of them can be lost
        for member in added:
            self._queue.add_worker(member.name)
        for member in added:
            self._start_thread(functools.partial(self._serve, member))

    def _start_thread(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 -- raised by `check`, in the thread that waits for the run
                if not self._stopped.is_set():  # a pool that is being stopped fails in many ways
                    self._error = self._error or error
                    self._queue.give_up(str(error))

        self._threads.append(threading.Thread(target=guarded, name="worker", daemon=True))
        self._threads[-1].start()

    def _grow(self) -> None:
        """Add workers as nodes join."""
        while not self._stopped.wait(_LOOK_SECONDS):
            self._start(cluster.room(self._workers))

    def _serve(self, member: _Member) -> None:
        """Start a worker, and again when it dies, until nothing is left to score or it is lost for good."""
        while not self._stopped.is_set():
            try:
                return self._work(member)
            except _WorkerDied as death:
                member.is_ready, member.holds = False, None
                if not self._may_return(member, death):
                    return None
                self._stopped.wait(rest_seconds(member.n_deaths))
            except Unfit as error:  # at its start: not on this node
                return self._lose(member, error)

    def _work(self, member: _Member) -> None:
        """Start a worker's process and score what it is assigned, until there is nothing left.

        Raises:
            _WorkerDied: the process has died, or is of no use any more.
            Unfit: it cannot load the first model.
            SweepError: the checkpoint cannot be loaded by any worker.
        """
        try:
            member.actor = self._actor(member)
            if self._spec.extensions:
                member.actor.warm_up.remote(self._spec.extensions)
            if self._workers.device == "cuda":  # a CPU runs every recipe
                hardware: Hardware = ray.get(member.actor.hardware.remote())
                self._queue.place(member.name, hardware)
            ray.get(member.actor.load.remote(self._spec.first, self._spec.mark))
        except RayTaskError as error:
            if isinstance(error.cause, SweepError):  # without Ray's wrapping
                raise type(error.cause)(str(error.cause)) from None
            raise
        except RayError as error:
            raise _died(error) from None
        member.holds = self._spec.first.model.revision
        self._admit(member)
        while (assignment := self._queue.assign(member.name, member.holds)) is not None:
            self._score(member, assignment)

    def _actor(self, member: _Member) -> Any:
        """Start a worker's process, in the place of one that has died."""
        spec, workers = self._spec, self._workers
        n_gpus = max(1, int(workers.gpus_each)) if workers.device == "cuda" else 1
        options = {"name": member.name, "num_cpus": 1, "num_gpus": workers.gpus_each if workers.device == "cuda" else 0}
        if member.actor is not None:
            ray.kill(member.actor)
        while True:
            try:
                return self._class.options(**options).remote(
                    spec.store_uri,
                    workers.device,
                    spec.memory_gb,
                    workers.per_node or workers.count,
                    n_gpus,
                    member.n_halvings,
                )
            except ActorAlreadyExistsError:  # Ray has not released the dead one's name yet
                if self._stopped.wait(_NAME_SECONDS):
                    raise

    def _admit(self, member: _Member) -> None:
        with self._events_lock:
            if not self._is_ready:
                self._events.ready()
                self._is_ready = True
                for text in self._early_losses:
                    self._events.warn(text)
            self.n_replaced += member.n_deaths > 0
            member.is_ready = True

    def _score(self, member: _Member, assignment: Assignment) -> None:
        """Have an assignment scored, report its progress, and give it back to the queue.

        Raises: _WorkerDied: before its end.
        """
        ended: dict[str, str | None] = {}
        member.holds = assignment.tasks[0].model.revision
        try:
            self._stream(member, assignment, ended)
        except RayTaskError as error:
            self._take_failure(member, assignment, ended, error)
        except RayError as error:
            death = _died(error)
            self.n_deaths += 1
            self._queue.finish(assignment, ended, Loss(reason=str(death), is_blameless=death.short_of_memory))
            raise death from None
        else:
            self._queue.finish(assignment, dict.fromkeys(task.task_id for task in assignment.tasks) | ended)

    def _take_failure(
        self, member: _Member, assignment: Assignment, ended: dict[str, str | None], error: RayTaskError
    ) -> None:
        """Give an assignment back to the queue after a worker's own error.

        Raises: _WorkerDied: the process cannot be used any more.
        """
        reason = str(error.cause).strip() or type(error.cause).__name__
        if isinstance(error.cause, StoreFailed):
            self._queue.stop(reason)
        if isinstance(error.cause, Unfit):
            member.holds = None
            self._queue.finish(assignment, ended, Loss(reason=reason, is_unfit=True))
        elif isinstance(error.cause, WorkerLost):
            self._warn(f"{member.name} starts anew: {reason}.")
            ray.kill(member.actor)
            self.n_deaths += 1
            self._queue.finish(assignment, ended, Loss(reason=reason))
            raise _WorkerDied(reason)
        else:
            self._queue.finish(assignment, dict.fromkeys((task.task_id for task in assignment.tasks), reason) | ended)

    def _stream(self, member: _Member, assignment: Assignment, ended: dict[str, str | None]) -> None:
        """Assign a worker parts as it asks for them, and report its progress; failed tasks are added to `ended`."""
        tasks, number, actor = assignment.tasks, assignment.number, member.actor
        plan = self._plan_refs[assignment.tasks[0].plan_id]
        name = f"score {tasks[0].label}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
        stream = actor.score.options(name=name, num_returns="streaming").remote(tasks, plan, number)
        next_parts = actor.next_parts.options(name=name)  # the process' title is that of the call that came last
        asked = next_parts.remote(number, None)
        waiting = [stream, asked]
        while waiting:
            ready = ray.wait(waiting, num_returns=1)[0][0]
            if ready is not stream:
                waiting.remove(ready)
                if ray.get(ready):
                    waiting.append(next_parts.remote(number, self._queue.take(number)))
                continue
            try:
                several: Sequence[Progress] = ray.get(next(stream))
            except StopIteration:
                waiting.remove(stream)
                continue
            for progress in several:
                if progress.done > progress.found:
                    member.n_shortages = 0
                if progress.failure is not None:
                    ended[progress.task_id] = progress.failure
            with self._events_lock:
                for progress in several:
                    self._events.progress(progress)

    def _warn(self, text: str) -> None:
        with self._events_lock:
            self._events.warn(text)

    def _may_return(self, member: _Member, death: _WorkerDied) -> bool:
        """Whether a worker that has died is started again.

        It is given less memory for captures if it was killed for lack of memory.

        Raises: SweepError: it is not started again, and was the last one.
        """
        if self._stopped.is_set():
            return False
        member.n_deaths += 1
        if death.short_of_memory:
            member.n_shortages += 1
            member.n_halvings += 1
            if member.n_shortages == _MAX_SHORTAGES:
                self._lose(member, MemoryShort(f"{member.name} was killed {_MAX_SHORTAGES} times: {death}."))
                return False
            share = f"1/{2**member.n_halvings} of its memory for captures"
            self._warn(f"{member.name} was killed: {death}. It starts again with {share}.")
        elif member.n_deaths > _MAX_RESTARTS:
            self._lose(member, SweepError(f"{member.name} has died for good: {death}"))
            return False
        return True

    def _lose(self, member: _Member, error: SweepError) -> None:
        """Go on without a worker.

        Raises: SweepError: it was the last one.
        """
        with self._events_lock:
            self._n_present -= 1
            if not self._n_present:
                raise error
            tell = self._events.warn if self._is_ready else self._early_losses.append
            tell(f"{error} Going on without {member.name}.")
        self._queue.remove_worker(member.name)


def rest_seconds(n_deaths: int) -> float:
    """Seconds until a worker is started again after so many deaths: a fault of its machine may pass."""
    return 0.0 if n_deaths <= 1 else min(_REST_SECONDS * 2.0 ** (n_deaths - 2), _MAX_REST_SECONDS)


def _died(error: RayError) -> _WorkerDied:
    """The reason of a worker's death, in a line, from Ray's error: memory in use of the machine's, if it was killed."""
    text = str(error)
    signs = ("due to memory pressure", "node running low on memory")
    if not isinstance(error, OutOfMemoryError) and not any(sign in text for sign in signs):
        return _WorkerDied((text.strip().splitlines() or [type(error).__name__])[0])
    reason = "its machine is short of memory"
    if found := _SHORTAGE.search(text):  # Ray 2.60's message
        reason += f" ({found[1]} used of {found[2]}, Ray kills above {found[3]} %)"
    return _WorkerDied(reason, short_of_memory=True)
