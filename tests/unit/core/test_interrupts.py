"""Ctrl-C and SIGTERM end a command cleanly, at any moment."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sweep.core.interrupts import interruptible, signals_wait

ROOT = Path(__file__).parents[3]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def exit_code(script: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", f"import os, signal, sys\n{script}"], cwd=ROOT, capture_output=True, check=False
    ).returncode


@BOTH
@pytest.mark.parametrize(
    "turned_into", [KeyboardInterrupt, ImportError, SystemExit, None]
)  # libraries do, or lose it in a callback
def test_an_interrupt_is_one_whatever_comes_of_it_on_the_way(
    number: int, turned_into: type[BaseException] | None
) -> None:
    @interruptible()
    def work() -> None:
        try:
            signal.raise_signal(number)
            pytest.fail("it was not interrupted")
        except KeyboardInterrupt:
            signal.raise_signal(number)  # an impatient user does not cut short the way out
            if turned_into is not None:
                raise turned_into from None

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert handlers() == before


def test_an_interrupt_that_was_lost_can_be_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.core.interrupts._LEAVING_SECONDS", 0.0)
    told: list[int] = []

    @interruptible()
    def work() -> None:
        for number in range(2):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                told.append(number)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert told == [0, 1]


@BOTH
def test_a_signal_waits_for_the_handler_of_before(number: signal.Signals) -> None:
    seen: list[str] = []
    before = signal.signal(number, lambda number, frame: seen.append("the caller's"))
    try:
        with signals_wait():
            signal.raise_signal(number)
            signal.signal(number, lambda number, frame: seen.append("a library's"))
            seen.append("done")
        signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert seen == ["done", "the caller's", "the caller's"]


def test_a_second_ctrl_c_does_not_wait() -> None:
    @signals_wait()
    def work() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waits for ever")

    before = handlers()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert handlers() == before


def test_an_interrupted_exec_does_not_end_the_process_by_a_signal() -> None:
    """CPython would, after all that was caught and said; dataclasses are made so, while modules are imported."""
    lines = [
        "from sweep.core.interrupts import interruptible",
        "try:",
        "    with interruptible():",
        "        exec('signal.raise_signal(2)')",
    ]
    assert exit_code("\n".join([*lines, "except KeyboardInterrupt:", "    sys.exit(75)"])) == 75


@BOTH
def test_a_signal_while_python_ends_leaves_the_exit_code(number: int) -> None:
    lines = [
        "import atexit",
        f"atexit.register(os.kill, os.getpid(), {int(number)})",
        "from sweep.cli import script",
        "sys.argv[1:] = ['run', 'x=1']",
    ]
    assert exit_code("\n".join([*lines, "sys.exit(script())"])) == 2
