"""Calibrated quantizers of what recipes make of a model's layer groups, from forward passes over the calibration samples."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sweep.errors import SweepError
from sweep.mixed import GroupChoice, GroupFormat, MixedRecipe
from sweep.recipe_quantizer import QuantizerSpec
from workers.calibration import calibrated_linears
from workers.capture import batch_to
from workers.data import Batch
from workers.linear_quant import LinearQuant
from workers.memory import windows

_CPU_BYTES = 2e9  # for what linears read; on a GPU half of the free memory

GroupQuants = Mapping[tuple[str, str], Mapping[str, LinearQuant]]  # by group and format's label, then by module


def calibrated_model(model: nn.Module, batches: Sequence[Batch], recipe: MixedRecipe) -> dict[str, LinearQuant]:
    """ModelOpt's ranges and scales by module name, for the format that a recipe gives each layer group.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs what its linears read.
        recipe: what each layer group gets.

    Raises: SweepError: no calibration sample reaches a group that needs them.
    """
    chosen = {choice.group: [found] for choice in recipe.groups if (found := recipe.format_of(choice)) is not None}
    found = calibrated_groups(model, batches, recipe.groups, chosen)
    return {name: quant for quants in found.values() for name, quant in quants.items()}


@torch.no_grad()
def calibrated_groups(
    model: nn.Module, batches: Sequence[Batch], groups: Sequence[GroupChoice], formats: Mapping[str, Sequence[GroupFormat]], room: float | None = None
) -> dict[tuple[str, str], dict[str, LinearQuant]]:
    """ModelOpt's ranges and scales, for several formats of each layer group.

    Args:
        model: unquantized, evaluation mode.
        batches: calibration samples; run through the model only if a format needs what its linears read.
        groups: in the model's order; their choices are not looked at.
        formats: those wanted, by group.
        room: bytes for what linears read at the calibration samples; where they need more, the model runs again, a window of
            groups at a time. None: half of what is free on a GPU, 2 GB on a CPU.

    Returns: by group and label of the format, then by module.

    Raises: SweepError: no calibration sample reaches a group that needs them.
    """
    wanted = [choice for choice in groups if choice.group in formats]
    found: dict[tuple[str, str], dict[str, LinearQuant]] = {}
    for choice in wanted:
        found |= _calibrated(model, choice, [format_ for format_ in formats[choice.group] if not needs_inputs(format_)], [])
    reading = [choice for choice in wanted if any(map(needs_inputs, formats[choice.group]))]
    for window in _windows(model, batches, reading, room):
        inputs = _inputs(model, batches, [choice.group for choice in window])
        for choice in window:
            seen = inputs.pop(choice.group)
            if not any(map(len, seen)):
                raise SweepError(f"No calibration sample reaches {choice.group}, so its inputs have no range. Choose a data set that does, or another format.")
            found |= _calibrated(model, choice, [format_ for format_ in formats[choice.group] if needs_inputs(format_)], seen)
    return found


def needs_inputs(chosen: GroupFormat) -> bool:
    """Whether calibrating the format takes what its linears read."""
    is_static = chosen.inputs is not None and QuantizerSpec(attributes=chosen.inputs).is_calibrated
    return is_static or chosen.algorithm in ("awq_lite", "smoothquant")


def _calibrated(
    model: nn.Module, choice: GroupChoice, formats: Sequence[GroupFormat], inputs: Sequence[Tensor]
) -> dict[tuple[str, str], dict[str, LinearQuant]]:
    weights: dict[str, Tensor] = {}
    for module in choice.modules:
        weight = model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        weights[module] = weight.detach()
    return {
        (choice.group, chosen.label): calibrated_linears(weights, inputs, chosen.weight, chosen.inputs, chosen.algorithm, chosen.scales) for chosen in formats
    }


def _windows(model: nn.Module, batches: Sequence[Batch], groups: Sequence[GroupChoice], room: float | None) -> Iterator[list[GroupChoice]]:
    """Groups whose inputs fit in memory together."""
    parameter = next(model.parameters())
    if room is None:
        room = torch.cuda.mem_get_info(parameter.device)[0] / 2 if parameter.device.type == "cuda" else _CPU_BYTES
    n_rows = sum(max(sum(batch.lengths), sum(batch.patch_counts)) for batch in batches)
    widths: list[int] = []
    for choice in groups:
        weight = model.get_submodule(choice.group).weight
        assert isinstance(weight, Tensor)
        widths.append(weight.shape[1])
    yield from windows(groups, [n_rows * width * parameter.element_size() for width in widths], room)


def _inputs(model: nn.Module, batches: Sequence[Batch], modules: Sequence[str]) -> dict[str, list[Tensor]]:
    """What modules read, [rows, in] a batch; a module that is called several times in a batch has its rows together."""
    kept: dict[str, list[list[Tensor]]] = {name: [] for name in modules}

    def keep(name: str) -> object:
        return lambda _, args: kept[name][-1].append(args[0].detach().flatten(0, -2))

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in modules]  # pyright: ignore[reportArgumentType]
    parameter = next(model.parameters())
    try:
        for batch in batches:
            for calls in kept.values():
                calls.append([])
            model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: [torch.cat(calls) for calls in batch_calls if calls] for name, batch_calls in kept.items()}
