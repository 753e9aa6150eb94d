"""The rows that the store keeps: their columns, their types, their versions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import pyarrow as pa

# 1: first layout. A reader refuses a newer one and upgrades an older one.
SCHEMA_VERSION = 1

# By version: the function that makes a file's rows those of the next version. Scores and trials count together; a
# table's columns tell which it is.
UPGRADES: Final[dict[int, Callable[[pa.Table], pa.Table]]] = {}

TrialState = Literal["planned", "running", "done", "failed", "skipped"]

# One row a (cell, layer group). Users rely on these columns.
SCORES_SCHEMA = pa.schema(
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # first module of the group, as ModelOpt names it
        pa.field("modules", pa.list_(pa.string()), nullable=False),
        pa.field("layer_index", pa.int32()),  # NULL outside decoder blocks
        pa.field("score", pa.float64()),  # sum over tokens and outputs of (dLoss/dy * dy)^2; NULL: never called
        pa.field("sensitivity", pa.float64()),  # score / n_predictions
        pa.field("predicted_kl", pa.float64()),  # score / (2 n_predictions), nats per prediction
        pa.field("n_predictions", pa.int64(), nullable=False),  # positions whose next token is valid
        pa.field("n_samples", pa.int32(), nullable=False),
        pa.field("weight_elements", pa.int64(), nullable=False),
        pa.field("effective_bits", pa.float64(), nullable=False),  # bits a weight, block scales counted
        pa.field("output_rel_error", pa.float64()),  # sqrt(sum dy^2 / sum y^2), pooled over the group's modules
        pa.field("output_sqnr_db", pa.float64()),  # -20 log10(output_rel_error); NULL: no error at all
        pa.field("weight_rel_error", pa.float64()),  # sqrt(sum dW^2 / sum W^2)
        pa.field("input_amax", pa.float64()),  # largest |x| over the calibration tokens
        pa.field("sample_scores", pa.list_(pa.float32())),  # one a sample, in data set order; sums to `score`
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)

TRIALS_SCHEMA = pa.schema(
    [
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("cell_id", pa.string()),  # NULL: no valid recipe
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_revision", pa.string(), nullable=False),  # hash of weight files and config.json
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("dataset_revision", pa.string(), nullable=False),  # hash of every tensor fed to the model
        pa.field("size", pa.string(), nullable=False),
        pa.field("coverage", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("engine", pa.string(), nullable=False),
        pa.field("quant_pair", pa.string(), nullable=False),
        pa.field("quant_granularity", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("reason", pa.string()),  # why it failed or was skipped
        pa.field("config", pa.string(), nullable=False),  # composed config, JSON
        pa.field("versions", pa.string(), nullable=False),  # JSON
        pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),  # of this event; the latest wins
        pa.field("run_id", pa.string(), nullable=False),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


# One row a sample of one validation: `<store>/validations/<id>.parquet`.
VALIDATIONS_SCHEMA = pa.schema(
    [
        pa.field("recipe", pa.string(), nullable=False),  # name
        pa.field("model_revision", pa.string(), nullable=False),
        pa.field("held_out", pa.string(), nullable=False),  # hash of every tensor of the samples measured on
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("effective_bits", pa.float64(), nullable=False),  # mean bits a weight of the covered groups
        pa.field("predicted_kl", pa.float64(), nullable=False),  # nats per prediction
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("kl", pa.float64(), nullable=False),  # KL(unquantized || quantized), nats, summed over predictions
        pa.field("loss_change", pa.float64(), nullable=False),  # nats, summed over predictions
        pa.field("n_predictions", pa.int64(), nullable=False),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One event of one trial: a row of ``<store>/trials/*.parquet``. Fields as in TRIALS_SCHEMA."""

    trial_id: str
    cell_id: str | None
    model: str
    model_revision: str
    dataset: str
    dataset_revision: str
    size: str
    coverage: str
    method: str
    engine: str
    quant_pair: str
    quant_granularity: str
    state: TrialState
    reason: str | None
    config: str
    versions: str
    created_at: Any  # datetime, UTC
    run_id: str

    @classmethod
    def from_mapping(cls, row: dict[str, Any]) -> Self:
        """A row as pyarrow gives it; columns that this version does not know are dropped."""
        return cls(**{name: row[name] for name in TRIALS_SCHEMA.names})


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTrial:
    """A trial that is done, with the rows of its cell (SCORES_SCHEMA, sorted by position in the model)."""

    trial: TrialRow
    scores: pa.Table
