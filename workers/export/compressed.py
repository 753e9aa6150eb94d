"""Checkpoints in compressed-tensors' format: formats as schemes, named in config.json module by module."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import compressed_tensors
import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from torch import Tensor, nn

from sweep.core.groups import Linear
from sweep.core.json import Json
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import Quantizer
from workers.export.layout import Packing, by_label
from workers.export.schemes import quantizer_of, scheme_of
from workers.export.weights import input_scales, packed, unpacked
from workers.quant.linear import LinearQuant

_VISION: Final = "visual"


@dataclass(frozen=True, slots=True)
class SchemePacking:
    """A linear as a compressed-tensors scheme has it; see `workers.export.layout.Packing`."""

    scheme: QuantizationScheme

    @property
    def weight(self) -> Quantizer | None:
        """See `Packing`."""
        return self.scheme.weights and quantizer_of(self.scheme.weights)

    @property
    def inputs(self) -> Quantizer | None:
        """See `Packing`."""
        return self.scheme.input_activations and quantizer_of(self.scheme.input_activations)

    def packed(
        self, weight_OI: Tensor, linear: LinearQuant, output_scale_O: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `workers.export.weights.packed`."""
        del dtype
        return packed(weight_OI, linear, self.scheme, output_scale_O)

    def unpacked(self, state: Mapping[str, Tensor]) -> Tensor:
        """See `workers.export.weights.unpacked`."""
        return unpacked(state, self.scheme)

    def input_scales(self, linear: LinearQuant) -> dict[str, Tensor]:
        """See `workers.export.weights.input_scales`."""
        return input_scales(linear, self.scheme)


class CompressedTensors:
    """The checkpoint format of compressed-tensors; see `workers.export.layout.Layout`."""

    name = "compressed-tensors"

    def check(self, recipe: MixedRecipe) -> None:
        """See `Layout`."""
        schemes_of(recipe)

    def packings(
        self, recipe: MixedRecipe, quants: Mapping[str, LinearQuant], output_scales: Mapping[str, Tensor]
    ) -> Mapping[str, Packing]:
        """See `Layout`: each module has its group's scheme."""
        del quants, output_scales
        schemes = {label: SchemePacking(scheme) for label, scheme in schemes_of(recipe).items()}
        return {
            module: schemes[choice.format]
            for choice in recipe.groups
            if choice.format is not None
            for module in choice.group.modules
        }

    def documents(
        self, recipe: MixedRecipe, linears: Sequence[Linear], others: Sequence[str], aliases: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Json]]:
        """See `Layout`."""
        return {"config.json": {"quantization_config": quantization_config(recipe, linears, others, aliases)}}

    def read(self, directory: Path, linears: Sequence[Linear]) -> Mapping[str, Packing]:
        """See `Layout`."""
        return {name: SchemePacking(scheme) for name, scheme in read_schemes(directory, linears).items()}


def quantization_config(
    recipe: MixedRecipe,
    linears: Sequence[Linear],
    others: Sequence[str] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Json]:
    """The `quantization_config` of config.json.

    Modules are named one by one: a runtime renames prefixes and joins q/k/v and gate/up by name, and a pattern that
    means the same modules under either naming is easily one that means more. Where transformers has another name for a
    linear than the checkpoint, both are there: transformers matches its own, vLLM maps the checkpoint's. Every other
    linear is named under `ignore`, for vLLM refuses those of which it finds nothing.

    Args:
        recipe: the format of each layer group.
        linears: of the whole model.
        others: further linears of the checkpoint, from `other_linears`.
        aliases: transformers' name of a linear, by that on disk, where they differ.

    Raises: Inexpressible: a format that compressed-tensors cannot express.
    """
    schemes = schemes_of(recipe)
    targets: dict[str, list[str]] = {label: [] for label in schemes}
    built = {linear.name for linear in linears}
    for choice in recipe.groups:
        if choice.format is not None:
            targets[choice.format] += [*choice.group.modules, *_doubled_keys(choice.group.modules, built)]
    formats = {scheme.format for scheme in schemes.values()}
    quantized = set(chain.from_iterable(targets.values()))
    ignored = [*(linear.name for linear in linears if linear.name not in quantized), *others]
    if not any(_VISION in module for module in quantized) and any(_VISION in name for name in ignored):
        ignored.append(f"re:.*{_VISION}.*")  # the convolution, which some runtimes hold as a linear
    for names in (ignored, *targets.values()):
        names += [aliases[name] for name in names if name in aliases]
    file_format: Any = formats.pop() if len(formats) == 1 else "mixed-precision"  # Any: the value of an enum
    config = QuantizationConfig(
        config_groups={
            f"group_{i}": scheme.model_copy(update={"targets": targets[label]})
            for i, (label, scheme) in enumerate(schemes.items())
        },
        format=file_format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored,
    )
    return {**config.model_dump(mode="json"), "version": compressed_tensors.__version__}


def _doubled_keys(modules: Sequence[str], built: Collection[str]) -> list[str]:
    """Names of the `v_proj` that a layer group lacks because its model takes the keys for values, as Gemma 4 does.

    vLLM 0.32 loads the keys twice then, into a q/k/v that has a scheme only if all three are named
    (`_match_fused_layer` of its compressed_tensors/utils.py).
    """
    missing = [f"{module.removesuffix('.k_proj')}.v_proj" for module in modules if module.endswith(".self_attn.k_proj")]
    return [module for module in missing if module not in built]


def schemes_of(recipe: MixedRecipe) -> dict[str, QuantizationScheme]:
    """The compressed-tensors scheme of each format that a group has, by the format's label.

    Raises: Inexpressible: a format that compressed-tensors cannot express, with the first group that has it.
    """
    return by_label(recipe, scheme_of)


def read_schemes(directory: Path, linears: Sequence[Linear]) -> dict[str, QuantizationScheme]:
    """The scheme of each module, as compressed-tensors reads config.json and matches its targets to module names.

    Args:
        directory: an export.
        linears: of the whole model.
    """
    document = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    config = QuantizationConfig.model_validate({key: value for key, value in document.items() if key != "version"})
    named = {linear.name for linear in linears}
    for group in config.config_groups.values():
        assert isinstance(group, QuantizationScheme)  # as written; a preset's name would be a list
        group.targets = [name for name in group.targets if name in named]  # the others are transformers' names
    model = _skeleton(linears)
    apply_quantization_config(model, config, show_progress=False)
    found: dict[str, QuantizationScheme] = {}
    for name, module in model.named_modules():
        scheme: QuantizationScheme | None = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            found[name] = scheme if scheme.format is not None else scheme.model_copy(update={"format": config.format})
    return found


def _skeleton(linears: Sequence[Linear]) -> nn.Module:
    """Modules of these names and shapes without weights, for the library to match its targets against."""
    root = nn.Module()
    for linear in linears:
        *parents, leaf = linear.name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(leaf, nn.Linear(linear.n_inputs, linear.n_outputs, bias=False, device="meta"))
    return root
