"""A recipe file with the model and the samples that it was made from: what validating and exporting start with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep.compose import expand
from sweep.config import ModelConfig, SweepConfig
from sweep.errors import SweepError
from sweep.export_checks import check_recipe
from sweep.machine import own_device
from sweep.mixed import MixedRecipe
from sweep.subject import Model, checkpoint_dir, samples_of

if TYPE_CHECKING:
    from workers.data import Plan, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A recipe, and what it takes to apply it."""

    recipe: MixedRecipe
    config: SweepConfig
    model: Model
    samples: "Sequence[Sample]"  # that calibrated and scored
    plan: "Plan"  # of these


def loaded(ready: Prepared) -> Any:
    """The model with its weights, on this machine's device, for this process alone."""
    import torch

    from workers.modeling import load

    device = own_device(ready.config.cluster)
    if device == "cpu":
        torch.set_num_threads(1)  # as a sweep's workers: more would change bits, and crawl beside them
    return load(ready.model.path, dtype=getattr(torch, ready.config.model.dtype_on(device)), device=device)


def read_recipe(path: Path) -> MixedRecipe:
    """A recipe file. Raises: SweepError: not there, or no recipe."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(f"Cannot read the recipe {path}: {error}. `sweep solve` writes recipe files.") from error
    return MixedRecipe.from_yaml(text, str(path))


def config_of(recipe: MixedRecipe, overrides: Sequence[str]) -> SweepConfig:
    """The recipe's model and data set, where the overrides do not say otherwise."""
    keys = {override.split("=")[0] for override in overrides}
    given = [] if "dataset" in keys else [f"dataset={recipe.dataset}"]
    config = expand([*given, f"dataset.size={recipe.size}", *overrides], multirun=False).points[0]
    if any(key.split(".")[0] == "model" for key in keys):
        return config
    return replace(config, model=ModelConfig(name=recipe.model, path=recipe.model_path, dtype="auto"))


def prepare(recipe_path: str, overrides: Sequence[str]) -> Prepared:
    """Read a recipe file and find its model and samples.

    Raises: SweepError: no recipe, another model or other samples than the recipe was made with, or a recipe that the model cannot have.
    """
    recipe = read_recipe(Path(recipe_path))
    config = config_of(recipe, overrides)
    return prepared(recipe, config)


def prepared(recipe: MixedRecipe, config: SweepConfig) -> Prepared:
    """The same from a recipe that is not in a file."""
    from workers.data import SIZES, make_plan

    model = Model(checkpoint_dir(config.model))
    check_recipe(recipe, model)
    samples = samples_of(config.dataset, model, SIZES[recipe.size])
    plan = make_plan(samples, packed=model.structure["packable"])
    if plan.digest(recipe.size) != recipe.dataset_revision:
        raise SweepError(
            f"The recipe was calibrated on {recipe.dataset} of revision {recipe.dataset_revision[:12]}, but what is here is "
            f"{plan.digest(recipe.size)[:12]}. Give the same samples: dataset=NAME, dataset.captions_path=FILE, dataset.max_tokens=N."
        )
    return Prepared(recipe=recipe, config=config, model=model, samples=samples, plan=plan)
