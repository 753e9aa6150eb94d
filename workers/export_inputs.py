"""Calibrated quantizers of every linear that a recipe quantizes, from one forward pass over the calibration samples."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sweep.errors import SweepError
from sweep.mixed import GroupFormat, MixedRecipe
from sweep.recipe_quantizer import QuantizerSpec
from workers.calibration import calibrated_linears
from workers.capture import batch_to
from workers.data import Batch
from workers.linear_quant import LinearQuant


@torch.no_grad()
def calibrated_model(model: nn.Module, batches: Sequence[Batch], recipe: MixedRecipe) -> dict[str, LinearQuant]:
    """ModelOpt's ranges and scales by module name.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs what its linears read.
        recipe: what each layer group gets.

    Raises: SweepError: no calibration sample reaches a group that needs them.
    """
    wanted = [choice.group for choice in recipe.groups if (chosen := recipe.format_of(choice)) is not None and _needs_inputs(chosen)]
    inputs = _inputs(model, batches, wanted) if wanted else {}
    quants: dict[str, LinearQuant] = {}
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is None:
            continue
        if choice.group in wanted and not inputs[choice.group]:
            raise SweepError(f"No calibration sample reaches {choice.group}, so its inputs have no range. Choose a data set that does, or another format.")
        weights = {module: model.get_submodule(module).weight for module in choice.modules}
        tensors = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}
        quants |= calibrated_linears(tensors, inputs.get(choice.group, []), chosen.weight, chosen.inputs, chosen.algorithm, chosen.scales)
        inputs.pop(choice.group, None)
    return quants


def _needs_inputs(chosen: GroupFormat) -> bool:
    is_static = chosen.inputs is not None and QuantizerSpec(attributes=chosen.inputs).is_calibrated
    return is_static or chosen.algorithm in ("awq_lite", "smoothquant")


def _inputs(model: nn.Module, batches: Sequence[Batch], groups: Sequence[str]) -> dict[str, list[Tensor]]:
    kept: dict[str, list[Tensor]] = {name: [] for name in groups}

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
