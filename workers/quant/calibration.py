"""ModelOpt's calibration algorithms on the linears of one layer group, fed with their inputs in the unquantized model.

The algorithms get the same inputs in a whole model: max, mse and smoothquant calibrate with every quantizer off,
awq_lite passes each linear's unquantized output on. So a group calibrates alone and gets the ranges and scales that it
would get in its model.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see workers.quant.modelopt
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import model_calib

from sweep.formats.format import Format
from sweep.formats.quantizer import Quantizer
from workers.quant.linear import LinearQuant, rounded_range
from workers.quant.modelopt import calibrate, new_quantizer, quantized, range_of

_ALGORITHMS: Final[Mapping[str, Callable[..., None]]] = {
    "max": model_calib.max_calibrate,
    "mse": model_calib.mse_calibrate,
    "awq_lite": model_calib.awq_lite,
    "smoothquant": model_calib.smoothquant,
}
_NEEDS_OUTPUTS: Final = frozenset({"awq_lite"})  # compares outputs; the others use inputs and weights only


@torch.no_grad()
def calibrated_linears(
    weights: Mapping[str, Tensor],
    x_batches: Sequence[Tensor],
    chosen: Format,
) -> dict[str, LinearQuant]:
    """Calibration ranges (amax) and pre-quantization scales, by ModelOpt in float32, of linears that share their input.

    Args:
        weights: [out, in], by module name; of one layer group.
        x_batches: the input, [rows, in] for each batch of the plan: awq_lite gives every batch the same weight. May be
            empty where neither the algorithm nor a static range of the inputs needs them.
        chosen: the format, one that its algorithm can calibrate (sweep.formats.recipe.resolve). Linears share the range
            of the whole tensor and the pre-quantization scale if its scales are "fused", and scales of packed
            integers are values of bfloat16 then (Format.rounds_scales). On several ranks the inputs' quantizer is the
            one that these linears have there (Format.of_linear).
    """
    (name, first_OI), *_ = weights.items()
    chosen = chosen.of_linear(name, first_OI.shape[1])
    linears: Any = _quant_linears(weights, chosen)
    _run(chosen.algorithm, linears, x_batches)
    found = {
        name: LinearQuant(
            weight=chosen.weight,
            inputs=chosen.inputs,
            weight_amax=None if chosen.weight is None else range_of(linear.weight_quantizer),
            input_amax=None if chosen.inputs is None else range_of(linear.input_quantizer),
            pre_quant_scale=linear.input_quantizer.pre_quant_scale,
        )
        for name, linear in zip(weights, linears, strict=True)
    }
    if chosen.scales == "fused":
        found = _fused(weights, found)
    return {name: _rounded(quant) for name, quant in found.items()} if chosen.rounds_scales else found


def fake_quantized(quant: LinearQuant, weight_OI: Tensor) -> Tensor:
    """Q(W') in float32, where W' is the weight with the pre-quantization scale divided out.

    Args:
        quant: calibrated.
        weight_OI: [out, in], unquantized.
    """
    return _applied(quant.weight, quant.weight_amax, smoothed_weight(quant, weight_OI))


def quantized_inputs(quant: LinearQuant, x_TI: Tensor) -> Tensor:
    """Q(x') in float32, where x' is the input times the pre-quantization scale. Args: x_TI: [..., in], unquantized."""
    return _applied(quant.inputs, quant.input_amax, smoothed_inputs(quant, x_TI).flatten(0, -2)).view(x_TI.shape)


def smoothed_weight(quant: LinearQuant, weight_OI: Tensor) -> Tensor:
    """W' in float32: the weight with the pre-quantization scale divided out, as ModelOpt does: times the reciprocal."""
    return weight_OI.float() if quant.pre_quant_scale is None else weight_OI.float() * (1.0 / quant.pre_quant_scale)


def smoothed_inputs(quant: LinearQuant, x_TI: Tensor) -> Tensor:
    """The scaled input x' in float32: the input times the pre-quantization scale."""
    return x_TI.float() if quant.pre_quant_scale is None else x_TI.float() * quant.pre_quant_scale


def _applied(quantizer: Quantizer | None, amax: Tensor | None, tensor: Tensor) -> Tensor:
    if quantizer is None:
        return tensor
    made = new_quantizer(quantizer, tensor.device)
    if amax is not None:
        made.amax = amax
    return quantized(made, tensor)


def _quant_linears(weights: Mapping[str, Tensor], chosen: Format) -> nn.ModuleList:
    """ModelOpt's quantized linears with copies of the weights, which algorithms may change, and with our quantizers."""
    linears: Any = nn.ModuleList()  # Any: ModelOpt changes their class
    for weight_OI in weights.values():
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight_OI.to(torch.float32, copy=True), requires_grad=False)
        linears.append(linear)
    with redirect_stdout(io.StringIO()):  # it prints how many
        mtq.replace_quant_module(linears)
    device = next(iter(weights.values())).device
    for linear in linears:
        for place, quantizer in (
            ("weight_quantizer", chosen.weight),
            ("input_quantizer", chosen.inputs),
            ("output_quantizer", None),
        ):
            if quantizer is None:
                getattr(linear, place).disable()
            else:
                setattr(linear, place, new_quantizer(quantizer, device))
    return linears


def _run(algorithm: str, linears: Any, x_batches: Sequence[Tensor]) -> None:
    def feed(_: nn.Module) -> None:
        for x_TI in x_batches:
            x = x_TI.float()
            for linear in linears:
                (linear if algorithm in _NEEDS_OUTPUTS else linear.input_quantizer)(x)

    # The algorithms print their steps and a progress bar.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        _ALGORITHMS[algorithm](linears, feed)


def _fused(weights: Mapping[str, Tensor], quants: Mapping[str, LinearQuant]) -> dict[str, LinearQuant]:
    """Linears of a group with the ranges and scales that they share in runtimes.

    Source: `preprocess_linear_fusion` of ModelOpt 0.47's export: the mean of the pre-quantization scales, under which
    the weights' ranges are found anew as their largest magnitudes; then the largest of the ranges that cover a whole
    tensor.
    """
    found = dict(quants)
    own = [quant.pre_quant_scale for quant in found.values() if quant.pre_quant_scale is not None]
    if own:
        mean = torch.stack(own).mean(dim=0)
        found = {name: replace(quant, pre_quant_scale=mean) for name, quant in found.items()}
        found = {
            name: replace(quant, weight_amax=_largest(quant.weight, smoothed_weight(quant, weights[name])))
            for name, quant in found.items()
        }
    weight_amax = _shared([(quant.weight, quant.weight_amax) for quant in found.values()])
    input_amax = _shared([(quant.inputs, quant.input_amax) for quant in found.values()])
    return {
        name: replace(
            quant, weight_amax=weight_amax.get(i, quant.weight_amax), input_amax=input_amax.get(i, quant.input_amax)
        )
        for i, (name, quant) in enumerate(found.items())
    }


def _rounded(quant: LinearQuant) -> LinearQuant:
    """The quantizers with scales of the weight in bfloat16, of a format with `rounds_scales`."""
    assert quant.weight is not None
    assert isinstance(quant.weight.num_bits, int)
    assert quant.weight_amax is not None
    amax = rounded_range(quant.weight_amax, quant.weight.num_bits)
    return replace(quant, weight_amax=amax, rounds_scales=True)


def _shared(ranges: Sequence[tuple[Quantizer | None, Tensor | None]]) -> dict[int, Tensor]:
    """The largest of the ranges that cover a whole tensor, for each linear that has one."""
    whole = {
        i: amax
        for i, (quantizer, amax) in enumerate(ranges)
        if quantizer is not None and amax is not None and quantizer.is_per_tensor
    }
    return dict.fromkeys(whole, torch.stack([*whole.values()]).amax(dim=0)) if whole else {}


def _largest(quantizer: Quantizer | None, weight_OI: Tensor) -> Tensor | None:
    """A weight's range by ModelOpt's `max` calibrator, None where it has no static range."""
    if quantizer is None or quantizer.is_dynamic:
        return None
    made = new_quantizer(quantizer, weight_OI.device)
    calibrate(made, [weight_OI])
    return range_of(made)
