"""Rows that earlier versions of this program wrote, as those of today."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa

from sweep.core.json import Json
from sweep.store.records import SCORES_SCHEMA, TRIALS_SCHEMA


class _Model(msgspec.Struct):
    dtype: str = "auto"


class _Sensitivity(msgspec.Struct):
    lm_head: bool = False
    quant_algorithm: str = "max"  # all that there was before the key, as below
    scales: str = "private"


class _Config(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)
    sensitivity: _Sensitivity = msgspec.field(default_factory=_Sensitivity)


def unrecorded(trial: Mapping[str, Json], config: Json) -> dict[str, str | None]:
    """Algorithm, scales and dtype of a trial of version 1, which kept the first two in its config alone.

    The dtype is the one with which the trial's identity has the hash that ends its id; None: neither, as in rows that
    no run has made.

    Args:
        trial: its columns.
        config: its composed config.

    Raises: msgspec.ValidationError: that is no config of this program.
    """
    known = msgspec.convert(config, _Config)
    algorithm, scales, dtype = known.sensitivity.quant_algorithm, known.sensitivity.scales, known.model.dtype
    variant = [value for value in (algorithm, scales) if value not in ("max", "private")]

    def is_right(dtype: str) -> bool:
        names = ("model", "model_revision", "dataset_revision", "dataset", "size", "quant_pair", "quant_granularity")
        asked = [*(trial.get(name) for name in names), trial.get("coverage"), known.sensitivity.lm_head]
        asked += [trial.get("method"), trial.get("engine"), dtype, trial.get("cell_id"), *variant]
        return str(trial.get("trial_id")).endswith(f"-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:10]}")

    found = [dtype] if dtype != "auto" else [each for each in ("float32", "bfloat16") if is_right(each)]
    return {"algorithm": algorithm, "scales": scales, "dtype": found[0] if found else None}


def _trials_2(table: pa.Table) -> pa.Table:
    """Trials of version 1 with columns for their algorithm, scales and dtype."""
    rows = table.drop_columns(["created_at", "versions"]).to_pylist()
    added = [unrecorded(row, msgspec.json.decode(row["config"])) for row in rows]
    for name in ("algorithm", "scales", "dtype"):
        table = table.append_column(TRIALS_SCHEMA.field(name), _texts([row[name] for row in added]))
    return table.select([name for name in TRIALS_SCHEMA.names if name not in ("tp", "calibration", "draws")])


def _trials_3(table: pa.Table) -> pa.Table:
    """Trials of version 2 with a column for their ranks: one."""
    ones = pa.repeat(pa.scalar(1, pa.int32()), len(table))
    table = table.append_column(TRIALS_SCHEMA.field("tp"), ones)
    return table.select([name for name in TRIALS_SCHEMA.names if name not in ("calibration", "draws")])


def _trials_4(table: pa.Table) -> pa.Table:
    """Trials of version 3 with a column for the samples that calibrate: those that are scored."""
    table = table.append_column(TRIALS_SCHEMA.field("calibration"), pa.nulls(len(table), pa.int32()))
    return table.select([name for name in TRIALS_SCHEMA.names if name != "draws"])


def _trials_5(table: pa.Table) -> pa.Table:
    """Trials of version 4 with a column for the labels that they drew: none."""
    nothing = pa.nulls(len(table), pa.int32())
    return table.append_column(TRIALS_SCHEMA.field("draws"), nothing).select(TRIALS_SCHEMA.names)


def _texts(values: Sequence[str | None]) -> pa.Array:
    """A column of texts, without `pa.array`, which imports pandas: a quarter of a second."""
    content = [(value or "").encode() for value in values]
    ends = np.cumsum([0, *map(len, content)], dtype=np.int32)
    known = np.packbits([value is not None for value in values], bitorder="little")
    return pa.StringArray.from_buffers(len(values), *map(pa.py_buffer, (ends, b"".join(content), known)))


def _scores_2(table: pa.Table) -> pa.Table:
    """Scores of version 1 with columns for kinds of tokens, and for the samples' predictions: not known."""
    return _with_nulls(table, [name for name in SCORES_SCHEMA.names if name != "projections"])


def _scores_3(table: pa.Table) -> pa.Table:
    """Scores of version 2 with a column for projections: none."""
    return _with_nulls(table, SCORES_SCHEMA.names)


def _with_nulls(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The columns of a table of scores that have these names, NULL where it lacks them."""
    for field in map(SCORES_SCHEMA.field, names):
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(names)


# By a table's first column and version: the function that makes its rows those of the next version.
UPGRADES: Final[dict[tuple[str, int], Callable[[pa.Table], pa.Table]]] = {
    ("trial_id", 1): _trials_2,
    ("trial_id", 2): _trials_3,
    ("trial_id", 3): _trials_4,
    ("trial_id", 4): _trials_5,
    ("cell_id", 1): _scores_2,
    ("cell_id", 2): _scores_3,
}
