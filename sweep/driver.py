"""The scheduler: one Ray Tune experiment over the trials that still lack scores, and the workers that they borrow.

Tune schedules and shows; the store decides what is done. `Tuner.restore` re-runs finished trials and ignores a larger grid,
so a resumed sweep is a fresh experiment over what is left.
"""

import math
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sweep import cluster  # before ray: sets what Ray reads from the environment
from sweep.errors import StoreFailed, SweepError, Unfit, WorkerLost
from sweep.files import Files
from sweep.machine import Workers
from sweep.metering import Meter
from sweep.watchdog import Watchdog
from workers.data import Plan
from workers.task import Picture, Progress, Task

_LOOK_SECONDS = 0.2  # between looks at whether loading should be waited for still
_RECRUIT_SECONDS = 1.0  # between looks at whether workers have died, or nodes have joined
_REPORT_SECONDS = 0.5  # a report costs the driver a few milliseconds
_RUNNERS = 4  # processes of Tune, at most: each costs seconds of a core to start. Threads of the driver lend workers out, too
_LEAVE_SECONDS = 5.0  # until a thread that lends a worker out is left behind

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.exceptions import RayActorError, RayTaskError  # noqa: E402

from workers.actor import Worker  # noqa: E402
from workers.pool import POOL, Ended, Lease, Pool  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOrder:
    """A trial as Tune sees it."""

    name: str  # without a space
    task_id: str

    def __str__(self) -> str:
        """As Tune carries it: it copies the whole grid for every trial, which texts make cheap."""
        return f"{self.name} {self.task_id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        name, _, task_id = text.partition(" ")
        return cls(name=name, task_id=task_id)


def run_trials(
    orders: Sequence[TrialOrder],
    tasks: Mapping[str, Task],
    plans: Mapping[str, Plan],
    windowed: frozenset[str],
    workers: Workers,
    store_uri: str,
    *,
    memory_gb: float | None,
    picture: Callable[[], Picture],
    on_connected: Callable[[cluster.Connection], None],
    on_stage: Callable[[str], None],
    on_ready: Callable[[], None],
    on_dead: Callable[[str], None],
    on_progress: Callable[[Progress], None],
    on_ended: Callable[[], None],
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Run the trials as one Tune experiment.

    Args:
        orders: every trial that still lacks scores.
        tasks: by task id.
        plans: by plan id.
        windowed: ids of plans that no worker captures at once: the work of a capture is not kept for the next tasks.
        workers: how many, on what, where.
        store_uri: where workers put finished parts.
        memory_gb: memory that each worker may use; None: see workers.scorer.Scorer.
        picture: how far the trials are, for the metrics.
        on_connected: called when there is a cluster.
        on_stage: called with what is happening, for people.
        on_ready: called once, from another thread, when the first worker holds the first task's model.
        on_dead: called, from another thread, if the cluster has died, with what did; it must end the process: Ray would hang.
        on_progress: called whenever rows of a task have reached the store.
        on_ended: called once, when every trial has ended; Ray has yet to stop.

    Returns: why tasks failed, by task id; and what each worker says of itself.

    Raises:
        SweepError: the model does not load on any worker.
        ClusterLost: Ray did not start.
        StoreFailed: the store cannot be written.
        KeyboardInterrupt: as the caller's signal handlers raise it; the cluster is stopped then, too, if it is the run's own.
    """
    scratch = tempfile.mkdtemp(prefix="sweep-")
    with Watchdog(on_dead) as watchdog:
        try:
            connection = cluster.connect(workers)
            watchdog.watch(connection.essential)
            on_connected(connection)
            extensions = frozenset[str]().union(*(task.extensions for task in tasks.values())) if workers.device == "cuda" else frozenset[str]()
            if extensions:
                on_stage(f"ModelOpt builds its CUDA extensions ({', '.join(sorted(extensions))}): a minute or two, once a machine ...")
            plan_refs = {plan_id: [ray.put(plan)] for plan_id, plan in plans.items()}
            pool_options = {"name": POOL, "num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": cluster.on_this_node()}
            pool_class: Any = ray.remote(Pool)
            pool = pool_class.options(**pool_options).remote(workers.count, dict(tasks), plan_refs, windowed)
            n_runners = min(workers.count, len(orders), _RUNNERS)
            helpers = _Helpers(orders, pool, on_progress)
            with _shared_mark(workers, store_uri) as mark:
                crew = cluster.Crew(workers, _hire(workers, store_uri, memory_gb, next(iter(tasks.values())), mark, extensions))
                try:
                    arrivals = _Arrivals(crew, pool, on_ready, on_stage, helpers.help)
                    meter = Meter(picture, lambda: _get(pool.figures.remote()), lambda: (arrivals.n_starting, arrivals.n_replaced))
                    with arrivals, meter:
                        _tuner(orders, n_runners, connection.trial_resources, scratch, [_Watcher(helpers.tell)], _Stopper(arrivals, helpers)).fit()
                    helpers.check()
                    on_ended()
                    if (broken := _get(pool.broken.remote())) is not None:
                        raise StoreFailed(broken)
                    return _get(pool.failures.remote()), crew.infos(arrivals.admitted)
                finally:  # threads of the driver wait for these
                    crew.dismiss()
                    ray.kill(pool)
                    helpers.leave()
        finally:
            watchdog.stopping()
            cluster.stop()
            shutil.rmtree(scratch, ignore_errors=True)


def _hire(
    workers: Workers, store_uri: str, memory_gb: float | None, first: Task, mark: str | None, extensions: frozenset[str]
) -> Callable[[Mapping[str, Any]], tuple[Any, Any]]:
    """What makes a worker of Ray's options for it: the actor, and an object reference that is there when it holds the first task's model."""
    actor_class: Any = ray.remote(Worker)

    def hire(options: Mapping[str, Any]) -> tuple[Any, Any]:
        n_gpus = max(1, int(workers.gpus_each)) if workers.device == "cuda" else 1
        actor = actor_class.options(**options).remote(store_uri, workers.device, memory_gb, workers.per_node or workers.count, n_gpus)
        if extensions:
            actor.warm_up.remote(extensions)
        return actor, actor.load.remote(first, mark)

    return hire


@contextmanager
def _shared_mark(workers: Workers, store_uri: str) -> Generator[str | None]:
    """Name of a file in the store, by which workers on other nodes know that it is the store; None if there are no other nodes."""
    if workers.address is None:
        yield None
        return
    files, mark = Files(store_uri), f".shared-{secrets.token_hex(4)}.tmp"
    files.write(mark, b"")
    try:
        yield mark
    finally:
        files.remove(mark)


def _tuner(
    orders: Sequence[TrialOrder], n_runners: int, resources: Mapping[str, float], scratch: str, callbacks: list[tune.Callback], stop: tune.Stopper | None = None
) -> tune.Tuner:
    # Tune asks for placement groups 200 trials ahead, all but a few of them in vain.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(math.ceil(n_runners / 8))

    def name_of(trial: Any) -> str:
        return TrialOrder.parse(trial.config["order"]).name.replace("/", "-")

    return tune.Tuner(
        tune.with_resources(TrialRunner, {"cpu": 0, **resources}),
        param_space={"order": tune.grid_search([str(order) for order in orders])},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=n_runners, trial_name_creator=name_of, trial_dirname_creator=name_of),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(Path(scratch) / "tune"),
            verbose=0,
            log_to_file=False,
            callbacks=callbacks,
            stop=stop,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


class _Arrivals:
    """Admits each worker to the pool when it holds the model, in a thread of its own: Tune's processes start meanwhile.

    Workers that died are admitted again when they have restarted, if ever; so are new ones, when nodes have joined.
    """

    def __init__(self, crew: cluster.Crew, pool: Any, on_ready: Callable[[], None], say: Callable[[str], None], on_admitted: Callable[[int], None]) -> None:
        """Watch the crew as soon as this is entered.

        Args:
            crew: who is to arrive.
            pool: the pool's actor.
            on_ready: called once, when the first of them has.
            say: tells people something.
            on_admitted: called for each that has arrived, with how many there are.
        """
        self._crew, self._pool, self._on_ready, self._say, self._on_admitted = crew, pool, on_ready, say, on_admitted
        self._waiting: dict[Any, str] = {}  # workers that load or restart, by object reference
        self._restarting: set[str] = set()
        self.admitted: set[str] = set()
        self.n_replaced = 0  # workers that have come back after they had died
        self._is_ready = False
        self._unsaid: list[str] = []  # why workers stay out, until one is ready: the last of them ends the run with its own reason
        self._n_hired = 0
        self._left = threading.Event()
        self._thread = ThreadPoolExecutor(1, "arrivals")
        self._ended: Future[None]

    def __enter__(self) -> Self:
        self._ended = self._thread.submit(self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.shutdown()
        if error is None:
            self._ended.result()

    @property
    def has_failed(self) -> bool:
        """Whether the model does not load, `on_ready` has failed, or nobody is left."""
        return self._ended.done() and self._ended.exception() is not None

    @property
    def n_starting(self) -> int:
        """Workers that load or restart, or that Ray has no room for yet."""
        return len(self._waiting)

    def _run(self) -> None:
        looked = -math.inf
        try:
            while not self._left.is_set():
                if time.monotonic() - looked > _RECRUIT_SECONDS:
                    looked = time.monotonic()
                    self._look_around()
                if not self._waiting:
                    self._left.wait(_LOOK_SECONDS)
                    continue
                for reference in ray.wait(list(self._waiting), num_returns=1, timeout=_LOOK_SECONDS)[0]:
                    self._take(self._waiting.pop(reference), reference)
        except BaseException as error:  # trials that wait for workers would wait for ever
            _get(self._pool.give_up.remote(str(error)))
            raise

    def _look_around(self) -> None:
        for name in _get(self._pool.lost.remote()):
            self._call_back(name)
        for name, loaded in self._crew.hire().items():
            self._waiting[loaded] = name
            self._n_hired += 1
        if not self._waiting:
            _get(self._pool.settle.remote())

    def _call_back(self, name: str) -> None:
        self.admitted.discard(name)
        self._restarting.add(name)
        self._waiting[self._crew.call_back(name)] = name

    def _take(self, name: str, reference: Any) -> None:
        """Admit a worker, or see why not."""
        try:
            _check_loaded(reference)
        except RayActorError as error:
            if name in self._restarting:
                self._lose(name, f"{name} has died for good: {str(error).strip().splitlines()[-1].strip()}")
            else:  # once it has restarted, it loads the model when it is lent out
                self._call_back(name)
            return
        except Unfit as error:
            self._lose(name, str(error))
            return
        if name in self._restarting:
            self._restarting.remove(name)
            self.n_replaced += 1
        if not self._is_ready:
            self._is_ready = True
            self._on_ready()
            for text in self._unsaid:
                self._say(text)
        self.admitted.add(name)
        _get(self._pool.admit.remote(name))
        self._on_admitted(len(self.admitted))

    def _lose(self, name: str, reason: str) -> None:
        """Go on without a worker.

        Raises: SweepError: it was the last one.
        """
        self._n_hired -= 1
        if not self._n_hired:
            raise SweepError(reason)
        _get(self._pool.forget.remote(name))
        text = f"{reason} Going on without {name}."
        if self._is_ready:
            self._say(text)
        else:
            self._unsaid.append(text)


def _check_loaded(load: Any) -> None:
    """Raises: SweepError: what is wrong with the checkpoint, without Ray's wrapping."""
    try:
        ray.get(load)
    except RayTaskError as error:
        if isinstance(error.cause, SweepError):
            raise type(error.cause)(str(error.cause)) from None
        raise


class _Helpers:
    """Threads of the driver that lend workers out as trials do: at once, while Tune's processes start, and where there are more workers than these."""

    def __init__(self, orders: Sequence[TrialOrder], pool: Any, on_progress: Callable[[Progress], None]) -> None:
        self._orders, self._pool, self._on_progress = orders, pool, on_progress
        self._telling = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None

    def help(self, n_workers: int) -> None:
        """Lend out so many workers at a time."""
        while len(self._threads) < n_workers:
            self._threads.append(threading.Thread(target=self._help, name="helper", daemon=True))
            self._threads[-1].start()

    def tell(self, progress: Progress) -> None:
        """Pass progress on, one at a time."""
        with self._telling:
            self._on_progress(progress)

    @property
    def has_failed(self) -> bool:
        """Whether a thread has ended with an error."""
        return self._error is not None

    def check(self) -> None:
        """Raises what a thread has ended with."""
        if self._error is not None:
            raise self._error

    def leave(self) -> None:
        """Wait for the threads, whose pool and workers are gone."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _help(self) -> None:
        ended: dict[str, str | None] = {}
        try:
            for order in self._orders:
                for several in _work(order.task_id, ended, self._pool):
                    for progress in several:
                        self.tell(progress)
        except BaseException as error:  # noqa: BLE001 -- raised by `check`; the trials would wait for what this thread has borrowed
            self._error = error


class _Stopper(tune.Stopper):
    """Ends Tune's experiment when what trials wait for will not come."""

    def __init__(self, *depends_on: Any) -> None:
        self._depends_on = depends_on

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its stopper to restore an experiment from; we never do

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return any(each.has_failed for each in self._depends_on)


class TrialRunner(tune.Trainable):
    """Tune's side of trials, one after another: as long as a trial's scores are not there, borrow workers and have tasks scored, its own first.

    A trial whose task is in another trial's bundle helps with what else is left. A class, since Tune runs a function in a thread that
    costs each trial as much as all the rest.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take a trial over."""
        self._ended: dict[str, str | None] = {}  # why tasks have no scores, None if they have; by task id
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next one over."""
        self._reports = self._run(TrialOrder.parse(new_config["order"]))
        return True

    def step(self) -> dict[str, Any]:
        """What Tune shows: progress, a few times a second, and at the end why there are no scores, if there are none."""
        return next(self._reports)

    def _run(self, order: TrialOrder) -> Iterator[dict[str, Any]]:
        for several in _work(order.task_id, self._ended, _pool()):
            yield {"progress": [asdict(progress) for progress in several]}
        # A failure that is raised makes Tune print forty lines of traceback and start another process.
        yield {"progress": [], "failure": self._ended[order.task_id] or "", "done": True}


def _work(task_id: str, ended: dict[str, str | None], pool: Any) -> Iterator[list[Progress]]:
    """Borrow workers and have tasks scored, this one first, until it has ended; add to `ended` how tasks have."""
    lease: Lease | Ended
    if task_id not in ended:
        while isinstance(lease := _get(pool.lease.remote(task_id)), Lease):
            yield from _carry(lease, pool)
        ended |= lease.failures


@cache
def _pool() -> Any:
    """The pool; kept, since Tune runs many trials in one process."""
    return ray.get_actor(POOL)


def _get(reference: Any) -> Any:
    """What a remote call returns; Ray's own annotation says nothing of it."""
    return ray.get(reference)


def _carry(lease: Lease, pool: Any) -> Iterator[list[Progress]]:
    """Have the lease's tasks scored, report their progress, and say how they ended."""
    ended: dict[str, str | None] = {}
    death: str | None = None
    unfit: str | None = None
    try:
        for several in _stream(lease):
            ended |= {progress.task_id: progress.failure for progress in several if progress.failure is not None}
            yield several
        ended |= {task.task_id: None for task in lease.tasks if task.task_id not in ended}
    except RayTaskError as error:
        reason = str(error.cause).strip() or type(error.cause).__name__
        if isinstance(error.cause, StoreFailed):
            _get(pool.stop.remote(reason))
        if isinstance(error.cause, Unfit):
            unfit = reason
        elif isinstance(error.cause, WorkerLost):
            death = reason
            yield [Progress(task_id=lease.tasks[0].task_id, done=0, found=0, lease=lease.number, warning=f"{lease.worker} starts anew: {reason}.")]
        else:
            ended |= {task.task_id: reason for task in lease.tasks if task.task_id not in ended}
    except (RayActorError, ValueError) as error:  # ValueError: it has died too often to come back
        death = str(error).splitlines()[0]
    _get(pool.give_back.remote(lease, ended, death, unfit))


def _stream(lease: Lease) -> Iterator[list[Progress]]:
    """A worker's progress, the latest of each task: now and then, and at the end."""
    worker: Any = ray.get_actor(lease.worker)
    latest: dict[str, Progress] = {}
    told = time.monotonic()
    name = f"score {lease.tasks[0].label}" + (f" and {len(lease.tasks) - 1} more" if len(lease.tasks) > 1 else "")
    for reference in worker.score.options(name=name, num_returns="streaming").remote(lease.tasks, lease.plan[0], lease.number):
        for progress in _get(reference):
            latest[progress.task_id] = progress.after(latest.get(progress.task_id))
        if time.monotonic() - told > _REPORT_SECONDS:
            yield list(latest.values())
            latest.clear()
            told = time.monotonic()
    yield list(latest.values())


class _Watcher(tune.Callback):
    """Passes what trials report to the driver's display."""

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks to restore an experiment from; we never do

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        for progress in result["progress"]:
            self._on_progress(Progress(**progress))
