"""Weight files of zeros with the headers that a test wants: every dtype of safetensors, and names of any quantizer."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Tensors = Mapping[str, tuple[str, Sequence[int]]]  # dtype by safetensors' name, and sizes, by the tensor's name

_BITS = {"F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "U32": 32, "I16": 16, "I8": 8, "U8": 8, "F4": 4}
PLAIN: Tensors = {
    "model.embed_tokens.weight": ("BF16", [8, 4]),
    "model.layers.0.mlp.down_proj.weight": ("BF16", [4, 4]),
    "model.layers.0.mlp.norm.weight": ("BF16", [4]),
}


def write_weights(file: Path, tensors: Tensors = PLAIN) -> None:
    """A safetensors file of zeros, written by the format's description: 8 bytes of length, JSON, values."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * _BITS.get(dtype, 8) // 8
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def write_checkpoint(path: Path, config: Mapping[str, object] | None = None, tensors: Tensors = PLAIN) -> Path:
    """A directory with config.json and model.safetensors, which makes no model."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {}))
    write_weights(path / "model.safetensors", tensors)
    return path
