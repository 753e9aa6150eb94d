"""Checkpoint formats, as the writer and the check of an export see them: how linears and their format are held."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.core.json import Json
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import Quantizer
from workers.quant.linear import LinearQuant

Expressed = TypeVar("Expressed")


class Inexpressible(SweepError):
    """A recipe that a file format cannot express."""


def by_label(recipe: MixedRecipe, express: Callable[[str, GroupFormat], Expressed]) -> dict[str, Expressed]:
    """What a checkpoint format makes of each format that a group has, by the format's label.

    Args:
        recipe: the format of each layer group.
        express: of a label and its format.

    Raises: Inexpressible: a format that it cannot express, with the first group that has it.
    """
    found: dict[str, Expressed] = {}
    for choice in recipe.groups:
        if choice.format is not None and choice.format not in found:
            try:
                found[choice.format] = express(choice.format, recipe.formats[choice.format])
            except Inexpressible as error:
                raise Inexpressible(f"{choice.group.name}: {error}") from None
    return found


class Packing(Protocol):
    """How a checkpoint holds one quantized linear."""

    @property
    def weight(self) -> Quantizer | None:
        """The quantizer of weights by which a reader understands the tensors."""
        ...

    @property
    def inputs(self) -> Quantizer | None:
        """The same of inputs; None: left in 16 bits."""
        ...

    def packed(
        self, weight_OI: Tensor, linear: LinearQuant, output_scale_O: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The linear's tensors by local name, on the CPU.

        Args:
            weight_OI: [out, in], the checkpoint's, on the device and in the dtype that compute.
            linear: its quantizers.
            output_scale_O: [out], a pre-quantization scale of the linear behind, folded into the scales of the
                weight's rows.
            dtype: of the weight in the checkpoint.

        Raises: Inexpressible: numbers that the tensors' types cannot hold.
        """
        ...

    def unpacked(self, state: Mapping[str, Tensor]) -> Tensor:
        """The weight that a reader computes with, [out, in]. Raises: KeyError, RuntimeError, ValueError: other tensors.

        Args:
            state: the linear's tensors by local name.
        """
        ...

    def input_scales(self, linear: LinearQuant) -> dict[str, Tensor]:
        """The static scale of a linear's inputs by local name; empty for dynamic ones."""
        ...


class Layout(Protocol):
    """A checkpoint format."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def check(self, recipe: MixedRecipe) -> None:
        """Raises: Inexpressible: a group's format that the checkpoint format cannot express."""
        ...

    def packings(
        self, recipe: MixedRecipe, quants: Mapping[str, LinearQuant], output_scales: Mapping[str, Tensor]
    ) -> Mapping[str, Packing]:
        """The packing of each quantized module.

        Args:
            recipe: one that `check` accepts.
            quants: calibrated quantizers by module.
            output_scales: from `workers.export.folding.output_scales`.
        """
        ...

    def documents(
        self, recipe: MixedRecipe, linears: Sequence[Linear], others: Sequence[str], aliases: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Json]]:
        """Fields that say each module's format, by file name; those of config.json are added to the source's.

        Args:
            recipe: one that `check` accepts.
            linears: of the whole model.
            others: further linears of the checkpoint, from `workers.export.checkpoint.other_linears`.
            aliases: transformers' name of a linear, by that on disk, where they differ.
        """
        ...

    def read(self, directory: Path, linears: Sequence[Linear]) -> Mapping[str, Packing]:
        """The packing of each quantized module, as a reader finds it in an export's documents.

        Args:
            directory: an export.
            linears: of the whole model.

        Raises: SweepError: documents that contradict each other.
        """
        ...
