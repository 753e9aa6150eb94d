"""The scheduler: one Ray Tune experiment over the trials that still lack scores, and the workers that they borrow.

Tune schedules and shows; the store decides what is done. `Tuner.restore` re-runs finished trials and ignores a larger grid,
so a resumed sweep is a fresh experiment over what is left.
"""

import logging
import math
import os
import shutil
import signal
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

from sweep.errors import ClusterLost, ModelNotLoaded, StoreFailed, SweepError
from sweep.machine import Workers
from sweep.watchdog import Watchdog
from workers.data import Plan
from workers.task import Progress, Task

# Read by Ray when it is imported. Loggers would write three files a trial; Tune's own Ctrl-C handling would hide ours.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # nobody restores an experiment; saving one costs 5 ms a trial
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box whatever the verbosity
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray._private import services  # noqa: E402
from ray.exceptions import RayActorError, RayError, RayTaskError  # noqa: E402

from workers.actor import Worker  # noqa: E402
from workers.pool import POOL, Ended, Lease, Pool  # noqa: E402

_NAMESPACE = "sweep"
_LOOPBACK = "127.0.0.1"
_SLOT = "sweep_trial"  # a resource that lets as many trials run at a time as there are workers
_LOOK_SECONDS = 0.2  # between looks at whether loading should be waited for still
_REPORT_SECONDS = 0.5  # a report costs the driver a few milliseconds
_MAX_RESTARTS = 20  # of a worker, over a whole sweep


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
    on_stage: Callable[[str], None],
    on_ready: Callable[[], None],
    on_dead: Callable[[str], None],
    on_progress: Callable[[Progress], None],
    on_ended: Callable[[], None],
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Run the trials as one Tune experiment on a Ray cluster of this machine.

    Args:
        orders: every trial that still lacks scores.
        tasks: by task id.
        plans: by plan id.
        windowed: ids of plans that no worker captures at once: the work of a capture is not kept for the next tasks.
        workers: how many, on what.
        store_uri: where workers put finished parts.
        memory_gb: memory that each worker may use; None: see workers.scorer.Scorer.
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
        KeyboardInterrupt: as the caller's signal handlers raise it; the cluster is stopped then, too.
    """
    scratch = tempfile.mkdtemp(prefix="sweep-")
    with Watchdog(on_dead) as watchdog:
        try:
            _start_ray(workers)
            actors = _start_workers(workers, store_uri, memory_gb)
            first = next(iter(tasks.values()))
            extensions = frozenset[str]().union(*(task.extensions for task in tasks.values())) if workers.device == "cuda" else frozenset[str]()
            if extensions:
                on_stage(f"ModelOpt builds its CUDA extensions ({', '.join(sorted(extensions))}): a minute or two, once a machine ...")
                for actor in actors.values():
                    actor.warm_up.remote(extensions)
            loads = {name: actor.load.remote(first) for name, actor in actors.items()}
            plan_refs = {plan_id: [ray.put(plan)] for plan_id, plan in plans.items()}
            pool_class: Any = ray.remote(Pool)
            pool = pool_class.options(name=POOL, num_cpus=0, max_concurrency=1000).remote(len(actors), dict(tasks), plan_refs, windowed)
            with _Arrivals(loads, pool, on_ready, on_stage) as arrivals:
                _tuner(orders, workers.count, scratch, [_Watcher(on_progress)], arrivals).fit()
            on_ended()
            if (broken := _get(pool.broken.remote())) is not None:
                raise StoreFailed(broken)
            return _get(pool.failures.remote()), [info for name in actors if (info := _alive(name)) is not None]
        finally:
            watchdog.stopping()
            ray.shutdown()
            shutil.rmtree(scratch, ignore_errors=True)


def _start_ray(workers: Workers) -> None:
    """Start a Ray cluster of this process' own, and keep the caller's signal handlers: Ray's ends the process with exit code 15."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=workers.count + 1,
                num_gpus=None if workers.device == "cuda" else 0,
                resources={_SLOT: workers.count},
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                namespace=_NAMESPACE,
                _node_ip_address=_LOOPBACK,
            )
    except SystemExit:  # SIGTERM, while Ray's handler was in place
        raise KeyboardInterrupt from None
    except (RuntimeError, ConnectionError, TimeoutError, RayError) as error:  # one of its processes has not come up, or not lived
        raise ClusterLost(f"Ray did not start: {str(error).splitlines()[0]}.") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _on_loopback() -> Generator[None]:
    """Have Ray listen on loopback alone: it does for a node of that address, but would replace the address by the machine's (2.60)."""
    names = ("resolve_ip_for_localhost", "get_node_ip_address")
    before = {name: getattr(services, name) for name in names}
    try:
        for name in names:
            setattr(services, name, lambda *_: _LOOPBACK)
        yield
    finally:
        for name, function in before.items():
            setattr(services, name, function)


def _start_workers(workers: Workers, store_uri: str, memory_gb: float | None) -> dict[str, Any]:
    actor_class: Any = ray.remote(Worker)
    options = {"num_cpus": 1, "num_gpus": workers.gpus_each if workers.device == "cuda" else 0, "max_restarts": _MAX_RESTARTS}
    names = [f"sweep-worker-{index}" for index in range(workers.count)]
    return {name: actor_class.options(name=name, **options).remote(store_uri, workers.device, memory_gb, workers.count) for name in names}


def _tuner(orders: Sequence[TrialOrder], n_workers: int, scratch: str, callbacks: list[tune.Callback], stop: tune.Stopper | None = None) -> tune.Tuner:
    # Tune asks for placement groups 200 trials ahead, all but a few of them in vain.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(math.ceil(n_workers / 8))

    def name_of(trial: Any) -> str:
        return TrialOrder.parse(trial.config["order"]).name.replace("/", "-")

    return tune.Tuner(
        tune.with_resources(TrialRunner, {"cpu": 0, _SLOT: 1}),
        param_space={"order": tune.grid_search([str(order) for order in orders])},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=n_workers, trial_name_creator=name_of, trial_dirname_creator=name_of),
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


class _Arrivals(tune.Stopper):
    """Admits each worker to the pool when it holds the model, in a thread of its own: Tune's processes start meanwhile.

    One on which the model does not load stays out. Ends Tune's experiment if the model loads nowhere, or
    `on_ready` fails.
    """

    def __init__(self, loads: Mapping[str, Any], pool: Any, on_ready: Callable[[], None], on_stage: Callable[[str], None]) -> None:
        self._loads, self._pool, self._on_ready, self._on_stage = loads, pool, on_ready, on_stage
        self._left = threading.Event()
        self._thread = ThreadPoolExecutor(1, "arrivals")
        self._admitted: Future[None]

    def __enter__(self) -> Self:
        self._admitted = self._thread.submit(self._admit)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.shutdown()
        if error is None:
            self._admitted.result()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its stopper to restore an experiment from; we never do

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._admitted.done() and self._admitted.exception() is not None

    def _admit(self) -> None:
        waiting = {load: name for name, load in self._loads.items()}
        unfit: dict[str, SweepError] = {}  # by worker: why the model does not load there
        ready = False
        try:
            while waiting and not self._left.is_set():
                for load in ray.wait(list(waiting), num_returns=1, timeout=_LOOK_SECONDS)[0]:
                    name = waiting.pop(load)
                    if (why := _load_failure(load)) is None:
                        if not ready:
                            ready = True
                            self._on_ready()
                        _get(self._pool.admit.remote(name))
                    else:
                        unfit[name] = why
            if unfit and not ready:
                raise next(iter(unfit.values()))
            for name, why in unfit.items():
                self._on_stage(f"The model does not load on {name}, the others go on: {why}")
        except BaseException as error:  # trials that wait for workers would wait for ever
            _get(self._pool.give_up.remote(str(error)))
            raise


def _load_failure(load: Any) -> SweepError | None:
    """What is wrong with the checkpoint, without Ray's wrapping; None if it is loaded."""
    try:
        ray.get(load)
    except RayActorError:
        pass  # a worker that died loads when it is lent out; a task under which workers keep dying fails with the reason
    except RayTaskError as error:
        if isinstance(error.cause, SweepError):
            return SweepError(str(error.cause))
        raise
    return None


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
        lease: Lease | Ended
        if order.task_id not in self._ended:
            while isinstance(lease := _get(_pool().lease.remote(order.task_id)), Lease):
                yield from _carry(lease, _pool())
            self._ended |= lease.failures
        # A failure that is raised makes Tune print forty lines of traceback and start another process.
        yield {"progress": [], "failure": self._ended[order.task_id] or "", "done": True}


@cache
def _pool() -> Any:
    """The pool; kept, since Tune runs many trials in one process."""
    return ray.get_actor(POOL, namespace=_NAMESPACE)


def _alive(worker: str) -> dict[str, Any] | None:
    """What a worker says of itself, once it has restarted if it must; None if it is gone for good."""
    try:
        actor: Any = ray.get_actor(worker, namespace=_NAMESPACE)
        return ray.get(actor.info.options(max_task_retries=-1).remote())
    except (RayActorError, ValueError):
        return None


def _get(reference: Any) -> Any:
    """What a remote call returns; Ray's own annotation says nothing of it."""
    return ray.get(reference)


def _carry(lease: Lease, pool: Any) -> Iterator[dict[str, Any]]:
    """Have the lease's tasks scored, report their progress, and say how they ended."""
    ended: dict[str, str | None] = {}
    death: str | None = None
    unfit: str | None = None
    try:
        for several in _stream(lease):
            ended |= {progress.task_id: progress.failure for progress in several if progress.failure is not None}
            yield {"progress": [asdict(progress) for progress in several]}
        ended |= {task.task_id: None for task in lease.tasks if task.task_id not in ended}
    except RayTaskError as error:
        reason = str(error.cause).strip() or type(error.cause).__name__
        if isinstance(error.cause, StoreFailed):
            _get(pool.stop.remote(reason))
        if isinstance(error.cause, ModelNotLoaded):
            unfit = reason
        else:
            ended |= {task.task_id: reason for task in lease.tasks if task.task_id not in ended}
    except (RayActorError, ValueError) as error:  # ValueError: it has died too often to come back
        death = str(error).splitlines()[0]
        _alive(lease.worker)  # lent out while it restarts, it would seem to die again
    _get(pool.give_back.remote(lease, ended, death, unfit))


def _stream(lease: Lease) -> Iterator[list[Progress]]:
    """A worker's progress, the latest of each task: now and then, and at the end."""
    worker: Any = ray.get_actor(lease.worker, namespace=_NAMESPACE)
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
