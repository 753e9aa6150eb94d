"""A worker whose process cannot go on says why, and one that scores asks for parts as it needs them; no Ray here."""

import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from sweep.core.errors import WorkerLost
from tests.tasks import TASK
from workers.service import actor
from workers.service.scorer import Scorer
from workers.task import Progress


class FailingScorer:
    is_device_fault = staticmethod(Scorer.is_device_fault)

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def score(self, tasks: object, plan: object, names: Iterator[str]) -> Iterator[Progress]:
        for done, _ in enumerate(names, 1):
            yield Progress(task_id="a", done=done, found=0)
        if self._error is not None:
            raise self._error

    def info(self) -> dict[str, Any]:
        return {"load_seconds": 0.0, "capture_seconds": 0.0}


def a_worker(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> actor.Worker:
    worker = actor.Worker.__new__(actor.Worker)
    worker._scorer, worker._parts, worker._metrics = FailingScorer(error), {}, None  # type: ignore[assignment]
    monkeypatch.setattr(actor.Worker, "_report_metrics", lambda self, rows: None)
    return worker


def score(worker: actor.Worker, *parts: tuple[str, ...]) -> tuple[list[Progress], list[bool]]:
    """Progress that a worker streams, and its answers, when the driver assigns one more part each time it has asked."""
    answers = [False]

    def give() -> None:
        answers[:] = [worker.next_parts(7, None)]
        answers.extend(worker.next_parts(7, names) for names in parts)

    giving = threading.Thread(target=give, daemon=True)
    giving.start()
    try:
        streamed = list(worker.score([TASK], None, 7))  # type: ignore[arg-type]
        return [progress for several in streamed for progress in several], answers
    finally:
        giving.join(20)
        assert not giving.is_alive()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered\nhow to debug it"),
            "CUDA error: device-side assert triggered",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            "CUDA error: an illegal memory access was encountered",
        ),
        (BrokenProcessPool("A child process terminated abruptly"), "a process that writes its scores has died"),
    ],
)
def test_a_process_that_cannot_go_on_says_why(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkerLost, match=f"^{reason}$"):
        score(a_worker(error, monkeypatch), ())


def test_an_error_of_the_recipe_leaves_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = a_worker(RuntimeError("shapes do not fit"), monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            score(worker, ("layers.0",), ())


def test_parts_are_asked_for_one_by_one_until_there_are_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = a_worker(None, monkeypatch)
    found, answers = score(worker, ("layers.0",), ("layers.1", "layers.2"), ())
    assert ([progress.done for progress in found][-1], answers) == (3, [True, True, True, False])
    assert worker._parts == {}  # nothing of the assignment is left
