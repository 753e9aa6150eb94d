"""Folding of pre-quantization scales, which no checkpoint format has, into the modules before: exactly, or refused.

awq_lite and smoothquant multiply a linear's inputs by a pre-quantization scale and divide the weight by it. The scale
can be folded into the weight and bias of a norm before the linear, or into the rows of a linear's weight, where nothing
but a product by channel lies between: up_proj before down_proj, v_proj before o_proj where every head has a value head
of its own. ModelOpt's export does the same and, with `fuse_grouped_heads`, averages o_proj's scale over the query heads
that share a value head: another recipe than was scored, so it is not done here.

The products are written in float32; those of a quantized linear's rows go into its scales, which are float32, too. A
reader that loads norms in bfloat16 rounds the product there: KL 1e-5 on the bundled model in INT4 with awq_lite, whose
own KL is 6e-2. Of a format that rounds scales to bfloat16 it is the product that is rounded, and for that the codes
were chosen (workers.quant.folds).
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.core.groups import Linear
from sweep.formats.format import SCALES_INPUTS, GroupFormat
from sweep.formats.mixed import GroupChoice, MixedRecipe
from workers.export.layout import Inexpressible
from workers.model.forward import batch_to
from workers.model.hooks import removed_after
from workers.quant.folds import module_before
from workers.quant.linear import LinearQuant

_ROWS: Final = 64  # rows of each linear's input that are compared


def folding_modules(recipe: MixedRecipe, linears: Sequence[Linear]) -> dict[str, GroupChoice]:
    """The modules into whose weights a pre-quantization scale is folded, with the layer group that has the scale.

    Args:
        recipe: the format of each layer group.
        linears: of the whole model.

    Raises: Inexpressible: a group whose scale cannot be folded exactly, with the way out.
    """
    shapes = {linear.name: linear for linear in linears}
    formats: dict[str, GroupFormat] = {}
    for choice in recipe.groups:
        if (chosen := recipe.format_of(choice)) is not None:
            formats |= dict.fromkeys(choice.group.modules, chosen)
    found: dict[str, GroupChoice] = {}
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is None or chosen.algorithm not in SCALES_INPUTS:
            continue
        before, n_in = module_before(choice.group.name), shapes[choice.group.name].n_inputs
        if before is None:
            reason = (
                "no module before it is known to fold a scale: there is attention or an activation function between"
            )
            raise _refuse(choice, chosen, reason)
        if chosen.scales == "private" and len(choice.group.modules) > 1:
            raise Inexpressible(
                f"{choice.group.name}: an export has no pre-quantization scale. That of {chosen.algorithm} "
                f"goes into {before}, which {len(choice.group.modules)} linears read, each with a scale of its own. "
                "Score with sensitivity.scales=fused, which gives them one, and solve again."
            )
        if before in shapes:
            _check_rows_foldable(choice, chosen, shapes[before], n_in, formats.get(before))
        found[before] = choice
    return found


def check_foldable(held: Mapping[str, tuple[torch.dtype, int]], recipe: MixedRecipe, linears: Sequence[Linear]) -> None:
    """Refuse a pre-quantization scale that cannot be folded into the weights that the checkpoint holds.

    Args:
        held: dtype and output channels of the `folding_modules` whose weights the checkpoint holds.
        recipe: the format of each layer group.
        linears: of the whole model.

    Raises: Inexpressible: a module without a weight, of another width, or a linear that is left in 16 bits, which a
        product does not fit.
    """
    widths = {linear.name: linear.n_inputs for linear in linears}
    matrices = widths.keys() - {
        module for choice in recipe.groups if choice.format is not None for module in choice.group.modules
    }
    for before, choice in folding_modules(recipe, linears).items():
        chosen, n_in = recipe.format_of(choice), widths[choice.group.name]
        assert chosen is not None  # folding_modules names groups with a format only
        dtype, n_out = held.get(before, (None, 0))
        if n_out != n_in:
            but = f", but of {n_out}" if n_out else ""
            raise _refuse(choice, chosen, f"the checkpoint has no {before}.weight of {n_in} channels{but}")
        if before in matrices and dtype != torch.float32:
            reason = (
                f"rows of {before} would be multiplied, which is left in 16 bits, and the products need more "
                "(or give it a format)"
            )
            raise _refuse(choice, chosen, reason)


def output_scales(
    recipe: MixedRecipe, quants: Mapping[str, LinearQuant], linears: Sequence[Linear]
) -> dict[str, Tensor]:
    """The scale that is folded into each of the `folding_modules`: their outputs are multiplied by it.

    Args:
        recipe: one that `folding_modules` accepts.
        quants: calibrated quantizers by module.
        linears: of the whole model.

    Returns: [channels] float32, by module name.
    Raises: ValueError: quantizers that are not the recipe's.
    """
    known = folding_modules(recipe, linears)
    found: dict[str, Tensor] = {}
    for module, quant in quants.items():
        if quant.pre_quant_scale is None:
            continue
        before, scale = module_before(module), quant.pre_quant_scale.float().flatten().cpu()
        if before is None or before not in known:
            raise ValueError(f"{module} has a pre-quantization scale, which the recipe's algorithm does not give")
        if not torch.equal(found.setdefault(before, scale), scale):
            raise ValueError(f"{module} has another scale than the linears beside it, which share its input")
    return found


def scaled_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """A weight or bias with a scale folded into its output channels.

    Args:
        tensor: [channels, ...].
        scale: [channels], on any device.

    Returns: [channels, ...] float32, on the tensor's device.
    """
    return tensor.float() * scale.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))


@torch.no_grad()
def check_folds(
    model: nn.Module, scales: Mapping[str, Tensor], linears: Sequence[Linear], batches: Iterable[Batch]
) -> None:
    """Try the folds on the unquantized model: with the inputs of the scaled linears divided again, nothing may change.

    Names alone don't say that a norm multiplies by its weight (some by 1 + weight) or that no other module uses its
    output.

    Args:
        model: unquantized; its parameters are put back.
        scales: from `output_scales`.
        linears: of the whole model.
        batches: samples; as many are run as it takes to reach every linear with a scale.

    Raises: Inexpressible: names the linear that would get another input or that no sample reaches, or says that the
        logits would differ.
    """
    befores = {linear.name: module_before(linear.name) or "" for linear in linears}
    scaled = {name: scales[before] for name, before in befores.items() if before in scales}
    missing = scaled.keys()
    for batch in batches if scales else ():
        missing = missing - _checked(model, scales, scaled, batch)
        if not missing:
            return
    if missing:
        raise Inexpressible(
            f"{min(missing)}: no sample reaches it, so nothing shows that its inputs can be scaled. "
            "Choose a data set that does."
        )


def _checked(model: nn.Module, scales: Mapping[str, Tensor], scaled: Mapping[str, Tensor], batch: Batch) -> set[str]:
    """The linears that a batch reaches, all of which get the same input with the scales folded and divided out again.

    Args:
        model: unquantized.
        scales: of the folding modules.
        scaled: the same scales, by the linears whose inputs they multiply.
        batch: samples.
    """
    plain, plain_logits = _inputs_and_logits(model, batch, scaled, divided=False)
    with _folded(model, scales):
        folded, folded_logits = _inputs_and_logits(model, batch, scaled, divided=True)
    # 3e-4 in float32; rounding alone gives 1e-6, a wrong fold some tenths.
    tolerance = torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    for name, rows in plain.items():
        if _differ(folded[name], rows, tolerance):
            raise Inexpressible(
                f"{name}: multiplying {module_before(name)} by this linear's pre-quantization scale does not multiply "
                f"its inputs: this model is built otherwise. Solve again with --exclude {name}, or with a format of "
                "algorithm max or mse there."
            )
    if _differ(folded_logits, plain_logits, tolerance):
        raise Inexpressible(
            f"With the pre-quantization scales folded into {', '.join([*scales][:3])} the model gives other logits: "
            "something else reads these. Solve again with formats of algorithm max or mse."
        )
    return {*plain}


def _check_rows_foldable(
    choice: GroupChoice, chosen: GroupFormat, before: Linear, n_in: int, format_: GroupFormat | None
) -> None:
    """Refuse a scale of a group that cannot be folded into the rows of the linear before."""
    if before.n_outputs != n_in:
        outputs = f"{before.name} has {before.n_outputs} outputs for its {n_in} inputs"
        raise _refuse(choice, chosen, f"{outputs}: query heads share a value head, but not a scale")
    if format_ is None or format_.weight is None:
        return  # check_foldable sees whether the checkpoint's precision holds the product
    along_rows = format_.weight.axis == 0 or format_.weight.block_lengths.keys() == {-1}
    if format_.weight.has_dynamic_blocks or not along_rows:
        reason = (
            f"rows of {before.name} would be multiplied, and its format {format_.label!r} has no scale a row "
            "(a channel, or groups along the inputs)"
        )
        raise _refuse(choice, chosen, reason)


def _refuse(choice: GroupChoice, chosen: GroupFormat, reason: str) -> Inexpressible:
    end = choice.group.name.rsplit(".", 1)[-1]
    plain = f"{chosen.quant_pair}/{chosen.quant_granularity}"
    return Inexpressible(
        f"{choice.group.name}: an export can't express the pre-quantization scale that algorithm "
        f"{chosen.algorithm!r} gives it: {reason}. Solve again with --pin {end}={plain} (algorithm max) or "
        f"--exclude {end}; --format modelopt takes one algorithm for all groups."
    )


@contextmanager
def _folded(model: nn.Module, scales: Mapping[str, Tensor]) -> Generator[None]:
    """Fold the scales into the model's modules until the block ends."""
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, scale in scales.items():
            for parameter in model.get_submodule(name).parameters(recurse=False):
                kept.append((parameter, parameter.data))
                parameter.data = scaled_rows(parameter.data, scale).to(parameter.dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _inputs_and_logits(
    model: nn.Module, batch: Batch, scaled: Mapping[str, Tensor], *, divided: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The first rows of each linear's input, and of the logits. Args: divided: first divide inputs by their scales."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = (args[0] / scaled[name].to(args[0].device)).to(args[0].dtype) if divided else args[0]
            found[name] = x.flatten(0, -2)[:_ROWS].float()
            return (x,)

        return before

    parameter = next(model.parameters())
    with removed_after([model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in scaled]):
        logits: Tensor = model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False).logits
    return found, logits.flatten(0, -2)[:_ROWS].float()


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return not float((found - expected).norm()) <= tolerance * float(expected.norm())  # a NaN is not <=
