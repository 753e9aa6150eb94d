"""Candidate formats of each layer group, with their size and predicted KL, read from a store's finished cells."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter

import numpy as np
import pyarrow as pa

from sweep.config.compose import expand
from sweep.config.schema import OWN_KINDS, CalibrationConfig, StoreConfig, SweepConfig, from_record, to_plain
from sweep.core.batches import TOKEN_KINDS
from sweep.core.coverage import ModelCoverage, coverage_of
from sweep.core.errors import SweepError, require_known
from sweep.core.groups import LayerGroup
from sweep.core.sizes import n_samples_of, size_name
from sweep.core.text import count, override
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import UNQUANTIZED_BITS
from sweep.plan.model import Model, checkpoint_dir
from sweep.plan.trials import calibration_of, elements_of, recipe_of, score_version
from sweep.report.analysis import (
    FloatArray,
    float_column,
    kind_samples,
    kind_scores,
    occurring,
    sample_matrix,
    sample_predictions,
)
from sweep.report.interactions import (
    Float32Array,
    counted_projections,
    group_samples,
    interaction_weight,
    projections_of,
)
from sweep.store.records import TrialRow
from sweep.store.select import finished_trials
from sweep.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A format for every layer group, with its predicted KL in each."""

    format: GroupFormat
    cell_id: str
    predicted_kl: FloatArray  # [groups], nats per prediction; infinite where nothing was measured
    sample_kl: FloatArray | None = field(repr=False)  # [groups, samples], adds up to predicted_kl
    # [samples], predictions of each; None: not known.
    sample_predictions: FloatArray | None = field(default=None, repr=False)
    # [groups, samples, draws], root nats: see sweep.report.interactions. None: not scored by method=fisher, or by some
    # kinds of token alone.
    projections: Float32Array | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The candidate formats that were scored for one model on one data set."""

    trial: TrialRow  # one of those that the candidates come from
    config: SweepConfig  # of this trial
    groups: tuple[LayerGroup, ...]  # in the model's order
    formats: tuple[Candidate, ...]
    elements: Mapping[str, int] | None  # of the model: see SweepPlan.models; None: the store does not know them
    # Kinds of token whose scores alone are in predicted_kl; empty: all are.
    tokens: tuple[str, ...] = ()
    other_ranks: tuple[str, ...] = ()  # labels of formats that were scored on other numbers of ranks than the target's
    # Of the interactions of groups in a choice, 0 to 1, see sweep.report.interactions.interaction_weight; None: they
    # are not known, or not asked for, and a mix has the sum of its groups' KL.
    interaction_weight: float | None = None

    @property
    def weights(self) -> FloatArray:
        """[groups], elements."""
        return np.array([group.weight_elements for group in self.groups], dtype=np.float64)

    @property
    def coverage(self) -> ModelCoverage | None:
        """What the groups cover of the model's weights; None: the store does not know them."""
        if self.elements is None:
            return None
        groups = {group.name: group.weight_elements for group in self.groups}
        return coverage_of(self.elements, groups, self.trial.coverage)

    @property
    def other_bytes(self) -> float:
        """Bytes of all weights outside the covered layer groups, in 16 bits.

        These are embeddings, norms, lm_head, and a vision tower that is not covered.

        Raises: SweepError: the store does not know.
        """
        coverage = self.coverage
        if coverage is None:
            raise SweepError(
                f"The store does not know the size of {self.trial.model}: an earlier version swept it. "
                "Type --bits instead of --gb, or sweep again."
            )
        return (coverage.parameters - coverage.covered) * UNQUANTIZED_BITS / 8

    def gb(self, cost: float) -> float:
        """GB (1e9 bytes) of all weights where the covered groups take `cost` bits.

        Raises: SweepError: as `other_bytes`.
        """
        return (cost / 8 + self.other_bytes) / 1e9

    def checkpoint_bits(self, cost: float) -> float | None:
        """Mean bits of all weights where the covered groups take `cost` bits; None: the store does not know them."""
        coverage = self.coverage
        return None if coverage is None else (cost + self.other_bytes * 8) / coverage.parameters

    @property
    def covers_lm_head(self) -> bool:
        """Whether lm_head is among the groups."""
        return any(group.is_lm_head for group in self.groups)


def sized(candidates: Candidates) -> Candidates:
    """Fill in the model's size from its checkpoint where the store lacks it.

    Returned as they are if the store knows the size, or if the checkpoint is gone or has changed.
    """
    if candidates.elements is not None:
        return candidates
    try:
        model = Model(checkpoint_dir(candidates.config.model))
        if model.revision != candidates.trial.model_revision:
            return candidates
        return replace(candidates, elements=elements_of(model))
    except SweepError:  # not there any more: the store's own message says what to type
        return candidates


def kinds_typed(text: str | None) -> tuple[str, ...]:
    """Kinds of token as they are typed, ``answer,image``, in the order of TOKEN_KINDS.

    Raises: SweepError: one of them is no kind.
    """
    if text is None:
        return ()
    typed = [word.strip() for word in text.split(",")]
    for word in typed:
        require_known("kind of token in --tokens", word, TOKEN_KINDS)
    return tuple(kind for kind in TOKEN_KINDS if kind in typed)


def read_candidates(
    store: Store,
    overrides: Sequence[str],
    points: Sequence[SweepConfig] | None = None,
    tokens: tuple[str, ...] = (),
    beside: MixedRecipe | None = None,
) -> Candidates:
    """Read the candidates that a store's finished trials give, of the largest size that was scored.

    Args:
        store: read only.
        overrides: Hydra's; those that name a property of trials select them.
        points: what they compose to, if that is known.
        tokens: kinds of token whose scores alone count, see TOKEN_KINDS; none: all of them.
        beside: a recipe with whose model and samples they were scored; None: any.

    Raises: SweepError: no finished trials, or of several models, data sets, coverages or methods: one must be typed;
        or their scores are not known by kind of token, or no token is of the kinds.
    """
    points = points or expand(overrides, multirun=True).points
    asked = points[0]
    rows = finished_trials(store, overrides, [to_plain(point) for point in points])
    configs = {row.trial_id: from_record(json.loads(row.config), asked.target, asked.validation) for row in rows}
    rows, others = _of_target(_beside(beside, rows, configs, store.uri), configs)
    _check_one_kind(rows, configs)
    largest = max((row.size for row in rows), key=n_samples_of)
    rows = _of_one_revision([row for row in rows if row.size == largest], configs)
    tables = {row.cell_id: store.scores(row.cell_id) for row in rows if row.cell_id is not None}
    groups = _groups(next(iter(tables.values())))
    candidates = _by_label(rows, configs, tables, groups, tokens)
    if tokens:
        _check_occurring(tokens, rows[0], tables.values())
    formats = tuple(candidates.values())
    projections = [
        counted_projections(each.projections, each.sample_predictions)
        for each in formats
        if each.projections is not None and each.sample_predictions is not None
    ]
    n_measured = sum(bool(np.isfinite(each.predicted_kl).any()) for each in formats)
    return Candidates(
        trial=rows[0],
        config=_shared([configs[row.trial_id] for row in rows], store.uri),
        groups=groups,
        formats=formats,
        interaction_weight=interaction_weight(projections) if projections and len(projections) == n_measured else None,
        elements=store.models().get(rows[0].model_revision),
        tokens=tokens,
        other_ranks=tuple(sorted({format_of(configs[row.trial_id]).label for row in others} - candidates.keys())),
    )


def _by_label(
    rows: Sequence[TrialRow],
    configs: Mapping[str, SweepConfig],
    tables: Mapping[str, pa.Table],
    groups: tuple[LayerGroup, ...],
    tokens: tuple[str, ...],
) -> dict[str, Candidate]:
    """A candidate of each cell, by its format's label.

    Raises: SweepError: a cell covers other layer groups than `groups`.
    """
    named = {row.cell_id: row for row in reversed(rows)}  # equal trials share a cell: the first one's name counts
    candidates: dict[str, Candidate] = {}
    for row in sorted(rows, key=lambda row: row.created_at):
        if named[row.cell_id] is not row or row.cell_id is None:
            continue
        table = tables[row.cell_id]
        if _groups(table) != groups:
            raise SweepError(
                f"Cells of {row.model} cover different layer groups: {row.trial_id}, {rows[0].trial_id}. "
                "Type quant_pair=... or quant_granularity=..."
            )
        candidate = _candidate(row, configs[row.trial_id], table, tokens)
        candidates[candidate.format.label] = candidate  # the latest, where another version scored it before
    return candidates


def _beside(
    recipe: MixedRecipe | None, rows: Sequence[TrialRow], configs: Mapping[str, SweepConfig], uri: str
) -> Sequence[TrialRow]:
    """Keep the trials of a recipe's model, samples and method, if there is one. Raises: SweepError: none is left.

    Its method and draws are those of its cells, as far as they are among the rows.
    """
    if recipe is None:
        return rows
    n_samples = recipe.calibration_samples
    ranges = recipe.size if n_samples is None else size_name(n_samples)
    found: list[TrialRow] = []
    cells = {choice.cell_id for choice in recipe.groups}
    methods = {(row.method, row.draws) for row in rows if row.cell_id in cells}
    for row in rows:
        if methods and (row.method, row.draws) not in methods:
            continue
        config = configs[row.trial_id]
        format_ = format_of(config)
        alike = (row.model_revision, row.dataset_revision) == (recipe.model_revision, recipe.dataset_revision)
        if alike and (not format_.calibrates_inputs or (calibration_of(config, format_) or row.size) == ranges):
            found.append(row)
    if not found:
        raise SweepError(
            f"The store {uri} holds cells of another revision of {recipe.model}, or of other samples, than the "
            "recipe's. Type store.uri=DIR."
        )
    return found


def _of_target(rows: Sequence[TrialRow], configs: Mapping[str, SweepConfig]) -> tuple[list[TrialRow], list[TrialRow]]:
    """Trials whose inputs' ranges a token were found as the target's ranks find them, and the others.

    Args:
        rows: to part; those of formats without such ranges are every target's.
        configs: their composed configs, by trial, with the target.

    Raises: SweepError: there are no trials of the first kind.
    """
    found: list[TrialRow] = []
    for row in rows:
        config = configs[row.trial_id]
        if row.tp == config.target.tp or row.tp == recipe_of(config).format.tp:
            found.append(row)
    if not found:
        tp = configs[rows[0].trial_id].target.tp
        there = ", ".join(sorted({f"target.tp={row.tp}" for row in rows}))
        raise SweepError(
            f"Every trial of that kind in the store was scored for {there}: its inputs have a range a token and rank, "
            f"and other ones on {count(tp, 'rank')}. Type the same `sweep run` with target.tp={tp}, or solve for "
            f"{there}."
        )
    ids = {row.trial_id for row in found}
    return found, [row for row in rows if row.trial_id not in ids]


def _groups(table: pa.Table) -> tuple[LayerGroup, ...]:
    """The layer groups of a cell's rows."""
    columns = zip(*(table[name].to_pylist() for name in ("group", "modules", "weight_elements")), strict=True)
    return tuple(LayerGroup(name=name, modules=tuple(modules), weight_elements=n) for name, modules, n in columns)


def _candidate(row: TrialRow, config: SweepConfig, table: pa.Table, tokens: tuple[str, ...]) -> Candidate:
    kl, counts, projections = float_column(table, "predicted_kl"), sample_predictions(table), None
    if tokens:
        kl, samples = _of_kinds(row, config.store.uri, table, tokens)
    elif (projections := projections_of(table)) is not None and counts is not None:
        samples = group_samples(projections, counts)
    else:
        samples = _scaled(sample_matrix(table), kl, float_column(table, "score"))
    return Candidate(
        format=format_of(config),
        cell_id=row.cell_id or "",
        predicted_kl=np.where(np.isfinite(kl), kl, np.inf),
        sample_kl=samples,
        sample_predictions=counts,
        projections=projections,
    )


def _of_kinds(
    row: TrialRow, uri: str, table: pa.Table, tokens: tuple[str, ...]
) -> tuple[FloatArray, FloatArray | None]:
    """Predicted KL of some kinds of token alone: of each group, and of its samples.

    Raises: SweepError: it is not known by kind.
    """
    kl, score, by_kind = float_column(table, "predicted_kl"), float_column(table, "score"), kind_scores(table)
    if by_kind is None:
        raise _without_kinds(row, uri)
    part = by_kind[:, [TOKEN_KINDS.index(kind) for kind in tokens]].sum(1)
    samples = _scaled(kind_samples(table, tokens), kl, score)
    # A part may be negative with method=fisher, where other tokens undo more than these do: they add no KL.
    return np.where(np.isfinite(kl), np.maximum(part, 0) * _ratio(kl, score), kl), samples


def _ratio(kl: FloatArray, score: FloatArray) -> FloatArray:
    """KL of a score of 1, of each group."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(score > 0, kl / score, 0.0)


def _scaled(samples: FloatArray | None, kl: FloatArray, score: FloatArray) -> FloatArray | None:
    """Scores of samples as KL. Args: samples: [groups, samples]; kl, score: of the groups."""
    return None if samples is None else np.nan_to_num(samples * _ratio(kl, score)[:, None])


def _without_kinds(row: TrialRow, uri: str) -> SweepError:
    """The refusal of a trial whose scores are not known by kind of token."""
    why, way_out = "an older program scored it", f"store.uri=DIR, another directory than {uri}"
    if row.engine == "modelopt":
        why, way_out = "sensitivity.engine=modelopt does not tell tokens apart", "sensitivity.engine=layerwise"
    return SweepError(
        f"Scores of {row.quant_pair}/{row.quant_granularity} are not known by kind of token: {why}. "
        f"Type the same `sweep run` with {way_out}, then --tokens again; or leave --tokens out."
    )


def _check_occurring(tokens: Collection[str], row: TrialRow, tables: Iterable[pa.Table]) -> None:
    """Refuse kinds that no token of the data set is of. Raises: SweepError: names those that there are."""
    present = {kind for table in tables for kind in occurring(table)}
    if missing := [kind for kind in tokens if kind not in present]:
        there = ", ".join(kind for kind in TOKEN_KINDS if kind in present)
        raise SweepError(
            f"{row.dataset}/{row.size} has no token of kind {', '.join(missing)}. Kinds there: {there}. "
            "Type --tokens with some of those, or dataset=NAME of another data set that was scored."
        )


def format_of(config: SweepConfig) -> GroupFormat:
    """The format that a point gives to every layer group."""
    recipe = recipe_of(config)
    return GroupFormat(
        quant_pair=config.quant_pair.name,
        quant_granularity=config.quant_granularity.name,
        weight=recipe.format.weight,
        inputs=recipe.format.inputs,
        algorithm=recipe.format.algorithm,
        scales=recipe.format.scales,
        tp=recipe.format.tp,
    )


def _check_one_kind(rows: Sequence[TrialRow], configs: Mapping[str, SweepConfig]) -> None:
    """Refuse trials of different models, data or methods, whose predicted KL cannot be added up.

    Raises: SweepError: says where the trials differ.
    """

    def kind(row: TrialRow) -> tuple[str, ...]:
        config = configs[row.trial_id]
        words = {
            "model": f"{row.model} ({row.model_revision[:8]})",
            "dataset.name" if config.dataset.kind in OWN_KINDS else "dataset": row.dataset,
            "sensitivity.coverage": row.coverage,
            "sensitivity.lm_head": str(config.sensitivity.lm_head).lower(),
            "sensitivity.method": row.method,
            "sensitivity.draws": "null" if row.draws is None else str(row.draws),
            "sensitivity.engine": row.engine,
            "sensitivity.scales": config.sensitivity.scales,
            "model.dtype": config.model.dtype,
        }
        return tuple(f"{key}={value}" for key, value in words.items())

    found = (sorted(set(values)) for values in zip(*map(kind, rows), strict=True))
    if differing := [values for values in found if len(values) > 1]:
        raise SweepError(
            "The store holds trials of several kinds, whose predicted KL cannot be compared: "
            + "; ".join(" or ".join(values) for values in differing)
            + ". Type the one you mean."
        )


def _of_one_revision(rows: Sequence[TrialRow], configs: Mapping[str, SweepConfig]) -> list[TrialRow]:
    """Keep the trials of one set of samples and of the latest trial's score version.

    Versions of one format's arithmetic alone (sweep.plan.trials.score_version) are those of this program: what an
    earlier one scored otherwise is as if it had not been scored.

    Args:
        rows: of one size.
        configs: their composed configs, by trial.

    Raises: SweepError: they were scored on different sets of samples, or all by other arithmetic than this program's.
    """
    samples = {row.dataset_revision for row in rows}
    if len(samples) > 1:
        data_sets = [asdict(configs[row.trial_id].dataset) for row in rows]
        kind = str(data_sets[0]["kind"])
        option = f"dataset={kind} " if kind in OWN_KINDS else ""  # which has the keys of her own data
        differing = [_either(f"dataset.{key}", map(itemgetter(key), data_sets), option) for key in data_sets[0]]
        way_out = "; ".join(filter(None, differing)) or "a file that has changed since: sweep into another store.uri"
        raise SweepError(
            f"The store holds trials of {len(samples)} different sets of samples that are called "
            f"{rows[0].dataset}/{rows[0].size}. Type the one that you mean: {way_out}."
        )
    latest, _ = _score_version(max(rows, key=lambda row: row.created_at))
    found: list[TrialRow] = []
    for row in rows:
        config = configs[row.trial_id]
        mine = score_version(recipe_of(config).format, config.sensitivity.method)
        (shared, own), (_, now) = _score_version(row), _parted(mine)
        if (shared, own) == (latest, now):
            found.append(row)
    if not found:
        raise SweepError(
            f"The store holds no trial of {rows[0].model} that this version scored: it rounds the scales of integer "
            "weights as runtimes hold them, draws labels otherwise, or measures KL with other kernels, which those "
            "trials did not. "
            "Type the same `sweep run` again."
        )
    return found


def _either(key: str, values: Iterable[str | int | None], option: str = "") -> str | None:
    """The overrides that have each of several values, each after `option`; None: they are equal."""
    found = sorted({option + override(key, "null" if value is None else str(value)) for value in values})
    return " or ".join(found) if len(found) > 1 else None


def _shared(configs: Sequence[SweepConfig], uri: str) -> SweepConfig:
    """The config of trials: the first one's, but for the samples that found the ranges of their inputs.

    Args:
        configs: of the trials.
        uri: of the store, which may have moved since.

    Raises: SweepError: the ranges are of several numbers of samples; a recipe has one.
    """
    ranged = [config for config in configs if format_of(config).calibrates_inputs]
    found = {calibration_of(config, format_of(config)): config.calibration for config in ranged}
    if asked := _either("calibration.n_samples", [each.n_samples for each in found.values()]):
        raise SweepError(
            "The store holds trials whose ranges of the inputs were found on several numbers of samples, and a recipe "
            f"has one. Type the one that you mean: {asked}."
        )
    calibration = next(iter(found.values()), CalibrationConfig(n_samples=None))
    return replace(configs[0], store=StoreConfig(uri=uri), calibration=calibration)


def _score_version(row: TrialRow) -> tuple[str, str]:
    """The part of a trial's score version that all formats share, and that of its own format."""
    return _parted(str(json.loads(row.versions).get("score")))


def _parted(version: str) -> tuple[str, str]:
    shared, _, own = version.partition("+")
    return shared, own
