"""Speeds that were measured of a runtime on one card: those of ``conf/target``, one model in one format for all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final

import msgspec

from sweep.config.schema import TargetConfig
from sweep.core.errors import SweepError, require_known
from sweep.core.typed import hints_of

UNQUANTIZED: Final = "unquantized"  # the model as it was, among the recipes
_Positive = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of the model in one format."""

    gb: _Positive  # of weights in GPU memory, 1e9 bytes
    decode_1: _Positive  # tokens a second at batch 1
    decode_32: _Positive  # of all sequences together, at batch 32
    prefill: _Positive  # tokens a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What was measured, and on what. The runtime may be another version than the target's."""

    card: str
    runtime: str  # with its version
    model: str
    date: str  # of the measurements
    how: str  # in one line
    recipes: Mapping[str, Speed]  # by "pair/granularity", and `UNQUANTIZED`


def speeds_of(config: TargetConfig) -> Speeds | None:
    """A target's speeds; None: none were measured.

    Raises: SweepError: an unknown key or recipe (with the nearest spelling), a value that is missing, no text or no
        number above 0, or nothing to compare with.
    """
    if not config.speeds:
        return None
    where = f"speeds of target {config.name!r}"
    for key in config.speeds:
        require_known(f"key in {where}", key, hints_of(Speeds))
    rows = config.speeds.get("recipes", {})
    for name, row in {}.items() if isinstance(rows, str) else rows.items():
        require_known(f"recipe in {where}", name, [UNQUANTIZED, *config.recipes])
        for key in row:
            require_known(f"key of {name} in {where}", key, hints_of(Speed))
    try:
        speeds = msgspec.convert(config.speeds, Speeds)
    except msgspec.ValidationError as error:
        needed = ", ".join(hints_of(Speed))
        raise SweepError(f"The {where}: {error}. Type texts, and for each recipe numbers above 0: {needed}.") from None
    if UNQUANTIZED not in speeds.recipes:
        raise SweepError(f"The {where} lack {UNQUANTIZED!r}, with which the others are compared. Type its numbers.")
    return speeds
