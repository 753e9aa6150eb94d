"""A recipe at work in a model: linears that compute with quantized weights and inputs, for as long as a block lasts."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.calibration import fake_quantized, quantized_inputs, smoothed_inputs, smoothed_weight
from workers.linear_quant import LinearQuant


@contextmanager
def applied(model: nn.Module, quants: Mapping[str, LinearQuant]) -> Generator[None]:
    """Within the block the named linears compute Q(x') Q(W')^T in the model's dtype; gradients pass straight through Q of the inputs.

    A linear's forward is replaced, not its weight: hooks see what it reads before that is quantized, whoever measures its error
    finds the original weight, and embeddings that share the weight keep it.

    Args:
        model: unquantized.
        quants: calibrated, by module name (workers.group_quants).
    """
    modules = {name: model.get_submodule(name) for name in quants}
    try:
        for name, module in modules.items():
            module.forward = _forward(module, quants[name])
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)  # the instance's: the class's is back


@torch.no_grad()
def output_error(quant: LinearQuant, weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    """How far a linear's output moves when it is quantized, in float32 and in delta form: x' dW'^T + dx' Q(W')^T.

    The difference of two outputs would cancel.

    Args:
        quant: calibrated.
        weight_OI: [out, in], unquantized.
        x_TI: [rows, in], what the linear reads.

    Returns: [rows, out].
    """
    quantized_OI, x = fake_quantized(quant, weight_OI), smoothed_inputs(quant, x_TI)
    error_TO = F.linear(x, quantized_OI - smoothed_weight(quant, weight_OI))
    return error_TO if quant.inputs is None else error_TO + F.linear(quantized_inputs(quant, x_TI) - x, quantized_OI)


def _forward(module: Any, quant: LinearQuant) -> Callable[[Tensor], Tensor]:
    weight_OI, bias = fake_quantized(quant, module.weight.detach()).to(module.weight.dtype), module.bias
    if quant.inputs is None and quant.pre_quant_scale is None:
        return lambda x: F.linear(x, weight_OI, bias)
    return lambda x: F.linear(_StraightThrough.apply(x, quant), weight_OI, bias)


class _StraightThrough(torch.autograd.Function):
    """Q(x'), with the gradient that x' would have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quant: LinearQuant) -> Tensor:
        ctx.scale = quant.pre_quant_scale
        return quantized_inputs(quant, x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grad_outputs
        return gradient if ctx.scale is None else (gradient * ctx.scale).to(gradient.dtype), None
