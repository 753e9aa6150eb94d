"""Checkpoints whose weights lie in FP8 beside scales, as official FP8 releases have them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_LARGEST = 448.0


def quantize(
    path: Path, block: list[int] | None, ending: str, *, round_up: bool = False, within: str = "layers."
) -> dict[str, Tensor]:
    """Rewrite a checkpoint's matrices as E4M3 codes with scales.

    Args:
        path: a checkpoint of one weight file.
        block: rows and columns under one scale; None: one scale a tensor.
        ending: of the scales' names, after the weight's.
        round_up: scales are powers of two.
        within: part of the names that are quantized.

    Returns: what these weights are now, bfloat16, by name.
    """
    weights: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if tensor.dim() != 2 or within not in name or "embed" in name:
            weights[name] = tensor
            continue
        rows, columns = block or tensor.shape
        codes, values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn), torch.empty_like(tensor).float()
        scales = torch.empty(-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scale = tensor[part].float().abs().max().clamp_min(1e-12) / _LARGEST
                scales[i, j] = torch.exp2(torch.log2(scale).ceil()) if round_up else scale
                codes[part] = (tensor[part].float() / scales[i, j]).to(codes.dtype)
                values[part] = codes[part].float() * scales[i, j]
        weights |= {name: codes, f"{name}{ending}": scales if block else scales.reshape(())}
        meant[name] = values.bfloat16()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _mark(path, block)
    return meant


def _mark(path: Path, block: list[int] | None) -> None:
    """Have config.json say that the weights are FP8."""
    file = path / "config.json"
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": said}))
