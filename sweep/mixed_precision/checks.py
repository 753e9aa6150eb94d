"""Checks of a recipe file, which may have been edited by hand: its model, layer groups, formats and cells."""

from dataclasses import replace

import msgspec

from sweep.config.compose import expand
from sweep.config.schema import SweepConfig, from_record
from sweep.core.errors import SweepError, require_known
from sweep.core.groups import Linear
from sweep.formats.format import Format, GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import check_format
from sweep.plan.model import Model
from sweep.plan.trials import recipe_of
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
    for group in (choice.group for choice in recipe.groups):
        for module in group.modules:
            require_known("module in the recipe", module, model.linears)
        require_known("layer group in the recipe", group.name, model.groups)
        known = model.groups[group.name]
        if sorted(group.modules) != sorted(known.modules):
            raise SweepError(
                f"Layer group {group.name} is {', '.join(known.modules)}, which runtimes fuse; "
                f"the recipe has {group.modules}."
            )
        if group.weight_elements != known.weight_elements:
            raise SweepError(
                f"Layer group {group.name} has {known.weight_elements} weights; the recipe says "
                f"{group.weight_elements}. Have `sweep solve` write it again."
            )
    for label, chosen in recipe.formats.items():
        for name, quantizer in (("weights", chosen.weight), ("activations", chosen.inputs)):
            if quantizer is not None:
                check_format(f"{name} of format {label!r}", quantizer)
    for choice in recipe.groups:
        if (chosen := recipe.format_of(choice)) is not None:
            for module in choice.group.modules:
                _check_blocks(chosen, model.linears[module])


def check_cells(recipe: MixedRecipe, config: SweepConfig, store: Store) -> None:
    """Refuse a recipe whose scores are of different models or data, or of other formats.

    Of cells that the store does not know, as of a recipe from another machine, the formats are compared with what conf/
    means by their names; names that conf/ does not have are passed over.

    Args:
        recipe: as read from a file.
        config: of the command; a store's records do not say targets and validations.
        store: read only.

    Raises: SweepError: names two cells that do not belong together, or a format that is not the scored one.
    """
    known = {row.cell_id: row for row in store.trials().values() if row.cell_id is not None}
    scored: dict[str, Format] = {}  # by cell
    for choice in recipe.groups:
        cell_id = choice.cell_id or ""
        row = known.get(cell_id)
        if row is None:
            continue
        score = f"The score of {choice.group.name} (cell {cell_id})"
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
        if cell_id not in scored:
            record = msgspec.json.decode(row.config)
            target = replace(config.target, tp=row.tp)
            scored[cell_id] = recipe_of(from_record(record, target, config.validation)).format
        chosen = recipe.format_of(choice)
        if chosen is not None and chosen.id != scored[cell_id].id:
            raise SweepError(
                f"{score} is of another format than {chosen.label!r} of the recipe, which was edited: its predicted KL "
                "would be another's. Have `sweep solve` write it again."
            )
    compared = {choice.format for choice in recipe.groups if choice.cell_id in scored}
    for label, chosen in recipe.formats.items():
        named = None if label in compared else _named(chosen, recipe)
        if named is not None and named.id != chosen.id:
            raise SweepError(
                f"Format {label!r} of the recipe was edited: it is not what that name means, and its predicted KL "
                "would be another's. Have `sweep solve` write it again."
            )


def _named(chosen: GroupFormat, recipe: MixedRecipe) -> Format | None:
    """The format that conf/ makes of a format's names; None: it has none of these names, or makes nothing of them."""
    typed = [
        f"quant_pair={chosen.quant_pair}",
        f"quant_granularity={chosen.quant_granularity}",
        f"sensitivity.quant_algorithm={chosen.algorithm}",
        f"sensitivity.scales={chosen.scales}",
        f"sensitivity.coverage={recipe.coverage}",
        f"target.tp={chosen.tp}",
    ]
    try:
        return recipe_of(expand(typed, multirun=False).points[0]).format
    except SweepError:
        return None


def _check_blocks(chosen: GroupFormat, linear: Linear) -> None:
    on_rank = chosen.of_linear(linear.name, linear.n_inputs)  # refuses parts that are not equal
    for lengths in (each.block_lengths for each in on_rank.quantizers):
        for axis, size, word in ((-1, linear.n_inputs, "inputs"), (-2, linear.n_outputs, "outputs")):
            length = lengths.get(axis)
            if length is not None and size % length:
                raise SweepError(
                    f"Blocks of {length} (format {chosen.label!r}) do not divide the {size} {word} of {linear.name}. "
                    "Choose another format for its group."
                )
