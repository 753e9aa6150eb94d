"""Selects the finished trials of a store that have the values that were typed."""

import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from sweep.core.errors import SweepError
from sweep.core.json import Json
from sweep.store.records import TrialRow
from sweep.store.store import Store

_NOT_OF_A_TRIAL = frozenset({"store", "output_layout", "cluster", "target", "validation", "grid"})


@contextmanager
def opened(uri: str) -> Generator[Store]:
    """Open a store; at the end, files that proved damaged meanwhile are named on standard error."""
    store = Store(uri)
    try:
        yield store
    finally:
        for reason in store.damage.values():
            # Standard output may be JSON.
            print(f"Set aside in {uri}/quarantine: {reason}", file=sys.stderr)  # noqa: T201


def finished_trials(store: Store, overrides: Sequence[str], points: Sequence[Mapping[str, Json]]) -> list[TrialRow]:
    """Trials that are done and have, for each key, one of the values that were typed.

    `quant_pair=wfp8_afp8,wint4_afp16` takes two pairs.

    Args:
        store: read only.
        overrides: as typed: their keys count.
        points: what they compose to, as sweep.config.schema.to_plain gives it: its values count.

    Raises: SweepError: there are none.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    wanted: dict[str, list[Json]] = {}
    for key in keys:
        if key.split(".")[0] not in _NOT_OF_A_TRIAL:
            wanted[key] = [_value(point, key) for point in points]
    done = [
        (row, msgspec.json.decode(row.config))
        for row in store.trials().values()
        if row.state == "done" and row.cell_id is not None
    ]
    if not done:
        raise SweepError(f"The store {store.uri} holds no finished trial. Type `sweep run` first, or store.uri=DIR.")
    found = [row for row, config in done if _has(config, wanted)]
    if not found:
        there = "; ".join(f"{key}={_values(key, done)}" for key in wanted)
        raise SweepError(f"The store {store.uri} holds no finished trial of that kind. It has {there}.")
    return found


def _has(config: Mapping[str, Json], wanted: Mapping[str, list[Json]]) -> bool:
    """Whether a composed config has one of the values that are wanted of each key."""
    return all(_value(config, key) in values for key, values in wanted.items())


def _values(key: str, trials: Iterable[tuple[TrialRow, Mapping[str, Json]]]) -> str:
    """Every value that trials have for a key, as a comma list."""
    return ",".join(sorted({str(_value(config, key)) for _, config in trials}))


def _value(config: Mapping[str, Json], key: str) -> Json:
    """A key's value in a composed config; of a group the option's name."""
    found: Json = config
    for word in key.split("."):
        found = found.get(word) if isinstance(found, Mapping) else None
    return found.get("name", found) if isinstance(found, Mapping) else found
