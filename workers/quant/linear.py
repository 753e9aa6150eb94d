"""One linear's quantizers after calibration: all that a fake-quantized model or an export needs."""

from dataclasses import dataclass

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
