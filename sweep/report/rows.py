"""The content of one trial's report, before it is text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa

from sweep.config.targets import served_as
from sweep.core.batches import TOKEN_KINDS
from sweep.core.coverage import ModelCoverage
from sweep.core.groups import short_group
from sweep.core.json import Json
from sweep.report.analysis import (
    FloatArray,
    RankStability,
    Summary,
    bootstrap_interval,
    float_column,
    kind_scores,
    occurring,
    ranked_scores,
    ranking,
    sample_matrix,
    sample_predictions,
    score_shares,
    split_half_stability,
    summarize,
)
from sweep.report.interactions import (
    Float32Array,
    counted_projections,
    group_samples,
    joint_samples,
    projections_of,
    strongest_pairs,
)
from sweep.store.records import FinishedTrial, TrialRow

_PAIRS: Final = 10  # of groups, in a report


@dataclass(frozen=True, slots=True, kw_only=True)
class CoveredGroup:
    """One layer group; alone if it was never called on the samples. Its fields are keys of the JSON report."""

    layer: str  # first module of the group
    modules: list[str]
    layer_index: int | None

    @property
    def name(self) -> str:
        """As people call it: ``layers.6.self_attn.q/k/v_proj``."""
        return short_group(self.layer, self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup(CoveredGroup):
    """One layer group that was measured. Units as in SCORES_SCHEMA."""

    rank: int  # 1: most sensitive
    score: float
    sensitivity: float
    sensitivity_interval: list[float] | None = None  # 90 %, if other samples had been drawn; None: no per-sample scores
    predicted_kl: float
    predicted_kl_interval: list[float] | None = None
    share: float  # of the total score, 0..1
    output_rel_error: float | None
    output_sqnr_db: float | None
    weight_rel_error: float | None
    input_amax: float | None
    weight_elements: int
    num_bits: float  # effective bits a weight
    size_cost: float  # weights of the group in 16-bit units
    # Parts of the score by kind of token, 0..1, of kinds that the samples have; None: not known.
    token_shares: dict[str, float] | None = None
    top_token_share: float | None = None  # of the single position with the largest part


class GroupPair(msgspec.Struct, frozen=True, kw_only=True):
    """Two layer groups whose errors add up or undo each other."""

    first: str  # first module of the group
    second: str
    names: tuple[str, str]  # short
    predicted_kl: float  # of both together beyond the sum of each alone, nats per prediction
    standard_error: float  # of it, over samples
    correlation: float  # of their projections


class Interactions(msgspec.Struct, frozen=True, kw_only=True):
    """What the errors of all layer groups have to do with each other under one recipe."""

    predicted_kl: float  # of all groups quantized at once, nats per prediction
    pairs: list[GroupPair]  # those that stand out of the samples' noise, strongest first


class Pair(msgspec.Struct, frozen=True):
    """Number formats of a quant pair, as a trial's config names them."""

    weight: str | None = None
    activation: str | None = None
    format_name: str | None = None  # ModelOpt preset that it starts from


class _Config(msgspec.Struct):
    quant_pair: Pair = Pair()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The content that Markdown and JSON reports share."""

    trial: TrialRow
    pair: Pair
    config: dict[str, Json]
    versions: dict[str, str]
    served_as: dict[str, dict[str, str | None]]  # by target
    rows: list[ScoredGroup]  # most sensitive first
    not_measured: list[CoveredGroup]
    summary: Summary
    weights: ModelCoverage | None  # what the cell covers of the model; None: the store does not know
    total_interval: list[float] | None
    interactions: Interactions | None  # None: the method does not know them
    token_shares: dict[str, float] | None  # of the trial's total score, as of each group's
    stability: RankStability | None

    def section(self, name: str) -> Mapping[str, Json]:
        """A section of the config; empty where there is none."""
        node = self.config.get(name)
        return node if isinstance(node, Mapping) else {}


def analyse(finished: FinishedTrial) -> Report:
    """Rank a finished trial's rows, with intervals and stability where per-sample scores were kept."""
    scores, trial = finished.scores, finished.trial
    score = ranked_scores(scores)
    summary = summarize(scores)
    samples = sample_matrix(scores)
    projections, counts = projections_of(scores), sample_predictions(scores)
    counted = None if projections is None or counts is None else group_samples(projections, counts)
    if counted is not None:
        counted[~np.isfinite(score)] = np.nan  # never called
    interval, kl_interval = None, np.empty(0)
    if samples is not None and summary.n_predictions > 0:
        interval = _intervals(finished, samples, summary.n_predictions)
        if counted is None:
            kl_interval = interval * ratio(
                np.nansum(float_column(scores, "predicted_kl")), np.nansum(float_column(scores, "sensitivity"))
            )
        else:
            kl_interval = _intervals(finished, counted * summary.n_predictions, summary.n_predictions)
    shares = score_shares(score)
    kinds, by_kind = occurring(scores), kind_scores(scores)
    rows: list[ScoredGroup] = []
    not_measured: list[CoveredGroup] = []
    by_sample = ("sample_", "projections")
    table = scores.select([name for name in scores.column_names if not name.startswith(by_sample)]).to_pylist()
    for i in ranking(score).tolist():
        finite = {key: value for key, value in table[i].items() if not isinstance(value, float) or math.isfinite(value)}
        row = dict.fromkeys(table[i]) | finite | {"layer": table[i]["group"]}
        if row["score"] is None:
            not_measured.append(msgspec.convert(row, CoveredGroup))
            continue
        known = {"rank": len(rows) + 1, "share": float(shares[i]), "num_bits": row["effective_bits"], "size_cost": 0.0}
        group = msgspec.convert(row | known, ScoredGroup)
        group = replace(group, size_cost=group.weight_elements * group.num_bits / 16)
        if by_kind is not None and group.score > 0:
            top = None if row["score_top_token"] is None else row["score_top_token"] / group.score
            group = replace(group, token_shares=_token_shares(by_kind[i], kinds), top_token_share=top)
        if interval is not None:
            ends, kl_ends = _rounded(interval[:, i]), _rounded(kl_interval[:, i])
            group = replace(group, sensitivity_interval=ends, predicted_kl_interval=kl_ends)
        rows.append(group)
    return Report(
        trial=trial,
        pair=pair_of(trial),
        config=portable_config(trial),
        versions=msgspec.json.decode(trial.versions, type=dict[str, str]),
        served_as=served_as_of(trial),
        rows=rows,
        not_measured=not_measured,
        summary=summary,
        weights=finished.weights,
        total_interval=None if interval is None else _rounded(kl_interval[:, -1]),
        interactions=None if projections is None else _interactions(scores, projections),
        token_shares=None if by_kind is None or not kinds else _token_shares(np.nansum(by_kind, axis=0), kinds),
        stability=None if samples is None else split_half_stability(samples if counted is None else counted),
    )


def _intervals(finished: FinishedTrial, samples: FloatArray, n_predictions: int) -> FloatArray:
    """[2, groups + 1], per prediction; the last is of their sum. Args: samples: [groups, samples]."""
    with_total = np.vstack([samples, np.nansum(samples, axis=0)])
    counts = sample_predictions(finished.scores)
    seed = finished.trial.cell_id or ""
    return bootstrap_interval(with_total, n_predictions if counts is None else counts, seed)


def _interactions(scores: pa.Table, projections: Float32Array) -> Interactions:
    counts = sample_predictions(scores)
    assert counts is not None
    groups: list[str] = scores["group"].to_pylist()
    modules: list[list[str]] = scores["modules"].to_pylist()
    pairs: list[GroupPair] = []
    for pair in strongest_pairs(counted_projections(projections, counts), _PAIRS):
        first, second = groups[pair.first], groups[pair.second]
        pairs.append(
            GroupPair(
                first=first,
                second=second,
                names=(short_group(first, modules[pair.first]), short_group(second, modules[pair.second])),
                predicted_kl=pair.kl,
                standard_error=pair.standard_error,
                correlation=pair.correlation,
            )
        )
    return Interactions(predicted_kl=float(joint_samples([*projections], counts).sum()), pairs=pairs)


def served_as_of(trial: TrialRow) -> dict[str, dict[str, str | None]]:
    """How every target runs the trial's recipe, whichever target it was run for."""
    return served_as(trial.quant_pair, trial.quant_granularity, trial.algorithm)


def pair_of(trial: TrialRow) -> Pair:
    """The number formats of a trial's pair; None: its config does not say them."""
    return msgspec.json.decode(trial.config, type=_Config).quant_pair


def portable_config(trial: TrialRow) -> dict[str, Json]:
    """The composed config without the values that may differ between equal runs.

    Leaves out `store`, `cluster`, `output_layout` and `target`; an absolute path keeps only its last part.
    """
    config = msgspec.json.decode(trial.config, type=dict)
    left_out = ("store", "cluster", "output_layout", "target")
    return {key: _portable(value) for key, value in config.items() if key not in left_out}


def _portable(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~")) or value[1:3] in (":\\", ":/")):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value


def ratio(part: float, whole: float) -> float:
    """Part of the whole; 0 of nothing."""
    return float(part / whole) if whole else 0.0


def _token_shares(by_kind: FloatArray, kinds: Sequence[str]) -> dict[str, float]:
    """Args: by_kind: scores, one a kind of TOKEN_KINDS. kinds: those to name."""
    parts = zip(TOKEN_KINDS, (by_kind / by_kind.sum()).tolist(), strict=True)
    return {kind: part for kind, part in parts if kind in kinds}


def _rounded(values: FloatArray) -> list[float]:
    # Six digits: the last ones of a matrix product differ between machines.
    return [float(f"{value:.6g}") for value in values.tolist()]
