"""A mixed-precision recipe on a whole model: calibrated quantizers of every linear, and fake-quantized passes."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.core.errors import SweepError
from sweep.core.groups import LayerGroup
from sweep.formats.format import Format
from sweep.formats.mixed import MixedRecipe
from workers.model.forward import batch_to
from workers.model.hooks import inputs_seen, replaced_forwards
from workers.model.memory import n_rows, windows
from workers.quant.calibration import (
    calibrated_linears,
    fake_quantized,
    quantized_inputs,
    smoothed_inputs,
    smoothed_weight,
)
from workers.quant.folds import folded
from workers.quant.linear import LinearQuant

_ROOM_BYTES: Final = 4e9  # for the inputs of linears that one pass keeps


def calibrated_model(
    model: nn.Module, batches: Sequence[Batch], recipe: MixedRecipe, room_bytes: float = _ROOM_BYTES
) -> dict[str, LinearQuant]:
    """ModelOpt's calibration ranges (amax) and pre-quantization scales for a recipe, by module name.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs its linears' inputs.
        recipe: the format of each layer group.
        room_bytes: for the inputs that are kept at a time.

    Raises: SweepError: no calibration sample reaches a group whose format needs its inputs.
    """
    chosen = {choice.group.name: [each] for choice in recipe.groups if (each := recipe.format_of(choice)) is not None}
    found = calibrated_groups(model, batches, [choice.group for choice in recipe.groups], chosen, room_bytes)
    return folded({name: quant for (quants,) in found.values() for name, quant in quants.items()})


@torch.no_grad()
def calibrated_groups(
    model: nn.Module,
    batches: Sequence[Batch],
    groups: Sequence[LayerGroup],
    formats: Mapping[str, Sequence[Format]],
    room_bytes: float = _ROOM_BYTES,
) -> dict[str, list[dict[str, LinearQuant]]]:
    """ModelOpt's calibration ranges (amax) and pre-quantization scales for several formats of each layer group.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs its linears' inputs, once for as many
            groups as fit into `room_bytes`.
        groups: in the model's order.
        formats: those to calibrate, by the group's name; groups that are absent are left out.
        room_bytes: for the inputs that are kept at a time.

    Returns: by the name of the group, for each of its formats in the order given: quantizers by module name.

    Raises: SweepError: no calibration sample reaches a group one of whose formats needs its inputs.
    """
    wanted = [group for group in groups if group.name in formats]
    row_bytes = n_rows(batches) * next(model.parameters()).element_size()
    with_inputs = {name for name, several in formats.items() if any(map(attrgetter("calibrates_inputs"), several))}
    sizes = [row_bytes * _linear(model, group.name).in_features if group.name in with_inputs else 0 for group in wanted]
    found: dict[str, list[dict[str, LinearQuant]]] = {}
    for window in windows(wanted, sizes, room_bytes):
        inputs = _inputs(model, batches, [group.name for group in window if group.name in with_inputs])
        for group in window:
            seen = inputs.pop(group.name, [])
            if group.name in with_inputs and not seen:
                raise SweepError(
                    f"No calibration sample reaches {group.name}, so its inputs have no range. "
                    "Choose a data set that does, or another format."
                )
            weights: dict[str, Tensor] = {module: _linear(model, module).weight.detach() for module in group.modules}
            found[group.name] = [
                calibrated_linears(weights, seen if chosen.calibrates_inputs else [], chosen)
                for chosen in formats[group.name]
            ]
    return found


@contextmanager
def applied(model: nn.Module, quants: Mapping[str, LinearQuant]) -> Generator[None]:
    """Fake-quantize the model, in its own dtype, until the block ends; input quantizers are straight-through.

    A linear's forward is replaced, not its weight: embeddings that share the weight keep it, code that measures the
    linear's error finds the original, and hooks get the linear's input before that is quantized.

    Args:
        model: unquantized.
        quants: from `calibrated_model`, by module name.
    """
    with torch.no_grad():
        forwards = {name: _forward(_linear(model, name), quant) for name, quant in quants.items()}
    with replaced_forwards(model, forwards):
        yield


@torch.no_grad()
def output_error(quant: LinearQuant, weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    """The error of a quantized linear's output, in float32 and in delta form: x' dW'^T + dx' Q(W')^T.

    The difference of two outputs would cancel.

    Args:
        quant: calibrated.
        weight_OI: [out, in], unquantized.
        x_TI: [rows, in], the linear's input, unquantized.

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


def _inputs(model: nn.Module, batches: Sequence[Batch], groups: Sequence[str]) -> dict[str, list[Tensor]]:
    """The input of each group's first linear, [rows, in] for each batch that reaches it; one pass over all batches."""
    kept: dict[str, list[Tensor]] = {name: [] for name in groups}
    if not groups:
        return kept

    parameter = next(model.parameters())
    with inputs_seen(model, groups, lambda name, x: kept[name].append(x.detach().flatten(0, -2))):
        for batch in batches:
            model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False)
    return kept
