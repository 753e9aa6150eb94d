"""Errors that a user can fix: their messages say what was found, what is allowed and what to type."""

import difflib
from collections.abc import Iterable


class SweepError(Exception):
    """Wrong input. The message says what was found, what is allowed and what to type; the CLI prints it and exits 2."""


class InvalidRecipe(SweepError):
    """A pair and a granularity that make no recipe: alone an error, in a grid a trial with ``state=skipped``."""


class StoreFailed(SweepError):
    """The store, or the directory of reports, cannot be written: a full disk, a lost mount.

    No score is wrong; the run ends and can be resumed.
    """


class ClusterLost(SweepError):
    """Ray did not start, or is gone; what the store has stays, and the run can be resumed."""


class MemoryShort(SweepError):
    """No worker is left that its machine has memory for; what the store has stays, and the run can be resumed."""


class Unfit(SweepError):
    """A task that one worker cannot do, and another one may.

    Its node does not see the model or the store, or the model does not load there.
    """


class WorkerLost(SweepError):
    """A worker's process cannot go on, as its GPU or one of its writers has failed; another process can."""


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise SweepError, naming the nearest known spelling, unless ``name`` is one of ``known``."""
    allowed = sorted(known)
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise SweepError(f"Unknown {kind} {name!r}. {hint}Choose one of: {', '.join(allowed)}.")
