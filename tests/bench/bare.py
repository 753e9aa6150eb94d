"""A sweep of the driver, Tune and the pool alone, on workers that score nothing."""

# pyright: basic

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sweep.core.machine import Workers
from sweep.run import driver
from tests.tasks import PICTURE, TASK
from workers.data.batches import make_plan
from workers.data.samples import Sample
from workers.task import Task


def run_bare(
    worker: type[Any], tasks: Mapping[str, Task], workers: Workers, store: str, on_ready: Callable[[], None] = lambda: None
) -> tuple[dict[str, str], list[dict[str, Any]], float, float]:
    """One trial a task.

    Args:
        worker: has the interface of workers.service.actor.Worker.
        tasks: by task id.
        workers: how many, where.
        store: a folder, if workers join a cluster.
        on_ready: called when the first worker is there.

    Returns: why tasks failed; what workers say of themselves; seconds from the first worker's readiness to the end of the last trial, and
        those that stopping Ray took then.
    """
    marks: list[float] = []
    driver.Worker = worker

    def mark() -> None:
        on_ready()
        marks.append(time.perf_counter())

    def dead(what: str) -> None:
        print(what, file=sys.stderr, flush=True)
        os._exit(1)

    failures, infos = driver.run_trials(
        [driver.TrialOrder(name=name, task_id=name) for name in tasks],
        tasks,
        {TASK.plan_id: make_plan([Sample(token_ids=np.arange(8, dtype=np.int64))] * 16, packed=True)},
        frozenset(),
        workers,
        store,
        memory_gb=None,
        picture=lambda: PICTURE,
        on_connected=lambda connection: None,
        on_stage=lambda text: print(text, file=sys.stderr),
        on_ready=mark,
        on_dead=dead,
        on_progress=lambda progress: None,
        on_ended=lambda: marks.append(time.perf_counter()),
    )
    ready, ended = marks
    return failures, infos, ended - ready, time.perf_counter() - ended
