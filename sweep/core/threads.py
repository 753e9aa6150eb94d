"""Threads that do something every few seconds."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def every(seconds: float, work: Callable[[], None], name: str) -> Generator[None]:
    """Call a function every few seconds, in a thread of its own, until the body ends.

    Args:
        seconds: until it is first called, and from the end of a call to the next.
        work: an error that it raises ends the thread.
        name: of the thread.
    """
    left = threading.Event()

    def repeat() -> None:
        while not left.wait(seconds):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
