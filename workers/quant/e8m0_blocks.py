"""FP8 in blocks under power-of-two scales (UE8M0), chosen before the codes: what vLLM computes on DeepGEMM.

This arithmetic is ours, not ModelOpt's: that has power-of-two scales for dynamic blocks of 8, 16 or 32 alone. Plain
PyTorch, and the same bits on every device: exponents are integers, and scaling by a power of two is exact.

A scale is the least power of two that is at least amax / 448, so no value saturates. Values quantized once are
multiples of their scale, and quantized again by the same rule they stay what they are: a runtime that requantizes
weights as it loads them changes nothing. (Where the largest value is rounded down to 224 times the scale, it halves the
scale and doubles the codes.)

Scales have a floor, which that of zeros is, too: 2^-22 for weights, the least power of two from 1e-4 / 448 up; 2^-33
for inputs, that from 1e-10 up. Source: vLLM 0.32, `per_block_cast_to_fp8` (vllm/utils/deep_gemm.py) and
csrc/libtorch_stable/quantization/w8a8/fp8/per_token_group_quant.cu. Both take the logarithm in float32, so a range
within 1e-6 above 448 times a power of two, which values of bfloat16 never have, may get half of our scale there; its
own code is the largest either way.
"""

from typing import Final

import torch
from torch import Tensor

_LARGEST: Final = 448.0  # of E4M3: 0.875 * 2^9
_MANTISSA, _EXPONENT = 0.875, 9
_WEIGHT_FLOOR, _INPUT_FLOOR = -22, -33  # exponents


def scales_of(amax: Tensor, *, is_weight: bool) -> Tensor:
    """The power-of-two scale of each range, float32, of the same shape; NaN where the range is not finite.

    Args:
        amax: the largest magnitudes, float32, not negative.
        is_weight: decides the floor.
    """
    floor = _WEIGHT_FLOOR if is_weight else _INPUT_FLOOR
    mantissa, exponent = torch.frexp(amax.float().clamp(min=_LARGEST * 2.0**floor))  # mantissa in [0.5, 1)
    exponent = exponent - _EXPONENT + (mantissa > _MANTISSA).int()
    scale = (exponent + 127 << 23).view(torch.float32)  # 2^exponent, from its bits
    return torch.where(amax.isfinite(), scale, torch.nan)


def fake_quantized(x: Tensor, amax: Tensor, *, is_weight: bool) -> Tensor:
    """Values rounded to E4M3 under their block's scale, in x's dtype.

    Args:
        x: any float dtype.
        amax: the ranges of its blocks, of a shape that broadcasts.
        is_weight: see `scales_of`.
    """
    scale = scales_of(amax, is_weight=is_weight)
    codes = (x.float() * (1.0 / scale)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)
