"""Ctrl-C and SIGTERM: both end a command with KeyboardInterrupt, and wait where they would do harm."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LEAVING_SECONDS = 10.0  # after an interrupt, until another one counts


@contextmanager
def interruptible() -> Generator[None]:
    """A signal ends what is inside with KeyboardInterrupt, whatever a library makes of it on the way."""
    told: float | None = None

    def interrupt(number: int, frame: object) -> None:
        nonlocal told
        if told is None or time.monotonic() - told > _LEAVING_SECONDS:  # a second Ctrl-C would cut short the way out
            told = time.monotonic()
            raise KeyboardInterrupt

    try:
        with _handled_by(interrupt):
            yield
    finally:
        if told is not None:
            exec(
                ""
            )  # if another exec was interrupted, as dataclasses use, CPython would end the process by SIGINT (3.11)
            raise KeyboardInterrupt


@contextmanager
def signals_wait() -> Generator[None]:
    """A first signal waits until what is inside is done, for the handlers of before, whatever a library has put in their place. A second does not wait."""
    waiting: list[int] = []

    def note(number: int, frame: object) -> None:
        waiting.append(number)
        if len(waiting) > 1:  # somebody is impatient
            raise KeyboardInterrupt

    try:
        with _handled_by(note):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def _handled_by(handler: Callable[[int, object], None]) -> Generator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def rearm() -> None:
    """Put the handlers that Python knows of in place again, after a library has changed them behind its back."""
    for number in _SIGNALS:
        signal.signal(number, signal.getsignal(number))


def ignore_signals() -> None:
    """The command has ended; no signal changes how."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
