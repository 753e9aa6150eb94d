"""The modules into which pre-quantization scales are folded on export, and what that means for the scales of these.

awq_lite and smoothquant multiply a linear's inputs by a pre-quantization scale. On export the module before multiplies
its output by it (workers.export.folding). Where that module is a quantized linear, the product goes into the scales of
its rows. A format that rounds scales to bfloat16 (Format.rounds_scales) then rounds the product, so it is the product
that must be rounded before codes are chosen, here, for validations and exports alike.

Scores do not know which format another group gets: they have the linear's own scale rounded. The two are at most 2^-8
of the scale apart.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from workers.quant.linear import LinearQuant, rounded_range

# Name of a linear, and of the module before, whose output is its input. `check_folds` tries it on the model itself.
_BEFORE: Final = (
    (r"(.*)self_attn\.[qkv]_proj", r"\1input_layernorm"),
    (r"(.*self_attn\.)o_proj", r"\1v_proj"),
    (r"(.*)mlp\.(?:gate|up)_proj", r"\1post_attention_layernorm"),
    (r"(.*mlp\.)down_proj", r"\1up_proj"),
    (r"(.*)attn\.qkv", r"\1norm1"),
    (r"(.*)mlp\.linear_fc1", r"\1norm2"),
    (r"(.*merger.*\.)linear_fc1", r"\1norm"),
)


def module_before(module: str) -> str | None:
    """The module whose output is a linear's input, but for a product by channel; None where none is known."""
    return next((match.expand(before) for pattern, before in _BEFORE if (match := re.fullmatch(pattern, module))), None)


def folded(quants: Mapping[str, LinearQuant]) -> dict[str, LinearQuant]:
    """Quantizers of a recipe, with rounded scales where pre-quantization scales of other linears are folded in.

    Args:
        quants: calibrated, by module, of all linears that the recipe quantizes.
    """
    found = dict(quants)
    for module, quant in quants.items():
        before = found.get(module_before(module) or "")
        if quant.pre_quant_scale is not None and before is not None and before.rounds_scales:
            found[module_before(module) or ""] = _under_output_scale(before, quant.pre_quant_scale.float().flatten())
    return found


def _under_output_scale(quant: LinearQuant, scale_O: Tensor) -> LinearQuant:
    """The quantizers with a range of the weight under which its scales, times `scale_O`, are values of bfloat16.

    Those of a weight without ranges by row, or of another width, take no such scale: they are returned as they are.
    """
    assert quant.weight is not None
    assert isinstance(quant.weight.num_bits, int)
    assert quant.weight_amax is not None
    ranges = quant.weight_amax
    by_row = quant.weight.axis == 0 or quant.weight.block_lengths.keys() == {-1}
    if not by_row or ranges.numel() % len(scale_O) or (quant.weight.axis == 0 and ranges.numel() != len(scale_O)):
        return quant
    rows = scale_O.to(ranges.device)[:, None]
    held = rounded_range(ranges.reshape(len(rows), -1) * rows, quant.weight.num_bits)
    return replace(quant, weight_amax=(held / rows).view_as(ranges))
