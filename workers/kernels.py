"""The two element-wise steps of the hot loop. Plain PyTorch on a CPU, one Triton kernel each on a GPU; both mean the same."""

import torch
from torch import Tensor


def deltas(quantized: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What quantizing changed, small enough to survive a cast.

    Args:
        quantized: [rows, columns] float32.
        original: [rows, columns] in the operand dtype.

    Returns: quantized and quantized - original in the operand dtype, and the sum of squares of the difference, a float64 scalar.
    """
    if quantized.is_cuda:
        from workers import kernels_triton

        return kernels_triton.deltas(quantized, original)
    difference = quantized - original.float()
    return quantized.to(original.dtype), difference.to(original.dtype), _row_square_sums(difference).double().sum()


def score_rows(errors: tuple[Tensor, ...], gradient: Tensor, score: Tensor, square: Tensor) -> None:
    """Square sums of each row of dy and of g * dy, in float32.

    Args:
        errors: one or two [rows, out] tensors; dy is their sum.
        gradient: g, [rows, out].
        score: [rows] float32, receives the sum of (g * dy)^2.
        square: [rows] float32, receives the sum of dy^2.
    """
    if gradient.is_cuda:
        from workers import kernels_triton

        kernels_triton.score_rows(errors, gradient, score, square)
        return
    dy = errors[0].float() if len(errors) == 1 else errors[0].float() + errors[1].float()
    square.copy_(_row_square_sums(dy))
    weighted = torch.mul(dy, gradient.float(), out=None if len(errors) == 1 else dy)
    score.copy_(_row_square_sums(weighted))


def _row_square_sums(values: Tensor) -> Tensor:
    return torch.linalg.vecdot(values, values)
