"""Hooks on a model's modules that are removed again."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Sequence[RemovableHandle]) -> Generator[None]:
    """Remove hooks when the block ends, also by an exception.

    Args:
        handles: as `register_forward_hook` and its siblings return them.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
