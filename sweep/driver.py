"""The scheduler: one Ray Tune experiment over the trials that still lack scores, and the workers that they borrow.

Tune schedules and shows; the store decides what is done. `Tuner.restore` re-runs finished trials and ignores a larger grid,
so a resumed sweep is a fresh experiment over what is left.
"""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sweep.machine import Workers
from workers.data import Plan
from workers.task import Progress, Task

# Read by Ray when it is imported. Loggers would write three files a trial; Tune's own Ctrl-C handling would hide ours.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.exceptions import RayActorError, RayTaskError  # noqa: E402

from workers.actor import Pool, Worker  # noqa: E402

_POOL = "sweep-pool"
_NAMESPACE = "sweep"
_REPORT_SECONDS = 0.5  # a report costs the driver a few milliseconds
_MAX_WORKER_DEATHS = 3  # a task that outlives so many workers is the cause


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOrder:
    """A trial as Tune sees it."""

    name: str
    task_id: str
    leads: bool  # the first trial of its task has it scored; the others wait for it


def run_trials(
    orders: Sequence[TrialOrder],
    tasks: Mapping[str, Task],
    plans: Mapping[str, Plan],
    workers: Workers,
    store_uri: str,
    *,
    on_ready: Callable[[], None],
    on_progress: Callable[[str, Progress], None],
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Run the trials as one Tune experiment on a Ray cluster of this machine.

    Args:
        orders: every trial that still lacks scores; leading trials of each task come first.
        tasks: by task id.
        plans: by plan id.
        workers: how many, on what.
        store_uri: where workers put finished parts.
        on_ready: called once, when the workers hold the first task's model.
        on_progress: called with a task id whenever rows of it have reached the store.

    Returns: why tasks failed, by task id; and what each worker says of itself.

    Raises: KeyboardInterrupt: as the caller's signal handlers raise it; the cluster is stopped then, too.
    """
    scratch = tempfile.mkdtemp(prefix="sweep-")
    ray.init(
        address="local",
        num_cpus=workers.count + 1,
        num_gpus=None if workers.device == "cuda" else 0,
        resources={"sweep_trial": workers.count},
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace=_NAMESPACE,
    )
    try:
        actors = _start_workers(workers, store_uri)
        first = next(iter(tasks.values()))
        loads = [actor.load.remote(first) for actor in actors.values()]
        plan_refs = {plan_id: [ray.put(plan)] for plan_id, plan in plans.items()}
        pool = ray.remote(Pool).options(name=_POOL, num_cpus=0, max_concurrency=10_000).remote(list(actors), dict(tasks), plan_refs)
        ray.get(loads)
        on_ready()
        _tuner(orders, scratch, on_progress).fit()
        return ray.get(pool.failures.remote()), ray.get([actor.info.remote() for actor in actors.values()])
    finally:
        ray.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def _start_workers(workers: Workers, store_uri: str) -> dict[str, Any]:
    actor_class: Any = ray.remote(Worker)
    options = {"num_cpus": 1, "num_gpus": workers.gpus_each if workers.device == "cuda" else 0, "max_restarts": _MAX_WORKER_DEATHS}
    names = [f"sweep-worker-{index}" for index in range(workers.count)]
    return {name: actor_class.options(name=name, **options).remote(store_uri, workers.device) for name in names}


def _tuner(orders: Sequence[TrialOrder], scratch: str, on_progress: Callable[[str, Progress], None]) -> tune.Tuner:
    def name_of(trial: Any) -> str:
        return trial.config["order"]["name"].replace("/", "-")

    return tune.Tuner(
        tune.with_resources(run_trial, {"cpu": 0, "sweep_trial": 1}),
        param_space={"order": tune.grid_search([asdict(order) for order in orders])},
        tune_config=tune.TuneConfig(reuse_actors=True, trial_name_creator=name_of, trial_dirname_creator=name_of),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(Path(scratch) / "tune"),
            verbose=0,
            log_to_file=False,
            callbacks=[_Watcher(on_progress)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )


def run_trial(config: dict[str, dict[str, Any]]) -> None:
    """Tune's side of a trial: borrow a worker that already holds the model, let it score, report progress."""
    order = TrialOrder(**config["order"])
    pool: Any = ray.get_actor(_POOL, namespace=_NAMESPACE)
    if order.leads:
        ray.get(pool.end.remote(order.task_id, _lead(order, pool)))
    failure = ray.get(pool.outcome.remote(order.task_id))
    if failure is not None:
        raise RuntimeError(failure)
    tune.report({"finished": 1})


def _lead(order: TrialOrder, pool: Any) -> str | None:
    """Have the task scored. Returns why it failed, None if it is done."""
    reason = ""
    for _ in range(_MAX_WORKER_DEATHS):
        name, task, (plan,) = ray.get(pool.borrow.remote(order.task_id))
        try:
            _score(name, task, plan, order)
            return None
        except RayTaskError as error:
            return str(error.cause).strip() or type(error.cause).__name__
        except RayActorError as error:  # the pool's next free worker goes on with the parts that are left
            reason = str(error).splitlines()[0]
        finally:
            ray.get(pool.give_back.remote(name, order.task_id))
    return f"{_MAX_WORKER_DEATHS} workers died while scoring it: {reason}"


def _score(worker_name: str, task: Task, plan: Any, order: TrialOrder) -> None:
    worker: Any = ray.get_actor(worker_name, namespace=_NAMESPACE)
    reported = 0.0
    for reference in worker.score.options(name=f"score {order.name}", num_returns="streaming").remote(task, plan):
        progress: Progress = ray.get(reference)
        if progress.done == progress.total or time.monotonic() - reported > _REPORT_SECONDS:
            tune.report({"task_id": order.task_id, "done": progress.done, "total": progress.total})
            reported = time.monotonic()


class _Watcher(tune.Callback):
    """Passes what trials report to the driver's display."""

    def __init__(self, on_progress: Callable[[str, Progress], None]) -> None:
        self._on_progress = on_progress

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "task_id" in result:
            self._on_progress(result["task_id"], Progress(done=result["done"], total=result["total"]))
