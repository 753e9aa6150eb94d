"""Checks of a recipe file, which may have been edited by hand: its model, layer groups, formats and cells."""

import math

from sweep.core.errors import SweepError, require_known
from sweep.formats.mixed import GroupFormat, MixedRecipe
from sweep.formats.quantizer import QuantizerSpec, check_format
from sweep.plan.subject import Model
from sweep.store.store import Store


def check_recipe(recipe: MixedRecipe, model: Model) -> None:
    """Refuse a recipe that cannot be applied to this model.

    Args:
        recipe: as read from a file.
        model: the checkpoint that it is to be applied to.

    Raises: SweepError: another revision; a module or a grouping that the model does not have; a format that ModelOpt
        has no arithmetic for (as InvalidRecipe), or blocks that do not divide a layer.
    """
    if recipe.model_revision != model.revision:
        raise SweepError(
            f"The recipe is for {recipe.model} of revision {recipe.model_revision[:12]}, "
            f"but {model.path} is {model.revision[:12]}. "
            "Give the checkpoint that was scored: model.path=DIR, or sweep and solve again for this one."
        )
    shapes = {name: (n_in, n_out) for name, n_in, n_out in model.structure["linears"]}
    groups: dict[str, list[str]] = model.structure["groups"]
    for choice in recipe.groups:
        for module in choice.modules:
            require_known("module in the recipe", module, shapes)
        require_known("layer group in the recipe", choice.group, groups)
        if sorted(choice.modules) != sorted(groups[choice.group]):
            raise SweepError(
                f"Layer group {choice.group} is {', '.join(groups[choice.group])}, which runtimes fuse; "
                f"the recipe has {choice.modules}."
            )
        elements = sum(math.prod(shapes[module]) for module in choice.modules)
        if choice.weight_elements != elements:
            raise SweepError(
                f"Layer group {choice.group} has {elements} weights; the recipe says {choice.weight_elements}. "
                "Have `sweep solve` write it again."
            )
    for label, chosen in recipe.formats.items():
        _check_quantizers(label, chosen)
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        for module in choice.modules if chosen is not None else ():
            _check_blocks(choice.format or "", chosen, module, shapes[module])


def check_cells(recipe: MixedRecipe, store: Store) -> None:
    """Refuse a recipe whose scores are of different models or data.

    Cells that the store does not know are passed over: the recipe may come from another machine.

    Raises: SweepError: names two cells that do not belong together.
    """
    known = {row.cell_id: row for row in store.trials().values() if row.cell_id is not None}
    for choice in recipe.groups:
        row = None if choice.cell_id is None else known.get(choice.cell_id)
        if row is None:
            continue
        score = f"The score of {choice.group} (cell {choice.cell_id})"
        if row.model_revision != recipe.model_revision:
            raise SweepError(
                f"{score} is of {row.model} revision {row.model_revision[:12]}, the recipe's model is {recipe.model} "
                f"revision {recipe.model_revision[:12]}: scores of different models make no recipe. "
                "Solve again for one model."
            )
        if row.dataset_revision != recipe.dataset_revision:
            raise SweepError(
                f"{score} is of {row.dataset}/{row.size} revision {row.dataset_revision[:12]}, the recipe's samples "
                f"are {recipe.dataset}/{recipe.size} revision {recipe.dataset_revision[:12]}: "
                "scores on different samples make no recipe. Solve again for one data set and size."
            )


def _check_quantizers(label: str, chosen: GroupFormat) -> None:
    for name, attributes in (("weights", chosen.weight), ("activations", chosen.inputs)):
        if attributes is not None:
            check_format(f"{name} of format {label!r}", QuantizerSpec(attributes=attributes))


def _check_blocks(label: str, chosen: GroupFormat | None, module: str, shape: tuple[int, int]) -> None:
    n_in, n_out = shape
    for attributes in (chosen.weight, chosen.inputs) if chosen is not None else ():
        blocks = QuantizerSpec(attributes=attributes).block_sizes if attributes is not None else {}
        for axis, size, word in ((-1, n_in, "inputs"), (-2, n_out, "outputs")):
            length = blocks.get(axis)
            if length is not None and size % length:
                raise SweepError(
                    f"Blocks of {length} (format {label!r}) do not divide the {size} {word} of {module}. "
                    "Choose another format for its group."
                )
