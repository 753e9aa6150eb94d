"""Ray's side of a worker. No arithmetic and no file formats live here."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from sweep.errors import WorkerLost
from workers.data import Plan
from workers.metrics import WorkerMetrics
from workers.pool import POOL
from workers.shared import check_shared
from workers.task import Progress, Task

_TELL_SECONDS = 0.2  # between messages; one costs Ray about a millisecond


class Worker:
    """A named actor that holds one loaded model and scores the tasks that it is lent out for."""

    def __init__(self, store_uri: str, device: str, memory_gb: float | None, n_workers: int, n_gpus: int) -> None:
        """Import the heavy libraries and prepare an empty worker; see workers.scorer.Scorer."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
        from workers.scorer import Scorer

        name = ray.get_runtime_context().get_actor_name() or ""
        self._metrics = WorkerMetrics(name)
        self._scorer = Scorer(store_uri, device, memory_gb=memory_gb, n_workers=n_workers, n_gpus=n_gpus, on_timed=self._metrics.timed)
        self._lost = False
        if device == "cuda":  # a CPU runs every recipe
            pool: Any = ray.get_actor(POOL)
            ray.get(pool.placed.remote(name, self._scorer.hardware()))

    def load(self, task: Task, mark: str | None) -> None:
        """Load the task's model before the first trial asks for it.

        Args:
            task: the first one.
            mark: a file of the store, which must be there; None: this is the driver's machine.

        Raises: Unfit: this node does not see the store or the model.
        """
        if mark is not None:
            check_shared(self._scorer.store, mark, Path(task.model.path))
        self._scorer.load(task.model)

    def warm_up(self, extensions: frozenset[str]) -> None:
        """Build CUDA extensions; workers of one machine wait for the one that came first."""
        from workers.quantization import build_extensions

        build_extensions(extensions)

    def info(self) -> dict[str, Any]:
        """Node, process, and what its scorer says of itself. After WorkerLost this ends the process: Ray starts another and asks that."""
        if self._lost:
            os._exit(1)
        return {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), **self._scorer.info()}

    def score(self, tasks: Sequence[Task], plan: Plan, lease: int) -> Iterator[list[Progress]]:
        """Stream progress, the latest of each task, a few times a second; what it counts is in the store already.

        Raises: WorkerLost: this process cannot go on; see `info`.
        """
        latest: dict[str, Progress] = {}
        told = time.monotonic()
        meter = _Rows(self._scorer.info, self._metrics)
        try:
            for progress in self._scorer.score(tasks, plan, _taken(lease)):
                latest[progress.task_id] = replace(progress, lease=lease).after(latest.get(progress.task_id))
                meter.update(progress)
                if time.monotonic() - told > _TELL_SECONDS:
                    self._tell_metrics(meter)
                    yield list(latest.values())
                    latest.clear()
                    told = time.monotonic()
        except RuntimeError as error:
            if isinstance(error, BrokenProcessPool):
                reason = "a process that writes its scores has died"
            elif self._scorer.is_device_fault(error):  # no later CUDA call of this process would work
                reason = str(error).splitlines()[0]
            else:
                raise
            self._lost = True
            raise WorkerLost(reason) from None
        self._tell_metrics(meter)
        yield list(latest.values())

    def _tell_metrics(self, rows: "_Rows") -> None:
        rows.tell()
        if (memory := self._scorer.gpu_memory()) is not None:
            self._metrics.gpu_memory(*memory)


class _Rows:
    """Rows that one lease has put into the store, for the metrics."""

    def __init__(self, info: Callable[[], dict[str, Any]], metrics: WorkerMetrics) -> None:
        self._info, self._metrics = info, metrics
        self._rows: dict[str, int] = {}  # by task id, those found in the store not counted
        self._told = 0
        self._spent = self._busy()

    def update(self, progress: Progress) -> None:
        self._rows[progress.task_id] = progress.done - progress.found

    def tell(self) -> None:
        """What has come since this was last told. Loading and capturing are no part of its time."""
        if (rows := sum(self._rows.values()) - self._told) > 0:
            spent = self._busy()
            self._metrics.written(rows, max(spent - self._spent, 1e-6))
            self._told, self._spent = self._told + rows, spent

    def _busy(self) -> float:
        info = self._info()
        return time.monotonic() - info["load_seconds"] - info["capture_seconds"]


def _taken(lease: int) -> Iterator[str]:
    """Names of parts, asked for as they are needed."""
    pool: Any = ray.get_actor(POOL)
    while names := ray.get(pool.take.remote(lease)):
        yield from names
