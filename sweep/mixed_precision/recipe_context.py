"""A recipe with its model and calibration samples, as validation and export need them."""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sweep.config.compose import expand
from sweep.config.schema import OWN_KINDS, DatasetConfig, ModelConfig, StoreConfig, SweepConfig
from sweep.core.batches import Batch, Plan, Sample
from sweep.core.errors import SweepError
from sweep.core.sizes import n_samples_of, size_name
from sweep.core.text import quoted
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.checks import check_recipe
from sweep.plan.model import Model, checkpoint_dir
from sweep.plan.own_samples import Writing
from sweep.plan.samples import samples_to_boundary
from sweep.plan.trials import Device

if TYPE_CHECKING:
    from sweep.plan.model import PreTrainedModel

# Options of the group `dataset` by the kind of data set, which may have been given another name.
_OPTIONS: Final = {"captions": "coco2017_captions", "scenes": "scenes", "scenes_chat": "scenes_chat"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeContext:
    """A recipe with the model, the configuration and the samples that it was made with."""

    recipe: MixedRecipe
    config: SweepConfig
    model: Model
    samples: Sequence[Sample]  # that calibrated and scored
    plan: Plan  # batches of these samples, and of those up to the next boundary of sizes

    @property
    def calibration(self) -> list[Batch]:
        """Batches of the samples that calibrate."""
        n_samples = self.recipe.calibration_samples
        return list(self.plan.batches(self.recipe.size if n_samples is None else size_name(n_samples)))


def load_model(context: RecipeContext, device: Device) -> "PreTrainedModel":
    """The model with its weights, in the precision that the config chooses for the device; the last one is kept.

    On a CPU torch computes in one thread from now on, as in the workers of a sweep: more would change bits, and crawl
    beside them.

    Args:
        context: the model and its config.
        device: that the model runs on.
    """
    if device == "cpu":
        import torch

        torch.set_num_threads(1)
    return _loaded(context.model, context.model.revision, context.config.model.dtype_on(device), device)


@functools.lru_cache(maxsize=1)
def _loaded(model: Model, revision: str, dtype: str, device: str) -> "PreTrainedModel":
    return model.load(dtype, device)


def read_recipe(path: Path) -> MixedRecipe:
    """Read a recipe file. Raises: SweepError: not there, or no recipe."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"Cannot read the recipe {path}: {error}. `sweep solve` writes recipe files.") from error
    return MixedRecipe.from_yaml(text, str(path))


def config_of(recipe: MixedRecipe, overrides: Sequence[str]) -> SweepConfig:
    """Compose the configuration that the recipe came from, where the overrides do not say otherwise.

    These are its model in the precision of the scores, its samples, and its store.

    Raises: SweepError: the recipe records keys of the data set that do not exist.
    """
    keys = {override.split("=")[0].lstrip("+~") for override in overrides}
    given = [] if "dataset" in keys else _dataset_overrides(recipe)
    config = expand([*given, f"dataset.size={recipe.size}", *overrides], multirun=False).points[0]
    if recipe.samples is not None and "dataset" not in keys:
        recorded = {key: value for key, value in recipe.samples.items() if f"dataset.{key}" not in keys}
        recorded |= {} if "dataset.name" in keys else {"name": recipe.dataset}
        config = replace(config, dataset=DatasetConfig.from_node("dataset", asdict(config.dataset) | recorded))
    if recipe.store is not None and keys.isdisjoint({"store", "store.uri"}):
        config = replace(config, store=StoreConfig(uri=recipe.store))
    model = config.model
    if not any(key.split(".")[0] == "model" for key in keys):
        model = ModelConfig(name=recipe.model, path=recipe.model_path, dtype="auto")
    if recipe.dtype is not None and "model.dtype" not in keys:
        model = ModelConfig.from_node("model", asdict(model) | {"dtype": recipe.dtype})
    return replace(config, model=model)


def _dataset_overrides(recipe: MixedRecipe) -> list[str]:
    """The option of the group `dataset` that a recipe's samples are of, with their path if that needs one."""
    samples = recipe.samples or {}
    kind = str(samples.get("kind"))
    if kind in OWN_KINDS:
        return [f"dataset={kind}", f"dataset.path={quoted(str(samples['path']))}"]
    return [f"dataset={_OPTIONS.get(kind, recipe.dataset)}"]


def load_context(recipe_path: str, overrides: Sequence[str]) -> RecipeContext:
    """Read a recipe file and find its model and samples.

    Raises: SweepError: the file is no recipe, or as `context_of`.
    """
    recipe = read_recipe(Path(recipe_path))
    return context_of(recipe, config_of(recipe, overrides))


def context_of(recipe: MixedRecipe, config: SweepConfig) -> RecipeContext:
    """Find the model and the samples of a recipe.

    Raises: SweepError: another model or other samples than the recipe was made with, or a recipe that the model
        cannot have.
    """
    model = Model(checkpoint_dir(config.model))
    check_recipe(recipe, model)
    n_samples = max(n_samples_of(recipe.size), recipe.calibration_samples or 0)
    samples = samples_to_boundary(config.dataset, model, n_samples, Writing.of(config))
    plan = model.plan(samples)
    if plan.digest(recipe.size) != recipe.dataset_revision:
        raise SweepError(
            f"The recipe was calibrated on {recipe.dataset} of revision {recipe.dataset_revision[:12]}, "
            f"but what is here is {plan.digest(recipe.size)[:12]}. "
            "Give the same samples: dataset=NAME, dataset.path=PATH or dataset.captions_path=FILE, "
            "dataset.max_tokens=N."
        )
    return RecipeContext(recipe=recipe, config=config, model=model, samples=samples[:n_samples], plan=plan)
