"""One linear's tensors in a compressed-tensors checkpoint: packed weight and scales, by the library's own compressors.

The compressors are given the weight as ModelOpt has quantized it, not the original: `x / scale` and ModelOpt's
`x * (1 / scale)` fall on different sides of a tie now and then, but a value that is a multiple of its scale already has
one nearest code.

Readers, by the code of compressed-tensors 0.20 and transformers 5.24, use it as follows: `from_pretrained` puts the
tensors into the modules as they are, and the first forward pass decompresses every weight, once. From then on inputs
are quantized at each pass and weights are not, so the model computes what it was fitted to, in floating point. Of the
packed formats NVFP4 and MX decompress to bfloat16, all others to the scales' dtype, float32 here. Dynamic INT8 inputs
have a range of amax / 127.5 there, amax / 127 in ModelOpt and in vLLM's kernels.

Their agreement with us is bounded. Weights: 1e-6 of each element, or bfloat16's 2^-9. Inputs: one in 1e5 to 1e6 rounds
the other way, because they divide where ModelOpt multiplies by the reciprocal, and from the first such element on the
whole model drifts: KL a tenth (FP8) to nearly a half (NVFP4) of the quantization's own, as far as our model drifts from
itself when its embeddings move in their last bits. In their order of operations our ranges and codes give their logits
to the bit, in every format (tests/unit/export/test_checkpoint.py).
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_range
from torch import Tensor

from workers.export.folding import scaled_rows
from workers.export.schemes import quantizer_of
from workers.quant import e8m0_blocks
from workers.quant.block_formats import mx_exponents, nvfp4_scales
from workers.quant.calibration import fake_quantized, smoothed_weight
from workers.quant.linear import LinearQuant

_NVFP4_RANGE: Final = 448.0 * 6.0  # largest block scale times largest element
_UNUSED_SCALE: Final = 0.125  # of blocks of zeros, as the library writes it; 0 would decompress to 0 / 0


def packed(
    weight_OI: Tensor, linear: LinearQuant, scheme: QuantizationScheme, output_scale_O: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds for one quantized linear.

    Args:
        weight_OI: [out, in], the checkpoint's, on the device that computes.
        linear: its quantizers.
        scheme: of its format, by `scheme_of`.
        output_scale_O: [out], a pre-quantization scale of the linear behind, folded into the scales of the weight's
            rows; codes stay as they are. Quantizers that round scales were calibrated for that
            (workers.quant.folds.folded).

    Returns: tensors on the CPU by local name: `weight_packed` or `weight`, `weight_scale` and the format's others;
        scales in float32 unless the format gives them another dtype.
    """
    assert scheme.weights is not None  # scheme_of refuses others
    quantized_OI = fake_quantized(linear, weight_OI)
    state: dict[str, Tensor | None] = {
        "weight": quantized_OI,
        **_weight_scales(quantized_OI, weight_OI, linear, scheme.weights),
    }
    compressed = _compressor(scheme).compress(state, scheme)
    if output_scale_O is not None:
        assert compressed["weight_scale"] is not None
        scale = scaled_rows(compressed["weight_scale"], output_scale_O)  # of bfloat16 values but for the last bits
        compressed["weight_scale"] = scale.bfloat16().float() if linear.rounds_scales else scale
    return {
        name: tensor.contiguous().cpu()
        for name, tensor in {**compressed, **input_scales(linear, scheme)}.items()
        if tensor is not None
    }


def unpacked(state: Mapping[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    """The weight that a reader computes with, [out, in], bfloat16 or float32. Args: state: as `packed` returns it."""
    weight = _compressor(scheme).decompress(dict(state), scheme)["weight"]
    assert weight is not None
    return weight


def input_scales(linear: LinearQuant, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """The static scale of a linear's inputs, `[1]` float32, by local name; empty for dynamic ones."""
    inputs = scheme.input_activations
    if inputs is None or inputs.dynamic is True:
        return {}
    assert linear.input_amax is not None  # a static range was calibrated
    amax = linear.input_amax.float().reshape(1).cpu()
    if inputs.strategy == QuantizationStrategy.TENSOR_GROUP:
        return {"input_global_scale": _NVFP4_RANGE / _positive(amax)}
    return {"input_scale": _positive(amax / _largest(inputs, amax.device))}


def _weight_scales(
    quantized_OI: Tensor, weight_OI: Tensor, linear: LinearQuant, args: QuantizationArgs
) -> dict[str, Tensor]:
    original_OI = smoothed_weight(linear, weight_OI)
    if args.scale_dtype == torch.uint8:
        exponents = mx_exponents(original_OI, args.group_size or 0, quantizer_of(args).num_bits)
        return {"weight_scale": torch.exp2(exponents.squeeze(-1).float())}
    amax = linear.weight_amax
    assert amax is not None  # all but the MX formats have a range
    amax = amax.float().to(weight_OI.device)
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        block_scales, _ = nvfp4_scales(original_OI, amax, args.group_size or 0)
        blocks = quantized_OI.unflatten(-1, (-1, args.group_size or 0))
        block_scales = block_scales.squeeze(-1)
        scales = torch.where((blocks == 0).all(-1) | (block_scales == 0), _UNUSED_SCALE, block_scales)
        return {"weight_scale": scales, "weight_global_scale": _NVFP4_RANGE / _positive(amax.reshape(1))}
    amax = amax.reshape(_scale_shape(weight_OI, args))
    if linear.weight is not None and linear.weight.has_e8m0_blocks:
        return {"weight_scale": e8m0_blocks.scales_of(amax, is_weight=True)}
    return {"weight_scale": _positive(amax / _largest(args, amax.device))}


def _scale_shape(weight_OI: Tensor, args: QuantizationArgs) -> tuple[int, ...]:
    n_out, n_in = weight_OI.shape
    if args.strategy == QuantizationStrategy.BLOCK:
        rows, columns = args.block_structure or (1, 1)
        return n_out // rows, n_in // columns
    if args.strategy == QuantizationStrategy.GROUP:
        return n_out, n_in // (args.group_size or 1)
    return (n_out, 1) if args.strategy == QuantizationStrategy.CHANNEL else (1,)


def _largest(args: QuantizationArgs, device: torch.device) -> Tensor:
    """On the device of what it divides: CUDA multiplies by the reciprocal of a number or a host's scalar."""
    return calculate_range(args, str(device))[1]


def _positive(scale: Tensor) -> Tensor:
    """The scales with 1 in place of 0: of nothing but zeros any scale is right except 0."""
    return torch.where(scale > 0, scale, 1.0)


def _compressor(scheme: QuantizationScheme) -> type[BaseCompressor]:
    found: Any = BaseCompressor.get_value_from_registry(str(scheme.format))  # typed as an instance, but a class
    return found
