"""Calibration sizes: numbers of samples, each a prefix of the next. Three have names; any other is its number."""

from typing import Final

from sweep.core.errors import SweepError

SIZES: Final = {"small": 16, "medium": 128, "large": 512}  # samples
_STEP: Final = 512  # samples between boundaries after the last named one
_MOST: Final = 1_000_000


def n_samples_of(size: str, key: str = "dataset.size") -> int:
    """Number of samples of a size: ``medium`` has 128, ``64`` has 64.

    Args:
        size: a name or a number.
        key: where it was typed, for errors.

    Raises: SweepError: neither a name nor a number from 2 up.
    """
    if size in SIZES:
        return SIZES[size]
    if not (size.isascii() and size.isdigit() and 2 <= int(size) <= _MOST):
        raise SweepError(
            f"{key}={size!r} is no size. Type {', '.join(SIZES)} "
            f"({', '.join(map(str, SIZES.values()))} samples), or a number of samples from 2 to {_MOST:,}."
        )
    return int(size)


def size_name(n_samples: int) -> str:
    """The size of that many samples: its name, else the number."""
    return next((name for name, n in SIZES.items() if n == n_samples), str(n_samples))


def boundaries(n_samples: int) -> list[int]:
    """Numbers of samples at which batches end, up to the first that is not below `n_samples`: 16, 128, 512, 1024...

    What is laid out up to a boundary depends on no later sample, so scores of that size keep their bits.
    """
    found = [n for n in SIZES.values() if n < n_samples]
    named = next((n for n in SIZES.values() if n >= n_samples), None)
    if named is not None:
        return [*found, named]
    last = max(SIZES.values())
    while last < n_samples:
        last += _STEP
        found.append(last)
    return found
