"""A recipe's KL and change of loss, measured on samples that neither calibrated nor scored, and kept in the store."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from sweep.config.compose import dataset_of
from sweep.config.schema import DatasetConfig, SweepConfig
from sweep.core.batches import Plan, Sample
from sweep.core.errors import SweepError
from sweep.core.json import Json
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import Quantizer
from sweep.mixed_precision.candidates import Candidates
from sweep.mixed_precision.checks import check_recipe
from sweep.mixed_precision.recipe import recipe_of_choice
from sweep.mixed_precision.recipe_context import RecipeContext, load_model
from sweep.plan.own_samples import Writing
from sweep.plan.samples import samples_of
from sweep.plan.trials import Device
from sweep.report.analysis import FloatArray, bootstrap_interval
from sweep.store.records import VALIDATIONS_SCHEMA
from sweep.store.store import Store

if TYPE_CHECKING:
    from workers.scoring.validation import MeasuredKl

VALIDATION_VERSION: Final = 1
_MEASURED: Final[tuple[str, ...]] = ("measured KL", "measured / predicted", "loss change")  # columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Predicted and measured KL of one recipe, in nats per prediction."""

    name: str
    kind: str  # recipe, uniform, random, group
    effective_bits: float  # mean bits a weight of the covered groups
    dataset: str  # measured on: its file's name, or its own
    calibrated: bool  # whether other samples of that data set calibrated
    predicted_kl: float
    measured_kl: float
    measured_kl_interval: tuple[float, float]  # 90 % bootstrap over samples
    loss_change: float
    loss_change_interval: tuple[float, float]
    n_samples: int
    n_predictions: int
    recipe: str = field(repr=False)  # hash of its content


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Samples of one data set to measure on."""

    name: str  # of the file, or of the data set
    samples: Sequence[Sample]
    calibrated: bool  # whether other samples of the data set calibrated


def uniform_recipes(candidates: Candidates) -> list[MixedRecipe]:
    """A recipe with one format for all groups, for each format that was measured in every group."""
    n = len(candidates.groups)
    whole = [
        (i, candidate) for i, candidate in enumerate(candidates.formats) if np.isfinite(candidate.predicted_kl).all()
    ]
    return [
        recipe_of_choice(candidates, np.full(n, i), f"uniform {candidate.format.label}", None) for i, candidate in whole
    ]


def random_mixes(candidates: Candidates, n_mixes: int) -> list[MixedRecipe]:
    """Recipes with a random format, or 16 bits, in each group; the same for the same candidates."""
    labels = "|".join(candidate.format.label for candidate in candidates.formats)
    rng = np.random.default_rng(
        list(hashlib.sha256(f"{candidates.trial.model_revision}|{labels}".encode()).digest()[:8])
    )
    measured = np.stack([np.isfinite(candidate.predicted_kl) for candidate in candidates.formats], axis=1)
    mixes: list[MixedRecipe] = []
    for number in range(n_mixes):
        choice = rng.integers(0, len(candidates.formats) + 1, len(candidates.groups))
        choice = np.where(
            np.append(measured, np.ones((len(choice), 1), dtype=bool), axis=1)[np.arange(len(choice)), choice],
            choice,
            len(candidates.formats),
        )
        mixes.append(recipe_of_choice(candidates, choice, f"random {number + 1}", None))
    return mixes


def validate(context: RecipeContext, recipes: Sequence[tuple[str, MixedRecipe]], device: Device) -> list[Measured]:
    """Measure recipes of one model on samples that none of them has seen.

    Args:
        context: the model, its samples and the store.
        recipes: with their kinds; all of the context's model, data set and size.
        device: that the model runs on.

    Returns: a row for each data set of the first recipe, then of the second...
    """
    found: list[list[Measured]] = []
    for held, tables in measured_samples(context, [recipe for _, recipe in recipes], device):
        found.append([_row(table, *of, held) for table, of in zip(tables, recipes, strict=True)])
    return [row for rows in zip(*found, strict=True) for row in rows]


def measured_samples(
    context: RecipeContext, recipes: Sequence[MixedRecipe], device: Device
) -> list[tuple[HeldOut, list[pa.Table]]]:
    """What `validate` measures, sample by sample.

    Rows that the store has from an earlier validation are read from there.

    Args:
        context: the model, its samples and the store.
        recipes: all of the context's model, data set and size.
        device: that the model runs on.

    Returns: each data set, with a table of VALIDATIONS_SCHEMA for each recipe.
    """
    store, dtype = Store(context.config.store.uri), context.config.model.dtype_on(device)
    on_each: list[tuple[HeldOut, Plan, str, list[str]]] = []
    for held in held_out(context):
        plan = context.model.plan(held.samples)
        digest = plan.digest(plan.size)
        on_each.append((held, plan, digest, [_identity(recipe, digest, dtype, device) for recipe in recipes]))
    known = {key: store.validation(key) for *_, keys in on_each for key in keys}
    missing = {key for key, table in known.items() if table is None}
    keys_of = zip(*(keys for *_, keys in on_each), strict=True)
    fresh = {
        number: recipe
        for number, (recipe, keys) in enumerate(zip(recipes, keys_of, strict=True))
        if not missing.isdisjoint(keys)
    }
    for recipe in fresh.values():
        check_recipe(recipe, context.model)
    measure = _measurer(context, list(fresh.values()), device) if fresh else None
    found: list[tuple[HeldOut, list[pa.Table]]] = []
    for held, plan, digest, keys in on_each:
        if measure is not None and not missing.isdisjoint(keys):
            on_these = measure(plan)
            for number in [number for number in fresh if keys[number] in missing]:
                table = _table(on_these(fresh[number]), fresh[number], digest, dtype)
                store.write_validation(keys[number], table)
                known[keys[number]] = table
        found.append((held, [table for key in keys if (table := known[key]) is not None]))
    return found


def held_out(context: RecipeContext) -> list[HeldOut]:
    """The samples of each data set of `validation`, or others of the data set that calibrated and scored.

    Raises: SweepError: too few, or one of them calibrated.
    """
    config = context.config
    found: list[HeldOut] = []
    for name, dataset in _data_sets(config):
        is_own = _source(dataset) == _source(config.dataset)
        samples = _other_samples(context) if is_own else _samples_of(name, dataset, context)
        _check_unseen(samples, name, context)
        found.append(HeldOut(name=name, samples=samples, calibrated=is_own))
    return found


def _data_sets(config: SweepConfig) -> list[tuple[str, DatasetConfig]]:
    """What to validate on, each with the name that tables give it: its file's, or its own."""
    validation, own = config.validation, config.dataset
    if validation.captions_path is not None:
        captions = replace(dataset_of("coco2017_captions", validation.captions_path), max_tokens=own.max_tokens)
        return [(Path(validation.captions_path).name, captions)]
    if not validation.sources:
        return [(own.name or own.kind, own)]
    names = [option if path is None else Path(path).name for option, path in validation.sources]
    found: list[tuple[str, DatasetConfig]] = []
    for (option, path), name in zip(validation.sources, names, strict=True):
        called = name if names.count(name) == 1 else f"{option} {path}"
        found.append((called, replace(dataset_of(option, path), max_pixels=own.max_pixels)))
    return found


def _source(dataset: DatasetConfig) -> tuple[str, str]:
    """The kind of a data set, and where its samples come from."""
    where = dataset.path or dataset.captions_path
    if where is None:
        return dataset.kind, dataset.hub_id or dataset.name or ""
    local = Path(where).expanduser()
    return dataset.kind, str(local.resolve()) if local.exists() else where


def _other_samples(context: RecipeContext) -> list[Sample]:
    """Samples of the data set that calibrated and scored, after those that did. Raises: SweepError: too few."""
    config = context.config
    n_seen = len(context.samples)
    try:
        n_samples = n_seen + config.validation.n_samples
        return samples_of(config.dataset, context.model, n_samples, Writing.of(config))[n_seen:]
    except SweepError as error:
        raise SweepError(
            f"{config.dataset.name} has too few samples for {config.validation.n_samples} after the {n_seen} that "
            f"calibrated and scored ({error}). Type validation.dataset=NAME "
            "validation.path=PATH, a smaller validation.n_samples=N, or validate a recipe of a smaller dataset.size."
        ) from error


def _samples_of(name: str, dataset: DatasetConfig, context: RecipeContext) -> list[Sample]:
    n_samples = context.config.validation.n_samples
    try:
        return samples_of(dataset, context.model, n_samples, Writing.of(context.config))
    except SweepError as error:
        raise SweepError(
            f"No {n_samples} samples of {name} to validate on: {error} "
            "Where there are fewer, type a smaller validation.n_samples=N."
        ) from error


def _check_unseen(samples: Sequence[Sample], name: str, context: RecipeContext) -> None:
    """Refuse samples that calibrated: equal tokens, and equal pictures. Raises: SweepError: names the first of them."""

    def content(sample: Sample) -> tuple[bytes, tuple[str, ...]]:
        return sample.token_ids.tobytes(), tuple(picture.content for picture in sample.pictures)

    seen = set(map(content, context.samples))
    if again := [number for number, sample in enumerate(samples, start=1) if content(sample) in seen]:
        raise SweepError(
            f"{len(again)} of the {len(samples)} samples to validate on calibrated the recipe, the first is number "
            f"{again[0]} of {name}: measured there, the KL would look smaller than it is. "
            "Give samples of their own: validation.dataset=NAME validation.path=PATH."
        )


def counts(rows: Sequence[Measured]) -> str:
    """The samples that were measured on: ``chats.jsonl: 16 samples, 300 predictions; ...``."""
    each = {row.dataset: f"{row.dataset}: {row.n_samples} samples, {row.n_predictions} predictions" for row in rows}
    return "; ".join(each.values())


def warning(rows: Sequence[Measured]) -> str | None:
    """What to know of samples that are all of the data set that calibrated."""
    if not all(row.calibrated for row in rows):
        return None
    return (
        f"Measured on other samples of what calibrated it, {rows[0].dataset}: on other data KL may differ. "
        "Type validation.dataset=chat validation.path=PATH (or text, images) to measure on data as it will be used on."
    )


def table(rows: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Predicted beside measured KL, with 90 % intervals: a heading, then one row a recipe."""
    found: list[tuple[str, ...]] = [("recipe", "measured on", "bits a weight", "predicted KL", *_MEASURED)]
    for row in rows:
        low, high = row.measured_kl_interval
        ratio = f"{row.measured_kl / row.predicted_kl:.2f}" if row.predicted_kl else "-"
        change = f"{row.loss_change:+.4f} ({row.loss_change_interval[0]:+.4f} to {row.loss_change_interval[1]:+.4f})"
        measured = f"{row.measured_kl:.4g} ({low:.3g} to {high:.3g})"
        bits, predicted = f"{row.effective_bits:.3f}", f"{row.predicted_kl:.4g}"
        found.append((row.name, row.dataset, bits, predicted, measured, ratio, change))
    if len({row.dataset for row in rows}) == 1:
        return [(name, *others) for name, _, *others in found]
    return found


def markdown_table(rows: Sequence[Measured]) -> str:
    """The table as Markdown."""
    heading, *lines = table(rows)
    sides = ["---" if name in ("recipe", "measured on") else "---:" for name in heading]
    return "\n".join([_line(heading), f"|{'|'.join(sides)}|", *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measurer(
    context: RecipeContext, recipes: Sequence[MixedRecipe], device: Device
) -> "Callable[[Plan], Callable[[MixedRecipe], MeasuredKl]]":
    """A function that measures any of the recipes on samples, whose formats are calibrated here, once."""
    from workers.scoring.validation import Validator, measurer

    model = load_model(context, device)
    measure = measurer(model, [choice.group for choice in context.recipe.groups], recipes, context.calibration)

    def on(plan: Plan) -> "Callable[[MixedRecipe], MeasuredKl]":
        validator = Validator(model, list(plan.batches(plan.size)))
        return lambda recipe: measure(recipe, validator)

    return on


def _table(measured: "MeasuredKl", recipe: MixedRecipe, held_out: str, dtype: str) -> pa.Table:
    n = len(measured.kl)
    columns = {
        "recipe": [recipe.name] * n,
        "model_revision": [recipe.model_revision] * n,
        "held_out": [held_out] * n,
        "dtype": [dtype] * n,
        "effective_bits": [recipe.effective_bits] * n,
        "predicted_kl": [recipe.predicted_kl] * n,
        "sample": list(range(n)),
        "kl": measured.kl,
        "loss_change": measured.loss_change,
        "n_predictions": measured.n_predictions,
    }
    return pa.table(columns, schema=VALIDATIONS_SCHEMA)


def _row(table: pa.Table, kind: str, recipe: MixedRecipe, held: HeldOut) -> Measured:
    kl, change, counts = (table[name].to_numpy().astype(np.float64) for name in ("kl", "loss_change", "n_predictions"))
    n_predictions = int(counts.sum())
    return Measured(
        name=recipe.name,
        kind=kind,
        effective_bits=recipe.effective_bits,
        dataset=held.name,
        calibrated=held.calibrated,
        predicted_kl=recipe.predicted_kl,
        measured_kl=float(kl.sum() / n_predictions),
        measured_kl_interval=_interval(kl, counts, recipe),
        loss_change=float(change.sum() / n_predictions),
        loss_change_interval=_interval(change, counts, recipe),
        n_samples=len(kl),
        n_predictions=n_predictions,
        recipe=_content(recipe)[:20],
    )


def _interval(samples: FloatArray, n_predictions: FloatArray, recipe: MixedRecipe) -> tuple[float, float]:
    low, high = bootstrap_interval(samples[None], n_predictions, recipe.model_revision)[:, 0]
    return float(low), float(high)


def _identity(recipe: MixedRecipe, held_out: str, dtype: str, device: str) -> str:
    words = [
        VALIDATION_VERSION,
        recipe.model_revision,
        _content(recipe),
        recipe.dataset_revision,
        held_out,
        dtype,
        device,
        version("nvidia-modelopt"),
    ]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:20]


def _content(recipe: MixedRecipe) -> str:
    """Hash of the formats that the recipe gives each linear; its name has no part in it."""

    def written(quantizer: Quantizer | None) -> str:
        """Attributes as they are given: stores of earlier versions know their validations by this text."""
        return repr(sorted((quantizer.attributes if quantizer is not None else {}).items(), key=str))

    words: list[Json] = []
    for choice in recipe.groups:
        chosen, modules = recipe.format_of(choice), list(choice.group.modules)
        if chosen is None:
            words.append([modules, None])
        else:
            words.append([modules, chosen.algorithm, chosen.scales, written(chosen.weight), written(chosen.inputs)])
        if chosen is not None and chosen.rounds_scales:  # validations of before measured scales in float32
            words.append("bfloat16 scales")
        if chosen is not None and chosen.tp > 1:
            words.append(f"tp={chosen.tp}")
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()
