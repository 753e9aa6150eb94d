"""How one linear of a model is quantized, ranges included: what applying a recipe to a model gives, and all that an export needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearQuant:
    """One linear's quantizers after calibration. Attributes are fields of ModelOpt's QuantizerAttributeConfig."""

    weight: Mapping[str, Any] | None  # None: left unquantized
    inputs: Mapping[str, Any] | None
    weight_amax: (
        Tensor | None
    )  # float32, as ModelOpt's TensorQuantizer keeps it: one a tensor, a channel or a block; None where values alone decide (MX)
    input_amax: Tensor | None  # the same of a static input range; None for dynamic ones
    pre_quant_scale: (
        Tensor | None
    )  # [in], multiplied to the inputs and divided out of the weights before both are quantized; None without
