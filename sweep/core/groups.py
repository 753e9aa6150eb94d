"""Layer groups: linears that share a recipe, the part of the store that their row goes to, and their names."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Coverage = Literal["lm_only", "all_layers"]  # all_layers: vision tower and mergers too


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """Linears that share a recipe, and where their row goes."""

    name: str  # the first module
    modules: tuple[str, ...]
    part: str  # the decoder layer or top-level block whose file holds the row
    layer_index: int | None  # None outside decoder blocks
    weight_elements: int
    n_inputs: int  # of the first module; the others read the same tensor
    n_outputs: int  # of all modules together


@dataclass(frozen=True, slots=True)
class Part:
    """Layer groups whose rows go into one file: a decoder layer, or a top-level block."""

    name: str
    groups: tuple[GroupSpec, ...]


def parts_of(groups: Sequence[GroupSpec]) -> tuple[Part, ...]:
    """The parts that layer groups make up, in the model's order."""
    return tuple(Part(name, tuple(members)) for name, members in groupby(groups, key=lambda group: group.part))


def is_vision(module: str) -> bool:
    """Whether a module belongs to a vision tower or a merger, whose rows are patches."""
    return "visual" in module or "vision" in module


def part_of(module: str) -> tuple[str, int | None]:
    """The part that a module's row belongs to, and its decoder layer if it is in one.

    A part is everything under the first numbered child (``model.language_model.layers.7``), else under the module's
    parent.
    """
    words = module.split(".")
    for position, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[: position + 1]), None if is_vision(module) else int(word)
    return (".".join(words[:-1]) or module), None


def short_group(group: str, modules: Sequence[str]) -> str:
    """A layer group as people call it: ``layers.6.self_attn.q/k/v_proj``, ``visual.blocks.0.attn.qkv``."""
    parent, _, leaf = group.rpartition(".")
    parents = {module.rpartition(".")[0] for module in modules}
    leaves = [module.rpartition(".")[2] for module in modules]
    if len(modules) > 1 and parents == {parent}:
        ending = "_proj" if all(name.endswith("_proj") for name in leaves) else ""
        leaf = "/".join(name.removesuffix(ending) for name in leaves) + ending
    elif len(modules) > 1:
        leaf = f"{leaf} (+{len(modules) - 1})"
    full = f"{parent}.{leaf}" if parent else leaf
    return full.removeprefix("model.").removeprefix("language_model.")
