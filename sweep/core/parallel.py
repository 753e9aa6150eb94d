"""Tensor parallelism: the part of a linear that one rank has, by the linear's name.

Column-parallel linears split their outputs, row-parallel ones their inputs; of all others each rank has the whole.
Source: vLLM 0.32, vllm/model_executor/models/{qwen2,qwen3,qwen3_vl}.py, whose names most models share;
vllm/model_executor/layers/linear.py, QKVParallelLinear: where there are fewer key-value heads than ranks, each rank has
one whole head.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sweep.core.errors import SweepError
from sweep.core.groups import Linear

_COLUMN: Final = re.compile(r".*\b(?:[qkv]_proj|qkv_proj|qkv|gate_proj|up_proj|gate_up_proj|linear_fc1|fc1)")
_ROW: Final = re.compile(r".*\b(?:o_proj|out_proj|attn\.proj|down_proj|linear_fc2|fc2)")
_KEYS_VALUES: Final = re.compile(r".*\b[kv]_proj")
_JOINED: Final = {"qkv": 3, "gate_up_proj": 2}  # equal sub-projections that are one linear in the checkpoint already


@dataclass(frozen=True, slots=True)
class RankPart:
    """The part of a linear that one rank has."""

    n_inputs: int
    n_outputs: tuple[int, ...]  # of each sub-projection


def is_row_parallel(module: str) -> bool:
    """Whether ranks have parts of a linear's inputs."""
    return _ROW.fullmatch(module) is not None


def rank_inputs(module: str, n_inputs: int, tp: int) -> int:
    """Inputs of a linear that each of `tp` ranks has. Raises: SweepError: `tp` does not divide what has to be split."""
    return _divided(n_inputs, tp, f"inputs of {module}") if is_row_parallel(module) else n_inputs


def rank_part(linear: Linear, tp: int, kv_heads: int | None) -> RankPart:
    """The part of a linear that each of `tp` ranks has.

    Args:
        linear: of the whole model.
        tp: number of ranks.
        kv_heads: key-value heads of the language model; None: as many as there are query heads.

    Raises: SweepError: `tp` does not divide what has to be split.
    """
    leaf = linear.name.rpartition(".")[2]
    n_parts = _JOINED.get(leaf, 1)
    n_inputs, n_outputs = rank_inputs(linear.name, linear.n_inputs, tp), linear.n_outputs // n_parts
    if _KEYS_VALUES.fullmatch(linear.name) and kv_heads is not None and tp > kv_heads:
        _divided(tp, kv_heads, "ranks among the key-value heads", tp)
        n_outputs = _divided(n_outputs, kv_heads, f"outputs of {linear.name}")
    elif _COLUMN.fullmatch(linear.name):
        n_outputs = _divided(n_outputs, tp, f"outputs of {linear.name}")
    return RankPart(n_inputs, (n_outputs,) * n_parts)


def parts_fit(parts: Sequence[RankPart], inputs: int, outputs: int, *, each: bool) -> str | None:
    """Why parts of the linears of a layer group do not fit a kernel; None: they do.

    Args:
        parts: that one rank has.
        inputs: the kernel takes multiples of it.
        outputs: see inputs.
        each: whether each sub-projection must be such a multiple; else all together, as they are one matrix.
    """
    sizes = [size for part in parts for size in part.n_outputs]
    for n in (part.n_inputs for part in parts):
        if n % inputs:
            return f"{n} inputs a rank, no multiple of {inputs}"
    for n in sizes if each else [sum(sizes)]:
        if n % outputs:
            return f"{n} outputs a rank, no multiple of {outputs}"
    return None


def _divided(n: int, by: int, what: str, tp: int | None = None) -> int:
    if n % by:
        raise SweepError(
            f"target.tp={tp or by}: {by} do not divide the {n} {what}, whatever their format. "
            "Type another target.tp, such as a power of 2."
        )
    return n // by
