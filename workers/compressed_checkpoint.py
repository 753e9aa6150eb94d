"""A checkpoint that compressed-tensors' readers load (transformers, vLLM): written shard by shard, read back and compared before it counts."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import compressed_tensors
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus, apply_quantization_config
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sweep.errors import SweepError
from sweep.mixed import GroupChoice, MixedRecipe
from sweep.recipe import SCALES_INPUTS
from sweep.recipe_quantizer import canonical_attributes
from workers.calibration import fake_quantized
from workers.checkpoint import weight_files
from workers.compressed_schemes import Inexpressible, attributes_of, scheme_of
from workers.compressed_weights import input_scales, packed, unpacked
from workers.linear_quant import LinearQuant

_COPIED: Final = (".json", ".jinja", ".model", ".txt")  # tokenizer, preprocessor and generation settings
_VISION: Final = "visual"
# Relative to the element: float32 scales come back to the last bits, what decompresses to bfloat16 to its 8.
_TOLERANCE: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-6, torch.bfloat16: 2**-8}

Linears = Sequence[tuple[str, int, int]]  # name, inputs, outputs of every nn.Linear, in the model's order


def quantization_config(recipe: MixedRecipe, linears: Linears) -> dict[str, Any]:
    """What config.json says of the quantization.

    Modules are named one by one: a runtime renames prefixes and joins q/k/v and gate/up by name, and a pattern that means the same modules
    under either naming is easily one that means more. Every other linear is named under `ignore`, for vLLM refuses those of which it finds nothing.

    Args:
        recipe: what each layer group gets.
        linears: of the whole model.

    Raises: Inexpressible: a format that compressed-tensors has no words for.
    """
    schemes = schemes_of(recipe)
    targets = {label: [m for choice in recipe.groups if choice.format == label for m in choice.modules] for label in schemes}
    formats = {scheme.format for scheme in schemes.values()}
    quantized = {module for modules in targets.values() for module in modules}
    ignored = [name for name, _, _ in linears if name not in quantized]
    if not any(_VISION in module for module in quantized) and any(_VISION in name for name in ignored):
        ignored.append(f"re:.*{_VISION}.*")  # its convolution, which some runtimes hold as a linear
    config = QuantizationConfig(
        config_groups={f"group_{i}": scheme.model_copy(update={"targets": targets[label]}) for i, (label, scheme) in enumerate(schemes.items())},
        format=formats.pop() if len(formats) == 1 else "mixed-precision",  # pyright: ignore[reportArgumentType] -- enum by value
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignored,
    )
    return {**config.model_dump(mode="json"), "version": compressed_tensors.__version__}


def schemes_of(recipe: MixedRecipe) -> dict[str, QuantizationScheme]:
    """The scheme of each format that a group has.

    Raises: Inexpressible: a format that compressed-tensors has no words for, with the first group that has it.
    """
    schemes: dict[str, QuantizationScheme] = {}
    for choice in recipe.groups:
        if choice.format is not None and choice.format not in schemes:
            _refuse_smoothed(choice, recipe.formats[choice.format].algorithm)
            try:
                schemes[choice.format] = scheme_of(choice.format, recipe.formats[choice.format])
            except Inexpressible as error:
                raise Inexpressible(f"{choice.group}: {error}") from None
    return schemes


def write_checkpoint(source: Path, directory: Path, recipe: MixedRecipe, quants: Mapping[str, LinearQuant], linears: Linears) -> None:
    """Fill an empty directory with the quantized checkpoint, one shard of the source in memory at a time.

    Args:
        source: the checkpoint that the recipe is for.
        directory: exists.
        recipe: what each layer group gets.
        quants: calibrated quantizers by module, of all modules that the recipe quantizes.
        linears: of the whole model.

    Raises: SweepError: something that the format can't express, or a weight that the checkpoint does not hold under its module's name.
    """
    schemes = _by_module(recipe)
    config = quantization_config(recipe, linears)
    check_weights_are_there(source, schemes)
    if smoothed := [module for module, quant in quants.items() if quant.pre_quant_scale is not None]:
        raise Inexpressible(f"{smoothed[0]}: compressed-tensors can't express pre_quant_scale, a scale of a linear's inputs. Choose algorithm max or mse.")
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for shard in weight_files(source):
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no dict
                module = name.removesuffix(".weight")
                if name.endswith(".weight") and module in schemes:
                    made = packed(file.get_tensor(name), quants[module], schemes[module])
                    tensors |= {f"{module}.{local}": tensor for local, tensor in made.items()}
                else:
                    tensors[name] = file.get_tensor(name)
        save_file(tensors, directory / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
    for index in source.glob("*.safetensors.index.json"):
        _write_json(directory / index.name, {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(weight_map.items()))})
    document: dict[str, Any] = json.loads((source / "config.json").read_bytes())
    _write_json(directory / "config.json", {**document, "quantization_config": config})
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COPIED and not (directory / path.name).exists() and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)


def check_export(directory: Path, source: Path, recipe: MixedRecipe, quants: Mapping[str, LinearQuant], linears: Linears) -> None:
    """Read an export back with the reader's own library and compare all of it with what was meant.

    Args: as for `write_checkpoint`.

    Raises: SweepError: names the module and what came back: another format, other numbers, a tensor too many or too few.
    """
    read = read_schemes(directory, linears)
    _check_formats(read, recipe, linears)
    with ExitStack() as stack:
        tensors = {name: file for shard in weight_files(directory) for name, file in _tensors(shard, stack)}
        originals = {name: file for shard in weight_files(source) for name, file in _tensors(shard, stack)}
        expected: set[str] = set()
        for name, file in originals.items():
            module, original = name.removesuffix(".weight"), file.get_tensor(name)
            scheme = read.get(module) if name.endswith(".weight") else None
            if scheme is None:
                expected.add(name)
                if name not in tensors or not torch.equal(tensors[name].get_tensor(name), original):
                    raise SweepError(f"{directory}: {name} is not what {source} holds, though the recipe leaves it in 16 bits. Export again.")
                continue
            prefix = f"{module}."
            state = {key.removeprefix(prefix): tensors[key].get_tensor(key) for key in tensors if key.startswith(prefix) and key != f"{module}.bias"}
            expected |= {f"{module}.{local}" for local in state}
            _check_linear(f"{directory}: {module}", state, original, quants[module], scheme)
        if surplus := sorted(tensors.keys() - expected):
            raise SweepError(f"{directory} holds {surplus[0]}, which {source} does not. Export again.")


def read_schemes(directory: Path, linears: Linears) -> dict[str, QuantizationScheme]:
    """The scheme of each module, as compressed-tensors reads config.json and matches its targets to module names.

    Args:
        directory: an export.
        linears: of the whole model.
    """
    document: dict[str, Any] = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    config = QuantizationConfig.model_validate({key: value for key, value in document.items() if key != "version"})
    model = _skeleton(linears)
    apply_quantization_config(model, config, show_progress=False)
    found: dict[str, QuantizationScheme] = {}
    for name, module in model.named_modules():
        scheme: QuantizationScheme | None = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            found[name] = scheme if scheme.format is not None else scheme.model_copy(update={"format": config.format})
    return found


def check_weights_are_there(source: Path, modules: Mapping[str, object]) -> None:
    """Refuse modules whose weight is not in the checkpoint under its name: tied to another, or renamed on loading."""
    with ExitStack() as stack:
        held = {name for shard in weight_files(source) for name, _ in _tensors(shard, stack)}
    for module in modules:
        if f"{module}.weight" not in held:
            raise SweepError(
                f"The checkpoint {source} holds no {module}.weight: it is tied to another module or has another name there, "
                "and compressed-tensors can't express that. Leave that group in 16 bits (format: null)."
            )


def _check_formats(read: Mapping[str, QuantizationScheme], recipe: MixedRecipe, linears: Linears) -> None:
    meant = {module: choice for choice in recipe.groups for module in choice.modules}
    for name, _, _ in linears:
        choice = meant.get(name)
        chosen = None if choice is None else recipe.format_of(choice)
        scheme = read.get(name)
        wanted = (None, None) if chosen is None else (canonical_attributes(chosen.weight), canonical_attributes(chosen.inputs))
        args = (None, None) if scheme is None else (scheme.weights, scheme.input_activations)
        found = tuple(None if item is None else canonical_attributes(attributes_of(item)) for item in args)
        if found != wanted:
            raise Inexpressible(f"{_group(choice, name)}: compressed-tensors can't express this: module {name} would be read as {found}, not {wanted}.")


def _check_linear(where: str, state: Mapping[str, Tensor], weight_OI: Tensor, linear: LinearQuant, scheme: QuantizationScheme) -> None:
    meant = fake_quantized(linear, weight_OI)
    try:
        found = unpacked(state, scheme)
    except (KeyError, RuntimeError, ValueError) as error:
        raise SweepError(f"{where} does not decompress: {type(error).__name__}: {str(error).splitlines()[0]}. Export again.") from error
    tolerance = _TOLERANCE[found.dtype]
    off = (found.float() - meant).abs() - tolerance * meant.abs()
    if found.shape != meant.shape or not bool((off <= 0).all()):  # a NaN is not <= 0
        share = float((~(off <= 0)).float().mean()) if found.shape == meant.shape else 1.0
        raise SweepError(
            f"{where}: {share:.2%} of the weights that a reader would compute with are not the recipe's (allowed: {tolerance:.1e} of each). "
            "A scale or a packed weight is damaged. Export again."
        )
    for name, scale in input_scales(linear, scheme).items():
        if name not in state or not torch.equal(state[name].float(), scale):
            raise SweepError(f"{where}: {name} is {state.get(name)}, calibrated was {scale}. Export again.")


def _refuse_smoothed(choice: GroupChoice, algorithm: str) -> None:
    if algorithm in SCALES_INPUTS:
        raise Inexpressible(
            f"{choice.group}: compressed-tensors can't express algorithm: {algorithm!r} of format {choice.format!r}. It has no scale of a linear's inputs, and "
            "folding one into the layer before is not done here: o_proj and down_proj have no layer that takes it exactly. "
            "Choose a format of algorithm max or mse for these groups, or --format modelopt."
        )


def _by_module(recipe: MixedRecipe) -> dict[str, QuantizationScheme]:
    schemes = schemes_of(recipe)
    return {module: schemes[choice.format] for choice in recipe.groups if choice.format is not None for module in choice.modules}


def _skeleton(linears: Linears) -> nn.Module:
    """Modules of these names and shapes without weights, for the library to match its targets against."""
    root = nn.Module()
    for name, n_in, n_out in linears:
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(leaf, nn.Linear(n_in, n_out, bias=False, device="meta"))
    return root


def _tensors(shard: Path, stack: ExitStack) -> Iterator[tuple[str, Any]]:
    file: Any = stack.enter_context(safe_open(shard, framework="pt"))
    for name in file.keys():  # noqa: SIM118 -- no dict
        yield name, file


def _group(choice: GroupChoice | None, name: str) -> str:
    return name if choice is None else choice.group


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
