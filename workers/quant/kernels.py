"""The two element-wise steps of gradient scoring: plain PyTorch on a CPU, one Triton kernel each on a GPU."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 8  # recipes that one launch of score_rows takes
_CHUNK_ROWS: Final = 1024  # rows that a CPU works on at a time: they stay in its cache


def deltas(quantized: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized values and their errors as operands; an error is small, so it survives the cast.

    Args:
        quantized: [rows, columns] float32.
        original: [rows, columns] in the operand dtype.

    Returns: quantized and quantized - original in the operand dtype, and the sum of squares of the difference, a
        float64 scalar.
    """
    if quantized.is_cuda:
        from workers.quant import kernels_triton

        return kernels_triton.deltas(quantized, original)
    difference = quantized - original.float()
    square_sum = torch.linalg.vecdot(difference, difference).double().sum()
    return quantized.to(original.dtype), difference.to(original.dtype), square_sum


def score_rows(
    first: Tensor | None,
    seconds: Tensor,
    gradient: Tensor,
    ends: Sequence[int],
    second_ends: Sequence[int],
    score: Tensor,
    square: Tensor,
) -> None:
    """Square sums of each row of dy and of g * dy, in float32, for several recipes at once (on a GPU at most COLUMNS).

    Args:
        first: [at least max(ends), out], the term of dy that the recipes share; None: there is none.
        seconds: [recipes, at least max(second_ends), out], the other term of each.
        gradient: g, [rows, out].
        ends: rows of each recipe, from the first on.
        second_ends: the same where a recipe has a second term, 0 where it has none.
        score: [recipes, rows] float32, receives the sums of (g * dy)^2.
        square: [recipes, rows] float32, receives the sums of dy^2.
    """
    if gradient.is_cuda:
        from workers.quant import kernels_triton

        kernels_triton.score_rows(first, seconds, gradient, ends, second_ends, score, square)
        return
    room = torch.empty(_CHUNK_ROWS, gradient.shape[1])
    for column, end in enumerate(ends):
        for start in range(0, end, _CHUNK_ROWS):
            rows = slice(start, min(end, start + _CHUNK_ROWS))
            dy = room[: rows.stop - start]
            if first is None:
                dy.copy_(seconds[column, rows])
            elif second_ends[column]:
                torch.add(first[rows], seconds[column, rows], out=dy)
            else:
                dy.copy_(first[rows])
            torch.linalg.vecdot(dy, dy, out=square[column, rows])
            dy.mul_(gradient[rows])
            torch.linalg.vecdot(dy, dy, out=score[column, rows])
