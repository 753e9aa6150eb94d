"""Dynamic block formats on any device: ModelOpt's own kernels on a CUDA GPU, their arithmetic bit for bit on the CPU.

ModelOpt 0.47 has NVFP4, the MX formats and the other dynamic block formats as CUDA kernels only, and its
TensorQuantizer runs the NVFP4 kernel on blocks of 16 whatever the recipe says (compute capability 8.9 and above). The
backend below runs on the CPU too and keeps the recipe's block length.

The kernels divide as `x * rcp(y)` with the GPU's approximate reciprocal, one unit in the last place off in 13% of all
mantissas. A correctly rounded division moves some elements across a tie (1% of NVFP4 values made of quarters) and some
block scales, and with them whole blocks. `_reciprocal` is the GPU's, fitted to its output for all 2^23 mantissas on an
H100 and equal in each: in every 128th of [1, 2) a quadratic with coefficients of 26, 16 and 10 bits, whose square
leaves out the low columns of partial products (the unit of Oberman and Siu, "A High-Performance Area-Efficient
Multifunction Interpolator", ARITH 2005).
"""

import warnings
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see workers.quant.modelopt
    import modelopt.torch.kernels.quantization.gemm as modelopt_kernels
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )
    from modelopt.torch.quantization.tensor_quant import dynamic_block_quant

from sweep.core.errors import SweepError
from sweep.formats.quantizer import KERNEL_BLOCKS, NumBits
from workers.quant import e8m0_blocks

BACKEND: Final = "sweep_blocks"

_E2M1, _E4M3, _E5M2, _E8M0 = (2, 1), (4, 3), (5, 2), (8, 0)
_LARGEST: Final[dict[NumBits, float]] = {
    (4, 3): 448.0,
    (5, 2): 57344.0,
    (3, 2): 28.0,
    (2, 3): 7.5,
    (2, 1): 6.0,
    8: 127.0,
}
_CACHED: Final = 2**19  # elements
_SMALLEST_NORMAL: Final = torch.finfo(torch.float32).tiny


def register() -> None:
    """Make `backend="sweep_blocks"` known to ModelOpt's TensorQuantizer; a second call changes nothing.

    It quantizes dynamic blocks, and FP8 in other blocks under power-of-two scales (workers.quant.e8m0_blocks).
    """
    if not is_registered_quant_backend(BACKEND):
        register_quant_backend(BACKEND, _StraightThrough.apply)


class _StraightThrough(torch.autograd.Function):
    """Quantized values forward, the gradient unchanged backward, as ModelOpt's own dynamic block formats."""

    @staticmethod
    def forward(ctx: FunctionCtx, inputs: Tensor, quantizer: Any) -> Tensor:
        del ctx
        return _quantize(inputs, quantizer)

    @staticmethod
    def backward(ctx: FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad_outputs[0], None


def _quantize(inputs: Tensor, quantizer: Any) -> Tensor:
    if (quantizer.block_sizes or {}).get("type") != "dynamic":  # ModelOpt has none for whole rows
        return e8m0_blocks.fake_quantized(inputs, quantizer._get_amax(inputs), is_weight=not quantizer._dynamic)
    num_bits, sizes = quantizer.num_bits, quantizer.block_sizes
    block, scale_bits = sizes.get(-1) or sizes[inputs.dim() - 1], sizes.get("scale_bits")
    is_nvfp4 = (num_bits, scale_bits) == (_E2M1, _E4M3)
    if is_nvfp4 and block & (block - 1):
        raise SweepError(
            f"NVFP4 in blocks of {block}: ModelOpt's kernel takes powers of two. Set block_sizes to 16, 32, 64 or 128."
        )
    if not is_nvfp4 and block not in KERNEL_BLOCKS:
        raise SweepError(
            f"num_bits={num_bits} in dynamic blocks of {block}: ModelOpt's kernel takes blocks of 8, 16 or 32. "
            "Set block_sizes to one of these."
        )
    amax: Tensor | None = None if scale_bits == _E8M0 else quantizer._get_amax(inputs).amax()
    if inputs.is_cuda:
        if (
            is_nvfp4 and amax is not None and hasattr(modelopt_kernels, "fp4_fake_quant_block")
        ):  # compute capability 8.9 and above
            return modelopt_kernels.fp4_fake_quant_block(inputs, amax, block_size=block)
        return dynamic_block_quant(inputs, block, amax, None, num_bits, scale_bits)
    rows = inputs.reshape(-1, inputs.shape[-1])
    parts = [_quantized_cpu(part, amax, block, num_bits, is_nvfp4) for part in rows.split(_rows(rows.shape[1]))]
    return torch.cat(parts).view(inputs.shape)


def _quantized_cpu(x_RI: Tensor, amax: Tensor | None, block: int, num_bits: NumBits, is_nvfp4: bool) -> Tensor:
    if amax is None:
        return mx_cpu(x_RI, block, num_bits)
    return nvfp4_cpu(x_RI, amax, block) if is_nvfp4 else e4m3_scaled_cpu(x_RI, amax, block, num_bits)


def _rows(n_columns: int) -> int:
    """Rows whose temporary tensors stay in the cache: 3.4 times as fast as a whole weight of 9,728 x 2,560."""
    return max(1, _CACHED // max(1, n_columns))


def nvfp4_cpu(x: Tensor, amax: Tensor, block: int) -> Tensor:
    """E2M1 elements in blocks with an E4M3 scale each, under one scale for the tensor.

    Args:
        x: ``[..., n]``, finite, any float dtype; a last block that is not full counts as padded with zeros.
        amax: scalar, the largest magnitude that the tensor's scale covers; larger blocks saturate.
        block: elements along the last axis that share a scale.

    Returns: ``[..., n]`` in x's dtype.
    Source: `fp4_fake_quant_kernel` of ModelOpt 0.47, compiled by Triton 3.6.
    """
    blocks = _blocked(x, block)
    block_scale, tensor_scale = nvfp4_scales(x, amax, block)
    scale = block_scale * tensor_scale
    scale = torch.where(scale >= 1e-5, scale, 1.0)
    magnitude = _round_to_float(_divide(blocks.abs(), scale), _E2M1) * scale
    return _unblocked(torch.where(blocks >= 0, magnitude, 0.0 - magnitude), x)


def nvfp4_scales(x: Tensor, amax: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The two levels of NVFP4's scales, as `nvfp4_cpu` uses them.

    Returns: float32 values of E4M3, one a block, ``[..., blocks, 1]``; and the tensor's scale, a scalar. Where their
        product is under 1e-5 the kernel takes 1 instead.
    """
    tensor_scale = amax.float() * (torch.ones(()) / (6.0 * 448.0))  # as CUDA divides a tensor by a Python number
    tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1e-12)
    scale = _divide(_blocked(x, block).abs().amax(-1, keepdim=True), 6.0 * tensor_scale).clamp(max=448.0)
    return _round_to_float(scale, _E4M3), tensor_scale


def mx_cpu(x: Tensor, block: int, num_bits: NumBits) -> Tensor:
    """Elements of an MX format in blocks whose scale is a power of two.

    That is the least that keeps the block's largest element in range.

    Args:
        x: ``[..., n]``, finite, any float dtype; a last block that is not full counts as padded with zeros.
        block: elements along the last axis that share a scale.
        num_bits: element format: E4M3, E5M2, E3M2, E2M3, E2M1 or 8-bit integers.

    Returns: ``[..., n]`` in x's dtype. Zeros come back as -0.0: the kernel leaves their sign undefined, and its binary
        gives the minus.
    Raises: SweepError: ModelOpt's kernel has no such element format here.
    Source: `amax_and_convert_kernel` of ModelOpt 0.47 with E8M0 scales, compiled with --use_fast_math: subnormals
        become zero.
    """
    blocks, exponent = _flushed(_blocked(x, block)), mx_exponents(x, block, num_bits)
    scale, unscale = ((127 + power << 23).view(torch.float32) for power in (-exponent, exponent))  # 2^-127 becomes zero
    return _scaled(x, blocks, scale, unscale, num_bits)


def mx_exponents(x: Tensor, block: int, num_bits: NumBits) -> Tensor:
    """The power of two of each block's scale, as `mx_cpu` uses it. Returns: int32, ``[..., blocks, 1]``."""
    largest = _flushed(_blocked(x, block)).abs().amax(-1, keepdim=True)
    ratio_bits = _flushed(_divide(largest, torch.tensor(_largest(num_bits)))).view(torch.int32)
    exponent = (ratio_bits >> 23) - 127 + ((ratio_bits & 0x7FFFFF) > 0).int()  # of the next power of two
    exponent = torch.where(largest == 0, 0, exponent)
    return exponent


def e4m3_scaled_cpu(x: Tensor, amax: Tensor, block: int, num_bits: NumBits) -> Tensor:
    """Elements of any format in blocks with an E4M3 scale each, under one scale for the tensor.

    This is for formats that NVFP4's kernel does not apply to.

    Args:
        x: ``[..., n]``, finite, any float dtype; a last block that is not full counts as padded with zeros.
        amax: scalar, the largest magnitude that the tensor's scale covers.
        block: elements along the last axis that share a scale.
        num_bits: element format, as for `mx_cpu`.

    Returns: ``[..., n]`` in x's dtype; as on the GPU NaN everywhere for an amax above 2^126, and for zeros in 8-bit
        floats under a scale that underflows.
    Raises: SweepError: ModelOpt's kernel has no such element format here.
    Source: `compute_scale_with_global` of ModelOpt 0.47, compiled with --use_fast_math.
    """
    blocks, largest_element = _flushed(_blocked(x, block)), torch.tensor(_largest(num_bits))
    largest = blocks.abs().amax(-1, keepdim=True)
    tensor_amax = _flushed(amax.float())
    to_scale_format = 448.0 * _flushed(_divide(largest_element, tensor_amax)).double()
    to_scale_format = torch.where(tensor_amax > 2.0**126, 0.0, to_scale_format)  # how div.approx.f32 is defined there
    block_scale = _flushed((_flushed(_divide(largest, largest_element)).double() * to_scale_format).float())
    unscale = _round_to_float(block_scale, _E4M3).double() / to_scale_format
    unscale = torch.where((largest == 0) | (tensor_amax == 0), 1.0, unscale)
    return _scaled(x, blocks, _flushed((1.0 / unscale).float()), _flushed(unscale.float()), num_bits)


def _scaled(x: Tensor, blocks: Tensor, scale: Tensor, unscale: Tensor, num_bits: NumBits) -> Tensor:
    magnitude = _flushed(blocks.abs() * scale)
    if num_bits not in (_E4M3, _E5M2):  # 0 * inf, where a scale underflows: only 8-bit floats have a NaN to keep it in
        magnitude = magnitude.nan_to_num(nan=0.0, posinf=torch.inf)
    magnitude = (
        magnitude.round().clamp(max=127.0) if isinstance(num_bits, int) else _round_to_float(magnitude, num_bits)
    )
    magnitude = _flushed(magnitude * unscale)
    return _unblocked(torch.where(blocks > 0, magnitude, -magnitude), x)


def _largest(num_bits: NumBits) -> float:
    if num_bits not in _LARGEST:
        raise SweepError(f"No dynamic blocks of num_bits={num_bits}. Choose one of: {', '.join(map(str, _LARGEST))}.")
    return _LARGEST[num_bits]


def _blocked(x: Tensor, block: int) -> Tensor:
    return F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))


def _unblocked(blocks: Tensor, x: Tensor) -> Tensor:
    return blocks.flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def _flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _SMALLEST_NORMAL, 0.0 * x, x)


def _round_to_float(x: Tensor, num_bits: tuple[int, int]) -> Tensor:
    """Nearest value of the format, ties to even, saturating. Args: x: float32, not negative."""
    exponent_bits, mantissa_bits = num_bits
    smallest = 2 - (1 << (exponent_bits - 1)) + 127  # exponent of the smallest normal number, as float32 writes it
    step = ((x.view(torch.int32) >> 23).clamp(min=smallest) - mantissa_bits << 23).view(torch.float32)
    return ((x / step).round() * step).clamp(max=_LARGEST[num_bits])


def _divide(x: Tensor, y: Tensor) -> Tensor:
    """The GPU's approximate ``x / y`` in float32. Args: x, y: float32, y positive."""
    return (x.double() * _reciprocal(y)).float()


def _reciprocal(y: Tensor) -> Tensor:
    """The GPU's approximate ``1 / y``. Args: y: positive float32. Returns: float64, of 24 significant bits."""
    fraction, exponent = torch.frexp(y.double())
    mantissa = (fraction * (1 << 24)).long() & 0x7FFFFF
    (c0, c1, c2), squares = _interpolator(y.device)
    segment, offset = mantissa >> 16, mantissa & 0xFFFF
    # In units of 2^-39. The constant is the only one that fits: 2022 misses 208 of the 2^23 mantissas, 2024 misses 320.
    total = (c0[segment] << 13) - c1[segment] * offset + c2[segment] * squares[offset] + 2023
    return torch.ldexp((total >> 15).double(), -23 - exponent)


@cache
def _interpolator(device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The three coefficients of the segments, ``[128]``, and the truncated squares of offsets, ``[65536]``; int64."""
    packed = torch.tensor([int(_COEFFICIENTS[i : i + 13], 16) for i in range(0, len(_COEFFICIENTS), 13)])
    bits = torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1
    squares = torch.zeros(1 << 16, dtype=torch.long)
    for i in range(16):
        for j in range(i, 16):
            column = i + j + (i != j)
            if column >= 17:
                squares += bits[:, i] * bits[:, j] << column - 17
    packed = packed.to(device)
    return ((packed >> 26) + (1 << 25), packed >> 10 & 0xFFFF, packed & 0x3FF), squares.to(device)


# One segment in 13 hex digits, eight a line: C0 - 2^25 in 26 bits, C1 in 16, C2 in 10.
_COEFFICIENTS: Final = (
    "8000003fffbf57e03f8bf02bdd7c0fc1be0b7c67a232d7d19fb1783e0fbc2db9b76603e3b46f8674898e3a6577372b9d6b988b5f"
    "70f0f138b0f4d6f2eb7b7ddf3b6d7304770f7296bbdb2f6453176a0ea1757f7066865ad34bdef666c2b4f4006e6652598b346ed7"
    "638e3972912c761fc78b1df2b8607038b130eaa5ee95cb08629d5d67c8efdee905beb626f3ae825a740dee9a6775901b2adfce6a"
    "5794366d6265d562b81accb25254c77bac36a4653680daba523c520d21ab1663150b6a06a8a2254f64756a00e1c4e168ae979e11"
    "4ccccd68f5a074b87286873dfe4a458827f45f54907dae7771ea47ce0ce6fc5e246980d2683dda4565c9260d5d144373065991c9"
    "430c316526dc141e4bc64b69b940c0c164485b13fa030a3dc1aa3e82faa3719a23d6910e30919c3c5264a2a21933b3ee7a23d18d"
    "3a2e8c61d9d86392144617817f3817032118179370fbc20b9d73360b61605d16e3509e72001966340b411fa7d61330f639f4f95c"
    "3216435ef8955311fd49ea3551302c0b9e4f14b2f3ade1dfc5462e4c41ddaad402d602c1d5ad3c2c76925d0bd362b8f6a5cbe131"
    "2aaaab1c71d2e29c84b1c2692928e8401bdc523280a811b9351f272f05db4b91b2655c49b04d17257eb59abf11224a9cfda7a90f"
    "23d70ada36d0a23065ed9f45072237c399b2902216b31997210020a0a159324fb1fd80a98f38f81f116698b58f31e4cad98788f0"
    "1d89d9183c8ed1cc8e218014e91c09c157c70e71b4c70578d4e21a90e857548df19d723571ccde191f1ad6e58da1868c896af0d6"
    "17b42696798d417012ed6448d0164fdad6104cd15a02615dd0cc14f209d5aa0c714458115780c5139a865546cc412f11415160c1"
    "12492514e5cbd11a2b454b64ba10fdbcd4878b8105a38d4594b60fb824942bcb40f177a53fecb20e7835d3d24af0dda5293a68ad"
    "0d3dcb937b4ab0ca29c53508a90c08c113264a60b7034d2fcca50ad8f392d38a10a42f912ab0a009ae41128309f091ac7d25b49b"
    "088889123449a07f781120dc990767abd1e789606d90611c2095064b8b119cc9305bf37d1780910534091153c8f04a9fa113008f"
    "042108d10c88c03993110e988a03126f50c7089028cc050a4c87020821108308501848e5061c840102045040c83008080d020482"
)
