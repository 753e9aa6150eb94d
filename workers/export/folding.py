"""Scales of inputs, which no checkpoint format has, multiplied into what computes those inputs. Exact, or refused by name.

awq_lite and smoothquant multiply a linear's inputs by a scale and divide the weight by it. A norm before the linear takes the scale in its own weight and
bias; so does a linear in the rows of its weight, where nothing but a product by channel lies between: up_proj before down_proj, v_proj before o_proj
where every head has a value head of its own. ModelOpt's export does the same and, with `fuse_grouped_heads`, averages o_proj's scale over
the query heads that share a value head: another recipe than was scored, so it is not done here.

What is multiplied is written in float32; a quantized linear's rows in its scales, which are. A reader that loads norms in bfloat16 rounds the product
there: KL 1e-5 on the bundled model in INT4 with awq_lite, whose own is 6e-2.
"""

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.formats.mixed import GroupChoice, GroupFormat, MixedRecipe
from sweep.formats.quantizer import QuantizerSpec
from sweep.formats.recipe import SCALES_INPUTS
from workers.export.schemes import Inexpressible
from workers.model.forward import batch_to
from workers.quant.linear import LinearQuant

Linears = Sequence[tuple[str, int, int]]  # name, inputs, outputs of every nn.Linear, in the model's order

# What computes a linear's inputs, by name. `check_folds` tries it on the model itself.
_BEFORE: Final[Sequence[tuple[str, str]]] = (
    (r"(.*)self_attn\.[qkv]_proj", r"\1input_layernorm"),
    (r"(.*self_attn\.)o_proj", r"\1v_proj"),
    (r"(.*)mlp\.(?:gate|up)_proj", r"\1post_attention_layernorm"),
    (r"(.*mlp\.)down_proj", r"\1up_proj"),
    (r"(.*)attn\.qkv", r"\1norm1"),
    (r"(.*)mlp\.linear_fc1", r"\1norm2"),
    (r"(.*merger.*\.)linear_fc1", r"\1norm"),
)
_ROWS: Final = 64  # of what a linear reads that are compared


def providers(recipe: MixedRecipe, linears: Linears) -> dict[str, GroupChoice]:
    """The modules that take a scale of inputs into their weights, with the group whose inputs it is.

    Args:
        recipe: what each layer group gets.
        linears: of the whole model.

    Raises: Inexpressible: a group whose scale nothing takes exactly, with the way out.
    """
    shapes = {name: (n_in, n_out) for name, n_in, n_out in linears}
    formats = {
        module: chosen for choice in recipe.groups if (chosen := recipe.format_of(choice)) for module in choice.modules
    }
    found: dict[str, GroupChoice] = {}
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is None or chosen.algorithm not in SCALES_INPUTS:
            continue
        provider, n_in = _provider(choice.group), shapes[choice.group][0]
        if provider is None:
            raise _refuse(
                choice,
                chosen,
                "nothing before it is known to take a scale: there is attention or an activation function between",
            )
        if chosen.scales == "private" and len(choice.modules) > 1:
            raise Inexpressible(
                f"{choice.group}: compressed-tensors has no scale of a linear's inputs. That of {chosen.algorithm} goes into {provider}, which "
                f"{len(choice.modules)} linears read, each with a scale of its own. Score with sensitivity.scales=fused, which gives them one, and solve again."
            )
        if provider in shapes:
            _check_linear_takes(choice, chosen, provider, shapes[provider][1], n_in, formats.get(provider))
        found[provider] = choice
    return found


def check_weights_take(held: Mapping[str, tuple[str, int]], recipe: MixedRecipe, linears: Linears) -> None:
    """Refuse a scale that what the checkpoint holds can't take.

    Args:
        held: dtype, as safetensors call it, and output channels of the providers' weights that the checkpoint holds.
        recipe: what each layer group gets.
        linears: of the whole model.

    Raises: Inexpressible: a provider without a weight, of another width, or a linear that is left in 16 bits, which a product does not fit.
    """
    widths = {name: n_in for name, n_in, _ in linears}
    matrices = widths.keys() - {
        module for choice in recipe.groups if choice.format is not None for module in choice.modules
    }
    for provider, choice in providers(recipe, linears).items():
        chosen, n_in = recipe.format_of(choice), widths[choice.group]
        assert chosen is not None  # providers names groups with a format only
        dtype, n_out = held.get(provider, ("", 0))
        if n_out != n_in:
            raise _refuse(
                choice,
                chosen,
                f"the checkpoint has no {provider}.weight of {n_in} channels" + (f", but of {n_out}" if n_out else ""),
            )
        if provider in matrices and dtype != "F32":
            raise _refuse(
                choice,
                chosen,
                f"rows of {provider} would be multiplied, which is left in 16 bits, and the products need more (or give it a format)",
            )


def output_scales(recipe: MixedRecipe, quants: Mapping[str, LinearQuant], linears: Linears) -> dict[str, Tensor]:
    """What each provider's output is multiplied by.

    Args:
        recipe: one that `providers` accepts.
        quants: calibrated quantizers by module.
        linears: of the whole model.

    Returns: [channels] float32, by module name.
    Raises: ValueError: quantizers that are not the recipe's.
    """
    known = providers(recipe, linears)
    found: dict[str, Tensor] = {}
    for module, quant in quants.items():
        if quant.pre_quant_scale is None:
            continue
        provider, scale = _provider(module), quant.pre_quant_scale.float().flatten().cpu()
        if provider is None or provider not in known:
            raise ValueError(f"{module} has a scale of its inputs, which the recipe's algorithm does not give")
        if not torch.equal(found.setdefault(provider, scale), scale):
            raise ValueError(
                f"{module} has another scale of its inputs than the linears beside it, which read the same"
            )
    return found


def scaled_rows(tensor: Tensor, scale: Tensor) -> Tensor:
    """A weight or bias whose output channels are multiplied. Args: tensor: [channels, ...]; scale: [channels]. Returns: float32."""
    return tensor.float() * scale.view(-1, *[1] * (tensor.dim() - 1))


@torch.no_grad()
def check_folds(model: nn.Module, scales: Mapping[str, Tensor], linears: Linears, batches: Iterable[Batch]) -> None:
    """Try the folds on the unquantized model: with each reader's input divided again, nothing may change.

    Names alone don't say that a norm multiplies by its weight (some by 1 + weight) or that nobody else reads what it gives.

    Args:
        model: unquantized; its parameters are put back.
        scales: from `output_scales`.
        linears: of the whole model.
        batches: samples; as many are run as it takes to reach every linear with a scale.

    Raises: Inexpressible: names the linear that would read something else or that no sample reaches, or says that the logits would differ.
    """
    readers = {name: scale for name, _, _ in linears if (scale := scales.get(_provider(name) or "")) is not None}
    missing = readers.keys()
    for batch in batches if scales else ():
        missing = missing - _tried(model, scales, readers, batch)
        if not missing:
            return
    if missing:
        raise Inexpressible(
            f"{min(missing)}: no sample reaches it, so nothing shows that its inputs can be scaled. Choose a data set that does."
        )


def _tried(model: nn.Module, scales: Mapping[str, Tensor], readers: Mapping[str, Tensor], batch: Batch) -> set[str]:
    """The linears that a batch reaches, each of which reads what it should."""
    plain, plain_logits = _rows_read(model, batch, readers, divided=False)
    with _folded(model, scales):
        folded, folded_logits = _rows_read(model, batch, readers, divided=True)
    tolerance = (
        torch.finfo(next(model.parameters()).dtype).eps ** 0.5
    )  # 3e-4 in float32; rounding alone gives 1e-6, a wrong fold some tenths
    for name, rows in plain.items():
        if _differ(folded[name], rows, tolerance):
            raise Inexpressible(
                f"{name}: multiplying {_provider(name)} by the scale of this linear's inputs does not multiply these: this model is built otherwise. "
                f"Solve again with --exclude {name}, or with a format of algorithm max or mse there."
            )
    if _differ(folded_logits, plain_logits, tolerance):
        raise Inexpressible(
            f"With the scales of inputs multiplied into {', '.join([*scales][:3])} the model gives other logits: something else reads these. "
            "Solve again with formats of algorithm max or mse."
        )
    return {*plain}


def _provider(module: str) -> str | None:
    """The module whose output a linear reads, but for a product by channel."""
    return next((match.expand(before) for pattern, before in _BEFORE if (match := re.fullmatch(pattern, module))), None)


def _check_linear_takes(
    choice: GroupChoice, chosen: GroupFormat, provider: str, n_out: int, n_in: int, format_: GroupFormat | None
) -> None:
    if n_out != n_in:
        raise _refuse(
            choice,
            chosen,
            f"{provider} has {n_out} outputs for its {n_in} inputs: query heads share a value head, but not a scale",
        )
    if format_ is None or format_.weight is None:
        return  # whether the checkpoint's precision holds the product is seen there
    spec = QuantizerSpec(attributes=format_.weight)
    along_rows = spec.attributes.get("axis") == 0 or {axis for axis in spec.block_sizes if isinstance(axis, int)} == {
        -1
    }
    if spec.has_dynamic_blocks or not along_rows:
        reason = f"rows of {provider} would be multiplied, and its format {format_.label!r} has no scale a row (a channel, or groups along the inputs)"
        raise _refuse(choice, chosen, reason)


def _refuse(choice: GroupChoice, chosen: GroupFormat, reason: str) -> Inexpressible:
    end = choice.group.rsplit(".", 1)[-1]
    plain = f"{chosen.quant_pair}/{chosen.quant_granularity}"
    return Inexpressible(
        f"{choice.group}: compressed-tensors can't express the scale of inputs that algorithm {chosen.algorithm!r} gives it: {reason}. "
        f"Solve again with --pin {end}={plain} (algorithm max) or --exclude {end}; --format modelopt takes one algorithm for all groups."
    )


@contextmanager
def _folded(model: nn.Module, scales: Mapping[str, Tensor]) -> Generator[None]:
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, scale in scales.items():
            for parameter in model.get_submodule(name).parameters(recurse=False):
                kept.append((parameter, parameter.data))
                parameter.data = scaled_rows(parameter.data, scale.to(parameter.device)).to(parameter.dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _rows_read(
    model: nn.Module, batch: Batch, readers: Mapping[str, Tensor], *, divided: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The first rows of what each linear reads, and of the logits; before it reads, its input is divided by its scale or left alone."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            x = (args[0] / readers[name].to(args[0].device)).to(args[0].dtype) if divided else args[0]
            found[name] = x.flatten(0, -2)[:_ROWS].float()
            return (x,)

        return before

    parameter = next(model.parameters())
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in readers]
    try:
        logits: Tensor = model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return found, logits.flatten(0, -2)[:_ROWS].float()


def _differ(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return not float((found - expected).norm()) <= tolerance * float(expected.norm())  # a NaN is not <=
