"""What becomes of a run whose workers do not get ready, die or arrive late, without a Ray cluster."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from sweep import driver
from sweep.errors import Unfit, WorkerLost
from tests.tasks import TASK
from workers.pool import Lease
from workers.task import Progress


class Remote:
    """A pool's method: notes what it is called with."""

    def __init__(self, called: list[tuple[str, ...]], name: str, answers: list[Any] | None = None) -> None:
        self.called, self.name, self.answers = called, name, answers

    def remote(self, *arguments: str) -> Any:
        if self.answers is not None:
            return self.answers.pop(0) if self.answers else []
        self.called.append((self.name, *arguments))
        return None


class FakePool:
    def __init__(self) -> None:
        self.called: list[tuple[str, ...]] = []
        self.deaths: list[list[str]] = []
        self.admit, self.give_up, self.lost = Remote(self.called, "admit"), Remote(self.called, "give_up"), Remote(self.called, "lost", self.deaths)
        self.settle = Remote([], "settle")
        self.forget, self.give_back = Remote(self.called, "forget"), Remote(self.called, "give_back")


class FakeCrew:
    """Workers whose object references are strings: of one that starts with "bad" the model does not load; "unfit", "dying" and "dead" speak for themselves."""

    def __init__(self, *hired: dict[str, str], back: str = "back") -> None:
        self._hired, self._back = list(hired), back

    def hire(self) -> dict[str, str]:
        return self._hired.pop(0) if self._hired else {}

    def call_back(self, name: str) -> str:
        return f"{self._back} {name}"


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    """A pool beside a Ray whose object references are strings."""

    def get(reference: Any) -> Any:
        text = str(reference)
        if text.startswith(("bad", "unfit")):
            error = Unfit("no room") if text.startswith("unfit") else driver.SweepError("no weights")
            raise driver.RayTaskError("load", "traceback", error)
        if text.startswith(("dying", "dead")):
            raise driver.RayActorError
        return reference

    monkeypatch.setattr(driver.ray, "wait", lambda references, num_returns, timeout: (references[:num_returns], references[num_returns:]))
    monkeypatch.setattr(driver.ray, "get", get)
    monkeypatch.setattr(driver, "_RECRUIT_SECONDS", 0.0)
    monkeypatch.setattr(driver, "_LOOK_SECONDS", 0.001)
    return FakePool()


def arrived(pool: FakePool, crew: FakeCrew, n: int, on_ready: Callable[[], object] = lambda: None) -> list[str]:
    """Run it as Tune does, until `n` workers have been admitted or it fails. Returns what people were told."""
    told: list[str] = []
    enough = threading.Event()
    with driver._Arrivals(crew, pool, on_ready, told.append, lambda _: None) as arrivals:
        deadline = time.monotonic() + 10
        while not arrivals.has_failed and sum(call[0] == "admit" for call in pool.called) < n and time.monotonic() < deadline:
            enough.wait(0.001)
    return told


def test_workers_are_admitted_one_by_one_after_the_first_is_ready(pool: FakePool) -> None:
    arrived(pool, FakeCrew({"w0": "load0", "w1": "load1"}), 2, lambda: pool.called.append(("ready",)))
    assert pool.called == [("ready",), ("admit", "w0"), ("admit", "w1")]


def test_a_model_that_does_not_load_ends_the_run_with_its_own_message(pool: FakePool) -> None:
    with pytest.raises(driver.SweepError, match=r"^no weights$"):
        arrived(pool, FakeCrew({"w0": "bad"}), 1, lambda: pytest.fail("it is not ready"))
    assert pool.called == [("give_up", "no weights")]


def test_a_full_disk_when_trials_are_recorded_ends_the_run_instead_of_leaving_it_waiting(pool: FakePool) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        arrived(pool, FakeCrew({"w0": "load0"}), 1, full)
    assert pool.called == [("give_up", "[Errno 28] No space left on device")]


def test_workers_of_nodes_that_join_are_admitted_while_others_work(pool: FakePool) -> None:
    arrived(pool, FakeCrew({"w0": "load0"}, {}, {"w1": "load1"}), 2)
    assert pool.called == [("admit", "w0"), ("admit", "w1")]


def test_a_worker_that_has_died_is_admitted_again_when_it_has_restarted(pool: FakePool) -> None:
    pool.deaths += [[], ["w0"]]
    arrived(pool, FakeCrew({"w0": "load0"}), 2)
    assert pool.called == [("admit", "w0"), ("admit", "w0")]


def test_a_worker_that_dies_while_it_loads_is_waited_for(pool: FakePool) -> None:
    arrived(pool, FakeCrew({"w0": "dying"}), 1)
    assert pool.called == [("admit", "w0")]


def test_the_pool_is_told_when_no_other_worker_is_about_to_come(pool: FakePool) -> None:
    before: list[list[tuple[str, ...]]] = []
    told = threading.Event()

    def settle() -> None:
        before.append(list(pool.called))
        told.set()

    pool.settle.remote = settle  # type: ignore[method-assign]
    with driver._Arrivals(FakeCrew({"w0": "load0", "w1": "load1"}), pool, lambda: None, print, lambda _: None):
        assert told.wait(10)
    assert before[0] == [("admit", "w0"), ("admit", "w1")]


def test_one_worker_that_cannot_work_is_left_out_and_named(pool: FakePool) -> None:
    assert arrived(pool, FakeCrew({"w0": "unfit", "w1": "load1"}), 1) == ["no room Going on without w0."]
    assert pool.called == [("forget", "w0"), ("admit", "w1")]


def test_when_no_worker_is_left_the_run_ends_with_the_last_ones_reason(pool: FakePool) -> None:
    with pytest.raises(driver.SweepError, match="w1 has died for good"):
        arrived(pool, FakeCrew({"w0": "unfit", "w1": "dying"}, back="dead"), 1)
    assert [call[0] for call in pool.called] == ["forget", "give_up"]


def test_a_worker_that_cannot_go_on_is_named_and_its_tasks_wait_for_another(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(lease: Lease) -> Iterator[list[Progress]]:
        yield [Progress(task_id="t", done=4, found=0, lease=7)]
        raise driver.RayTaskError("score", "traceback", WorkerLost("CUDA error: launch failure"))

    monkeypatch.setattr(driver, "_stream", broken)
    lease = Lease(number=7, worker="w0", tasks=(replace(TASK, task_id="t"),), plan=["plan"])
    *_, (last,) = driver._carry(lease, pool)
    assert (last.task_id, last.warning) == ("t", "w0 starts anew: CUDA error: launch failure.")
    assert pool.called == [("give_back", lease, {}, "CUDA error: launch failure", None)]
