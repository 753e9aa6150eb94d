"""A quantized checkpoint that runtimes load, written shard by shard in one of two formats."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from safetensors import SafetensorError, safe_open
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
from workers.model.checkpoint import check_unquantized, loaded_files, loaded_index, settings_files
from workers.quant.linear import LinearQuant

COMPRESSED_TENSORS: Final[Layout] = CompressedTensors()
_EMBEDDINGS: Final = ("embed", "wte", "wpe")  # in the last word of a module's name


class TensorSlice(Protocol):
    """A tensor in a file: its header."""

    def get_dtype(self) -> str:
        """By safetensors' name."""
        ...

    def get_shape(self) -> list[int]:
        """Its sizes."""
        ...


class TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> Iterable[str]:
        """Names of its tensors."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, read."""
        ...

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor that is not read yet."""
        ...


def write_checkpoint(
    source: Path,
    directory: Path,
    recipe: MixedRecipe,
    quants: Mapping[str, LinearQuant],
    linears: Sequence[Linear],
    compute: Compute = CPU,
    layout: Layout = COMPRESSED_TENSORS,
) -> None:
    """Write the quantized checkpoint, with files of `checkpoint_names`, one shard of the source in memory at a time.

    Args:
        source: the checkpoint that the recipe is for.
        directory: exists, without files of these names.
        recipe: the format of each layer group.
        quants: calibrated quantizers by module, of all modules that the recipe quantizes.
        linears: of the whole model.
        compute: where and in which dtype weights are quantized; quants must be there.
        layout: the checkpoint format.

    Raises:
        SweepError: something that the format can't express, or a weight that the checkpoint does not hold under its
            module's name.
        OSError: the directory cannot be written.
    """
    check_expressible(source, recipe, linears, layout)
    scales = output_scales(recipe, quants, linears)
    packings = layout.packings(recipe, quants, scales)
    weight_map: dict[str, str] = {}
    n_bytes = 0
    largest = largest_weight(linears)

    def made(name: str, file: TensorFile) -> dict[str, Tensor]:
        module, _, local = name.rpartition(".")
        tensor = file.get_tensor(name)
        if local == "weight" and module in packings:
            parts = packings[module].packed(compute.weight(tensor), quants[module], scales.get(module), tensor.dtype)
            return {f"{module}.{local}": part for local, part in parts.items()}
        return {name: scaled_rows(tensor, scales[module]) if module in scales else tensor}

    for shard in loaded_files(source):
        with safe_open(shard, framework="pt") as file:
            parts = compute.each(partial(made, file=file), file.keys(), largest)
        tensors = {name: tensor for each in parts for name, tensor in each.items()}
        try:
            save_file(tensors, directory / shard.name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from error
        weight_map |= dict.fromkeys(tensors, shard.name)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    for index in loaded_index(source):
        held = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / index.name, held)
    for path in settings_files(source):
        shutil.copyfile(path, directory / path.name)
    own = {"config.json": json.loads((source / "config.json").read_bytes())}
    for name, fields in layout.documents(recipe, linears, other_linears(source, linears)).items():
        _write_json(directory / name, {**own.get(name, {}), **fields})
    for shard in loaded_files(source):  # safetensors lets nobody else read what it writes
        shutil.copymode(directory / "config.json", directory / shard.name)


def other_linears(source: Path, linears: Sequence[Linear]) -> list[str]:
    """Modules with a matrix in the checkpoint that transformers builds no linear of.

    These are heads that predict several tokens, and routers: a runtime that builds them must find them named.

    Args:
        source: the checkpoint.
        linears: that transformers builds.
    """
    built, found = {linear.name for linear in linears}, list[str]()
    with ExitStack() as stack:
        for name, file in held_tensors(source, stack).items():
            module, _, local = name.rpartition(".")
            is_embedding = any(word in module.rpartition(".")[2] for word in _EMBEDDINGS)
            if local != "weight" or module in built or is_embedding:
                continue
            if len(file.get_slice(name).get_shape()) == 2:
                found.append(module)
    return found


def check_expressible(
    source: Path, recipe: MixedRecipe, linears: Sequence[Linear], layout: Layout = COMPRESSED_TENSORS
) -> None:
    """Refuse what can be seen to be inexpressible before minutes are spent on calibration.

    Args: as for `write_checkpoint`.

    Raises: SweepError: a format that the layout cannot express; a pre-quantization scale that cannot be folded
        exactly; a module whose weight is not in the checkpoint under its name, because it is tied to another or renamed
        on loading.
    """
    check_unquantized(source)
    layout.check(recipe)
    modules = [module for choice in recipe.groups if choice.format is not None for module in choice.group.modules]
    with ExitStack() as stack:
        held = held_tensors(source, stack)
        for module in modules:
            if f"{module}.weight" not in held:
                raise SweepError(
                    f"The checkpoint {source} holds no {module}.weight: it is tied to another module or has another "
                    f"name there, and {layout.name} can't express that. "
                    "Leave that group in 16 bits (format: null)."
                )
        weights: dict[str, tuple[str, int]] = {}
        for module in folding_modules(recipe, linears):
            if (file := held.get(f"{module}.weight")) is not None:
                weight = file.get_slice(f"{module}.weight")
                weights[module] = weight.get_dtype(), weight.get_shape()[0]
        check_foldable(weights, recipe, linears)


def largest_weight(linears: Sequence[Linear]) -> int:
    """Weights of the largest linear."""
    return max(linear.n_inputs * linear.n_outputs for linear in linears)


def held_tensors(directory: Path, stack: ExitStack) -> dict[str, TensorFile]:
    """The open file that holds each tensor of a checkpoint, by the tensor's name. Args: stack: closes the files."""
    found: dict[str, TensorFile] = {}
    for shard in loaded_files(directory):
        file: TensorFile = stack.enter_context(safe_open(shard, framework="pt"))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _write_json(path: Path, document: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
