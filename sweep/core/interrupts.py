"""Ctrl-C and SIGTERM: both end a command with KeyboardInterrupt, and wait where they would do harm."""

import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LEAVING_SECONDS = 10.0  # after an interrupt, until another one counts


@contextmanager
def interruptible() -> Generator[None]:
    """End the body with KeyboardInterrupt on SIGINT or SIGTERM, whatever a library makes of the signal on the way."""
    interrupted_at: float | None = None  # monotonic seconds

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted_at
        now = time.monotonic()
        # A second Ctrl-C would cut the exit short.
        if interrupted_at is None or now - interrupted_at > _LEAVING_SECONDS:
            interrupted_at = now
            raise KeyboardInterrupt

    try:
        with _handled_by(interrupt):
            yield
    finally:
        if interrupted_at is not None:
            # If another exec was interrupted, as dataclasses use, CPython 3.11 would end the process by SIGINT.
            exec("")
            raise KeyboardInterrupt


@contextmanager
def signals_wait() -> Generator[None]:
    """Hold a first signal back until the body is done; then the handlers that were there before get it.

    They do whatever handlers a library installs meanwhile. A second signal raises KeyboardInterrupt at once.
    """
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            raise KeyboardInterrupt

    try:
        with _handled_by(note):
            yield
    finally:
        if waiting:
            signal.raise_signal(waiting[0])


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def rearm() -> None:
    """Install Python's handlers again, after a library has replaced them without Python's knowledge."""
    for number in _SIGNALS:
        signal.signal(number, signal.getsignal(number))


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM: the command has ended, and no signal changes its exit code."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
