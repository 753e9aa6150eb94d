"""The element-wise steps of scoring by gradients: plain PyTorch on a CPU, one Triton kernel each on a GPU."""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 8  # recipes that one launch of score_rows or project_rows takes
DRAWS: Final = 8  # that one launch of project_rows takes
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
    for column, rows, dy in _errors(first, seconds, ends, second_ends):
        torch.linalg.vecdot(dy, dy, out=square[column, rows])
        dy.mul_(gradient[rows])
        torch.linalg.vecdot(dy, dy, out=score[column, rows])


def project_rows(
    first: Tensor | None,
    seconds: Tensor,
    gradients: Tensor,
    ends: Sequence[int],
    second_ends: Sequence[int],
    projection: Tensor,
    square: Tensor,
) -> None:
    """Sums of each row of g * dy, signed, for several draws of g, and of dy^2, in float32, for several recipes at once.

    Args:
        first: as for `score_rows`.
        seconds: as for `score_rows`.
        gradients: g of each draw, [draws, rows, out].
        ends: as for `score_rows`.
        second_ends: as for `score_rows`.
        projection: [recipes, draws, rows] float32, receives the sums of g * dy.
        square: [recipes, rows] float32, receives the sums of dy^2.
    """
    if gradients.is_cuda:
        from workers.quant import kernels_triton

        kernels_triton.project_rows(first, seconds, gradients, ends, second_ends, projection, square)
    else:
        project_rows_plain(first, seconds, gradients, ends, second_ends, projection, square)


def project_rows_plain(
    first: Tensor | None,
    seconds: Tensor,
    gradients: Tensor,
    ends: Sequence[int],
    second_ends: Sequence[int],
    projection: Tensor,
    square: Tensor,
) -> None:
    """`project_rows` in PyTorch, on any device: products of a row are added up in halves of halves."""
    for column, rows, dy in _errors(first, seconds, ends, second_ends):
        torch.linalg.vecdot(dy, dy, out=square[column, rows])
        for draw, gradient in enumerate(gradients):
            torch.linalg.vecdot(dy, gradient[rows].float(), out=projection[column, draw, rows])


def _errors(
    first: Tensor | None, seconds: Tensor, ends: Sequence[int], second_ends: Sequence[int]
) -> Iterator[tuple[int, slice, Tensor]]:
    """Each recipe's dy in float32, some rows at a time, in memory that the next ones overwrite. Args: as `score_rows`.

    Yields: the recipe's number, the rows, and their dy.
    """
    room = torch.empty(_CHUNK_ROWS, seconds.shape[2], device=seconds.device)
    for column, end in enumerate(ends):
        for start in range(0, end, _CHUNK_ROWS):
            rows = slice(start, min(end, start + _CHUNK_ROWS))
            dy = room[: rows.stop - start]
            if first is None:
                dy.copy_(seconds[column, rows])
            elif second_ends[column]:
                torch.add(first[rows].float(), seconds[column, rows].float(), out=dy)
            else:
                dy.copy_(first[rows])
            yield column, rows, dy
