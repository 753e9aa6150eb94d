"""Wall seconds that a worker spends on loading, capturing and scoring."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypeVar

_Kind = Literal["load_seconds", "capture_seconds", "busy_seconds"]
_Item = TypeVar("_Item")
WorkerInfo: TypeAlias = dict[str, str | float | None]  # facts of a worker for the run's record


class Clock:
    """Sums of wall seconds by kind, and the times at which the worker was first and last busy."""

    def __init__(self, on_timed: Callable[[_Kind, float], None] | None = None) -> None:
        """Start with nothing.

        Args:
            on_timed: called with each block's kind and seconds.
        """
        self._on_timed = on_timed
        self._seconds: dict[_Kind, float] = {"load_seconds": 0.0, "capture_seconds": 0.0, "busy_seconds": 0.0}
        self._first_at: float | None = None
        self._last_at: float | None = None

    @contextmanager
    def timed(self, kind: _Kind) -> Generator[None]:
        """Count the block's time."""
        started = time.time()
        try:
            yield
        finally:
            self._add(kind, started, time.time())

    def timed_items(self, kind: _Kind, items: Iterator[_Item]) -> Iterator[_Item]:
        """Count the time that the iterator takes to produce items, not that of the loop's body."""
        started = time.time()
        for item in items:
            self._add(kind, started, time.time())
            yield item
            started = time.time()

    def _add(self, kind: _Kind, started: float, ended: float) -> None:
        self._seconds[kind] += ended - started
        if kind == "busy_seconds":
            self._first_at, self._last_at = self._first_at or started, ended
        if self._on_timed is not None:
            self._on_timed(kind, ended - started)

    def figures(self) -> dict[str, float | None]:
        """Seconds by kind, and `first_at` and `last_at`, seconds since 1970 (None: never busy)."""
        return {**self._seconds, "first_at": self._first_at, "last_at": self._last_at}
