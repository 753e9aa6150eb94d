"""Recipes over small random models, for tests that apply one."""

from collections.abc import Sequence
from typing import Any, Final

from torch import nn

from sweep.core.groups import LayerGroup
from sweep.core.pairs import Algorithm, Scales
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import GroupChoice, MixedRecipe
from tests.formats import group_format
from workers.quant.modelopt import layer_groups

PER_TOKEN: Final[dict[str, Any]] = {"type": "dynamic", "block_sizes": {-1: None}}
FP8: Final[dict[str, Any]] = {"num_bits": (4, 3), "axis": None}
INT8: Final[dict[str, Any]] = {"num_bits": 8, "axis": None}
INT4_BLOCK: Final[dict[str, Any]] = {"num_bits": 4, "block_sizes": {-1: 64}}
NVFP4: Final[dict[str, Any]] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FORMATS: Final[dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]] = {  # weights, inputs
    "fp8": (FP8, FP8),
    "int8_static": ({"num_bits": 8, "axis": 0}, INT8),
    "int8_per_token": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}),
    "int4_block": (INT4_BLOCK, None),
    "nvfp4": (NVFP4, NVFP4),
    "activations_only": (None, INT8),
}


def format_of(name: str, algorithm: Algorithm = "max", scales: Scales = "private") -> GroupFormat:
    return group_format(name, *FORMATS[name], algorithm, scales)


def recipe_of(
    model: nn.Module, formats: Sequence[GroupFormat | None], size: str = "small", covered: str = ""
) -> MixedRecipe:
    """The groups of the linears whose name contains `covered` get the formats in turn; None: left in 16 bits."""
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and covered in name
    }
    choices: list[GroupChoice] = []
    for index, (first, modules) in enumerate(layer_groups(linears).items()):
        chosen = formats[index % len(formats)]
        choice = GroupChoice(
            group=LayerGroup(
                name=first, modules=modules, weight_elements=sum(linears[name].weight.numel() for name in modules)
            ),
            format=chosen and chosen.label,
            cell_id=None,
            predicted_kl=0.0,
        )
        choices.append(choice)
    return MixedRecipe(
        name="mixed",
        model="random",
        model_revision="r",
        model_path=None,
        dataset="random",
        dataset_revision="d",
        size=size,
        coverage="lm_only",
        target=None,
        formats={chosen.label: chosen for chosen in formats if chosen is not None},
        groups=tuple(choices),
    )
