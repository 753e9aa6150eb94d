"""Parts are put on disk beside the scoring: by threads, or by processes where Python itself would hold the GPU up."""

import multiprocessing
import os
import threading
import time
from collections.abc import Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from typing import Final

from workers.scoring.scores import PartScores
from workers.service.rows import Ledger

_WATCH_SECONDS: Final = 1.0

_open: dict[str, Ledger] = {}  # of this process, by task id


class Writers:
    """Writes what is submitted; what belongs to one task in the order in which it came."""

    def __init__(self, n_writers: int, *, processes: bool) -> None:
        """Start them.

        Args:
            n_writers: threads or processes.
            processes: each writer has a process of its own, which ends with this one.
        """
        spawn = multiprocessing.get_context("spawn")
        self._executors: list[Executor] = [
            ProcessPoolExecutor(1, spawn, initializer=_end_with, initargs=(os.getpid(),))
            if processes
            else ThreadPoolExecutor(1, "part-writer")
            for _ in range(n_writers)
        ]
        self._of_task: dict[str, Executor] = {}
        self._turn = count()
        if processes:
            for executor in self._executors:
                executor.submit(_nothing)  # starts it, while there is time

    def open(self, ledger: Ledger) -> None:
        """A task's parts will come."""
        executor = self._executors[next(self._turn) % len(self._executors)]
        self._of_task[ledger.task.task_id] = executor
        executor.submit(_open_ledger, ledger)

    def write(self, task_id: str, part: str, measured: PartScores) -> Future[None]:
        """Put a part into the store; see workers.service.rows.Ledger.write."""
        return self._of_task[task_id].submit(_write, task_id, part, measured)

    def close(self, task_id: str, *, complete: bool) -> Future[None]:
        """No more parts of the task come; with `complete` they make up its cells."""
        return self._of_task.pop(task_id).submit(_close, task_id, complete)

    def shutdown(self) -> None:
        """Finish what was submitted, and end."""
        for executor in self._executors:
            executor.shutdown()

    @contextmanager
    def tidied(self) -> Generator[None]:
        """Drop what the block opens and does not close."""
        try:
            yield
        finally:
            for task_id in list(self._of_task):
                self.close(task_id, complete=False)


def _open_ledger(ledger: Ledger) -> None:
    _open[ledger.task.task_id] = ledger


def _write(task_id: str, part: str, measured: PartScores) -> None:
    _open[task_id].write(part, measured)


def _close(task_id: str, complete: bool) -> None:
    ledger = _open.pop(task_id)
    if complete:
        ledger.complete()


def _nothing() -> None:
    pass


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: one that was killed tells nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
