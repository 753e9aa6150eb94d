"""Checkpoints in ModelOpt's unified Hugging Face format, which TensorRT-LLM and vLLM's ModelOpt loader read.

`hf_quant_config.json` names each linear's `quant_algo`; config.json has the same as `quantization_config`. Tensors are
packed by ModelOpt's own functions, given the weight as its fake quantizer has left it: a value that is a multiple of
its scale has one nearest code. A round trip through `_QUANTIZERS` is the check that a name means the recipe's format.

Pre-quantization scales are folded into the modules before (workers.export.folding), also those for which the format has
a tensor: TensorRT-LLM rounds that tensor to the model's dtype. Its INT4 loader asks for the tensor in linears that are
not fused (`W4A16_AWQ_LinearMethod.load_weights_vanilla`), so these get one of ones.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see workers.quant.modelopt
    import modelopt
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import from_quantized_weight, process_layer_quant_config, to_quantized_weight
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.core.json import Json
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import ATTRIBUTE_DEFAULTS, Attributes, BlockValue, Quantizer
from workers.export.folding import scaled_rows
from workers.export.layout import Inexpressible, Packing, by_label
from workers.quant.block_formats import mx_exponents, nvfp4_scales
from workers.quant.calibration import fake_quantized, smoothed_weight
from workers.quant.linear import LinearQuant

QUANT_CONFIG: Final = "hf_quant_config.json"
_NAME: Final = "a ModelOpt checkpoint"
_E2M1, _E4M3, _E8M0 = (2, 1), (4, 3), (8, 0)
_FP8: Final[Attributes] = {"num_bits": _E4M3}
_INT8_ROWS: Final[Attributes] = {"num_bits": 8, "axis": 0}
_NVFP4: Final[Attributes] = {"num_bits": _E2M1, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": _E4M3}}
_MXFP4: Final[Attributes] = {"num_bits": _E2M1, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": _E8M0}}
_MXFP8: Final[Attributes] = {**_MXFP4, "num_bits": _E4M3}
# By ModelOpt's name of a format (modelopt.torch.export.model_config), the quantizers that its readers run. Those of
# inputs that ModelOpt's exporter does not look at are vLLM 0.32's (modelopt.py, resolve) and TensorRT-LLM's
# (linear.py, get_quant_method). INT4 weights have any group size.
_QUANTIZERS: Final[Mapping[str, tuple[Attributes, Attributes | None]]] = {
    "fp8": (_FP8, _FP8),
    "fp8_pc_pt": ({**_FP8, "axis": 0}, {**_FP8, "type": "dynamic", "block_sizes": {-1: None}}),
    "fp8_pb_wo": ({**_FP8, "block_sizes": {-1: 128, -2: 128}}, {**_FP8, "type": "dynamic", "block_sizes": {-1: 128}}),
    "mxfp8": (_MXFP8, _MXFP8),
    "int4_awq": ({"num_bits": 4}, None),
    "w4a8_awq": ({"num_bits": 4}, _FP8),
    "int8_wo": (_INT8_ROWS, None),
    "int8_sq": (_INT8_ROWS, {"num_bits": 8}),
    "nvfp4": (_NVFP4, _NVFP4),
    "w4a16_nvfp4": (_NVFP4, None),
    "w4a8_nvfp4_fp8": (_NVFP4, _FP8),
    "w4a8_mxfp4_fp8": (_MXFP4, _FP8),
}
_INT4: Final = frozenset({"int4_awq", "w4a8_awq"})
_TWO_SCALES: Final = frozenset({"w4a8_awq", "nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8"})
_LARGEST: Final = {4: 7.0, 8: 127.0, _E4M3: 448.0, _E2M1: 6.0 * 448.0}  # under a tensor's, a row's or a group's scale
# Under FP8 inputs the product of an NVFP4 element and its block's scale is an FP8 number, at most 448: ModelOpt's
# exporter divides the block scales by 6 (get_weight_scaling_factor). 8 leaves the codes of E4M3 as they are.
_FP8_PRODUCT: Final = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptPacking:
    """A linear as ModelOpt's exporter lays it out; see `workers.export.layout.Packing`."""

    format: str  # ModelOpt's name
    group_size: int  # inputs of a block of weights; 0 without blocks
    weight_scale_2: Tensor | None = None  # of W4A8_AWQ: one for all linears of a layer group
    has_pre_quant_scale: bool = False

    @property
    def weight(self) -> Quantizer:
        """See `Packing`."""
        attributes = _QUANTIZERS[self.format][0]
        return Quantizer({**attributes, "block_sizes": {-1: self.group_size}} if self.format in _INT4 else attributes)

    @property
    def inputs(self) -> Quantizer | None:
        """See `Packing`."""
        attributes = _QUANTIZERS[self.format][1]
        return None if attributes is None else Quantizer(attributes)

    def packed(
        self, weight_OI: Tensor, linear: LinearQuant, output_scale_O: Tensor | None, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """See `Packing`: `weight`, `weight_scale`, and what else the format has; scalars have no axis."""
        quantized_OI = fake_quantized(linear, weight_OI)
        scales = self._weight_scales(quantized_OI, weight_OI, linear)
        scale, scale_2 = scales["weight_scale"], scales.get("weight_scale_2")
        codes = to_quantized_weight(quantized_OI, scale, self.format, scale_2, self.group_size)
        if output_scale_O is not None:
            scales["weight_scale"] = scaled_rows(scale.cpu(), output_scale_O)
        if self.has_pre_quant_scale:
            scales["pre_quant_scale"] = torch.ones(weight_OI.shape[1], dtype=dtype)
        made = {"weight": codes, **scales, **self.input_scales(linear)}
        return {name: tensor.contiguous().cpu() for name, tensor in made.items()}

    def unpacked(self, state: Mapping[str, Tensor]) -> Tensor:
        """See `Packing`: [out, in] float32, by ModelOpt's own conversions where it has one."""
        names = {"weight", "weight_scale", *(["weight_scale_2"] if self.format in _TWO_SCALES else [])}
        names |= {"input_scale"} if self.inputs is not None and self.inputs.is_calibrated else set()
        names |= {"pre_quant_scale"} if self.format in _INT4 and "pre_quant_scale" in state else set()
        if {*state} != names:
            raise ValueError(f"it holds {', '.join(sorted(state))}, and {self.format} has {', '.join(sorted(names))}")
        if "pre_quant_scale" in state and bool((state["pre_quant_scale"] != 1).any()):
            raise ValueError("its pre_quant_scale is not 1, and scales are folded into the module before")
        return _dequantized(self.format, state)

    def input_scales(self, linear: LinearQuant) -> dict[str, Tensor]:
        """See `Packing`: float32, without an axis."""
        if self.inputs is None or not self.inputs.is_calibrated:
            return {}
        assert linear.input_amax is not None  # a static range was calibrated
        return {"input_scale": _positive(linear.input_amax.float().reshape(()).cpu() / _LARGEST[self.inputs.num_bits])}

    def _weight_scales(self, quantized_OI: Tensor, weight_OI: Tensor, linear: LinearQuant) -> dict[str, Tensor]:
        original_OI, amax, (n_out, n_in) = smoothed_weight(linear, weight_OI), linear.weight_amax, weight_OI.shape
        if self.weight.num_bits == _E2M1 and self.weight.scale_bits == _E8M0:
            # Packing finds the scales anew, an octave lower where a block's largest element was rounded down to 3.
            return {"weight_scale": MXFP4QTensor.quantize(quantized_OI, self.group_size)[1].reshape(n_out, -1)}
        if self.weight.scale_bits == _E8M0:
            exponents = mx_exponents(original_OI, self.group_size, self.weight.num_bits).squeeze(-1)
            return {"weight_scale": (exponents + 127).to(torch.uint8)}
        assert amax is not None  # all but the MX formats have a range
        amax = amax.float().to(weight_OI.device)
        if self.weight.is_nvfp4:
            return self._nvfp4_scales(quantized_OI, nvfp4_scales(original_OI, amax, self.group_size)[0], amax)
        rows, columns = (self.weight.block_lengths.get(axis) for axis in (-2, -1))
        shape: tuple[int, ...] = ()
        if rows is not None and columns is not None:
            shape = (n_out // rows, 1, n_in // columns, 1)
        elif columns is not None:
            shape = (n_out, n_in // columns)
        elif self.weight.axis == 0:
            shape = (n_out,)
        found = {"weight_scale": _positive(amax.reshape(shape) / _LARGEST[self.weight.num_bits])}
        return found if self.weight_scale_2 is None else {**found, "weight_scale_2": self.weight_scale_2.clone()}

    def _nvfp4_scales(self, quantized_OI: Tensor, block_scales: Tensor, amax: Tensor) -> dict[str, Tensor]:
        blocks = quantized_OI.unflatten(-1, (-1, self.group_size))
        times = _FP8_PRODUCT if self.format == "w4a8_nvfp4_fp8" else 1.0
        # Of a block of zeros any scale is right except 0, which the codes would be divided by.
        used = torch.where((blocks == 0).all(-1), times, block_scales.squeeze(-1))
        scale = (used / times).to(torch.float8_e4m3fn)
        if not torch.equal(scale.float() * times, used):
            raise Inexpressible(
                f"{_NAME} can't express the weights of a linear in W4A8_NVFP4_FP8: the scale of some block is under "
                f"1/{448 * times:g} of the largest, and E4M3 cannot hold an eighth of it. "
                "Solve again with another format for FP4 weights, such as wfp4_afp16/default."
            )
        return {"weight_scale": scale, "weight_scale_2": _positive(amax.reshape(()) / _LARGEST[_E2M1]) * times}


class ModelOptLayout:
    """ModelOpt's checkpoint format; see `workers.export.layout.Layout`."""

    name = _NAME

    def check(self, recipe: MixedRecipe) -> None:
        """See `Layout`."""
        _formats_of(recipe)

    def packings(
        self, recipe: MixedRecipe, quants: Mapping[str, LinearQuant], output_scales: Mapping[str, Tensor]
    ) -> Mapping[str, Packing]:
        """See `Layout`."""
        formats, found = _formats_of(recipe), dict[str, Packing]()
        for choice in recipe.groups:
            if choice.format is None:
                continue
            modules, (name, group_size) = choice.group.modules, formats[choice.format]
            packing = ModelOptPacking(
                format=name,
                group_size=group_size,
                weight_scale_2=_shared_scale(modules, quants, output_scales) if name == "w4a8_awq" else None,
                has_pre_quant_scale=name in _INT4 and len(modules) == 1,
            )
            found |= dict.fromkeys(modules, packing)
        return found

    def documents(
        self, recipe: MixedRecipe, linears: Sequence[Linear], others: Sequence[str], aliases: Mapping[str, str]
    ) -> Mapping[str, Mapping[str, Json]]:
        """See `Layout`."""
        del aliases  # transformers does not read this format, and its readers map the checkpoint's names
        formats, chosen = _formats_of(recipe), dict[str, tuple[str | None, int]]()
        for choice in recipe.groups:
            if choice.format is not None:
                chosen |= dict.fromkeys(choice.group.modules, formats[choice.format])
        if not chosen:
            return {"config.json": {}}
        layers: dict[str, str | int | None] = {}
        for module in (*(linear.name for linear in linears), *others):
            layers[f"{module}.quantization"], layers[f"{module}.awq_block_size"] = chosen.get(module, (None, 0))
        found: dict[str, Any] = {**process_layer_quant_config(layers), "kv_cache_quant_algo": None}
        if "quantized_layers" in found:  # of several formats it lists these alone
            found["exclude_modules"] = [module for module in _modules(layers) if module not in chosen]
        config = {"producer": {"name": "modelopt", "version": modelopt.__version__}, "quantization": found}
        return {QUANT_CONFIG: config, "config.json": {"quantization_config": _converted(config)}}

    def read(self, directory: Path, linears: Sequence[Linear]) -> Mapping[str, Packing]:
        """See `Layout`."""
        if not (directory / QUANT_CONFIG).exists():
            return {}  # nothing is quantized
        document = json.loads((directory / QUANT_CONFIG).read_bytes())
        if json.loads((directory / "config.json").read_bytes())["quantization_config"] != _converted(document):
            raise SweepError(f"{directory}: config.json does not say what {QUANT_CONFIG} says. Export again.")
        config = msgspec.convert(document["quantization"], _Quantization)
        layers = config.quantized_layers
        if layers is None:
            names = [linear.name for linear in linears if not config.excludes(linear.name)]
            layers = dict.fromkeys(names, _Layer(config.quant_algo, config.group_size))
        return {
            module: ModelOptPacking(format=name, group_size=layer.group_size or _block_length(name))
            for module, layer in layers.items()
            if layer.quant_algo is not None
            for name in [_names()[layer.quant_algo]]
        }


class _Layer(msgspec.Struct):
    quant_algo: str | None
    group_size: int = 0


class _Quantization(_Layer, kw_only=True):
    """The section `quantization` of hf_quant_config.json."""

    exclude_modules: list[str]  # names, or patterns
    quantized_layers: dict[str, _Layer] | None = None

    def excludes(self, module: str) -> bool:
        return any(fnmatch(module, pattern) for pattern in self.exclude_modules)


def quant_algo_of(label: str, chosen: GroupFormat) -> str:
    """The `quant_algo` of a format, in capitals, as readers compare it. Raises: Inexpressible: as `format_of`."""
    name, _ = format_of(label, chosen)
    return _algo(name)


def format_of(label: str, chosen: GroupFormat) -> tuple[str, int]:
    """ModelOpt's name of a format, and the inputs of a block of its weights, 0 without blocks.

    Args:
        label: the format's, for messages.
        chosen: the format.

    Raises: Inexpressible: names the format and the field, and what there is.
    """
    if chosen.weight is None:
        raise _refuse(label, "weight.num_bits", 16, "quantized inputs under quantized weights only")
    group_size = chosen.weight.block_lengths.get(-1) or 0
    packings = [ModelOptPacking(format=name, group_size=group_size) for name in _QUANTIZERS]
    packings = [each for each in packings if each.weight.num_bits == chosen.weight.num_bits]
    if not packings:
        raise _refuse(label, "weight.num_bits", chosen.weight.num_bits, "E4M3, E2M1, and integers of 4 and 8 bits")
    same = [each for each in packings if each.weight.id == chosen.weight.id]
    if not same:
        field = packings[0].weight.differing(chosen.weight) or "block_sizes"
        algos = ", ".join(_algo(each.format) for each in packings)
        found = {**ATTRIBUTE_DEFAULTS, **chosen.weight.attributes}[field]
        raise _refuse(label, f"weight.{field}", found, f"of these bits only what {algos} names")
    for each in same:
        if (each.inputs and each.inputs.id) == (chosen.inputs and chosen.inputs.id):
            return each.format, group_size
    found = None if chosen.inputs is None else dict(chosen.inputs.attributes)
    known = "; ".join(f"{_algo(each.format)}: {each.inputs and dict(each.inputs.attributes)}" for each in same)
    raise _refuse(label, "inputs", found, f"under such weights these inputs only: {known}")


def _refuse(label: str, field: str, found: object, allowed: str) -> Inexpressible:
    return Inexpressible(
        f"{_NAME} can't express {field}: {found!r} of format {label!r}. It has {allowed}. "
        "Choose another format for these groups, or --format compressed-tensors."
    )


def _formats_of(recipe: MixedRecipe) -> dict[str, tuple[str, int]]:
    """ModelOpt's name and block length of each format of a recipe, by label."""
    return by_label(recipe, format_of)


@cache
def _names() -> dict[str, str]:
    """ModelOpt's name of a format by the `quant_algo` that its exporter writes for it."""
    written = {name: process_layer_quant_config({"layer.quantization": name})["quant_algo"] for name in _QUANTIZERS}
    return {algo: name for name, algo in written.items()}


def _algo(name: str) -> str:
    return next(algo for algo, each in _names().items() if each == name).upper()


def _block_length(name: str) -> int:
    return Quantizer(_QUANTIZERS[name][0]).block_lengths.get(-1) or 0


def _modules(layers: Mapping[str, BlockValue]) -> list[str]:
    return [key.removesuffix(".quantization") for key in layers if key.endswith(".quantization")]


def _converted(config: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no compressed-tensors words for FP8 blocks, which nobody needs
        return convert_hf_quant_config_format(config)


def _shared_scale(
    modules: Sequence[str], quants: Mapping[str, LinearQuant], output_scales: Mapping[str, Tensor]
) -> Tensor:
    """The second scale of W4A8_AWQ: under it INT4 weights times their group's scale are FP8 numbers in range.

    TensorRT-LLM refuses linears of a fused group whose scales differ (`load_weight_scales_w4a8`).
    """
    largest: list[Tensor] = []
    for module in modules:
        amax = quants[module].weight_amax
        assert amax is not None  # of INT4 in groups
        rows = amax.float().cpu()
        if module in output_scales:
            rows = scaled_rows(rows.reshape(output_scales[module].numel(), -1), output_scales[module])
        largest.append(rows.amax())
    return _positive(torch.stack(largest).amax() / _LARGEST[_E4M3])


def _dequantized(name: str, state: Mapping[str, Tensor]) -> Tensor:
    codes, scale = state["weight"], state["weight_scale"]
    if name in _INT4:
        return _unpacked_int4(codes, scale)
    if name in ("fp8", "int8_wo", "int8_sq"):
        return from_quantized_weight(codes, scale, name, torch.float32)
    n_out, n_in = codes.shape[0], codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    made = {torch.uint8: NVFP4QTensor, torch.float8_e4m3fn: FP8QTensor}[codes.dtype]
    arguments: dict[str, Any] = {"scale": scale, "block_sizes": {-1: _block_length(name)}}
    if name == "fp8_pc_pt":
        arguments = {"scale": scale[:, None]}
    elif name == "fp8_pb_wo":
        arguments = {"scale": scale[:, 0, :, 0], "block_sizes": {-1: 128, -2: 128}}
    elif name in ("mxfp8", "w4a8_mxfp4_fp8"):
        made = MXFP8QTensor if name == "mxfp8" else MXFP4QTensor
    else:
        arguments["double_scale"] = state["weight_scale_2"]
    return made(torch.Size((n_out, n_in)), torch.float32, codes).dequantize(torch.float32, **arguments)


def _unpacked_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """The weights of `pack_int4_in_uint8`, for which ModelOpt has no way back: two rows in a byte, the even one low."""
    nibbles = torch.stack([codes & 0xF, codes >> 4], dim=1).flatten(0, 1).to(torch.int8)
    values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
    return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)


def _positive(scale: Tensor) -> Tensor:
    """The scales with 1 in place of 0: of nothing but zeros any scale is right except 0."""
    return torch.where(scale > 0, scale, 1.0)
