"""A worker whose process cannot go on says why, and ends when it is next asked for; no Ray here."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from sweep.errors import WorkerLost
from sweep.machine import Hardware
from workers import actor
from workers.scorer import Scorer
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


class Placing:
    """The pool's method of that name: notes what it is called with."""

    def __init__(self) -> None:
        self.placed, self.called = self, list[tuple[str, Hardware]]()

    def remote(self, worker: str, hardware: Hardware) -> None:
        self.called.append((worker, hardware))


class PlacedScorer:
    def __init__(self, *_: object, **__: object) -> None: ...

    def hardware(self) -> Hardware:
        return Hardware(host="here")


def test_a_worker_with_a_gpu_first_tells_the_pool_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, context = Placing(), type("Context", (), {"get_actor_name": lambda self: "w0"})()
    monkeypatch.setattr(actor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(actor, "WorkerMetrics", lambda name: type("Metrics", (), {"timed": None}))
    monkeypatch.setattr("workers.scorer.Scorer", PlacedScorer)
    monkeypatch.setattr(actor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(actor.ray, "get_actor", lambda name: pool)
    monkeypatch.setattr(actor.ray, "get", lambda reference: reference)
    for device in ("cpu", "cuda"):
        actor.Worker("store", device, None, n_workers=1, n_gpus=1)
    assert pool.called == [("w0", Hardware(host="here"))]


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
