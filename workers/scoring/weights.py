"""The weights of linears under recipes, quantized, with their errors: both engines work with them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sweep.formats.format import Format
from workers.quant import kernels
from workers.quant.modelopt import Quantizers, quantized
from workers.scoring.capture import square_sum


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A linear's weight under one recipe."""

    quantized_OI: Tensor  # operand dtype
    delta_OI: Tensor | None  # its change, operand dtype; None: the weight is left unquantized
    dw_square_sum: Tensor | float


class Weights:
    """Quantizes weights of one loaded model; keeps quantizers, ranges, sums of squares and checks between calls.

    An equal module name means an equal weight.
    """

    def __init__(self) -> None:
        self.quantizers = Quantizers()
        self._finite: dict[str, bool] = {}  # by module
        self._squares: dict[str, Tensor] = {}

    def quantized(self, module: str, chosen: Format, weight_OI: Tensor, group: Mapping[str, Tensor]) -> QuantizedWeight:
        """A weight [out, in] under a format; see workers.quant.modelopt.Quantizers.weight.

        Args:
            module: names the weight.
            chosen: the format, of algorithm `max`.
            weight_OI: [out, in].
            group: all weights of the layer group, by module.
        """
        if chosen.weight is None:
            return QuantizedWeight(weight_OI, None, 0.0)
        fused = group if chosen.is_fused else None
        made = self.quantizers.weight(module, chosen.weight, weight_OI, fused, rounds_scales=chosen.rounds_scales)
        return QuantizedWeight(*kernels.deltas(quantized(made, weight_OI), weight_OI))

    def square(self, module: str, weight_OI: Tensor) -> Tensor:
        """Sum of squares of a weight, a float64 scalar."""
        if module not in self._squares:
            self._squares[module] = square_sum(weight_OI)
        return self._squares[module]

    def not_finite(self, weights: Mapping[str, Tensor]) -> str | None:
        """The reason why no recipe can be scored: a NaN or an infinity in a weight, None if there is none."""
        for module, weight_OI in weights.items():
            if module not in self._finite:
                self._finite[module] = bool(torch.isfinite(weight_OI).all())
            if not self._finite[module]:
                advice = "Compare the checkpoint's checksum with the published one."
                return f"the weight of {module} is NaN or infinite. {advice}"
        return None
