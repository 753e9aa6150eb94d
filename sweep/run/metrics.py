"""Tells Prometheus, every few seconds, how far a sweep is."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from workers.service.metrics import SweepMetrics
from workers.task import Picture

_SECONDS = 2.0


class CountedPool(Protocol):
    """What is shown of a worker pool."""

    n_deaths: int
    n_replaced: int

    def counts(self) -> dict[str, int]:
        """Workers by state: starting, idle, busy."""
        ...


class Meter:
    """A thread that keeps a run's metrics up to date until it is left."""

    def __init__(self, picture: Callable[[], Picture], pool: CountedPool) -> None:
        """Name the metrics; entered, it shows them.

        Args:
            picture: how far the trials are.
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
        """Set every metric to how it is now."""
        self._metrics.show(
            self._picture(), self._pool.counts(), deaths=self._pool.n_deaths, replacements=self._pool.n_replaced
        )

    def _run(self) -> None:
        while not self._left.wait(_SECONDS):
            self.show()
