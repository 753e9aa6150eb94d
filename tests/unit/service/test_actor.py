"""A worker whose process cannot go on says why, and ends when it is next asked for; no Ray here."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from sweep.core.errors import WorkerLost
from workers.service import actor
from workers.service.scorer import Scorer
from workers.task import Progress


class FailingScorer:
    is_device_fault = staticmethod(Scorer.is_device_fault)

    def __init__(self, error: Exception) -> None:
        self._error = error

    def score(self, *_: object) -> Iterator[Progress]:
        yield Progress(task_id="a", done=1, found=0)
        raise self._error

    def info(self) -> dict[str, Any]:
        return {"load_seconds": 0.0, "capture_seconds": 0.0}


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> actor.Worker:
    worker = actor.Worker.__new__(actor.Worker)
    worker._scorer, worker._lost, worker._metrics = FailingScorer(error), False, None  # type: ignore[assignment]
    monkeypatch.setattr(actor.ray, "get_runtime_context", lambda: type("Context", (), {"get_node_id": lambda self: "n"})())
    return worker


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nhow to debug it"), "CUDA error: device-side assert triggered"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "CUDA error: an illegal memory access was encountered"),
        (BrokenProcessPool("A child process terminated abruptly"), "a process that writes its scores has died"),
    ],
)
def test_a_process_that_cannot_go_on_says_why_and_ends_when_it_is_asked_again(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, ended = failing(error, monkeypatch), list[int]()
    monkeypatch.setattr(actor.os, "_exit", ended.append)
    assert worker.info()["node"] == "n"
    with pytest.raises(WorkerLost, match=f"^{reason}$"):
        list(worker.score([], None, 0))  # type: ignore[arg-type]
    assert ended == []  # it would take what it has just said with it
    worker.info()
    assert ended == [1]


def test_an_error_of_the_recipe_leaves_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = failing(RuntimeError("shapes do not fit"), monkeypatch)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(worker.score([], None, 0))  # type: ignore[arg-type]
    assert worker.info()["node"] == "n"
