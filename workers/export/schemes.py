"""ModelOpt's quantizer attributes as compressed-tensors schemes, and back.

The two directions are written apart, so that a round trip through them is a check: a field that one forgets, the other
does not return. Formats as of compressed-tensors 0.20. With the three modules beside it this is the home of
`compressed_tensors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.quant_args import DynamicType
from torch import nn

from sweep.core.errors import SweepError
from sweep.formats.mixed import GroupFormat
from sweep.formats.quantizer import ATTRIBUTE_DEFAULTS, COST_HINT, QuantizerSpec, canonical_attributes

_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
_FLOAT_BITS: Final = {_E2M1: 4, _E4M3: 8}
_NVFP4_BLOCK, _MX_BLOCK = 16, 32  # the only lengths that the format's compressors take


class Inexpressible(SweepError):
    """A recipe that a file format cannot express."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    """The quantizer that an error message names."""

    label: str  # of the recipe's format
    quantizer: str  # "weight" or "inputs"

    def refuse(self, field: str, found: object, allowed: str) -> Inexpressible:
        return Inexpressible(
            f"compressed-tensors can't express {self.quantizer}.{field}: {found!r} of format {self.label!r}. "
            f"It has {allowed}. Choose another format for these groups, or --format modelopt."
        )


def scheme_of(label: str, chosen: GroupFormat) -> QuantizationScheme:
    """The scheme of one format, without targets, with the compression format that the library chooses for it.

    Args:
        label: the format's, for messages.
        chosen: the format.

    Raises: Inexpressible: names the format and the field.
    """
    if chosen.weight is None:
        raise _Where(label=label, quantizer="weight").refuse(
            "num_bits", 16, "quantized inputs under quantized weights only"
        )
    weights = _weight_args(chosen.weight, _Where(label=label, quantizer="weight"))
    inputs = None if chosen.inputs is None else _input_args(chosen.inputs, _Where(label=label, quantizer="inputs"))
    if inputs is not None:
        _check_pair(weights, inputs, _Where(label=label, quantizer="inputs"))
    scheme = QuantizationScheme(targets=[], weights=weights, input_activations=inputs)
    for where, given, args in (("weight", chosen.weight, weights), ("inputs", chosen.inputs, inputs)):
        if given is not None and args is not None:
            _check_returns(given, attributes_of(args), _Where(label=label, quantizer=where))
    return scheme.model_copy(update={"format": infer_module_format(nn.Linear, scheme).value})


def attributes_of(args: QuantizationArgs) -> dict[str, Any]:
    """The quantizer that a reader of the file uses, as ModelOpt's attributes: fields that differ from its defaults.

    Args:
        args: of weights or of inputs, symmetric.
    """
    is_float = args.type == QuantizationType.FLOAT
    found: dict[str, Any] = {
        "num_bits": {bits: name for name, bits in _FLOAT_BITS.items()}[args.num_bits] if is_float else args.num_bits
    }
    group, strategy = args.group_size, args.strategy
    if strategy == QuantizationStrategy.CHANNEL:
        return {**found, "axis": 0}
    if strategy == QuantizationStrategy.TOKEN:
        return {**found, "type": "dynamic", "block_sizes": {-1: None}}
    if strategy == QuantizationStrategy.TENSOR_GROUP:
        return {**found, "block_sizes": {-1: group, "type": "dynamic", "scale_bits": _E4M3}}
    if strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure or (0, 0)
        return {**found, "block_sizes": {-1: columns, -2: rows}}
    if strategy == QuantizationStrategy.GROUP and args.scale_dtype == torch.uint8:
        return {**found, "block_sizes": {-1: group, "type": "dynamic", "scale_bits": _E8M0}}
    if strategy == QuantizationStrategy.GROUP:
        return {**found, "block_sizes": {-1: group}} | ({"type": "dynamic"} if args.dynamic else {})
    return found | ({"type": "dynamic"} if args.dynamic else {})


def _weight_args(attributes: Mapping[str, Any], where: _Where) -> QuantizationArgs:
    spec = QuantizerSpec(attributes=attributes)
    common: dict[str, Any] = {**_number(spec, where), "symmetric": True, "dynamic": False}
    if attributes.get("type", "static") != "static":
        raise where.refuse("type", attributes["type"], "weights in static ranges")
    if spec.has_dynamic_blocks:
        return QuantizationArgs(**common, **_scaled_blocks(spec, where))
    axis, blocks = attributes.get("axis"), {key: length for key, length in spec.block_sizes.items() if key != "type"}
    if not blocks:
        if axis not in (None, 0):
            raise where.refuse("axis", axis, "one scale a tensor (null) or one an output channel (0)")
        return QuantizationArgs(
            **common, strategy=QuantizationStrategy.TENSOR if axis is None else QuantizationStrategy.CHANNEL
        )
    if set(blocks) == {-1} and spec.num_bits != _E2M1:
        return QuantizationArgs(**common, strategy=QuantizationStrategy.GROUP, group_size=blocks[-1])
    if set(blocks) == {-1, -2} and spec.num_bits == _E4M3:
        return QuantizationArgs(**common, strategy=QuantizationStrategy.BLOCK, block_structure=[blocks[-2], blocks[-1]])
    raise where.refuse(
        "block_sizes",
        dict(spec.block_sizes),
        "groups along the inputs for integers and FP8, two-dimensional blocks for FP8",
    )


def _input_args(attributes: Mapping[str, Any], where: _Where) -> QuantizationArgs:
    spec = QuantizerSpec(attributes=attributes)
    common: dict[str, Any] = {**_number(spec, where), "symmetric": True}
    if spec.has_dynamic_blocks:
        if not spec.is_nvfp4 and spec.num_bits == _E2M1:
            # generate_mx_scales rounds a block's range to the nearest power of two and saturates, ModelOpt rounds up.
            raise where.refuse(
                "num_bits",
                spec.num_bits,
                "another rule for the scale of MXFP4 inputs than ModelOpt, so it would compute other numbers",
            )
        return QuantizationArgs(
            **common, **_scaled_blocks(spec, where), dynamic=DynamicType.LOCAL if spec.is_nvfp4 else True
        )
    if attributes.get("axis") is not None:
        raise where.refuse(
            "axis", attributes["axis"], "inputs in one static scale, or in dynamic ones a token or a group"
        )
    blocks = {key: length for key, length in spec.block_sizes.items() if key != "type"}
    if attributes.get("type", "static") == "static":
        if blocks:
            raise where.refuse("block_sizes", dict(spec.block_sizes), "no static blocks of inputs")
        return QuantizationArgs(**common, strategy=QuantizationStrategy.TENSOR, dynamic=False)
    if spec.num_bits == 4:
        raise where.refuse(
            "num_bits",
            4,
            "a range of amax / 7.5 for dynamic INT4 where ModelOpt's is amax / 7, so it would compute other numbers",
        )
    if blocks == {-1: None}:
        return QuantizationArgs(**common, strategy=QuantizationStrategy.TOKEN, dynamic=True)
    if set(blocks) == {-1}:
        return QuantizationArgs(**common, strategy=QuantizationStrategy.GROUP, group_size=blocks[-1], dynamic=True)
    raise where.refuse(
        "block_sizes", dict(spec.block_sizes), "dynamic scales of inputs a token or a group along the inputs"
    )


def _number(spec: QuantizerSpec, where: _Where) -> dict[str, Any]:
    bits = spec.num_bits
    if isinstance(bits, int):
        if bits > 8:
            raise where.refuse("num_bits", bits, "integers of 2 to 8 bits")
        return {"num_bits": bits, "type": QuantizationType.INT}
    if bits not in _FLOAT_BITS:
        raise where.refuse("num_bits", bits, "floats of E2M1 and E4M3")
    return {"num_bits": _FLOAT_BITS[bits], "type": QuantizationType.FLOAT}


def _scaled_blocks(spec: QuantizerSpec, where: _Where) -> dict[str, Any]:
    """NVFP4 and the MX formats: blocks whose scale is a small float of its own."""
    length, scale_bits = spec.block_sizes.get(-1), spec.block_sizes.get("scale_bits")
    if spec.is_nvfp4:
        if length != _NVFP4_BLOCK:
            raise where.refuse("block_sizes", dict(spec.block_sizes), f"NVFP4 in blocks of {_NVFP4_BLOCK} only")
        return {"strategy": QuantizationStrategy.TENSOR_GROUP, "group_size": length, "scale_dtype": torch.float8_e4m3fn}
    if scale_bits != _E8M0 or isinstance(spec.num_bits, int) or length != _MX_BLOCK:
        raise where.refuse(
            "block_sizes",
            dict(spec.block_sizes),
            f"blocks of {_MX_BLOCK} with scale_bits (8, 0) of E2M1 and E4M3, beside NVFP4",
        )
    return {"strategy": QuantizationStrategy.GROUP, "group_size": length, "scale_dtype": torch.uint8}


def _check_pair(weights: QuantizationArgs, inputs: QuantizationArgs, where: _Where) -> None:
    is_w4afp8 = (
        weights.type == QuantizationType.INT
        and weights.num_bits == 4
        and inputs.type == QuantizationType.FLOAT
        and inputs.num_bits == 8
    )
    if (weights.type != inputs.type and not is_w4afp8) or inputs.num_bits < weights.num_bits:
        found = f"{inputs.type}{inputs.num_bits} inputs under {weights.type}{weights.num_bits} weights"
        raise where.refuse(
            "num_bits",
            found,
            "schemes of one kind of number, inputs no narrower than weights, and INT4 weights under FP8 inputs",
        )


def _check_returns(given: Mapping[str, Any], returned: Mapping[str, Any], where: _Where) -> None:
    if canonical_attributes(given) == canonical_attributes(returned):
        return
    full = {**ATTRIBUTE_DEFAULTS, **{key: value for key, value in given.items() if key != COST_HINT}}
    back = {**ATTRIBUTE_DEFAULTS, **returned}
    field = next((key for key in full if full[key] != back.get(key)), "block_sizes")
    raise where.refuse(field, full[field], f"{back.get(field)!r} there")
