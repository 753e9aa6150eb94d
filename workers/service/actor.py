"""The Ray actor of a worker. No arithmetic and no file formats live here."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import ray

from sweep.core.batches import Plan
from sweep.core.errors import WorkerLost
from sweep.core.machine import Hardware
from workers.service.clock import WorkerInfo
from workers.service.metrics import WorkerMetrics
from workers.service.node import check_shared
from workers.task import Progress, Task

_REPORT_SECONDS = 0.2  # between messages; one costs Ray about a millisecond


class Worker:
    """A named actor that holds one loaded model and scores the tasks that it is assigned."""

    def __init__(
        self, store_uri: str, device: str, memory_gb: float | None, n_workers: int, n_gpus: int, n_halvings: int
    ) -> None:
        """Import the heavy libraries and prepare an empty worker; see workers.service.scorer.Scorer."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
        from workers.service.scorer import Scorer

        name = ray.get_runtime_context().get_actor_name() or ""
        self._metrics = WorkerMetrics(name)
        self._scorer = Scorer(
            store_uri,
            device,
            memory_gb=memory_gb,
            n_workers=n_workers,
            n_gpus=n_gpus,
            n_halvings=n_halvings,
            on_timed=self._metrics.timed,
        )
        self._parts: dict[int, _PartQueue] = {}  # by assignment

    def load(self, task: Task, mark: str | None) -> None:
        """Load the task's model before there is an assignment.

        Args:
            task: the first one.
            mark: a file of the store, which must be there; None: this is the driver's machine.

        Raises: Unfit: this node does not see the store or the model.
        """
        if mark is not None:
            check_shared(self._scorer.store, mark, Path(task.model.path))
        self._scorer.load(task.model)

    def hardware(self) -> Hardware:
        """Its GPUs, and memory and compiler of its machine."""
        return self._scorer.hardware()

    def warm_up(self, extensions: frozenset[str]) -> None:
        """Build CUDA extensions; of several workers of a machine the first builds, the others wait."""
        from workers.quant.modelopt import build_extensions

        build_extensions(extensions)

    def info(self) -> WorkerInfo:
        """Node and process id, and the figures of workers.service.scorer.Scorer.info."""
        return {"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), **self._scorer.info()}

    @ray.method(concurrency_group="parts")
    def next_parts(self, assignment: int, names: tuple[str, ...] | None) -> bool:
        """Receive names of parts to score, and wait until more are needed.

        Args:
            assignment: its number.
            names: empty: there are no more; None: nothing has been asked for yet.

        Returns: whether more are needed; False: `score` has ended.
        """
        parts = self._parts.setdefault(assignment, _PartQueue())
        if names is not None:
            parts.given.put(names)
        if (is_needed := parts.needed.get()) is False:
            del self._parts[assignment]
        return is_needed

    def score(self, tasks: Sequence[Task], plan: Plan, assignment: int) -> Iterator[list[Progress]]:
        """Stream the latest progress of each task, a few times a second; the groups that it counts are in the store.

        Raises: WorkerLost: this process cannot go on.
        """
        parts = self._parts.setdefault(assignment, _PartQueue())
        try:
            yield from self._score(tasks, plan, assignment, parts.taken())
        finally:
            parts.needed.put(False)

    def _score(
        self, tasks: Sequence[Task], plan: Plan, assignment: int, names: Iterator[str]
    ) -> Iterator[list[Progress]]:
        latest: dict[str, Progress] = {}
        reported_at = time.monotonic()
        meter = _Rows(self._scorer.info, self._metrics)
        try:
            for progress in self._scorer.score(tasks, plan, names):
                latest[progress.task_id] = replace(progress, assignment=assignment).after(latest.get(progress.task_id))
                meter.update(progress)
                if time.monotonic() - reported_at > _REPORT_SECONDS:
                    self._report_metrics(meter)
                    yield list(latest.values())
                    latest.clear()
                    reported_at = time.monotonic()
        except RuntimeError as error:
            if isinstance(error, BrokenProcessPool):
                reason = "a process that writes its scores has died"
            elif self._scorer.is_device_fault(error):  # no later CUDA call of this process would work
                reason = str(error).splitlines()[0]
            else:
                raise
            raise WorkerLost(reason) from None
        self._report_metrics(meter)
        yield list(latest.values())

    def _report_metrics(self, rows: "_Rows") -> None:
        rows.report()
        if (memory := self._scorer.gpu_memory()) is not None:
            self._metrics.gpu_memory(*memory)


class _PartQueue:
    """A queue of part names from the thread that receives them from the driver to the thread that scores."""

    def __init__(self) -> None:
        self.needed: SimpleQueue[bool] = SimpleQueue()
        self.given: SimpleQueue[tuple[str, ...]] = SimpleQueue()

    def taken(self) -> Iterator[str]:
        """Names, asked for as they are needed."""
        self.needed.put(True)
        while names := self.given.get():
            yield from names
            self.needed.put(True)


class _Rows:
    """Rows that one assignment has put into the store, for the metrics."""

    def __init__(self, info: Callable[[], Mapping[str, float | None]], metrics: WorkerMetrics) -> None:
        self._info, self._metrics = info, metrics
        self._rows: dict[str, int] = {}  # by task id, those found in the store not counted
        self._reported = 0
        self._spent = self._busy()

    def update(self, progress: Progress) -> None:
        self._rows[progress.task_id] = progress.done - progress.found

    def report(self) -> None:
        """Report the rows since the last report. Their time leaves out loading and capturing."""
        if (rows := sum(self._rows.values()) - self._reported) > 0:
            spent = self._busy()
            self._metrics.written(rows, max(spent - self._spent, 1e-6))
            self._reported, self._spent = self._reported + rows, spent

    def _busy(self) -> float:
        info = self._info()
        return time.monotonic() - (info["load_seconds"] or 0.0) - (info["capture_seconds"] or 0.0)
