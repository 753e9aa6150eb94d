"""Recipes by the names that a checkpoint has on disk: readers of an export know these, transformers may have others."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sweep.core.groups import Linear
from sweep.formats.mixed import MixedRecipe


def recipe_on_disk(recipe: MixedRecipe, names: Mapping[str, str]) -> MixedRecipe:
    """The same formats of layer groups whose modules are named as on disk.

    Args:
        recipe: by the names of transformers' modules.
        names: on disk, by those; what has none keeps its own.
    """
    groups = list(recipe.groups)
    for index, choice in enumerate(groups):
        first, *others = (names.get(module, module) for module in choice.group.modules)
        groups[index] = replace(choice, group=replace(choice.group, name=first, modules=(first, *others)))
    return replace(recipe, groups=tuple(groups))


def linears_on_disk(linears: Sequence[Linear], names: Mapping[str, str]) -> list[Linear]:
    """The same linears by their names on disk. Args: names: as for `recipe_on_disk`."""
    return [replace(linear, name=names.get(linear.name, linear.name)) for linear in linears]


def aliases(names: Mapping[str, str]) -> dict[str, str]:
    """Names of linears in transformers, by those on disk, where they differ. Args: names: as for `recipe_on_disk`."""
    return {on_disk: name for name, on_disk in names.items() if name != on_disk}
