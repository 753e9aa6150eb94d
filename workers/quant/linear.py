"""One linear's quantizers after calibration: all that a fake-quantized model or an export needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sweep.formats.quantizer import Quantizer


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearQuant:
    """One linear's quantizers after calibration, with their ranges and scales."""

    weight: Quantizer | None  # None: left unquantized
    inputs: Quantizer | None
    # float32, as ModelOpt's TensorQuantizer keeps it: one a tensor, a channel or a block; None where values alone
    # decide (MX)
    weight_amax: Tensor | None
    input_amax: Tensor | None  # the same of a static input range; None for dynamic ones
    # [in], multiplied to the inputs and divided out of the weights before both are quantized; None without
    pre_quant_scale: Tensor | None
    rounds_scales: bool = False  # whether the weight's scales are values of bfloat16; see Format.rounds_scales


def rounded_range(amax: Tensor, num_bits: int) -> Tensor:
    """Ranges of integers whose scale, range / largest integer, is the bfloat16 value nearest to that of `amax`.

    The product of 8 and at most 15 significant bits is exact in float32, so dividing by the largest integer gives the
    bfloat16 value back bit for bit. ModelOpt multiplies codes by 1 / (largest / range) instead, which is off by one
    unit in float32's last place now and then. A range that is rounded down saturates values at its end by 2^-8 of
    them at most, less than half a step of 8 bits: their code is the largest integer either way.

    Args:
        amax: float32, any shape, not negative.
        num_bits: of the integers, at most 16.
    """
    largest = torch.full((), float(2 ** (num_bits - 1) - 1), device=amax.device)  # CUDA multiplies by 1 / a number
    return (amax.float() / largest).bfloat16().float() * largest
