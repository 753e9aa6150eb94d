"""Checks of the shared store and checkpoint, and the lock under which one worker of a machine loads first."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from sweep.core.errors import Unfit
from sweep.store.store import Store
from workers.service import node
from workers.service.node import check_shared, first_alone


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.tempfile, "gettempdir", lambda: str(tmp_path))


def test_a_node_that_sees_store_and_model_may_work_and_another_says_what_it_lacks(tmp_path: Path) -> None:
    store, model = Store(str(tmp_path / "store")), tmp_path / "model"
    with pytest.raises(Unfit, match=r"does not see the store .* store\.uri=DIR"):
        check_shared(store, ".mark", model)
    store.files.write(".mark", b"")
    with pytest.raises(Unfit, match=r"does not see the model .* model\.path=DIR"):
        check_shared(store, ".mark", model)
    model.mkdir()
    (model / "config.json").touch()
    check_shared(store, ".mark", model)


def load(model: Path, events: Any, seconds: float) -> None:
    with first_alone(model):
        events.put(("begins", os.getpid()))
        time.sleep(seconds)
        events.put(("ends", os.getpid()))


def test_the_first_loads_alone_and_the_others_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where no earlier run has left its lock
    context = multiprocessing.get_context("fork")
    events = context.Queue()
    workers = [context.Process(target=load, args=(tmp_path, events, 0.5)) for _ in range(3)]
    for worker in workers:
        worker.start()
    order = [events.get(timeout=20)[0] for _ in range(6)]
    for worker in workers:
        worker.join()
    assert order == ["begins", "ends", "begins", "begins", "ends", "ends"]


def test_a_load_that_failed_leaves_the_next_one_first(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="torn"), first_alone(tmp_path):
        raise OSError("torn")
    (lock,) = tmp_path.glob("sweep-load-*.lock")
    assert lock.read_bytes() == b""
    with first_alone(tmp_path):
        pass
    assert lock.read_bytes() != b""
