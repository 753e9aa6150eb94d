"""A sweep's Prometheus metrics on Ray's metrics port. The home of `ray.util.metrics`.

Ray puts `ray_` before the names, and adds labels of the node and the process: sum or take the maximum over these.
"""

from collections.abc import Mapping
from typing import Final

from ray.util.metrics import Counter, Gauge, Histogram

from workers.task import Picture

_GROUP_BUCKETS: Final = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]  # seconds
_CAPTURE_BUCKETS: Final = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
_TRIAL_BUCKETS: Final = [0.1, 1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 14400.0, 86400.0]
_MAX_OBSERVATIONS: Final = 1000  # at a time: one costs a few microseconds
_NO_ETA: Final = -1.0


class SweepMetrics:
    """The driver's metrics."""

    def __init__(self) -> None:
        """Name the metrics; each appears when it first has a value."""
        self._trials = Gauge("sweep_trials", "Trials of the grid, by state.", ("state",))
        self._groups = Gauge("sweep_groups", "Layer groups of this run over all cells, by state.", ("state",))
        self._queue = Gauge("sweep_queue", "Trials that wait for a worker.")
        self._models = Gauge("sweep_models", "Models of this run, each of which a worker loads at most once.")
        self._workers = Gauge("sweep_workers", "Workers by state: starting, idle, busy.", ("state",))
        self._eta = Gauge("sweep_eta_seconds", "Time left at this rate; -1 while there is none.")
        self._trial_seconds = Histogram(
            "sweep_trial_seconds", "From a trial's first assignment to its last row.", _TRIAL_BUCKETS
        )
        self._counters = {
            "scored": _Total("sweep_groups_scored_total", "Layer groups scored, over all cells."),
            "failed": _Total("sweep_failed_trials_total", "Trials that failed in this run."),
            "replacements": _Total("sweep_worker_replacements_total", "Workers that took a dead one's place."),
            "retries": _Total("sweep_retries_total", "Assignments repeated after a worker died."),
        }

    def show(self, picture: Picture, workers: Mapping[str, int], *, deaths: int, replacements: int) -> None:
        """Set everything to how it is now.

        Args:
            picture: the trials.
            workers: by state.
            deaths: of workers that had an assignment, since the run began.
            replacements: workers that came back after they had died, since the run began.
        """
        for state, n in picture.trials.items():
            self._trials.set(n, {"state": state})
        self._groups.set(picture.groups_done, {"state": "done"})
        self._groups.set(picture.groups_total, {"state": "total"})
        self._queue.set(picture.queue)
        self._models.set(picture.models)
        for state, n in workers.items():
            self._workers.set(n, {"state": state})
        self._eta.set(_NO_ETA if picture.eta_seconds is None else picture.eta_seconds)
        for seconds in picture.trial_seconds:
            self._trial_seconds.observe(seconds)
        totals = {
            "scored": picture.groups_scored,
            "failed": picture.failed_trials,
            "replacements": replacements,
            "retries": deaths,
        }
        for name, total in totals.items():
            self._counters[name].reach(total)


class WorkerMetrics:
    """One worker's metrics."""

    def __init__(self, worker: str) -> None:
        """Name the metrics.

        Args:
            worker: the actor's name: there are few, and a restarted worker keeps its own.
        """
        self._loads = Counter("sweep_model_loads_total", "Times a worker loaded a model.")
        self._rows = Counter("sweep_rows_written_total", "Rows that reached the store.")
        self._group_seconds = Histogram("sweep_group_seconds", "A layer group in one cell.", _GROUP_BUCKETS)
        self._capture_seconds = Histogram(
            "sweep_capture_seconds", "One capture, or one window of it.", _CAPTURE_BUCKETS
        )
        self._gpu_memory = Gauge(
            "sweep_gpu_memory_bytes", "Memory of a worker's GPUs: used, total.", ("worker", "kind")
        )
        self._worker = worker

    def timed(self, kind: str, seconds: float) -> None:
        """Record a time that workers.service.clock.Clock has measured."""
        if kind == "load_seconds":
            self._loads.inc()
        elif kind == "capture_seconds":
            self._capture_seconds.observe(seconds)

    def written(self, rows: int, seconds: float) -> None:
        """Record rows that reached the store, and the seconds that they took together."""
        if rows > 0:
            self._rows.inc(rows)
            for _ in range(min(rows, _MAX_OBSERVATIONS)):
                self._group_seconds.observe(seconds / rows)

    def gpu_memory(self, used: int, total: int) -> None:
        """Record the memory of this worker's GPUs, in bytes."""
        self._gpu_memory.set(used, {"worker": self._worker, "kind": "used"})
        self._gpu_memory.set(total, {"worker": self._worker, "kind": "total"})


class _Total:
    """A Prometheus counter that is set to totals."""

    def __init__(self, name: str, description: str) -> None:
        self._counter = Counter(name, description)
        self._reached = 0

    def reach(self, total: int) -> None:
        """Raise the counter to a total; a lower total changes nothing."""
        if total > self._reached:
            self._counter.inc(total - self._reached)
            self._reached = total
