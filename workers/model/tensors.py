"""Tensors of a checkpoint as its model has them: loading, validation and export all read them here.

Weights that a checkpoint holds in FP8 beside their scales, as official FP8 releases do, come out multiplied by these,
in the dtype that config.json names for the model; the scales are none of the model's tensors. Nothing is read before it
is asked for, so a dictionary of these tensors is what transformers' loader takes for a state dict of files.

Layouts of FP8, by the code of transformers 5.24 (`FineGrainedFP8Config`) and vLLM 0.32 (`fp8.py`): E4M3 codes under the
weight's name, the scale under that name and ``_scale_inv`` or ``_scale``. It is the factor of the codes in either
spelling: one a block of `weight_block_size`, the last ones cut at the weight's edge, one a row, or one a tensor.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from sweep.core.errors import SweepError
from workers.model.checkpoint import fp8_source, loaded_files

_SCALES: Final = ("_scale_inv", "_scale")  # after a weight's name
# Scales of inputs, queries and caches: the last words of their names, in the linears, their attention or below it.
_OTHER_SCALES: Final = (
    "input_scale",
    "input_scale_inv",
    "activation_scale",
    "activation_scale_inv",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
)
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by safetensors' names
_SCALE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in an open weight file, as it lies there."""

    file: Any  # safetensors' open file
    shard: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Its values, on the CPU."""
        return self.file.get_tensor(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTensor:
    """A tensor of the model in its checkpoint; one of FP8 codes is read dequantized."""

    stored: Stored
    dtype: torch.dtype  # that it is read in
    scale: Stored | None = None  # of FP8 codes
    block: tuple[int, int] | None = None  # rows and columns under one scale, if the scale has two dimensions

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.stored.shape

    @property
    def shard(self) -> Path:
        """The weight file that holds it."""
        return self.stored.shard

    def read(self) -> Tensor:
        """Its values, on the CPU, in `dtype`."""
        if self.scale is None:
            return self.stored.read()
        return dequantized(self.stored.read(), self.scale.read(), self.block).to(self.dtype)

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """As transformers reads a tensor of an open file: ``tensor[...]``."""
        return self.read()[index]


def dequantized(codes: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """FP8 codes times their scales.

    Args:
        codes: [..., rows, columns] float8.
        scale: [..., ceil(rows / block rows), ceil(columns / block columns)], [rows, 1], [rows], or a single one.
        block: rows and columns under one scale; None: a scale a row or one for all.

    Returns: [..., rows, columns] float32.
    """
    values, factors = codes.float(), scale.float()
    if factors.numel() == 1:
        return values * factors.reshape(())
    if block is None:
        return values * factors.reshape(-1, 1)
    rows, columns = values.shape[-2:]
    factors = factors.repeat_interleave(block[0], -2)[..., :rows, :]
    return values * factors.repeat_interleave(block[1], -1)[..., :columns]


def stored_tensors(path: Path, stack: ExitStack) -> dict[str, Stored]:
    """All tensors of a checkpoint as they lie in its files, by name; only headers are read.

    Args:
        path: checkpoint directory.
        stack: closes the files; no tensor can be read afterwards.

    Raises: SweepError: a tensor of a dtype that torch does not have.
    """
    stored: dict[str, Stored] = {}
    for shard in loaded_files(path):
        file = stack.enter_context(safe_open(shard, framework="pt"))
        for name in file.keys():  # noqa: SIM118 -- no mapping
            header = file.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            if dtype is None:
                raise SweepError(
                    f"{shard} holds {name} as {header.get_dtype()}, which is no weight that is read here. "
                    "Give the checkpoint in 16 bits: model.path=DIR."
                )
            stored[name] = Stored(file, shard, name, tuple(header.get_shape()), dtype)
    return stored


def open_tensors(path: Path, stack: ExitStack) -> dict[str, HeldTensor]:
    """The tensors of a checkpoint that its model may have, by their name on disk; only headers are read.

    Args:
        path: checkpoint directory.
        stack: closes the files; no tensor can be read afterwards.

    Raises: SweepError: weights that are quantized in another way than FP8, or FP8 without a scale that fits.
    """
    stored, source = stored_tensors(path, stack), fp8_source(path)
    if source is None:
        return {name: HeldTensor(stored=each, dtype=each.dtype) for name, each in stored.items()}
    dtype = getattr(torch, source.dtype)
    scales = {name: _scale_of(name, stored) for name, each in stored.items() if each.dtype == torch.float8_e4m3fn}
    found: dict[str, HeldTensor] = {}
    for name, each in stored.items():
        if _is_scale(name, stored):
            continue
        if (scale := scales.get(name)) is None:
            found[name] = HeldTensor(stored=each, dtype=each.dtype)
        else:
            block = _block(each, scale, source.block)
            found[name] = HeldTensor(stored=each, dtype=dtype, scale=scale, block=block)
    return found


def meta_tensors(held: dict[str, HeldTensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes and dtypes without values."""
    return {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in held.items()}


def _is_scale(name: str, stored: dict[str, Stored]) -> bool:
    """Whether a tensor of an FP8 checkpoint is a scale, of weights that are there or not.

    Raises: SweepError: the weight beside it is in no FP8: whether it is to be multiplied is not known.
    """
    local = name.rpartition(".")[2]
    if local in _OTHER_SCALES:
        return True
    for ending in _SCALES:
        weight = name.removesuffix(ending)
        if weight == name or (weight not in stored and not local.startswith("weight_")):
            continue
        if weight in stored and stored[weight].dtype != torch.float8_e4m3fn:
            raise SweepError(
                f"{stored[name].shard} holds a scale, {name}, of a weight in {_named(stored[weight].dtype)}: whether "
                "it is multiplied already is not known. Download the checkpoint again, or give it in 16 bits: "
                "model.path=DIR."
            )
        return True
    return False


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _scale_of(name: str, stored: dict[str, Stored]) -> Stored:
    """The scale beside an FP8 weight. Raises: SweepError: there is none."""
    for ending in _SCALES:
        if (scale := stored.get(f"{name}{ending}")) is not None:
            return scale
    raise SweepError(
        f"{stored[name].shard} holds {name} in FP8 without a scale ({name}_scale_inv or {name}_scale), so its values "
        "are not known. Download the checkpoint again, or give it in 16 bits: model.path=DIR."
    )


def _block(weight: Stored, scale: Stored, typed: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of a weight under one scale; None: a scale a row, or a single one.

    Args:
        weight: its codes.
        scale: its scale.
        typed: the block that config.json names.

    Raises: SweepError: the scale fits no layout that is known.
    """
    sizes = scale.shape
    if scale.dtype in _SCALE_DTYPES:
        if typed is not None and len(weight.shape) >= 2:
            grid = tuple(-(-size // each) for size, each in zip(weight.shape[-2:], typed, strict=True))
            if sizes == (*weight.shape[:-2], *grid):
                return typed
        a_row = ((weight.shape[0],), (weight.shape[0], 1)) if typed is None and len(weight.shape) == 2 else ()
        # A single scale of two dimensions is a grid that was cut, where there should be blocks.
        if sizes in ((), (1,), *a_row) or (typed is None and all(size == 1 for size in sizes)):
            return None
    raise SweepError(
        f"{scale.shard} holds {scale.name} with sizes {[*sizes]} in {_named(scale.dtype)}, which "
        f"fits no layout of {weight.name} {[*weight.shape]} (config.json: weight_block_size={typed}). Known are a "
        "scale a block, a row or a tensor. Give the checkpoint in 16 bits: model.path=DIR."
    )
