"""Time that Ray and Tune cost: trials whose scoring takes no time, on workers that load a model in no time.

`ms_per_trial` runs from the workers' readiness to the end of the last trial; `stop_seconds` is the time that stopping
Ray takes then.

python -m tests.bench.orchestration
"""

# pyright: basic

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ray import tune

from sweep.core.batches import Plan
from sweep.core.machine import Workers
from sweep.run import cluster, driver
from sweep.run.watchdog import Watchdog
from tests.bench.bare import run_bare
from tests.tasks import TASK
from workers.service import actor
from workers.task import Progress, Task

_N_TRIALS = 384


class InstantWorker(actor.Worker):
    """A worker that has its scores before it is asked."""

    def __init__(self, *arguments: Any) -> None:
        self._loads, self._parts = 0, {}

    def load(self, task: Task, mark: str | None) -> None:
        self._loads += 1

    def info(self) -> dict[str, Any]:
        return {"model_loads": self._loads}

    def _score(
        self, tasks: Sequence[Task], plan: Plan, assignment: int, names: Iterator[str]
    ) -> Iterator[list[Progress]]:
        for _ in names:
            yield [Progress(task_id=task.task_id, done=1, found=0) for task in tasks]


class Unwatched(Watchdog):
    """Nobody looks after the cluster."""

    def __init__(self) -> None:
        """Start nothing."""

    def own(self, session: str) -> None:
        """It is not killed with this process."""

    def started(self) -> None:
        """Its death is not noticed."""

    def failed(self) -> None:
        """Nor that it did not come up."""


class Nothing(tune.Trainable):
    """A trial of bare Tune: the reference."""

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing."""

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Nothing."""
        return True

    def step(self) -> dict[str, Any]:
        """Nothing to report."""
        return {"done": True}


def tune_seconds(orders: Sequence[driver.TrialOrder]) -> float:
    """Wall time of as many trials that do nothing at all, with the same Tune settings."""
    driver.Trial = Nothing  # type: ignore[misc, assignment]
    connection = cluster.connect(Workers(device="cpu", count=2, gpus_each=1.0), Unwatched())
    with tempfile.TemporaryDirectory() as scratch:
        tuner = driver._tuner(orders, 2, connection.trial_resources, scratch)
        started = time.perf_counter()
        tuner.fit()
        return time.perf_counter() - started


def main() -> None:
    import torch

    from tests.bench.setup import report

    tasks = {f"task-{i}": replace(TASK, task_id=f"task-{i}") for i in range(_N_TRIALS)}
    orders = [driver.TrialOrder(name=name, task_id=name) for name in tasks]
    _, infos, seconds, stop_seconds = run_bare(
        InstantWorker, tasks, Workers(device="cpu", count=2, gpus_each=1.0), "none"
    )
    tune_alone = tune_seconds(orders)
    figures = {
        "trials": _N_TRIALS,
        "workers": 2,
        "ms_per_trial": 1000 * seconds / _N_TRIALS,
        "stop_seconds": stop_seconds,
        "tune_alone_ms_per_trial": 1000 * tune_alone / _N_TRIALS,
        "model_loads": sum(info["model_loads"] for info in infos),
    }
    report("orchestration", torch.device("cpu"), figures)


if __name__ == "__main__":
    main()
