"""A mixed-precision recipe on a whole model: the quantizers of every linear, calibrated, and the model as if it were quantized."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.errors import SweepError
from sweep.mixed import GroupChoice, GroupFormat, MixedRecipe
from sweep.recipe_quantizer import QuantizerSpec
from workers.calibration import calibrated_linears, fake_quantized, quantized_inputs, smoothed_inputs, smoothed_weight
from workers.capture import batch_to
from workers.data import Batch
from workers.linear_quant import LinearQuant

_ROOM_BYTES: Final = 4e9  # for what linears read in one pass


@torch.no_grad()
def calibrated_model(model: nn.Module, batches: Sequence[Batch], recipe: MixedRecipe, room_bytes: float = _ROOM_BYTES) -> dict[str, LinearQuant]:
    """ModelOpt's ranges and scales by module name.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs what its linears read, once for as many groups as
            have room.
        recipe: what each layer group gets.
        room_bytes: for what linears read.

    Raises: SweepError: no calibration sample reaches a group that needs them.
    """
    n_rows = sum(max(sum(batch.lengths), sum(batch.patch_counts)) for batch in batches)
    itemsize = next(model.parameters()).element_size()
    quants: dict[str, LinearQuant] = {}
    waiting: list[GroupChoice] = []
    size = 0.0

    def flush() -> None:
        inputs = _inputs(model, batches, [choice.group for choice in waiting if needs_inputs(recipe.format_of(choice))])
        for choice in waiting:
            chosen = recipe.format_of(choice)
            assert chosen is not None
            seen = inputs.pop(choice.group, [])
            if needs_inputs(chosen) and not seen:
                raise SweepError(f"No calibration sample reaches {choice.group}, so its inputs have no range. Choose a data set that does, or another format.")
            weights: dict[str, Tensor] = {module: _linear(model, module).weight.detach() for module in choice.modules}
            quants.update(calibrated_linears(weights, seen, chosen.weight, chosen.inputs, chosen.algorithm, chosen.scales))
        waiting.clear()

    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is None:
            continue
        more = n_rows * _linear(model, choice.group).in_features * itemsize if needs_inputs(chosen) else 0
        if waiting and size + more > room_bytes:
            flush()
            size = 0.0
        waiting.append(choice)
        size += more
    flush()
    return quants


@contextmanager
def applied(model: nn.Module, quants: Mapping[str, LinearQuant]) -> Generator[None]:
    """The model as if it were quantized, in its own dtype, until the block ends; gradients pass straight through quantizers of inputs.

    A linear's forward is replaced, not its weight: embeddings that share the weight keep it, whoever measures the linear's error
    finds the original, and hooks see what it reads before that is quantized.

    Args:
        model: unquantized.
        quants: from `calibrated_model`, by module name.
    """
    linears: dict[str, Any] = {name: _linear(model, name) for name in quants}
    try:
        with torch.no_grad():
            for name, linear in linears.items():
                linear.forward = _forward(linear, quants[name])
        yield
    finally:
        for linear in linears.values():
            vars(linear).pop("forward", None)  # the instance's: the class's is back


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


def _forward(linear: nn.Linear, quant: LinearQuant) -> Callable[[Tensor], Tensor]:
    weight_OI, bias = fake_quantized(quant, linear.weight.detach()).to(linear.weight.dtype), linear.bias
    if quant.inputs is None and quant.pre_quant_scale is None:
        return lambda x: F.linear(x, weight_OI, bias)
    return lambda x: F.linear(_StraightThrough.apply(x, quant), weight_OI, bias)  # pyright: ignore[reportArgumentType]


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


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise SweepError(f"{name} is a {type(found).__name__}, not a linear: the recipe belongs to another model.")
    return found


def needs_inputs(chosen: GroupFormat | None) -> bool:
    """Whether ranges or scales depend on calibration samples."""
    if chosen is None:
        return False
    is_static = chosen.inputs is not None and QuantizerSpec(attributes=chosen.inputs).is_calibrated
    return is_static or chosen.algorithm in ("awq_lite", "smoothquant")


def _inputs(model: nn.Module, batches: Sequence[Batch], groups: Sequence[str]) -> dict[str, list[Tensor]]:
    kept: dict[str, list[Tensor]] = {name: [] for name in groups}
    if not groups:
        return kept

    def keep(name: str) -> object:
        return lambda _, args: kept[name].append(args[0].detach().flatten(0, -2))

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in groups]  # pyright: ignore[reportArgumentType]
    parameter = next(model.parameters())
    try:
        for batch in batches:
            model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept
