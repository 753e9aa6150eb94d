"""How quantizers mark a checkpoint that they wrote: in config.json, in files beside it, in names and dtypes of tensors.

Marks of config.json are those of transformers 5.24 (`utils/quantization_config.py`), which loads the codes as weights
where it does not know the method, and of runtimes that it does not know (ModelOpt, MLX). Names of tensors are those of
its `integrations/`, of GPTQModel, bitsandbytes and MLX.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from sweep.core.json import Json

UNKNOWN: Final = "unknown method"
# Files by which quantizers say so, where config.json may not: ModelOpt, AutoGPTQ, AutoAWQ, auto-round and Quanto.
FILES: Final = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "auto-round",
    "quanto_qmap.json": "quanto",
}
# compression_config is of compressed-tensors before 0.7, quantization of MLX.
_SECTIONS: Final = ("quantization_config", "compression_config", "quantization")
# Keys of sections that do not name their method.
_KEYS: Final = {
    "bitsandbytes": {"load_in_4bit", "load_in_8bit"},
    "modelopt": {"quant_algo", "producer"},
    "compressed-tensors": {"config_groups", "sparsity_config"},
    "mlx": {"group_size"},
}
_PLAIN: Final = ("F64", "F32", "F16", "BF16", "BOOL", "C64")  # dtypes of values that stand for themselves
_INTEGERS: Final = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# A tensor that only checkpoints of the method have beside codes, by its name in the module that holds these. The first
# that fits counts: GPTQ has AWQ's qweight too.
_SIGNS: Final = {
    "compressed-tensors": r"weight_packed",
    "gptq": r"g_idx",
    "fp_quant": r"dqweight",
    "awq": r"qweight",
    "bitsandbytes": r"(weight\.)?(absmax|quant_map|nested_absmax|SCB)",
    "modelopt": r"weight_scale_2",
    "mxfp4": r"\w+_blocks",
    "aqlm": r"codebooks",
    "vptq": r"(res_)?centroids\.weight",
    "spqr": r"dense_weights",
    "hqq": r"W_q",
    "torchao": r"_weight_\w+",
    "quanto": r"_data",
    "eetq": r"weight_scales",
    "higgs": r"tables2?",
    "metal": r"qbiases",
    "mlx": r"biases",
    "fp8": r"\w+_scale_inv",
}
_SCALE: Final = re.compile(r"(weight_)?(scales?|zeros?|zero_points?)")
_LORA: Final = re.compile(r"\.(lora_(embedding_)?[AB]|lora_magnitude_vector|base_layer)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A tensor as a weight file's header has it."""

    dtype: str  # by safetensors' name: "BF16", "F8_E4M3"
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A place in a checkpoint that says that its weights are quantized."""

    method: str  # as config.json spells it: "gptq", "compressed-tensors"
    place: str  # "quantization_config of config.json"
    section: Mapping[str, Json]  # what stands there; empty for files and tensors


def config_marks(config: Json, inside: str = "config.json") -> Iterator[Mark]:
    """The sections of a config.json, nested ones too, by which some reader takes the checkpoint as quantized.

    Args:
        config: the decoded file, or what it holds under a key.
        inside: where that stands, for the reader: "text_config of config.json".
    """
    for key, value in config.items() if isinstance(config, Mapping) else ():
        place = f"{key} of {inside}"
        if key not in _SECTIONS:
            yield from config_marks(value, place)
        elif value is not None:
            section = value if isinstance(value, Mapping) else {}
            if key != "quantization" or "bits" in section:  # audio models have a section of that name
                yield Mark(method=_method_of(section), place=place, section=section)


def _method_of(section: Mapping[str, Json]) -> str:
    """The method that a section names, or that only its keys show."""
    if isinstance(named := section.get("quant_method"), str):
        return named.lower()
    for method, keys in _KEYS.items():
        if not keys.isdisjoint(section):
            return method
    return UNKNOWN


def tensor_mark(headers: Mapping[str, Header]) -> Mark | None:
    """The first tensor that holds codes, with the method that its neighbours' names show; None: all hold values.

    Integers are codes if they are a weight or have scales beside them: position ids and masks are neither.
    """
    suspects = sorted(name for name, header in headers.items() if header.dtype not in _PLAIN)
    beside: dict[str, set[str]] = {name.rpartition(".")[0]: set() for name in suspects}
    for name in headers if suspects else ():
        parent = name.rpartition(".")[0]
        for module in (parent, parent.rpartition(".")[0]):
            if module in beside:
                beside[module].add(name.removeprefix(f"{module}."))
    for name in suspects:
        module, _, last = name.rpartition(".")
        header = headers[name]
        method = _method_beside(beside[module])
        scaled = any(_SCALE.fullmatch(each) or each in (f"{last}_scale", f"{last}_scales") for each in beside[module])
        is_matrix = len(header.shape) >= 2 and (last == "weight" or header.dtype not in _INTEGERS)
        if method is not None or scaled or is_matrix:
            return Mark(method=method or UNKNOWN, place=f"tensor {name}, {header.dtype}", section={})
    return None


def lora_tensor(headers: Mapping[str, Header]) -> str | None:
    """A tensor of an adapter that was saved with its model, not merged into it; None: there is none."""
    return next((name for name in sorted(headers) if _LORA.search(f".{name}.")), None)


def _method_beside(names: set[str]) -> str | None:
    for method, sign in _SIGNS.items():
        if any(re.fullmatch(sign, name) for name in names):
            return method
    return None
