"""A recipe's KL and change of loss, measured on samples that neither calibrated nor scored, and kept in the store."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from sweep.core.batches import Plan, Sample
from sweep.core.errors import SweepError
from sweep.core.json import Json
from sweep.core.sizes import n_samples_of
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import Quantizer
from sweep.mixed_precision.candidates import Candidates
from sweep.mixed_precision.checks import check_recipe
from sweep.mixed_precision.recipe import recipe_of_choice
from sweep.mixed_precision.recipe_context import RecipeContext, load_model
from sweep.plan.own_samples import Writing
from sweep.plan.subject import samples_of
from sweep.plan.trials import Device
from sweep.report.analysis import FloatArray, bootstrap_interval
from sweep.store.records import VALIDATIONS_SCHEMA
from sweep.store.store import Store

if TYPE_CHECKING:
    from workers.scoring.validation import MeasuredKl

VALIDATION_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Predicted and measured KL of one recipe, in nats per prediction."""

    name: str
    kind: str  # recipe, uniform, random, group
    effective_bits: float  # mean bits a weight of the covered groups
    predicted_kl: float
    measured_kl: float
    measured_kl_interval: tuple[float, float]  # 90 % bootstrap over samples
    loss_change: float
    loss_change_interval: tuple[float, float]
    n_samples: int
    n_predictions: int
    recipe: str = field(repr=False)  # hash of its content


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


def validate(
    context: RecipeContext,
    recipes: Sequence[tuple[str, MixedRecipe]],
    device: Device,
    on_measured: Callable[[Measured], None] = lambda _: None,
) -> list[Measured]:
    """Measure recipes of one model on samples that none of them has seen.

    Rows that the store has from an earlier validation are read from there.

    Args:
        context: the model, its samples and the store.
        recipes: with their kinds; all of the context's model, data set and size.
        device: that the model runs on.
        on_measured: called with each recipe's row.
    """
    plan, digest = held_out(context)
    store, config = Store(context.config.store.uri), context.config
    dtype = config.model.dtype_on(device)
    ids = [_identity(recipe, digest, dtype, device) for _, recipe in recipes]
    known = {key: found for key in ids if (found := store.validation(key)) is not None}
    fresh = {key: recipe for key, (_, recipe) in zip(ids, recipes, strict=True) if key not in known}
    for recipe in fresh.values():
        check_recipe(recipe, context.model)
    measure = _measurer(context, list(fresh.values()), plan, device) if fresh else None
    rows: list[Measured] = []
    for key, (kind, recipe) in zip(ids, recipes, strict=True):
        if key not in known:
            assert measure is not None
            known[key] = _table(measure(recipe), recipe, digest, dtype)
            store.write_validation(key, known[key])
        rows.append(_row(known[key], kind, recipe))
        on_measured(rows[-1])
    return rows


def held_out(context: RecipeContext) -> tuple[Plan, str]:
    """Batches of the samples to validate on, and their digest. Raises: SweepError: as `held_out_samples`."""
    plan = context.model.plan(held_out_samples(context))
    return plan, plan.digest(plan.size)


def held_out_samples(context: RecipeContext) -> list[Sample]:
    """Samples after those that calibrated and scored, or those of `validation.captions_path`.

    Raises: SweepError: too few, or one of them calibrated.
    """
    config, recipe, model = context.config, context.recipe, context.model
    n_seen, n_wanted = n_samples_of(recipe.size), config.validation.n_samples
    if config.validation.captions_path is not None:
        own = replace(config.dataset, kind="captions", captions_path=config.validation.captions_path)
        samples = samples_of(own, model, n_wanted)
    else:
        try:
            samples = samples_of(config.dataset, model, n_seen + n_wanted, Writing.of(config))[n_seen:]
        except SweepError as error:
            raise SweepError(
                f"{config.dataset.name} has too few samples for {n_wanted} after the {n_seen} that calibrated and "
                f"scored ({error}). Type validation.captions_path=FILE, a smaller validation.n_samples=N, "
                "or validate a recipe of a smaller dataset.size."
            ) from error
    seen = {sample.token_ids.tobytes() for sample in context.samples}
    if again := [
        number for number, sample in enumerate(samples) if sample.token_ids.tobytes() in seen and not sample.pictures
    ]:
        raise SweepError(
            f"{len(again)} of the {len(samples)} samples to validate on calibrated the recipe, the first is number "
            f"{again[0] + 1}: measured there, the KL would look smaller than it is. "
            "Give samples of their own: validation.captions_path=FILE."
        )
    return samples


def table(rows: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Predicted beside measured KL, with 90 % intervals: a heading, then one row a recipe."""
    found = [("recipe", "bits a weight", "predicted KL", "measured KL", "measured / predicted", "loss change")]
    for row in rows:
        low, high = row.measured_kl_interval
        ratio = f"{row.measured_kl / row.predicted_kl:.2f}" if row.predicted_kl else "-"
        change = f"{row.loss_change:+.4f} ({row.loss_change_interval[0]:+.4f} to {row.loss_change_interval[1]:+.4f})"
        measured = f"{row.measured_kl:.4g} ({low:.3g} to {high:.3g})"
        found.append((row.name, f"{row.effective_bits:.3f}", f"{row.predicted_kl:.4g}", measured, ratio, change))
    return found


def markdown_table(rows: Sequence[Measured]) -> str:
    """The table as Markdown."""
    heading, *lines = (f"| {' | '.join(cells)} |" for cells in table(rows))
    return "\n".join([heading, "|---|---:|---:|---:|---:|---:|", *lines])


def _measurer(
    context: RecipeContext, recipes: Sequence[MixedRecipe], plan: Plan, device: Device
) -> "Callable[[MixedRecipe], MeasuredKl]":
    from workers.scoring.validation import measurer

    return measurer(
        load_model(context, device),
        [choice.group for choice in context.recipe.groups],
        recipes,
        context.calibration,
        list(plan.batches(plan.size)),
    )


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


def _row(table: pa.Table, kind: str, recipe: MixedRecipe) -> Measured:
    kl, change, counts = (table[name].to_numpy().astype(np.float64) for name in ("kl", "loss_change", "n_predictions"))
    n_predictions = int(counts.sum())
    return Measured(
        name=recipe.name,
        kind=kind,
        effective_bits=recipe.effective_bits,
        predicted_kl=recipe.predicted_kl,
        measured_kl=float(kl.sum() / n_predictions),
        measured_kl_interval=_interval(kl, n_predictions, recipe),
        loss_change=float(change.sum() / n_predictions),
        loss_change_interval=_interval(change, n_predictions, recipe),
        n_samples=len(kl),
        n_predictions=n_predictions,
        recipe=_content(recipe)[:20],
    )


def _interval(samples: FloatArray, n_predictions: int, recipe: MixedRecipe) -> tuple[float, float]:
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
