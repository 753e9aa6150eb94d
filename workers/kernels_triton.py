# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of workers.kernels. Triton comes with PyTorch's CUDA builds; nothing imports this module without a GPU.

Each program walks its rows in one order, so results do not depend on what else the GPU does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_DELTA_BLOCK = 4096  # elements a program
_ROW_BLOCK = 2048  # outputs read at once; 2.9 TB/s on an H100 with 8 warps


@triton.jit
def _deltas_kernel(quantized, original, cast, difference, squares, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    q = tl.load(quantized + at, inside, 0.0)
    d = q - tl.load(original + at, inside, 0.0).to(tl.float32)
    tl.store(cast + at, q.to(cast.dtype.element_ty), inside)
    tl.store(difference + at, d.to(difference.dtype.element_ty), inside)
    tl.store(squares + tl.program_id(0), tl.sum(d * d, 0))


@triton.jit
def _score_rows_kernel(first, second, gradient, score, square, n_out, HAS_SECOND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n_out
    scores = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_out, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < n_out
        dy = tl.load(first + row + at, inside, 0.0).to(tl.float32)
        if HAS_SECOND:
            dy += tl.load(second + row + at, inside, 0.0).to(tl.float32)
        weighted = dy * tl.load(gradient + row + at, inside, 0.0).to(tl.float32)
        scores += weighted * weighted
        squares += dy * dy
    tl.store(score + tl.program_id(0), tl.sum(scores, 0))
    tl.store(square + tl.program_id(0), tl.sum(squares, 0))


def deltas(quantized: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See workers.kernels.deltas."""
    quantized, original = quantized.contiguous(), original.contiguous()
    n = quantized.numel()
    cast, difference = torch.empty_like(original), torch.empty_like(original)
    n_programs = triton.cdiv(n, _DELTA_BLOCK)
    squares = torch.empty(n_programs, dtype=torch.float32, device=original.device)
    _deltas_kernel[(n_programs,)](quantized, original, cast, difference, squares, n, BLOCK=_DELTA_BLOCK, num_warps=8)
    return cast, difference, squares.double().sum()


def score_rows(errors: tuple[Tensor, ...], gradient: Tensor, score: Tensor, square: Tensor) -> None:
    """See workers.kernels.score_rows."""
    n_rows, n_out = gradient.shape
    grid = (n_rows,)
    block = min(_ROW_BLOCK, triton.next_power_of_2(n_out))
    _score_rows_kernel[grid](errors[0], errors[-1], gradient, score, square, n_out, HAS_SECOND=len(errors) == 2, BLOCK=block, num_warps=8)
