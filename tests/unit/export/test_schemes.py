"""Schemes of formats: the file formats that targets promise, and what their readers refuse."""

import pytest

from sweep.config.targets import TargetRecipe, all_targets
from sweep.formats.format import GroupFormat
from tests.exports import FORMATS
from tests.formats import group_format
from tests.unit.formats.test_recipe import made
from workers.export.schemes import Inexpressible, scheme_of

PROMISES = [
    pytest.param(recipe, id=f"{target.name}-{recipe.name}")
    for target in all_targets()
    for recipe in target.recipes
    if "compressed_tensors" in recipe.export
]


@pytest.mark.parametrize("recipe", PROMISES)
def test_an_export_has_the_file_format_that_the_target_promises(recipe: TargetRecipe) -> None:
    found = made(recipe.quant_pair, recipe.quant_granularity).format
    named = GroupFormat(
        quant_pair=recipe.quant_pair,
        quant_granularity=recipe.quant_granularity,
        weight=found.weight,
        inputs=found.inputs,
        algorithm="max",
        scales="fused",
    )
    assert scheme_of(recipe.name, named).format == recipe.export["compressed_tensors"]


@pytest.mark.parametrize("name", ["int4_groups_int8_token", "int4_groups_fp8_token", "int4_groups_int4_static"])
def test_int4_weights_are_packed_whatever_the_inputs_are(name: str) -> None:
    """vLLM has no parameter for a byte a weight there."""
    assert scheme_of(name, group_format(name, *FORMATS[name])).format == "pack-quantized"


@pytest.mark.parametrize("weight", ["mxfp4_mxfp8", "mxfp8"])
def test_a_static_scale_of_inputs_is_refused_beside_mx_weights(weight: str) -> None:
    """vLLM's schemes have no parameter for it."""
    mixed = group_format("mixed", FORMATS[weight][0], {"num_bits": (4, 3)})
    with pytest.raises(Inexpressible, match=r"inputs\.type: 'static' of format 'mixed'.*dynamic inputs or none"):
        scheme_of("mixed", mixed)
