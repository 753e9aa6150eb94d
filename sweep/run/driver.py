"""The scheduler: one Ray Tune experiment over the trials that still lack scores, and the workers that score it.

Tune schedules and shows; the store decides what is done. `Tuner.restore` re-runs finished trials and ignores a larger
grid, so a resumed sweep is a fresh experiment over what is left.
"""

import logging
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self

from sweep.run import cluster  # before ray: sets what Ray reads from the environment

# isort: split
import ray
from ray import tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial as TuneTrial

from sweep.core.batches import Plan
from sweep.core.errors import StoreFailed
from sweep.core.machine import Workers
from sweep.core.threads import every
from sweep.run.task_queue import TaskQueue
from sweep.run.watchdog import Watchdog
from sweep.run.worker_pool import PoolEvents, WorkerPool, WorkerSpec
from sweep.store.files import Files
from workers.service.clock import WorkerInfo
from workers.service.metrics import SweepMetrics
from workers.task import Picture, Task

_METRICS_SECONDS: Final = 2.0
_RUNNERS: Final = 4  # processes of Tune, at most: each costs seconds of a core to start
# Between reports of a trial: at first, and at most; a report costs the driver a few milliseconds.
_POLL_SECONDS: Final = (0.02, 0.5)

# Tune copies AWS_* and more of the environment into the runtime environment of each trial, which Ray's agents log
# for everybody to read (2.60). Our trials read nothing of it.
class_cache.ENV_VARS_TO_PROPAGATE = frozenset[str]()
# A trial's process that is killed is started again, and nothing is lost with it: forty lines of traceback say nothing.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)


_fail = RayActorManager._actor_task_failed  # pyright: ignore[reportPrivateUsage]


def _fail_or_die(self: RayActorManager, tracked_actor_task: TrackedActorTask, exception: Exception) -> None:
    """Have Tune start a trial again that was killed for want of memory; it takes that error for a bug (2.60)."""
    is_kill = isinstance(exception, RayError) and not isinstance(exception, RayTaskError)
    _fail(self, tracked_actor_task, RayActorError() if is_kill else exception)


RayActorManager._actor_task_failed = _fail_or_die  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOrder:
    """A trial as Tune sees it."""

    name: str  # without a space
    task_id: str

    def __str__(self) -> str:
        """The parameter that Tune carries: it copies the whole grid for every trial, and copies texts cheaply."""
        return f"{self.name} {self.task_id}"

    @classmethod
    def parse(cls, text: str) -> Self:
        name, _, task_id = text.partition(" ")
        return cls(name=name, task_id=task_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The trials, tasks and plans that a run is to score."""

    orders: Sequence[TrialOrder]  # every trial that still lacks scores
    tasks: Mapping[str, Task]  # by task id
    plans: Mapping[str, Plan]  # by plan id
    windowed: frozenset[str]  # ids of plans that no worker captures at once: a capture is not kept for the next tasks
    store_uri: str  # where workers put finished parts
    memory_gb: float | None  # that each worker may use, 1e9 bytes; None: see workers.service.scorer.Scorer

    @property
    def extensions(self) -> frozenset[str]:
        """ModelOpt's CUDA extensions that a GPU needs."""
        return frozenset[str]().union(*(task.extensions for task in self.tasks.values()))


class RunEvents(PoolEvents, Protocol):
    """Callbacks of a run. They are called from several threads, those of a pool one at a time."""

    def connected(self, connection: cluster.Connection) -> None:
        """The driver is connected to a cluster."""
        ...

    def stage(self, text: str) -> None:
        """The run enters another stage, described for people."""
        ...

    def dead(self, what: str) -> None:
        """The cluster has died. Must end the process: Ray would wait for ever. Args: what: has died, for people."""
        ...

    def ended(self) -> None:
        """Every trial has ended; Ray has yet to stop."""
        ...

    def picture(self) -> Picture:
        """Trials and layer groups by state, for the metrics."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Failures of a run, and the facts that its workers report."""

    failures: Mapping[str, str]  # why tasks failed, by task id
    worker_info: Sequence[WorkerInfo]  # see workers.service.actor.Worker.info


def run_trials(work: Work, workers: Workers, events: RunEvents) -> Outcome:
    """Run the trials as one Tune experiment.

    Raises:
        SweepError: the model does not load on any worker.
        ClusterLost: Ray did not start.
        MemoryShort: no worker is left that there is memory for.
        StoreFailed: the store cannot be written.
        KeyboardInterrupt: as the caller's signal handlers raise it; the cluster is stopped then, too, if it is the
            run's own.
    """
    scratch = tempfile.mkdtemp(prefix="sweep-")
    with Watchdog(events.dead, owns_cluster=workers.address is None) as watchdog:
        try:
            connection = cluster.connect(workers, watchdog)
            watchdog.started()
            watchdog.watch(connection.essential)
            events.connected(connection)
            extensions = work.extensions if workers.device == "cuda" else frozenset[str]()
            if extensions:
                names = ", ".join(sorted(extensions))
                events.stage(f"ModelOpt builds its CUDA extensions ({names}): a minute or two, once a machine ...")
            with _shared_mark(workers, work.store_uri) as mark:
                first = next(iter(work.tasks.values()))
                spec = WorkerSpec(
                    store_uri=work.store_uri, memory_gb=work.memory_gb, first=first, mark=mark, extensions=extensions
                )
                return _scored(work, workers, spec, connection, scratch, events)
        finally:
            watchdog.stopping()
            cluster.stop()
            shutil.rmtree(scratch, ignore_errors=True)


def _scored(
    work: Work, workers: Workers, spec: WorkerSpec, connection: cluster.Connection, scratch: str, events: RunEvents
) -> Outcome:
    """Have workers score everything while Tune runs its experiment; raises what `run_trials` does."""
    queue = TaskQueue(workers.count, work.tasks.values(), work.windowed)
    plan_refs = {plan_id: ray.put(plan) for plan_id, plan in work.plans.items()}
    with WorkerPool(workers, spec, queue, plan_refs, events) as pool:
        with exported(events.picture, pool):
            n_runners = min(workers.count, len(work.orders), _RUNNERS)
            _tuner(work.orders, n_runners, connection.trial_resources, scratch, _Stopper(queue, pool)).fit()
        pool.check()
        events.ended()
        if queue.broken is not None:
            raise StoreFailed(queue.broken)
        return Outcome(failures=queue.failures(), worker_info=pool.infos())


@contextmanager
def exported(picture: Callable[[], Picture], pool: WorkerPool) -> Generator[None]:
    """Export progress to Prometheus through Ray's metrics agent, every few seconds, and at the end of a body that ends.

    Args:
        picture: gives the state of the trials.
        pool: the run's workers.
    """
    metrics = SweepMetrics()

    def show() -> None:
        metrics.show(picture(), pool.counts(), deaths=pool.n_deaths, replacements=pool.n_replaced)

    with every(_METRICS_SECONDS, show, "metrics"):
        yield
    show()


@contextmanager
def _shared_mark(workers: Workers, store_uri: str) -> Generator[str | None]:
    """Put a file in the store during a run, by which workers on other nodes check that they see the same store.

    Yields: its name; None if there are no other nodes.
    """
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
    orders: Sequence[TrialOrder],
    n_runners: int,
    resources: Mapping[str, float],
    scratch: str,
    stop: tune.Stopper | None = None,
) -> tune.Tuner:
    # Tune asks for placement groups 200 trials ahead, all but a few of them in vain.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(math.ceil(n_runners / 8))

    def name_of(trial: TuneTrial) -> str:
        return TrialOrder.parse(trial.config["order"]).name.replace("/", "-")

    return tune.Tuner(
        tune.with_resources(Trial, {"cpu": 0, **resources}),
        param_space={"order": tune.grid_search([str(order) for order in orders])},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=n_runners,
            trial_name_creator=name_of,
            trial_dirname_creator=name_of,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(Path(scratch) / "tune"),
            verbose=0,
            log_to_file=False,
            stop=stop,
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


class Trial(tune.Trainable):
    """Tune's side of trials, one after another: reports until the driver, which knows each task's progress, stops it.

    It holds no state, so that nothing is lost when its process is killed. A class, since Tune runs a function in a
    thread that costs each trial as much as all the rest.
    """

    def setup(self, config: dict[str, str]) -> None:
        """Begin a trial."""
        self._wait = 0.0

    def reset_config(self, new_config: dict[str, str]) -> bool:
        """Begin the next one."""
        self._wait = 0.0
        return True

    def step(self) -> dict[str, float]:
        """Report at once, so that a trial whose task has ended costs no wait, then less and less often."""
        first, most = _POLL_SECONDS
        time.sleep(self._wait)
        self._wait = min(max(2 * self._wait, first), most)
        return {}


class _Stopper(tune.Stopper):
    """Ends each of Tune's trials with its task, and the experiment when nothing is left to wait for."""

    def __init__(self, queue: TaskQueue, pool: WorkerPool) -> None:
        self._queue, self._pool = queue, pool

    def __getstate__(self) -> dict[str, str]:
        return {}  # Tune saves its stopper to restore an experiment from; we never do

    def __call__(self, trial_id: str, result: dict[str, dict[str, str]]) -> bool:
        return self._queue.has_ended(TrialOrder.parse(result["config"]["order"]).task_id)

    def stop_all(self) -> bool:
        return self._queue.is_over or self._pool.has_failed
