"""What becomes of a run whose workers do not get ready, without a Ray cluster."""

from collections.abc import Callable
from typing import Any

import pytest

from sweep import driver


class Remote:
    """A pool's method: notes what it is called with."""

    def __init__(self, called: list[tuple[str, str]], name: str) -> None:
        self.called, self.name = called, name

    def remote(self, argument: str) -> None:
        self.called.append((self.name, argument))


class FakePool:
    def __init__(self) -> None:
        self.called: list[tuple[str, str]] = []
        self.admit, self.give_up = Remote(self.called, "admit"), Remote(self.called, "give_up")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    """A pool beside loads that are strings: one that starts with "bad" has failed."""

    def get(reference: Any) -> None:
        if str(reference).startswith("bad"):
            raise driver.RayTaskError("load", "traceback", driver.SweepError("no weights"))

    monkeypatch.setattr(driver.ray, "wait", lambda references, num_returns, timeout: (references[:num_returns], references[num_returns:]))
    monkeypatch.setattr(driver.ray, "get", get)
    return FakePool()


def arrived(pool: FakePool, loads: dict[str, str], on_ready: Callable[[], object], *, stops: bool = False) -> None:
    """Run it as Tune does: for as long as it is not told to stop."""
    with driver._Arrivals(loads, pool, on_ready, lambda text: pool.called.append(("said", text))) as arrivals:
        arrivals._admitted.exception(timeout=10)
        assert arrivals.stop_all() == stops


def test_workers_are_admitted_one_by_one_after_the_first_is_ready(pool: FakePool) -> None:
    arrived(pool, {"w0": "load0", "w1": "load1"}, lambda: pool.called.append(("ready", "")))
    assert pool.called == [("ready", ""), ("admit", "w0"), ("admit", "w1")]


def test_a_model_that_does_not_load_ends_the_run_with_its_own_message(pool: FakePool) -> None:
    with pytest.raises(driver.SweepError, match=r"^no weights$"):
        arrived(pool, {"w0": "bad"}, lambda: pytest.fail("it is not ready"), stops=True)
    assert pool.called == [("give_up", "no weights")]


def test_a_worker_on_which_the_model_does_not_load_stays_out_and_the_others_go_on(pool: FakePool) -> None:
    arrived(pool, {"w0": "bad", "w1": "load1"}, lambda: pool.called.append(("ready", "")))
    assert pool.called == [("ready", ""), ("admit", "w1"), ("said", "The model does not load on w0, the others go on: no weights")]


def test_a_full_disk_when_trials_are_recorded_ends_the_run_instead_of_leaving_it_waiting(pool: FakePool) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        arrived(pool, {"w0": "load0"}, full, stops=True)
    assert pool.called == [("give_up", "[Errno 28] No space left on device")]
