"""The rows that the store keeps: their columns, their types, their versions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal, get_args, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sweep.core.batches import TOKEN_KINDS
from sweep.core.coverage import ModelCoverage, coverage_of
from sweep.core.sample_kl import counted_kl

# Each schema names its version. A reader refuses a newer one and upgrades an older one.
SCHEMA_VERSION = 1  # of validations and answers; 1: first layout
# 2: scores by kind of token, and predictions a sample; before, a row had its score and that of each sample.
# 3: projections, of method=fisher.
SCORES_VERSION = 3
# 2: algorithm, scales and dtype are columns; before, the config named the first two, and the trial id hid the third.
# 3: tp is a column; before, all ranges a token were found over all inputs.
# 4: calibration is a column; before, ranges were found by the samples that were scored.
# 5: draws is a column, of method=fisher.
TRIALS_VERSION = 5

UNKNOWN: Final = "unknown"  # shown for an attribute that an older program has not recorded

TrialState = Literal["planned", "running", "done", "failed", "skipped"]

# One row a (cell, layer group). Users rely on these columns.
SCORES_SCHEMA = pa.schema(
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),  # first module of the group, as ModelOpt names it
        pa.field("modules", pa.list_(pa.string()), nullable=False),
        pa.field("layer_index", pa.int32()),  # NULL outside decoder blocks
        # Sum over tokens and outputs of (dLoss/dy * dy)^2; of method=fisher the sum over samples of the mean square of
        # their projections; NULL: never called.
        pa.field("score", pa.float64()),
        pa.field("sensitivity", pa.float64()),  # score / n_predictions
        # score / (2 n_predictions), nats per prediction; of method=fisher what counts of it, see sweep.core.sample_kl.
        pa.field("predicted_kl", pa.float64()),
        pa.field("n_predictions", pa.int64(), nullable=False),  # positions whose next token is valid
        pa.field("n_samples", pa.int32(), nullable=False),
        pa.field("weight_elements", pa.int64(), nullable=False),
        pa.field("effective_bits", pa.float64(), nullable=False),  # bits a weight, block scales counted
        pa.field("output_rel_error", pa.float64()),  # sqrt(sum dy^2 / sum y^2), pooled over the group's modules
        pa.field("output_sqnr_db", pa.float64()),  # -20 log10(output_rel_error); NULL: no error at all
        pa.field("weight_rel_error", pa.float64()),  # sqrt(sum dW^2 / sum W^2)
        pa.field("input_amax", pa.float64()),  # largest |x| over the calibration tokens
        pa.field("sample_scores", pa.list_(pa.float32())),  # one a sample, in data set order; sums to `score`
        pa.field("sample_predictions", pa.list_(pa.int32())),  # one a sample; sums to `n_predictions`
        # The score by kind of the input token at whose position g and dy are taken, see sweep.core.batches.TOKEN_KINDS;
        # they sum to `score`. NULL: scored by ModelOpt, or by an older program. Of method=fisher a part is the mean of
        # that kind's projection times the whole one, and negative where it undoes what other kinds do.
        *(pa.field(f"score_{kind}", pa.float64()) for kind in TOKEN_KINDS),
        pa.field("score_top_token", pa.float64()),  # largest of a single position; NULL as well where it is not known
        # The samples' scores by kind, as `sample_scores`; NULL: all 0. What is left of those is the prompt's.
        *(pa.field(f"sample_scores_{kind}", pa.list_(pa.float32())) for kind in TOKEN_KINDS if kind != "prompt"),
        # Of method=fisher, [samples x draws], the draws of a sample side by side: the sum over tokens, outputs and
        # modules of dLoss/dy * dy, signed, under labels that the model draws. The square of the sum of several groups'
        # is what the mix of their formats scores. NULL: another method.
        pa.field("projections", pa.list_(pa.float32())),
    ],
    metadata={"schema_version": str(SCORES_VERSION)},
)


def per_prediction(
    score: float | None, samples: npt.NDArray[np.float64] | None, n_predictions: Sequence[int], method: str
) -> dict[str, float | None]:
    """The columns `score`, `sensitivity` and `predicted_kl` of a row of SCORES_SCHEMA.

    Args:
        score: None: never called.
        samples: [samples], which add up to it; None: not known, or never called.
        n_predictions: of each sample.
        method: gradient, fisher or kl_div.
    """
    if score is None:
        return {"score": None, "sensitivity": None, "predicted_kl": None}
    n = sum(n_predictions)
    predicted_kl = score / (n if method == "kl_div" else 2 * n)
    if method == "fisher" and samples is not None:
        beyond = samples / 2 - counted_kl(samples / 2, np.array(n_predictions, dtype=np.float64))
        predicted_kl -= float(beyond.sum()) / n
    return {"score": score, "sensitivity": score / n, "predicted_kl": predicted_kl}


# One row a sample of one validation: `<store>/validations/<id>.parquet`.
# Answers that the unquantized model wrote: one row a conversation of a chunk, see workers.model.answers.
ANSWERS_SCHEMA = pa.schema(
    [
        pa.field("chunk_id", pa.string(), nullable=False),  # hash of the model, the prompts and how it writes
        pa.field("conversation", pa.int32(), nullable=False),  # of the chunk, in data set order
        pa.field("answer", pa.string(), nullable=False),
        pa.field("is_cut", pa.bool_(), nullable=False),  # it had not ended after dataset.answer_tokens
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)

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


# A trial's attributes that tables, titles and manifests name, in this order: columns of TrialRow, with their key in the
# config. Its `dtype` may be auto there; the column has the one that the model computed in.
RECIPE: Final = {
    "quant_pair": "quant_pair.name",
    "quant_granularity": "quant_granularity.name",
    "algorithm": "sensitivity.quant_algorithm",
    "scales": "sensitivity.scales",
    "dtype": "model.dtype",
}
ATTRIBUTES: Final = {
    "model": "model.name",
    "dataset": "dataset.name",
    "size": "dataset.size",
    "coverage": "sensitivity.coverage",
    "method": "sensitivity.method",
    "engine": "sensitivity.engine",
    **RECIPE,
}
NUMBERS: Final = ("tp", "calibration", "draws")  # columns of TrialRow that few trials have, beside these
VARIANT: Final = tuple(RECIPE)[2:]  # what distinguishes trials of one pair and granularity
# Values that go without saying in published paths, which older programs wrote without these attributes.
USUAL: Final = {"algorithm": "max", "scales": "private"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRow:
    """One event of one trial: a row of ``<store>/trials/*.parquet``."""

    trial_id: str
    cell_id: str | None  # None: no valid recipe
    model: str
    model_revision: str  # hash of weight files and config.json
    dataset: str
    dataset_revision: str  # hash of every tensor fed to the model
    size: str
    coverage: str
    method: str
    engine: str
    quant_pair: str
    quant_granularity: str
    algorithm: str  # ModelOpt's calibration algorithm
    scales: str  # whether the linears of a layer group share their per-tensor scales: fused, private
    dtype: str | None  # that the model computed in: float32, bfloat16; None: an older program has not recorded it
    tp: int = 1  # ranks that each find the inputs' range of a token; 1 for formats without one: see Format.on_ranks
    # Leading samples that find ranges and scales of the inputs; None: those that are scored, or it has none to find.
    calibration: int | None = None
    draws: int | None = None  # of method=fisher: labels drawn at each prediction
    state: TrialState
    reason: str | None  # why it failed or was skipped
    config: str  # composed config, JSON
    versions: str  # JSON
    created_at: datetime  # UTC, of this event; the latest wins
    run_id: str

    @property
    def recipe(self) -> tuple[str, ...]:
        """Its values of RECIPE, as tables show them."""
        return tuple(getattr(self, name) or UNKNOWN for name in RECIPE)

    @property
    def variant(self) -> list[str]:
        """Values that do not go without saying: ``["mse", "fused", "tp8"]``."""
        found = [value for name, usual in USUAL.items() if (value := getattr(self, name)) != usual]
        return [*found, *(word.replace(" ", "") for word in self._own_words)]

    @property
    def title(self) -> str:
        """``tiny, wfp8_afp8, default, algorithm max, scales private, dtype float32``, and what few trials have."""
        pair, granularity, *others = self.recipe
        named = (f"{name} {value}" for name, value in zip(VARIANT, others, strict=True))
        return ", ".join([self.model, pair, granularity, *named, *self._own_words])

    @property
    def _own_words(self) -> list[str]:
        """What few trials have: ``tp 8``, ``calibration 512``, ``draws 8``."""
        numbers = {"tp": self.tp if self.tp > 1 else None, "calibration": self.calibration, "draws": self.draws}
        return [f"{name} {number}" for name, number in numbers.items() if number is not None]

    @property
    def setting(self) -> str:
        """The attributes that the formats of a mix share: ``tiny, texts/large, scales fused, dtype float32``."""
        return f"{self.model}, {self.dataset}/{self.size}, {self.variant_words}"

    @property
    def variant_words(self) -> str:
        """``scales fused, dtype float32``."""
        return f"scales {self.scales}, dtype {self.dtype or UNKNOWN}"


_COLUMNS: Final[dict[object, pa.DataType]] = {
    datetime: pa.timestamp("us", tz="UTC"),
    int: pa.int32(),
    int | None: pa.int32(),
}
TRIALS_SCHEMA = pa.schema(
    [
        pa.field(
            name,
            _COLUMNS.get(hint, pa.string()),
            nullable=type(None) in get_args(hint),
        )
        for name, hint in get_type_hints(TrialRow).items()
    ],
    metadata={"schema_version": str(TRIALS_VERSION)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedTrial:
    """A trial that is done, with the rows of its cell (SCORES_SCHEMA, sorted by position in the model)."""

    trial: TrialRow
    scores: pa.Table
    elements: Mapping[str, int] | None = None  # of the model, see RunRecord.models; None: the store does not know them

    @property
    def weights(self) -> ModelCoverage | None:
        """What the cell covers of the model's weights; None: not known."""
        if self.elements is None:
            return None
        groups = zip(self.scores["group"].to_pylist(), self.scores["weight_elements"].to_pylist(), strict=True)
        return coverage_of(self.elements, dict(groups), self.trial.coverage)


class RunRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A run's heartbeat, ``<store>/runs/<id>.json``: whatever may differ between equal runs. None: not known (yet)."""

    run_id: str | None = None
    host: str | None = None
    pid: int | None = None
    started_at: str | None = None  # ISO, UTC, to the second, as all times here
    trials: int | None = None  # of the grid
    models: dict[str, dict[str, int]] = {}  # elements of each, by revision: see sweep.plan.trials.SweepPlan
    workers: int | None = None
    ray_address: str | None = None  # host:port
    dashboard_url: str | None = None
    metrics: list[str] = []  # host:port of each endpoint
    heartbeat_at: str | None = None
    groups_done: int | None = None  # layer groups over all cells, those found in the store included
    groups_total: int | None = None
    groups_per_second: float | None = None
    eta_seconds: float | None = None
    scoring_seconds: float | None = None  # since the workers were ready
    worker_info: list[dict[str, str | int | float | None]] = []  # see workers.service.actor.Worker.info
    ended_at: str | None = None
    exit_code: int | None = None

    def __post_init__(self) -> None:
        if self.heartbeat_at is not None and self.beat.tzinfo is None:
            raise ValueError(f"heartbeat_at is {self.heartbeat_at}, without a time zone")

    @property
    def beat(self) -> datetime:
        """When the run last gave a sign of life; long ago if it never has."""
        return datetime.fromisoformat(self.heartbeat_at or "0001-01-01T00:00+00:00")

    def is_alive(self, seconds: float) -> bool:
        """Whether it has not ended, and its last heartbeat is younger than that."""
        return self.ended_at is None and (datetime.now(UTC) - self.beat).total_seconds() < seconds
