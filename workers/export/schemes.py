"""ModelOpt's quantizer attributes as compressed-tensors schemes, and back.

The two directions are written apart, so that a round trip through them is a check: a field that one forgets, the other
does not return. Formats as of compressed-tensors 0.20. With `weights` and `compressed` beside it this is the home
of `compressed_tensors`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.quant_args import DynamicType
from torch import nn

from sweep.formats.format import GroupFormat
from sweep.formats.quantizer import ATTRIBUTE_DEFAULTS, Attribute, Attributes, BlockValue, Quantizer
from workers.export.layout import Inexpressible

_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
_FLOAT_BITS: Final = {_E2M1: 4, _E4M3: 8}
_NVFP4_BLOCK, _MX_BLOCK = 16, 32  # the only lengths that the format's compressors take


@dataclass(frozen=True, slots=True, kw_only=True)
class _Where:
    """The quantizer that an error message names."""

    label: str  # of the recipe's format
    quantizer: str  # "weight" or "inputs"

    def refuse(self, field: str, found: Attribute, allowed: str) -> Inexpressible:
        return Inexpressible(
            f"compressed-tensors can't express {self.quantizer}.{field}: {found!r} of format {self.label!r}. "
            f"It has {allowed}. Choose another format for these groups, or --format modelopt."
        )


def scheme_of(label: str, chosen: GroupFormat) -> QuantizationScheme:
    """The scheme of one format, without targets, with the compression format that runtimes take.

    Args:
        label: the format's, for messages.
        chosen: the format.

    Raises: Inexpressible: names the format and the field.
    """
    weight, given_inputs = (each and as_written(each) for each in (chosen.weight, chosen.inputs))
    if weight is None:
        raise _Where(label=label, quantizer="weight").refuse(
            "num_bits", 16, "quantized inputs under quantized weights only"
        )
    weights = _weight_args(weight, _Where(label=label, quantizer="weight"))
    inputs = None if given_inputs is None else _input_args(given_inputs, _Where(label=label, quantizer="inputs"))
    if inputs is not None:
        _check_pair(weights, inputs, _Where(label=label, quantizer="inputs"))
    scheme = QuantizationScheme(targets=[], weights=weights, input_activations=inputs)
    for where, given, args in (("weight", weight, weights), ("inputs", given_inputs, inputs)):
        if given is not None and args is not None:
            _check_returns(given, quantizer_of(args), _Where(label=label, quantizer=where))
    return scheme.model_copy(update={"format": _file_format(scheme, weights).value})


def _file_format(scheme: QuantizationScheme, weights: QuantizationArgs) -> CompressionFormat:
    """The library's choice, but for INT4 weights under quantized inputs, for which it takes a byte a weight.

    Source: vLLM 0.26 and 0.32, whose schemes W4A8Fp8 and W4A8Int have `weight_packed`, eight weights in an int32.
    """
    if weights.type == QuantizationType.INT and weights.num_bits == 4:
        return CompressionFormat.pack_quantized
    return infer_module_format(nn.Linear, scheme)


def quantizer_of(args: QuantizationArgs) -> Quantizer:
    """The quantizer that a reader of the file uses: the attributes that differ from ModelOpt's defaults.

    Args:
        args: of weights or of inputs, symmetric.
    """
    is_float = args.type == QuantizationType.FLOAT
    bits = {bits: name for name, bits in _FLOAT_BITS.items()}[args.num_bits] if is_float else args.num_bits
    return Quantizer({"num_bits": bits, **_ranges_of(args)})


def as_written(quantizer: Quantizer) -> Quantizer:
    """A quantizer as far as the file can say it: all of it, but that scales of FP8 blocks are powers of two.

    compressed-tensors stores such scales in float32, as others, and has no field for how a reader finds the scales of
    dynamic inputs. vLLM rounds these up wherever its DeepGEMM kernels run, whatever the file says, and no other reader
    does. So weights and their scales are compared by value when an export is read back (workers.export.readback), and
    which runtime computes the inputs so is stated in ``conf/target``.
    """
    if not quantizer.has_e8m0_blocks:
        return quantizer
    blocks = {key: value for key, value in quantizer.block_sizes.items() if key != "scale_bits"}
    return Quantizer({**quantizer.attributes, "block_sizes": blocks})


def _ranges_of(args: QuantizationArgs) -> Attributes:
    """The attributes that say which elements share a range, and whether it is found anew in each call."""
    group, strategy = args.group_size, args.strategy
    if strategy == QuantizationStrategy.CHANNEL:
        return {"axis": 0}
    if strategy == QuantizationStrategy.TOKEN:
        return {"type": "dynamic", "block_sizes": {-1: None}}
    if strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure or (0, 0)
        return {"block_sizes": {-1: columns, -2: rows}}
    has_small_scales = strategy == QuantizationStrategy.GROUP and args.scale_dtype == torch.uint8
    if strategy == QuantizationStrategy.TENSOR_GROUP or has_small_scales:
        blocks: dict[int | str, BlockValue] = {
            -1: group,
            "type": "dynamic",
            "scale_bits": _E8M0 if has_small_scales else _E4M3,
        }
        return {"block_sizes": blocks}
    dynamic: Attributes = {"type": "dynamic"} if args.dynamic else {}
    return {"block_sizes": {-1: group}, **dynamic} if strategy == QuantizationStrategy.GROUP else dynamic


def _weight_args(spec: Quantizer, where: _Where) -> QuantizationArgs:
    num_bits, number = _number(spec, where)
    args = partial(QuantizationArgs, num_bits=num_bits, type=number, symmetric=True, dynamic=False)
    if spec.is_dynamic:
        raise where.refuse("type", "dynamic", "weights in static ranges")
    if spec.has_dynamic_blocks:
        strategy, length, scale_dtype = _scaled_blocks(spec, where)
        return args(strategy=strategy, group_size=length, scale_dtype=scale_dtype)
    lengths, axes = spec.block_lengths, _block_fields(spec)
    if not axes:
        if spec.axis not in (None, 0):
            raise where.refuse("axis", spec.axis, "one scale a tensor (null) or one an output channel (0)")
        return args(strategy=QuantizationStrategy.TENSOR if spec.axis is None else QuantizationStrategy.CHANNEL)
    if axes == {-1} and spec.num_bits != _E2M1:
        return args(strategy=QuantizationStrategy.GROUP, group_size=lengths[-1])
    if axes == {-1, -2} and spec.num_bits == _E4M3:
        return args(strategy=QuantizationStrategy.BLOCK, block_structure=[lengths[-2] or 0, lengths[-1] or 0])
    raise where.refuse(
        "block_sizes", spec.block_sizes, "groups along the inputs for integers and FP8, two-dimensional blocks for FP8"
    )


def _input_args(spec: Quantizer, where: _Where) -> QuantizationArgs:
    num_bits, number = _number(spec, where)
    args = partial(QuantizationArgs, num_bits=num_bits, type=number, symmetric=True)
    if spec.has_dynamic_blocks:
        if not spec.is_nvfp4 and spec.num_bits == _E2M1:
            # generate_mx_scales rounds a block's range to the nearest power of two and saturates, ModelOpt rounds up.
            raise where.refuse(
                "num_bits",
                spec.num_bits,
                "another rule for the scale of MXFP4 inputs than ModelOpt, so it would compute other numbers",
            )
        strategy, length, scale_dtype = _scaled_blocks(spec, where)
        dynamic = DynamicType.LOCAL if spec.is_nvfp4 else True
        return args(strategy=strategy, group_size=length, scale_dtype=scale_dtype, dynamic=dynamic)
    if spec.axis is not None:
        raise where.refuse("axis", spec.axis, "inputs in one static scale, or in dynamic ones a token or a group")
    if not spec.is_dynamic:
        if _block_fields(spec):
            raise where.refuse("block_sizes", spec.block_sizes, "no static blocks of inputs")
        return args(strategy=QuantizationStrategy.TENSOR, dynamic=False)
    if spec.num_bits == 4:
        raise where.refuse(
            "num_bits",
            4,
            "a range of amax / 7.5 for dynamic INT4 where ModelOpt's is amax / 7, so it would compute other numbers",
        )
    if _block_fields(spec) == {-1}:
        length = spec.block_lengths[-1]
        strategy = QuantizationStrategy.TOKEN if length is None else QuantizationStrategy.GROUP
        return args(strategy=strategy, group_size=length, dynamic=True)
    raise where.refuse("block_sizes", spec.block_sizes, "dynamic scales of inputs a token or a group along the inputs")


def _block_fields(spec: Quantizer) -> set[int | str]:
    """Axes of blocks, and names of their other fields than their type."""
    return spec.block_sizes.keys() - {"type"}


def _number(spec: Quantizer, where: _Where) -> tuple[int, QuantizationType]:
    bits = spec.num_bits
    if isinstance(bits, int):
        if bits > 8:
            raise where.refuse("num_bits", bits, "integers of 2 to 8 bits")
        return bits, QuantizationType.INT
    if bits not in _FLOAT_BITS:
        raise where.refuse("num_bits", bits, "floats of E2M1 and E4M3")
    return _FLOAT_BITS[bits], QuantizationType.FLOAT


def _scaled_blocks(spec: Quantizer, where: _Where) -> tuple[QuantizationStrategy, int, torch.dtype]:
    """NVFP4 and the MX formats: blocks whose scale is a small float of its own; their length and the scale's type."""
    length = spec.block_lengths.get(-1)
    if spec.is_nvfp4:
        if length != _NVFP4_BLOCK:
            raise where.refuse("block_sizes", spec.block_sizes, f"NVFP4 in blocks of {_NVFP4_BLOCK} only")
        return QuantizationStrategy.TENSOR_GROUP, length, torch.float8_e4m3fn
    if spec.scale_bits != _E8M0 or isinstance(spec.num_bits, int) or length != _MX_BLOCK:
        raise where.refuse(
            "block_sizes",
            spec.block_sizes,
            f"blocks of {_MX_BLOCK} with scale_bits (8, 0) of E2M1 and E4M3, beside NVFP4",
        )
    return QuantizationStrategy.GROUP, length, torch.uint8


def _check_pair(weights: QuantizationArgs, inputs: QuantizationArgs, where: _Where) -> None:
    is_w4afp8 = (
        weights.type == QuantizationType.INT
        and weights.num_bits == 4
        and inputs.type == QuantizationType.FLOAT
        and inputs.num_bits == 8
    )
    if weights.scale_dtype == torch.uint8 and not inputs.dynamic:
        # vLLM 0.26 and 0.32: W4A4Mxfp4 and W8A8Mxfp8 have no parameter for it, and refuse the checkpoint.
        raise where.refuse("type", "static", "dynamic inputs or none under weights of an MX format")
    if (weights.type != inputs.type and not is_w4afp8) or inputs.num_bits < weights.num_bits:
        found = f"{inputs.type}{inputs.num_bits} inputs under {weights.type}{weights.num_bits} weights"
        raise where.refuse(
            "num_bits",
            found,
            "schemes of one kind of number, inputs no narrower than weights, and INT4 weights under FP8 inputs",
        )


def _check_returns(given: Quantizer, returned: Quantizer, where: _Where) -> None:
    if (field := given.differing(returned)) is not None:
        found, back = ({**ATTRIBUTE_DEFAULTS, **each.attributes}.get(field) for each in (given, returned))
        raise where.refuse(field, found, f"{back!r} there")
