"""Exports a run's progress to Prometheus, every few seconds, through Ray's metrics agent."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from workers.service.metrics import SweepMetrics
from workers.task import Picture

_SECONDS = 2.0


class CountedPool(Protocol):
    """The counts of a worker pool that become metrics."""

    n_deaths: int
    n_replaced: int

    def counts(self) -> dict[str, int]:
        """Workers by state: starting, idle, busy."""
        ...


class MetricsExporter:
    """A context whose thread keeps a run's metrics up to date."""

    def __init__(self, picture: Callable[[], Picture], pool: CountedPool) -> None:
        """Register the metrics; entering the context starts the updates.

        Args:
            picture: gives the state of the trials.
            pool: the run's workers.
        """
        self._picture, self._pool = picture, pool
        self._metrics = SweepMetrics()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        if error is None:
            self.show()

    def show(self) -> None:
        """Set every metric to its current value."""
        self._metrics.show(
            self._picture(), self._pool.counts(), deaths=self._pool.n_deaths, replacements=self._pool.n_replaced
        )

    def _run(self) -> None:
        while not self._left.wait(_SECONDS):
            self.show()
