"""A sweep of the driver, Tune and the pool alone, on workers that score nothing."""

# pyright: basic

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sweep.core.batches import Sample
from sweep.core.machine import Workers
from sweep.run import driver, worker_pool
from tests.tasks import PICTURE, TASK
from workers.data.batches import make_plan
from workers.task import Picture, Progress, Task


def run_bare(
    worker: type[Any],
    tasks: Mapping[str, Task],
    workers: Workers,
    store: str,
    on_ready: Callable[[], None] = lambda: None,
) -> tuple[Mapping[str, str], Sequence[Mapping[str, Any]], float, float]:
    """One trial a task.

    Args:
        worker: has the interface of workers.service.actor.Worker.
        tasks: by task id.
        workers: how many, where.
        store: a folder, if workers join a cluster.
        on_ready: called when the first worker is there.

    Returns: why tasks failed; facts of the workers; seconds from the first worker's readiness to the end of the last
        trial; seconds that stopping Ray took then.
    """
    marks: list[float] = []
    worker_pool.Worker = worker

    class Events:
        """Notes when the first worker is ready, and when the last trial has ended."""

        stage = warn = staticmethod(lambda text: print(text, file=sys.stderr))

        def connected(self, connection: Any) -> None:
            """Nothing to record."""

        def ready(self) -> None:
            on_ready()
            marks.append(time.perf_counter())

        def dead(self, what: str) -> None:
            print(what, file=sys.stderr, flush=True)
            os._exit(1)

        def progress(self, progress: Progress) -> None:
            """Nothing to show."""

        def ended(self) -> None:
            marks.append(time.perf_counter())

        def picture(self) -> Picture:
            return PICTURE

    work = driver.Work(
        orders=[driver.TrialOrder(name=name, task_id=name) for name in tasks],
        tasks=tasks,
        plans={TASK.plan_id: make_plan([Sample(token_ids=np.arange(8, dtype=np.int64))] * 16, packed=True)},
        windowed=frozenset(),
        store_uri=store,
        memory_gb=None,
    )
    outcome = driver.run_trials(work, workers, Events())
    ready, ended = marks
    return outcome.failures, outcome.worker_info, ended - ready, time.perf_counter() - ended
