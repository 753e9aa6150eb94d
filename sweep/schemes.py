"""A recipe's numbers in the words that runtimes use: one for the weights, one for the inputs, whatever its pair and granularity are called."""

from collections.abc import Mapping
from typing import Any, Final

from sweep.recipe_quantizer import QuantizerSpec

SIXTEEN_BIT: Final = "16bit"
_ELEMENTS: Final[Mapping[Any, str]] = {4: "int4", 8: "int8", (2, 1): "fp4", (4, 3): "fp8"}
_AXES: Final[Mapping[Any, str]] = {None: "tensor", 0: "channel", 1: "in_channel", -1: "in_channel"}


def scheme_of(weight: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None) -> tuple[str, str]:
    """Words for weights and inputs: ``("fp8_channel", "fp8_token")``, ``("nvfp4", "16bit")``, ``("fp8_block128x128", "fp8_group128")``.

    Args: weight and inputs: QuantizerAttributeConfig fields; None: left unquantized.
    """
    return _word(weight), _word(inputs)


def _word(attributes: Mapping[str, Any] | None) -> str:
    if attributes is None:
        return SIXTEEN_BIT
    spec = QuantizerSpec(attributes=attributes)
    element = _ELEMENTS.get(spec.num_bits, f"e{spec.num_bits[0]}m{spec.num_bits[1]}" if isinstance(spec.num_bits, tuple) else f"int{spec.num_bits}")
    length = spec.block_sizes.get(-1)
    if spec.has_dynamic_blocks:
        if spec.block_sizes.get("scale_bits") == (8, 0):
            return f"mx{element}" if length == 32 else f"mx{element}_group{length}"
        return "nvfp4" if spec.is_nvfp4 and length == 16 else f"{element}_scaled_group{length}"
    if -2 in spec.block_sizes:
        return f"{element}_block{spec.block_sizes[-2]}x{length}"
    if -1 in spec.block_sizes:
        return f"{element}_token" if length is None else f"{element}_group{length}"
    return f"{element}_{_AXES.get(attributes.get('axis'), 'axis')}"
