"""Layer groups: linears that share a recipe, the part of the store that their row goes to, and their names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Coverage = Literal["lm_only", "all_layers"]  # all_layers: vision tower and mergers too


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Name and shape of one ``nn.Linear`` of a model."""

    name: str
    n_inputs: int
    n_outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStructure:
    """The linears of a model, and numbers of elements; tied weights count once."""

    linears: tuple[Linear, ...]  # every nn.Linear, in the model's order
    parameters: int  # elements of all weights
    elements: Mapping[str, int]  # by kind, see sweep.core.coverage; lm_head: 0 where it is tied to the embeddings
    vocabulary: int
    packable: bool  # samples may share a row of a batch
    # The name of each linear in the checkpoint, by its name. Those whose weight is no tensor of its own there, but tied
    # to another or made of several, have none.
    on_disk: dict[str, str]
    missing: tuple[str, ...]  # parameters that the checkpoint does not hold
    mismatched: tuple[str, ...]  # tensors of another shape, in words: "NAME [2, 3], not [2, 4]"
    unused: tuple[str, ...]  # tensors of the checkpoint that the model does not have
    other_head: str | None  # the output layer, if it is not named lm_head: no layer group has it
    untied: tuple[str, ...]  # parameters that config.json ties to others, but the checkpoint has other values of
    from_fp8: int  # elements that the checkpoint holds in FP8


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Linears that share a format because runtimes fuse them: q/k/v, gate/up, else one alone."""

    name: str  # the first module
    modules: tuple[str, ...]
    weight_elements: int  # of all modules together

    @property
    def part(self) -> str:
        """The decoder layer or top-level block whose file holds the row: see `part_of`."""
        return part_of(self.name)[0]

    @property
    def layer_index(self) -> int | None:
        """Number of the decoder layer, None outside decoder layers."""
        return part_of(self.name)[1]

    @property
    def short_name(self) -> str:
        """As people call it: ``layers.6.self_attn.q/k/v_proj``, ``visual.blocks.0.attn.qkv``."""
        return short_group(self.name, self.modules)

    @property
    def is_lm_head(self) -> bool:
        """Whether the output layer is in it."""
        return any(module.rpartition(".")[2] == "lm_head" for module in self.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapedGroup(LayerGroup):
    """A layer group of a model whose structure is known."""

    n_inputs: int  # of the first module; the others read the same tensor
    n_outputs: int  # of all modules together


@dataclass(frozen=True, slots=True)
class Part:
    """Layer groups whose rows go into one file: a decoder layer, or a top-level block."""

    name: str
    groups: tuple[ShapedGroup, ...]


def parts_of(groups: Sequence[ShapedGroup]) -> tuple[Part, ...]:
    """The parts that layer groups make up, in the model's order."""
    return tuple(Part(name, tuple(members)) for name, members in groupby(groups, key=lambda group: group.part))


def is_vision(module: str) -> bool:
    """Whether a module belongs to a vision tower, or to what makes tokens of its patches: its rows are of pictures."""
    return any(word in module for word in ("visual", "vision", "projector", "connector", "aligner"))


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
