"""Recipes over the bundled model and its calibrated quantizers, for tests of exports.

Made with plain hooks and ModelOpt's TensorQuantizer alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from sweep.core.groups import LayerGroup
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import GroupChoice, MixedRecipe
from sweep.plan.model import Model
from workers.quant.block_formats import nvfp4_scales
from workers.quant.calibration import fake_quantized, quantized_inputs, smoothed_weight
from workers.quant.linear import LinearQuant
from workers.quant.modelopt import Quantizers

SERVED_WITH = "--max-model-len 4096 --max-logprobs 20"  # of the line that serves the bundled model

PER_TOKEN = {"type": "dynamic", "block_sizes": {-1: None}}
FP8, INT4, INT8 = {"num_bits": (4, 3)}, {"num_bits": 4}, {"num_bits": 8}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
MXFP8 = {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}

# weight and input attributes of what compressed-tensors can express
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "fp8_tensor_static": (FP8, FP8),
    "fp8_channel_token": ({**FP8, "axis": 0}, {**FP8, **PER_TOKEN}),
    "fp8_blocks": ({**FP8, "block_sizes": {-1: 128, -2: 128}}, {**FP8, "type": "dynamic", "block_sizes": {-1: 128}}),
    "fp8_weight_only": ({**FP8, "axis": 0}, None),
    "fp8_tensor_weight_only": (FP8, None),
    "fp8_groups_weight_only": ({**FP8, "block_sizes": {-1: 64}}, None),
    "int8_channel_token": ({**INT8, "axis": 0}, {**INT8, **PER_TOKEN}),
    "int8_channel_static": ({**INT8, "axis": 0}, INT8),
    "int8_tensor_static": (INT8, INT8),
    "int8_channel_weight_only": ({**INT8, "axis": 0}, None),
    "int8_groups_weight_only": ({**INT8, "block_sizes": {-1: 128}}, None),
    "int4_groups_weight_only": ({**INT4, "block_sizes": {-1: 128}}, None),
    "int4_channel_weight_only": ({**INT4, "axis": 0}, None),
    "int4_groups_int8_token": ({**INT4, "block_sizes": {-1: 64}}, {**INT8, **PER_TOKEN}),
    "int4_groups_fp8_token": ({**INT4, "block_sizes": {-1: 128}}, {**FP8, **PER_TOKEN}),
    "int4_groups_int4_static": ({**INT4, "block_sizes": {-1: 64}}, INT4),
    "nvfp4": (NVFP4, NVFP4),
    "nvfp4_weight_only": (NVFP4, None),
    "nvfp4_fp8_static": (NVFP4, FP8),
    "mxfp4_weight_only": (MXFP4, None),
    "mxfp4_mxfp8": (MXFP4, MXFP8),
    "mxfp4_fp8_groups": (MXFP4, {**FP8, "type": "dynamic", "block_sizes": {-1: 128}}),
    "mxfp8": (MXFP8, MXFP8),
    "mxfp8_weight_only": (MXFP8, None),
}


def recipe_of(
    formats: Sequence[GroupFormat | None], path: Path | None = None, groups: Sequence[LayerGroup] | None = None
) -> MixedRecipe:
    """A recipe in which layer groups get the formats in turn. Args: groups: None: all of the language model."""
    model = Model(bundled_model_dir() if path is None else path)
    if groups is None:
        groups = [group for name, group in model.groups.items() if "visual" not in name and "lm_head" not in name]
    choices = []
    for i, group in enumerate(groups):
        chosen = formats[i % len(formats)]
        choices.append(
            GroupChoice(
                group=LayerGroup(name=group.name, modules=group.modules, weight_elements=group.weight_elements),
                format=chosen and chosen.label,
                cell_id=chosen and f"cell-{chosen.quant_pair}",
                predicted_kl=0.001 * (i + 1) if chosen else 0.0,
            )
        )
    return MixedRecipe(
        name="mixed",
        model="qwen3_vl_tiny",
        model_revision=model.revision,
        model_path=None if path is None else str(path),
        dataset="wordnet_glosses",
        dataset_revision="d",
        size="small",
        coverage="lm_only",
        target=None,
        formats={chosen.label: chosen for chosen in formats if chosen},
        groups=tuple(choices),
    )


def quants_of(recipe: MixedRecipe, model: nn.Module, token_ids: Tensor) -> dict[str, LinearQuant]:
    """Calibrated on one batch, each linear with a range of its own."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Any:
        return lambda module, args: largest.__setitem__(name, float(args[0].abs().max()))

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(input_ids=token_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    quants: dict[str, LinearQuant] = {}
    makers = Quantizers()
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is None or chosen.weight is None:
            continue
        for name in choice.group.modules:
            amax = getattr(makers.weight(name, chosen.weight, model.get_submodule(name).weight.float()), "_amax", None)
            inputs = chosen.inputs and chosen.inputs.attributes
            static = inputs is not None and inputs.get("type") != "dynamic" and inputs != MXFP8
            quants[name] = LinearQuant(
                weight=chosen.weight,
                inputs=chosen.inputs,
                weight_amax=None if amax is None else amax.clone(),
                input_amax=torch.tensor(largest[name]) if static else None,
                pre_quant_scale=None,
            )
    return quants


class ReaderLinear(nn.Module):
    """A linear under a recipe, in the order of operations of compressed-tensors' forward pass, from its formulas.

    Codes and ranges are ModelOpt's. What differs from `FakeQuantized` is `x / scale` where ModelOpt has
    `x * (1 / scale)`, weights in bfloat16 of the formats that the reader unpacks to it, and the range of dynamic INT8
    inputs, amax / 127.5 there and amax / 127 in ModelOpt.
    """

    def __init__(
        self,
        linear: nn.Linear,
        quant: LinearQuant,
        input_scale_I: Tensor | None = None,
        output_scale_O: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.input_scale = 1.0 if input_scale_I is None else input_scale_I
        assert quant.weight is not None
        weight, attributes = fake_quantized(quant, linear.weight), quant.weight.attributes
        blocks = attributes.get("block_sizes") or {}
        if blocks.get("scale_bits") == (4, 3) and blocks.get("type") == "dynamic":
            assert quant.weight_amax is not None
            # Code times scale may be a tie of bfloat16 (3 * 240 * amax / 2688 for an amax of 175/1024), so its last
            # bit in float32 counts.
            whole = 2688.0 / quant.weight_amax
            block = nvfp4_scales(smoothed_weight(quant, linear.weight), quant.weight_amax, blocks[-1])[0]
            scale = torch.where(block == 0, 0.125, block) / whole
            codes = _rounded(weight.unflatten(-1, (-1, blocks[-1])) / scale, (2, 1))
            self.weight = (codes * scale).flatten(-2).bfloat16().float()
        elif blocks.get("type") == "dynamic":
            self.weight = weight.bfloat16().float()
        else:
            assert quant.weight_amax is not None
            scale = _over(quant.weight_amax, weight.shape, attributes) / _LARGEST[attributes["num_bits"]]
            held = scale if output_scale_O is None else scale * output_scale_O[:, None]
            if quant.rounds_scales and output_scale_O is not None:
                held = held.bfloat16().float()
            self.weight = _rounded(weight / scale, attributes["num_bits"]) * held
        self.bias, self.quant = linear.bias, quant

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self._inputs(x * self.input_scale), self.weight, self.bias)

    def _inputs(self, x: Tensor) -> Tensor:
        if self.quant.inputs is None:
            return x
        attributes, amax = self.quant.inputs.attributes, self.quant.input_amax
        bits, blocks = attributes["num_bits"], attributes.get("block_sizes") or {}
        grouped = x.unflatten(-1, (-1, blocks.get(-1) or x.shape[-1]))
        largest = grouped.abs().amax(-1, keepdim=True)
        if blocks.get("scale_bits") == (4, 3):
            assert amax is not None
            whole = 2688.0 / amax
            block = _rounded(largest / 6.0 * whole, (4, 3))
            scale = torch.where(block == 0, 0.125, block) / whole
        elif blocks.get("scale_bits") == (8, 0):
            scale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST[bits])))
        elif attributes.get("type") == "dynamic":
            scale = largest / (127.5 if bits == 8 else _LARGEST[bits])
        else:
            assert amax is not None
            scale = amax / _LARGEST[bits]
        return (_rounded(grouped / scale, bits) * scale).flatten(-2)


_LARGEST: dict[Any, float] = {4: 7.0, 8: 127.0, (4, 3): 448.0, (2, 1): 6.0}


def _over(amax: Tensor, shape: Sequence[int], attributes: Mapping[str, Any]) -> Tensor:
    """A weight's ranges, one for each element. Args: amax: one a tensor, a channel or a block, as ModelOpt keeps it."""
    (n_out, n_in), blocks = shape, attributes.get("block_sizes") or {}
    rows = blocks.get(-2) or (n_out if attributes.get("axis") is None and not blocks else 1)
    columns = blocks.get(-1) or n_in
    return amax.reshape(n_out // rows, n_in // columns).repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _rounded(x: Tensor, num_bits: Any) -> Tensor:
    """The nearest code, ties to even."""
    if num_bits == (4, 3):
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    if num_bits == (2, 1):
        step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
        return ((x / step).round() * step).clamp(-6, 6)
    return x.round().clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)


class FakeQuantized(nn.Module):
    """A linear as a recipe has it, in float32."""

    def __init__(self, linear: nn.Linear, quant: LinearQuant) -> None:
        super().__init__()
        self.weight, self.bias, self.quant = fake_quantized(quant, linear.weight), linear.bias, quant

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(quantized_inputs(self.quant, x), self.weight, self.bias)


def apply(model: nn.Module, quants: Mapping[str, LinearQuant]) -> nn.Module:
    """Put fake-quantized linears in place, in the model itself."""
    for name, quant in quants.items():
        _put(model, name, FakeQuantized(model.get_submodule(name), quant))
    return model


def apply_as_reader(
    model: nn.Module, quants: Mapping[str, LinearQuant], output_scales: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The same in the reader's order of operations.

    Args:
        model: unquantized; it is changed.
        quants: calibrated.
        output_scales: scales of inputs, for what computes these. None: each linear multiplies its own, as ModelOpt's.
    """
    scales = dict(output_scales or {})
    for name, quant in quants.items():
        own = quant.pre_quant_scale if output_scales is None else None
        _put(model, name, ReaderLinear(model.get_submodule(name), quant, own, scales.pop(name, None)))
    for name, scale in scales.items():  # what is no quantized linear
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data * scale.view(-1, *[1] * (parameter.dim() - 1))
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, leaf = name.rsplit(".", 1)
    setattr(model.get_submodule(parent), leaf, module)


def loaded(directory: Path) -> Any:
    """An export as transformers and compressed-tensors load it, in float32."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    for hook in list(model._forward_pre_hooks.values()):
        hook(
            model, ()
        )  # the reader decompresses before its first forward pass; NVFP4 and MX weights come out in bfloat16
    return nn.Module.float(model).eval()


def kl(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || logits) over positions, nats."""
    p, q = (torch.log_softmax(item.double(), -1) for item in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())
