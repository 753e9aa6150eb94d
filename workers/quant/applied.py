"""A mixed-precision recipe on a whole model: the quantizers of every linear, calibrated, and the model as if it were quantized."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.core.errors import SweepError
from sweep.formats.mixed import GroupChoice, GroupFormat, MixedRecipe
from sweep.formats.quantizer import QuantizerSpec
from sweep.formats.recipe import SCALES_INPUTS
from workers.model.forward import batch_to
from workers.model.memory import windows
from workers.quant.calibration import (
    calibrated_linears,
    fake_quantized,
    quantized_inputs,
    smoothed_inputs,
    smoothed_weight,
)
from workers.quant.linear import LinearQuant

_ROOM_BYTES: Final = 4e9  # for what linears read in one pass


def calibrated_model(
    model: nn.Module, batches: Sequence[Batch], recipe: MixedRecipe, room_bytes: float = _ROOM_BYTES
) -> dict[str, LinearQuant]:
    """ModelOpt's ranges and scales by module name.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs what its linears read.
        recipe: what each layer group gets.
        room_bytes: for what linears read.

    Raises: SweepError: no calibration sample reaches a group that needs them.
    """
    formats = {choice.group: [chosen] for choice in recipe.groups if (chosen := recipe.format_of(choice)) is not None}
    found = calibrated_groups(model, batches, recipe.groups, formats, room_bytes)
    return {name: quant for (quants,) in found.values() for name, quant in quants.items()}


@torch.no_grad()
def calibrated_groups(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[GroupChoice],
    formats: Mapping[str, Sequence[GroupFormat]],
    room_bytes: float = _ROOM_BYTES,
) -> dict[str, list[dict[str, LinearQuant]]]:
    """ModelOpt's ranges and scales for several formats of each layer group.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs what its linears read, once for as many groups as
            have room.
        groups: in the model's order; their choices are not looked at.
        formats: those wanted, by group.
        room_bytes: for what linears read.

    Returns: by group, for each of its formats: by module name.

    Raises: SweepError: no calibration sample reaches a group that needs them.
    """
    wanted = [choice for choice in groups if choice.group in formats]
    n_rows = sum(max(sum(batch.lengths), sum(batch.patch_counts)) for batch in batches)
    itemsize = next(model.parameters()).element_size()
    reading = {choice.group for choice in wanted if any(map(needs_inputs, formats[choice.group]))}
    sizes = [
        n_rows * _linear(model, choice.group).in_features * itemsize if choice.group in reading else 0
        for choice in wanted
    ]
    found: dict[str, list[dict[str, LinearQuant]]] = {}
    for window in windows(wanted, sizes, room_bytes):
        inputs = _inputs(model, batches, [choice.group for choice in window if choice.group in reading])
        for choice in window:
            seen = inputs.pop(choice.group, [])
            if choice.group in reading and not seen:
                raise SweepError(
                    f"No calibration sample reaches {choice.group}, so its inputs have no range. Choose a data set that does, or another format."
                )
            weights: dict[str, Tensor] = {module: _linear(model, module).weight.detach() for module in choice.modules}
            found[choice.group] = [
                calibrated_linears(
                    weights,
                    seen if needs_inputs(chosen) else [],
                    chosen.weight,
                    chosen.inputs,
                    chosen.algorithm,
                    chosen.scales,
                )
                for chosen in formats[choice.group]
            ]
    return found


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


def needs_inputs(chosen: GroupFormat) -> bool:
    """Whether ranges or scales depend on calibration samples."""
    is_static = chosen.inputs is not None and QuantizerSpec(attributes=chosen.inputs).is_calibrated
    return is_static or chosen.algorithm in SCALES_INPUTS


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
