"""Threads or processes that write parts to the store while others are scored.

They are processes beside a GPU, which would wait for Python's lock otherwise.
"""

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
from workers.service.rows import TaskWriter

_WATCH_SECONDS: Final = 1.0

_open: dict[str, TaskWriter] = {}  # of this process, by task id


class Writers:
    """Writes submitted parts; those of one task in the order of submission."""

    def __init__(self, n_writers: int, *, processes: bool) -> None:
        """Start the threads or processes.

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
                executor.submit(int)  # starts the process now, not at the first part

    def open(self, writer: TaskWriter) -> None:
        """Prepare for a task's parts, to be written by `writer`."""
        executor = self._executors[next(self._turn) % len(self._executors)]
        self._of_task[writer.task.task_id] = executor
        executor.submit(_open_task, writer)

    def write(self, task_id: str, part: str, measured: PartScores) -> Future[None]:
        """Put a part into the store; see workers.service.rows.TaskWriter.write."""
        return self._of_task[task_id].submit(_write, task_id, part, measured)

    def close(self, task_id: str, *, complete: bool) -> Future[None]:
        """End a task; with `complete`, turn its parts into its cells."""
        return self._of_task.pop(task_id).submit(_close, task_id, complete)

    def shutdown(self) -> None:
        """Write all that was submitted, and end the threads or processes."""
        for executor in self._executors:
            executor.shutdown()

    @contextmanager
    def tidied(self) -> Generator[None]:
        """Close tasks that the block opens and does not close, without completing their cells."""
        try:
            yield
        finally:
            for task_id in list(self._of_task):
                self.close(task_id, complete=False)


def _open_task(writer: TaskWriter) -> None:
    _open[writer.task.task_id] = writer


def _write(task_id: str, part: str, measured: PartScores) -> None:
    _open[task_id].write(part, measured)


def _close(task_id: str, complete: bool) -> None:
    writer = _open.pop(task_id)
    if complete:
        writer.complete()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a killed parent can't end its children."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
