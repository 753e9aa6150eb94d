"""A quantized checkpoint that runtimes load, written shard by shard in one of two formats."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.core.json import Json
from sweep.formats.mixed import MixedRecipe
from workers.export.compressed import CompressedTensors
from workers.export.compute import CPU, Compute
from workers.export.folding import check_foldable, folding_modules, output_scales, scaled_rows
from workers.export.layout import Layout
from workers.model.checkpoint import NOT_HELD, check_unquantized, loaded_files, loaded_index, settings_files
from workers.model.tensors import HeldTensor, open_tensors
from workers.quant.linear import LinearQuant

COMPRESSED_TENSORS: Final[Layout] = CompressedTensors()
_QUANTIZED: Final = "quantization_config"
_EMBEDDINGS: Final = ("embed", "wte", "wpe")  # in the last word of a module's name


def write_checkpoint(
    source: Path,
    directory: Path,
    recipe: MixedRecipe,
    quants: Mapping[str, LinearQuant],
    linears: Sequence[Linear],
    compute: Compute = CPU,
    layout: Layout = COMPRESSED_TENSORS,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the quantized checkpoint, with files of `checkpoint_names`, one shard of the source in memory at a time.

    Args:
        source: the checkpoint that the recipe is for.
        directory: exists, without files of these names.
        recipe: the format of each layer group, by names on disk, as all here: see `workers.export.names`.
        quants: calibrated quantizers by module, of all modules that the recipe quantizes.
        linears: of the whole model.
        compute: where and in which dtype weights are quantized; quants must be there.
        layout: the checkpoint format.
        aliases: transformers' name of a linear, by that on disk, where they differ.

    Raises:
        SweepError: something that the format can't express, or a weight that the checkpoint does not hold under its
            module's name.
        OSError: the directory cannot be written.
    """
    check_expressible(source, recipe, linears, layout)
    scales = output_scales(recipe, quants, linears)
    packings = layout.packings(recipe, quants, scales)

    def made(item: tuple[str, HeldTensor]) -> dict[str, Tensor]:
        name, tensor = item[0], item[1].read()
        module, _, local = name.rpartition(".")
        if local == "weight" and module in packings:
            parts = packings[module].packed(compute.weight(tensor), quants[module], scales.get(module), tensor.dtype)
            return {f"{module}.{local}": part for local, part in parts.items()}
        return {name: scaled_rows(tensor, scales[module]) if module in scales else tensor}

    weight_map = _write_shards(source, directory, made, compute, largest_weight(linears))
    for index in loaded_index(source):
        n_bytes = sum(size for _, size in weight_map.values())
        shards = {name: shard for name, (shard, _) in sorted(weight_map.items())}
        _write_json(directory / index.name, {"metadata": {"total_size": n_bytes}, "weight_map": shards})
    for path in settings_files(source):
        shutil.copyfile(path, directory / path.name)
    own = {"config.json": _unquantized(json.loads((source / "config.json").read_bytes()))}
    for name, fields in layout.documents(recipe, linears, other_linears(source, linears), aliases).items():
        _write_json(directory / name, {**own.get(name, {}), **fields})
    for shard in loaded_files(source):  # safetensors lets nobody else read what it writes
        shutil.copymode(directory / "config.json", directory / shard.name)


def _write_shards(
    source: Path,
    directory: Path,
    made: Callable[[tuple[str, HeldTensor]], dict[str, Tensor]],
    compute: Compute,
    largest: int,
) -> dict[str, tuple[str, int]]:
    """Write one weight file for each of the source. Returns: file name and bytes of each tensor, by its name.

    Args:
        source: a checkpoint.
        directory: that the files are written to.
        made: the tensors that are written for one of the source.
        compute: what calls it.
        largest: weights of the largest linear.

    Raises: OSError: the directory cannot be written.
    """
    written: dict[str, tuple[str, int]] = {}
    by_shard: dict[Path, dict[str, HeldTensor]] = {shard: {} for shard in loaded_files(source)}
    with ExitStack() as stack:
        for name, held in open_tensors(source, stack).items():
            by_shard[held.shard][name] = held
        for shard, held in by_shard.items():
            parts = compute.each(made, held.items(), largest)
            tensors = {name: tensor for each in parts for name, tensor in each.items()}
            try:
                save_file(tensors, directory / shard.name, metadata={"format": "pt"})
            except SafetensorError as error:  # a full disk, among others
                raise OSError(str(error)) from error
            written |= {name: (shard.name, tensor.nbytes) for name, tensor in tensors.items()}
    return written


def other_linears(source: Path, linears: Sequence[Linear]) -> list[str]:
    """Modules with a matrix in the checkpoint that transformers builds no linear of.

    These are heads that predict several tokens, and routers: a runtime that builds them must find them named.

    Args:
        source: the checkpoint.
        linears: that transformers builds.
    """
    built, found = {linear.name for linear in linears}, list[str]()
    with ExitStack() as stack:
        for name, held in open_tensors(source, stack).items():
            module, _, local = name.rpartition(".")
            is_embedding = any(word in module.rpartition(".")[2] for word in _EMBEDDINGS)
            if local != "weight" or module in built or is_embedding:
                continue
            if len(held.shape) == 2:
                found.append(module)
    return found


def check_expressible(
    source: Path, recipe: MixedRecipe, linears: Sequence[Linear], layout: Layout = COMPRESSED_TENSORS
) -> None:
    """Refuse what can be seen to be inexpressible before minutes are spent on calibration.

    Args: as for `write_checkpoint`.

    Raises: SweepError: a format that the layout cannot express; a pre-quantization scale that cannot be folded
        exactly; a module whose weight is no tensor of the checkpoint.
    """
    check_unquantized(source)
    layout.check(recipe)
    modules = [module for choice in recipe.groups if choice.format is not None for module in choice.group.modules]
    with ExitStack() as stack:
        held = open_tensors(source, stack)
        for module in modules:
            if f"{module}.weight" not in held:
                raise SweepError(
                    f"The checkpoint {source} holds no {module}.weight: it is {NOT_HELD}, and {layout.name} can't "
                    f"express that. Solve again with --exclude {module.rpartition('.')[2]}, which leaves it in 16 bits."
                )
        weights: dict[str, tuple[torch.dtype, int]] = {}
        for module in folding_modules(recipe, linears):
            if (weight := held.get(f"{module}.weight")) is not None:
                weights[module] = weight.dtype, weight.shape[0]
        check_foldable(weights, recipe, linears)


def _unquantized(config: dict[str, Json]) -> dict[str, Json]:
    """config.json without what it says of weights in FP8, which are dequantized as they are read."""
    plain = {key: value for key, value in config.items() if key != _QUANTIZED}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key != _QUANTIZED}
    return plain


def largest_weight(linears: Sequence[Linear]) -> int:
    """Weights of the largest linear."""
    return max(linear.n_inputs * linear.n_outputs for linear in linears)


def _write_json(path: Path, document: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
