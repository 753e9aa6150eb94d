"""`sweep validate`: a recipe's damage, measured on samples that neither calibrated nor scored, beside what was predicted."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
from rich.console import Console

from sweep.analysis import FloatArray, bootstrap_interval
from sweep.errors import SweepError
from sweep.export_checks import check_recipe
from sweep.machine import own_device
from sweep.mixed import GroupChoice, GroupFormat, MixedRecipe, is_called
from sweep.mixing import recipe as recipe_of_choice
from sweep.options import Options, read_options
from sweep.prepared import Prepared, loaded, prepare
from sweep.records import VALIDATIONS_SCHEMA
from sweep.report_rows import short_group
from sweep.store import Store
from sweep.subject import samples_of
from sweep.tables import aligned

if TYPE_CHECKING:
    from workers.data import Plan
    from workers.validation import Damage

VALIDATION_VERSION: Final = 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was typed."""

    recipe_path: str
    overrides: Sequence[str]
    n_random: int
    uniform: bool
    groups: str | None  # pattern of groups to quantize alone
    as_json: bool


def validate_command(request: Request) -> int:
    """Measure, print and keep. Returns the exit code.

    Raises: SweepError: a recipe that is not of this model, or no samples that it has not seen.
    """
    prepared = prepare(request.recipe_path, request.overrides)
    rows = validate(prepared, wanted(prepared, request))
    path = Path(request.recipe_path)
    page, document = path.with_suffix(".validation.md"), path.with_suffix(".validation.json")
    text = json.dumps([asdict(row) for row in rows], indent=1)
    document.write_text(text + "\n", encoding="utf-8")
    page.write_text(render(prepared.recipe, rows), encoding="utf-8")
    if request.as_json:
        print(text)  # noqa: T201 -- machine-readable output, not for rich to wrap
        return 0
    console = Console(markup=False, soft_wrap=True, highlight=False)
    for line in table_lines(rows):
        console.print(line)
    console.print(f"{rows[0].n_samples} samples, {rows[0].n_predictions} predictions that neither calibrated nor scored; nats per prediction. Page: {page}")
    return 0


def wanted(prepared: Prepared, request: Request) -> list[tuple[str, MixedRecipe]]:
    """The recipe itself, and what was asked for beside it, each with its kind.

    Raises: SweepError: what is asked for needs finished cells that the store lacks, or the pattern matches no group.
    """
    recipe = prepared.recipe
    found = [("recipe", recipe)]
    alone = [choice for choice in recipe.groups if request.groups is not None and is_called([choice.group], request.groups)]
    if request.groups is not None and not alone:
        raise SweepError(f"--groups {request.groups!r} matches no layer group. They are called like {recipe.groups[0].group!r}; * stands for anything.")
    if not (request.uniform or request.n_random or alone):
        return found
    options = _options_of(prepared)
    if request.uniform:
        found += [("uniform", each) for each in uniform_recipes(options) if each.effective_bits <= recipe.effective_bits + 1e-9]
    found += [("random", each) for each in random_mixes(options, request.n_random)]
    for choice in alone:
        index = [group["group"] for group in options.groups].index(choice.group)
        for number, option in enumerate(options.formats):
            only = np.full(len(options.groups), len(options.formats))
            only[index] = number
            found.append(("group", recipe_of_choice(options, only, f"{short_group(choice.group, choice.modules)} alone, {option.format.label}", recipe.target)))
    return found


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
        choice = np.where(np.append(measured, np.ones((len(choice), 1), dtype=bool), axis=1)[np.arange(len(choice)), choice], choice, len(options.formats))
        mixes.append(recipe_of_choice(options, choice, f"random {number + 1}", None))
    return mixes


def validate(prepared: Prepared, recipes: Sequence[tuple[str, MixedRecipe]], on_measured: Callable[[Measured], None] = lambda _: None) -> list[Measured]:
    """Measure recipes of one model on samples that none of them has seen; what the store has measured before is read from there.

    Args:
        prepared: the model, its samples and the store.
        recipes: with their kinds; all of the prepared recipe's model, data set and size.
        on_measured: called after each.
    """
    plan, digest = held_out(prepared)
    store, config = Store(prepared.config.store.uri), prepared.config
    device = own_device(config.cluster)
    dtype = config.model.dtype_on(device)
    ids = [_identity(recipe, digest, dtype, device) for _, recipe in recipes]
    known = {key: found for key in ids if (found := store.validation(key)) is not None}
    fresh = {key: recipe for key, (_, recipe) in zip(ids, recipes, strict=True) if key not in known}
    for recipe in fresh.values():
        check_recipe(recipe, prepared.model)
    measure = _measurer(prepared, list(fresh.values()), plan) if fresh else None
    rows: list[Measured] = []
    for key, (kind, recipe) in zip(ids, recipes, strict=True):
        if key not in known:
            assert measure is not None
            known[key] = _table(measure(recipe), recipe, digest, dtype)
            store.write_validation(key, known[key])
        rows.append(_row(known[key], kind, recipe))
        on_measured(rows[-1])
    return rows


def held_out(prepared: Prepared) -> "tuple[Plan, str]":
    """Samples after those that calibrated and scored, or those of `validation.captions_path`, and their digest.

    Raises: SweepError: too few, or one of them calibrated.
    """
    from workers.data import SIZES, make_plan

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
    if again := [number for number, sample in enumerate(samples) if sample.token_ids.tobytes() in seen and sample.pixel_values is None]:
        raise SweepError(
            f"{len(again)} of the {len(samples)} samples to validate on calibrated the recipe, the first is number {again[0] + 1}: measured there, the damage "
            "would look smaller than it is. Give samples of their own: validation.captions_path=FILE."
        )
    plan = make_plan(samples, packed=model.structure["packable"])
    return plan, plan.digest(list(SIZES)[len(plan.segments) - 1])


def table_lines(rows: Sequence[Measured]) -> list[str]:
    """A table for the screen: a heading, then one line a recipe."""
    cells = [("recipe", "bits", "predicted KL", "measured KL", "90 % interval", "measured/predicted", "loss change")]
    for row in rows:
        low, high = row.measured_kl_interval
        ratio = f"{row.measured_kl / row.predicted_kl:.2f}" if row.predicted_kl else "-"
        figures = (
            f"{row.effective_bits:.3f}",
            f"{row.predicted_kl:.4g}",
            f"{row.measured_kl:.4g}",
            f"{low:.3g} to {high:.3g}",
            ratio,
            f"{row.loss_change:+.4f}",
        )
        cells.append((row.name, *figures))
    return aligned(cells, figures=True)


def render(recipe: MixedRecipe, rows: Sequence[Measured]) -> str:
    """The page that people read."""
    head = (
        f"# Predicted and measured: {recipe.name}\n\nModel {recipe.model} ({recipe.model_revision[:12]}), calibrated and scored on {recipe.dataset}, "
        f"{recipe.size}; measured on {rows[0].n_samples} other samples ({rows[0].n_predictions} predictions). KL(unquantized || quantized) and change of the "
        "loss in nats per prediction, with 90 % bootstrap intervals over samples.\n\n"
    )
    return head + markdown_table(rows) + "\n"


def markdown_table(rows: Sequence[Measured]) -> str:
    """Predicted beside measured damage, for pages."""
    lines = ["| recipe | bits a weight | predicted KL | measured KL | measured / predicted | loss change |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        low, high = row.measured_kl_interval
        ratio = f"{row.measured_kl / row.predicted_kl:.2f}" if row.predicted_kl else "-"
        change = f"{row.loss_change:+.4f} ({row.loss_change_interval[0]:+.4f} to {row.loss_change_interval[1]:+.4f})"
        lines.append(
            f"| {row.name} | {row.effective_bits:.3f} | {row.predicted_kl:.4g} | {row.measured_kl:.4g} ({low:.3g} to {high:.3g}) | {ratio} | {change} |"
        )
    return "\n".join(lines)


def _measurer(prepared: Prepared, recipes: Sequence[MixedRecipe], plan: "Plan") -> "Callable[[MixedRecipe], Damage]":
    """What measures any of the recipes, each format of each layer group being calibrated once for all of them."""
    from workers.applied import calibrated_groups
    from workers.data import SIZES
    from workers.validation import Validator

    model = loaded(prepared)
    formats: dict[str, list[GroupFormat]] = {}
    for recipe in recipes:
        for choice in recipe.groups:
            chosen = recipe.format_of(choice)
            if chosen is not None and chosen not in formats.setdefault(choice.group, []):
                formats[choice.group].append(chosen)
    quants = calibrated_groups(model, list(prepared.plan.batches(prepared.recipe.size)), prepared.recipe.groups, formats)
    validator = Validator(model, list(plan.batches(list(SIZES)[len(plan.segments) - 1])))

    def measure(recipe: MixedRecipe) -> "Damage":
        chosen = [(choice.group, found) for choice in recipe.groups if (found := recipe.format_of(choice)) is not None]
        return validator.measure({name: quant for group, found in chosen for name, quant in quants[group][formats[group].index(found)].items()})

    return measure


def _table(damage: "Damage", recipe: MixedRecipe, held_out: str, dtype: str) -> pa.Table:
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
    words = [VALIDATION_VERSION, recipe.model_revision, _content(recipe), recipe.dataset_revision, held_out, dtype, device, version("nvidia-modelopt")]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:20]


def _content(recipe: MixedRecipe) -> str:
    """Hash of what the recipe does to each linear, whatever it is called."""

    def words(choice: GroupChoice, chosen: GroupFormat | None) -> list[object]:
        if chosen is None:
            return [list(choice.modules), None]
        quantizers = [repr(sorted((attributes or {}).items(), key=str)) for attributes in (chosen.weight, chosen.inputs)]
        return [list(choice.modules), chosen.algorithm, chosen.scales, *quantizers]

    return hashlib.sha256(json.dumps([words(choice, recipe.format_of(choice)) for choice in recipe.groups]).encode()).hexdigest()


def _options_of(prepared: Prepared) -> Options:
    """What the store knows of the recipe's model and samples. Raises: SweepError: nothing."""
    config, recipe = prepared.config, prepared.recipe
    typed = [f"store.uri={config.store.uri}", f"dataset={recipe.dataset}", f"dataset.size={recipe.size}", f"sensitivity.coverage={recipe.coverage}"]
    options = read_options(Store(config.store.uri), typed)
    if options.trial.model_revision != recipe.model_revision:
        raise SweepError(f"The store {config.store.uri} holds cells of another revision of {recipe.model} than the recipe's. Type store.uri=DIR.")
    return options
