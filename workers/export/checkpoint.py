"""A checkpoint that compressed-tensors' readers load (transformers, vLLM), written shard by shard."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final, Protocol

import compressed_tensors
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.core.json import Json
from sweep.formats.mixed import MixedRecipe
from workers.export.compute import CPU, Compute
from workers.export.folding import check_foldable, folding_modules, output_scales, scaled_rows
from workers.export.schemes import Inexpressible, scheme_of
from workers.export.weights import packed
from workers.model.checkpoint import check_unquantized, loaded_files, loaded_index, settings_files
from workers.quant.linear import LinearQuant

_VISION: Final = "visual"
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


def quantization_config(recipe: MixedRecipe, linears: Sequence[Linear], others: Sequence[str] = ()) -> dict[str, Json]:
    """The `quantization_config` of config.json.

    Modules are named one by one: a runtime renames prefixes and joins q/k/v and gate/up by name, and a pattern that
    means the same modules under either naming is easily one that means more. Every other linear is named under
    `ignore`, for vLLM refuses those of which it finds nothing.

    Args:
        recipe: the format of each layer group.
        linears: of the whole model.
        others: further linears of the checkpoint, from `other_linears`.

    Raises: Inexpressible: a format that compressed-tensors cannot express.
    """
    schemes = schemes_of(recipe)
    targets: dict[str, list[str]] = {label: [] for label in schemes}
    for choice in recipe.groups:
        if choice.format is not None:
            targets[choice.format] += choice.group.modules
    formats = {scheme.format for scheme in schemes.values()}
    quantized = set(chain.from_iterable(targets.values()))
    ignored = [*(linear.name for linear in linears if linear.name not in quantized), *others]
    if not any(_VISION in module for module in quantized) and any(_VISION in name for name in ignored):
        ignored.append(f"re:.*{_VISION}.*")  # the convolution, which some runtimes hold as a linear
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


def schemes_of(recipe: MixedRecipe) -> dict[str, QuantizationScheme]:
    """The compressed-tensors scheme of each format that a group has, by the format's label.

    Raises: Inexpressible: a format that compressed-tensors cannot express, with the first group that has it.
    """
    schemes: dict[str, QuantizationScheme] = {}
    for choice in recipe.groups:
        if choice.format is not None and choice.format not in schemes:
            try:
                schemes[choice.format] = scheme_of(choice.format, recipe.formats[choice.format])
            except Inexpressible as error:
                raise Inexpressible(f"{choice.group.name}: {error}") from None
    return schemes


def write_checkpoint(
    source: Path,
    directory: Path,
    recipe: MixedRecipe,
    quants: Mapping[str, LinearQuant],
    linears: Sequence[Linear],
    compute: Compute = CPU,
) -> None:
    """Write the quantized checkpoint, with files of `checkpoint_names`, one shard of the source in memory at a time.

    Args:
        source: the checkpoint that the recipe is for.
        directory: exists, without files of these names.
        recipe: the format of each layer group.
        quants: calibrated quantizers by module, of all modules that the recipe quantizes.
        linears: of the whole model.
        compute: where and in which dtype weights are quantized; quants must be there.

    Raises:
        SweepError: something that the format can't express, or a weight that the checkpoint does not hold under its
            module's name.
        OSError: the directory cannot be written.
    """
    check_expressible(source, recipe, linears)
    schemes, config = _by_module(recipe), quantization_config(recipe, linears, other_linears(source, linears))
    scales = output_scales(recipe, quants, linears)
    weight_map: dict[str, str] = {}
    n_bytes = 0
    largest = largest_weight(linears)

    def made(name: str, file: TensorFile) -> dict[str, Tensor]:
        module, _, local = name.rpartition(".")
        tensor = file.get_tensor(name)
        if local == "weight" and module in schemes:
            parts = packed(compute.weight(tensor), quants[module], schemes[module], scales.get(module))
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
    document = json.loads((source / "config.json").read_bytes())
    _write_json(directory / "config.json", {**document, "quantization_config": config})
    for path in settings_files(source):
        shutil.copyfile(path, directory / path.name)
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


def check_expressible(source: Path, recipe: MixedRecipe, linears: Sequence[Linear]) -> None:
    """Refuse what can be seen to be inexpressible before minutes are spent on calibration.

    Args: as for `write_checkpoint`.

    Raises: SweepError: a format that compressed-tensors cannot express; a pre-quantization scale that cannot be folded
        exactly; a module whose weight is not in the checkpoint under its name, because it is tied to another or renamed
        on loading.
    """
    check_unquantized(source)
    modules = _by_module(recipe)
    with ExitStack() as stack:
        held = held_tensors(source, stack)
        for module in modules:
            if f"{module}.weight" not in held:
                raise SweepError(
                    f"The checkpoint {source} holds no {module}.weight: it is tied to another module or has another "
                    "name there, and compressed-tensors can't express that. Leave that group in 16 bits (format: null)."
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


def _by_module(recipe: MixedRecipe) -> dict[str, QuantizationScheme]:
    schemes = schemes_of(recipe)
    return {
        module: schemes[choice.format]
        for choice in recipe.groups
        if choice.format is not None
        for module in choice.group.modules
    }


def _write_json(path: Path, document: Mapping[str, Json]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
