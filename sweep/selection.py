"""Which finished trials of a store a command is about: those that have the values that were typed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sweep.compose import expand
from sweep.config import to_plain
from sweep.errors import SweepError
from sweep.records import TrialRow
from sweep.store import Store

_NOT_OF_A_TRIAL = frozenset({"store", "output_layout", "cluster", "target", "validation", "grid"})


def finished_trials(store: Store, overrides: Sequence[str]) -> list[TrialRow]:
    """Trials that are done and have one of the values that were typed for each key: `quant_pair=wfp8_afp8,wint4_afp16` takes two pairs.

    Raises: SweepError: there are none, or an override is wrong.
    """
    points = [to_plain(point) for point in expand(overrides, multirun=True).points]
    keys = [override.partition("=")[0].strip() for override in overrides]
    wanted = {key: [_value(point, key) for point in points] for key in keys if key.split(".")[0] not in _NOT_OF_A_TRIAL}
    done = [row for row in store.trials().values() if row.state == "done" and row.cell_id is not None]
    if not done:
        raise SweepError(f"The store {store.uri} holds no finished trial. Type `sweep run` first, or store.uri=DIR.")
    found = [row for row in done if all(_value(json.loads(row.config), key) in values for key, values in wanted.items())]
    if not found:
        there = {key: sorted({str(_value(json.loads(row.config), key)) for row in done}) for key in wanted}
        raise SweepError(
            f"The store {store.uri} holds no finished trial of that kind. It has " + "; ".join(f"{key}={','.join(there[key])}" for key in there) + "."
        )
    return found


def _value(config: Mapping[str, Any], key: str) -> Any:
    """A key's value in a composed config; of a group the option's name."""
    found: Any = config
    for word in key.split("."):
        found = found.get(word) if isinstance(found, Mapping) else None
    return found.get("name", found) if isinstance(found, Mapping) else found
