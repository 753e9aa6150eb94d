"""Tells Prometheus, every few seconds, how far a sweep is."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from workers.service.metrics import SweepMetrics
from workers.task import Picture

_SECONDS = 2.0


class Meter:
    """A thread that keeps a run's metrics up to date until it is left."""

    def __init__(self, picture: Callable[[], Picture], figures: Callable[[], dict[str, int]], starting: Callable[[], tuple[int, int]]) -> None:
        """Prepare.

        Args:
            picture: how far the trials are.
            figures: of the pool: workers `idle` and `busy`, and `deaths`.
            starting: how many workers are starting, and how many have come back after they had died.
        """
        self._picture, self._figures, self._starting = picture, figures, starting
        self._metrics = SweepMetrics()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()
        if error is None:
            self.show()

    def show(self) -> None:
        """Once."""
        pool, (starting, replacements) = self._figures(), self._starting()
        workers = {"starting": starting, "idle": pool["idle"], "busy": pool["busy"]}
        self._metrics.show(self._picture(), workers, deaths=pool["deaths"], replacements=replacements)

    def _run(self) -> None:
        while not self._left.wait(_SECONDS):
            self.show()
