"""`sweep` with workers that log each part that they have scored, before it is written.

python -m tests.bench.counted run ...
"""

# pyright: basic

import os
from concurrent.futures import Future
from typing import Any, Final

from sweep.cli import script
from sweep.run import worker_pool
from workers.scoring.scores import PartScores
from workers.service import actor

SCORED: Final = "SWEEP_BENCH_SCORED"  # in the environment of the driver: the file
_LOG = os.environ.get(SCORED, "")  # goes with the class to workers, which may have another environment


class Worker(actor.Worker):
    """A worker that notes each part when it hands it to its writers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        writers = self._scorer._writers
        write = writers.write

        def noted(task_id: str, part: str, measured: PartScores) -> Future[None]:
            with open(_LOG, "a", encoding="utf-8") as file:
                file.write(f"{task_id} {part} {os.getpid()}\n")  # one write: lines of several workers do not mix
            return write(task_id, part, measured)

        writers.write = noted


if __name__ == "__main__":
    worker_pool.Worker = Worker
    raise SystemExit(script())
