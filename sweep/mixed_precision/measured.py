"""A recipe's KL and change of loss, measured on samples that neither calibrated nor scored, and kept in the store."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from sweep.core.batches import Plan
from sweep.core.errors import SweepError
from sweep.core.sizes import SIZES
from sweep.formats.mixed import GroupChoice, GroupFormat, MixedRecipe
from sweep.mixed_precision.candidates import Options
from sweep.mixed_precision.checks import check_recipe
from sweep.mixed_precision.prepared import Prepared, loaded
from sweep.mixed_precision.recipe import recipe as recipe_of_choice
from sweep.plan.subject import samples_of
from sweep.plan.trials import Device
from sweep.report.analysis import FloatArray, bootstrap_interval
from sweep.store.records import VALIDATIONS_SCHEMA
from sweep.store.store import Store

if TYPE_CHECKING:
    from workers.scoring.validation import MeasuredKl

VALIDATION_VERSION: Final = 1
# How the files begin that `validate_command` writes, by which they are known again.


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Predicted and measured damage of one recipe, nats per prediction."""

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


def uniform_recipes(options: Options) -> list[MixedRecipe]:
    """One format for all groups, each that was measured everywhere."""
    n = len(options.groups)
    whole = [(i, option) for i, option in enumerate(options.formats) if np.isfinite(option.predicted_kl).all()]
    return [recipe_of_choice(options, np.full(n, i), f"uniform {option.format.label}", None) for i, option in whole]


def random_mixes(options: Options, n_mixes: int) -> list[MixedRecipe]:
    """Recipes that draw a format, or 16 bits, for each group; the same for the same options."""
    labels = "|".join(option.format.label for option in options.formats)
    rng = np.random.default_rng(list(hashlib.sha256(f"{options.trial.model_revision}|{labels}".encode()).digest()[:8]))
    measured = np.stack([np.isfinite(option.predicted_kl) for option in options.formats], axis=1)
    mixes: list[MixedRecipe] = []
    for number in range(n_mixes):
        choice = rng.integers(0, len(options.formats) + 1, len(options.groups))
        choice = np.where(
            np.append(measured, np.ones((len(choice), 1), dtype=bool), axis=1)[np.arange(len(choice)), choice],
            choice,
            len(options.formats),
        )
        mixes.append(recipe_of_choice(options, choice, f"random {number + 1}", None))
    return mixes


def validate(
    prepared: Prepared,
    recipes: Sequence[tuple[str, MixedRecipe]],
    device: Device,
    on_measured: Callable[[Measured], None] = lambda _: None,
) -> list[Measured]:
    """Measure recipes of one model on samples that none of them has seen; what the store has measured before is read from there.

    Args:
        prepared: the model, its samples and the store.
        recipes: with their kinds; all of the prepared recipe's model, data set and size.
        device: that the model runs on.
        on_measured: called after each.
    """
    plan, digest = held_out(prepared)
    store, config = Store(prepared.config.store.uri), prepared.config
    dtype = config.model.dtype_on(device)
    ids = [_identity(recipe, digest, dtype, device) for _, recipe in recipes]
    known = {key: found for key in ids if (found := store.validation(key)) is not None}
    fresh = {key: recipe for key, (_, recipe) in zip(ids, recipes, strict=True) if key not in known}
    for recipe in fresh.values():
        check_recipe(recipe, prepared.model)
    measure = _measurer(prepared, list(fresh.values()), plan, device) if fresh else None
    rows: list[Measured] = []
    for key, (kind, recipe) in zip(ids, recipes, strict=True):
        if key not in known:
            assert measure is not None
            known[key] = _table(measure(recipe), recipe, digest, dtype)
            store.write_validation(key, known[key])
        rows.append(_row(known[key], kind, recipe))
        on_measured(rows[-1])
    return rows


def held_out(prepared: Prepared) -> tuple[Plan, str]:
    """Samples after those that calibrated and scored, or those of `validation.captions_path`, and their digest.

    Raises: SweepError: too few, or one of them calibrated.
    """
    config, recipe, model = prepared.config, prepared.recipe, prepared.model
    n_seen, n_wanted = SIZES[recipe.size], config.validation.n_samples
    if config.validation.captions_path is not None:
        own = replace(config.dataset, kind="captions", captions_path=config.validation.captions_path)
        samples = samples_of(own, model, n_wanted)
    else:
        try:
            samples = samples_of(config.dataset, model, n_seen + n_wanted)[n_seen:]
        except SweepError as error:
            raise SweepError(
                f"{config.dataset.name} has too few samples for {n_wanted} after the {n_seen} that calibrated and scored ({error}). "
                "Type validation.captions_path=FILE, a smaller validation.n_samples=N, or validate a recipe of a smaller dataset.size."
            ) from error
    seen = {sample.token_ids.tobytes() for sample in prepared.samples}
    if again := [
        number
        for number, sample in enumerate(samples)
        if sample.token_ids.tobytes() in seen and sample.pixel_values is None
    ]:
        raise SweepError(
            f"{len(again)} of the {len(samples)} samples to validate on calibrated the recipe, the first is number {again[0] + 1}: measured there, the damage "
            "would look smaller than it is. Give samples of their own: validation.captions_path=FILE."
        )
    plan = model.plan(samples)
    return plan, plan.digest(list(SIZES)[len(plan.segments) - 1])


def markdown_table(rows: Sequence[Measured]) -> str:
    """Predicted beside measured damage, for pages."""
    lines = [
        "| recipe | bits a weight | predicted KL | measured KL | measured / predicted | loss change |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row.measured_kl_interval
        ratio = f"{row.measured_kl / row.predicted_kl:.2f}" if row.predicted_kl else "-"
        change = f"{row.loss_change:+.4f} ({row.loss_change_interval[0]:+.4f} to {row.loss_change_interval[1]:+.4f})"
        lines.append(
            f"| {row.name} | {row.effective_bits:.3f} | {row.predicted_kl:.4g} | {row.measured_kl:.4g} ({low:.3g} to {high:.3g}) | {ratio} | {change} |"
        )
    return "\n".join(lines)


def _measurer(
    prepared: Prepared, recipes: Sequence[MixedRecipe], plan: Plan, device: Device
) -> "Callable[[MixedRecipe], MeasuredKl]":
    from workers.scoring.validation import measurer

    calibration = list(prepared.plan.batches(prepared.recipe.size))
    return measurer(
        loaded(prepared, device),
        prepared.recipe.groups,
        recipes,
        calibration,
        list(plan.batches(list(SIZES)[len(plan.segments) - 1])),
    )


def _table(damage: "MeasuredKl", recipe: MixedRecipe, held_out: str, dtype: str) -> pa.Table:
    n = len(damage.kl)
    columns = {
        "recipe": [recipe.name] * n,
        "model_revision": [recipe.model_revision] * n,
        "held_out": [held_out] * n,
        "dtype": [dtype] * n,
        "effective_bits": [recipe.effective_bits] * n,
        "predicted_kl": [recipe.predicted_kl] * n,
        "sample": list(range(n)),
        "kl": damage.kl,
        "loss_change": damage.loss_change,
        "n_predictions": damage.n_predictions,
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
    """Hash of what the recipe does to each linear, whatever it is called."""

    def words(choice: GroupChoice, chosen: GroupFormat | None) -> list[object]:
        if chosen is None:
            return [list(choice.modules), None]
        quantizers = [
            repr(sorted((attributes or {}).items(), key=str)) for attributes in (chosen.weight, chosen.inputs)
        ]
        return [list(choice.modules), chosen.algorithm, chosen.scales, *quantizers]

    return hashlib.sha256(
        json.dumps([words(choice, recipe.format_of(choice)) for choice in recipe.groups]).encode()
    ).hexdigest()
