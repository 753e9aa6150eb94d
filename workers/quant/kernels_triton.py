# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of workers.quant.kernels, and fake quantization.

Triton comes with PyTorch's CUDA builds; nothing imports this module without a GPU.
Each program walks its rows in one order, so results do not depend on what else the GPU does.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from workers.quant.kernels import COLUMNS, DRAWS

_DELTA_BLOCK = 4096  # elements a program
_QUANTIZE_BLOCK = 1024
_ROW_BLOCK = 512  # outputs read at once, of COLUMNS recipes
_PROJECT_BLOCK = 128  # the same for COLUMNS recipes and DRAWS draws: 64 sums a thread of four warps


@triton.jit
def _deltas_kernel(quantized, original, cast, difference, squares, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    q = tl.load(quantized + at, inside, 0.0)
    d = q - tl.load(original + at, inside, 0.0).to(tl.float32)
    tl.store(cast + at, q.to(cast.dtype.element_ty), inside)
    tl.store(difference + at, d.to(difference.dtype.element_ty), inside)
    tl.store(squares + tl.program_id(0), tl.sum(d * d, 0))


@triton.jit(do_not_specialize=["second_stride", "sum_stride"])
def _score_rows_kernel(
    first,
    second,
    gradient,
    ends,
    second_ends,
    score,
    square,
    n_out,
    second_stride,
    sum_stride,
    HAS_FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    with_second = (row < tl.load(second_ends + column))[:, None]
    scores = tl.zeros((COLUMNS, BLOCK), tl.float32)
    squares = tl.zeros((COLUMNS, BLOCK), tl.float32)
    start = row.to(tl.int64) * n_out
    second_start = column.to(tl.int64)[:, None] * second_stride + start
    for block in range(0, n_out, BLOCK):
        at = block + tl.arange(0, BLOCK)
        inside = at < n_out
        dy = tl.load(second + second_start + at[None, :], with_second & inside[None, :], 0.0).to(tl.float32)
        if HAS_FIRST:
            dy += tl.load(first + start + at, inside, 0.0).to(tl.float32)[None, :]
        weighted = dy * tl.load(gradient + start + at, inside, 0.0).to(tl.float32)[None, :]
        scores += weighted * weighted
        squares += dy * dy
    to = column * sum_stride + row
    inside_column = row < tl.load(ends + column)
    tl.store(score + to, tl.sum(scores, 1), inside_column)
    tl.store(square + to, tl.sum(squares, 1), inside_column)


@triton.jit(
    do_not_specialize=["n_draws", "second_stride", "gradient_stride", "column_stride", "draw_stride", "square_stride"]
)
def _project_rows_kernel(
    first,
    second,
    gradient,
    ends,
    second_ends,
    projection,
    square,
    n_out,
    n_draws,
    second_stride,
    gradient_stride,
    column_stride,
    draw_stride,
    square_stride,
    HAS_FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DRAWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    draw = tl.arange(0, DRAWS)
    start = row.to(tl.int64) * n_out
    # [columns, draws, outputs] of everything; dy has one draw, g one column.
    second_start = column.to(tl.int64)[:, None, None] * second_stride + start
    gradient_start = draw.to(tl.int64)[None, :, None] * gradient_stride + start
    with_second = (row < tl.load(second_ends + column))[:, None, None]
    is_draw = (draw < n_draws)[None, :, None]
    sums = tl.zeros((COLUMNS, DRAWS, BLOCK), tl.float32)
    squares = tl.zeros((COLUMNS, 1, BLOCK), tl.float32)
    for block in range(0, n_out, BLOCK):
        at = block + tl.arange(0, BLOCK)[None, None, :]
        inside = at < n_out
        dy = tl.load(second + second_start + at, with_second & inside, 0.0).to(tl.float32)
        if HAS_FIRST:
            dy += tl.load(first + start + at, inside, 0.0).to(tl.float32)
        g = tl.load(gradient + gradient_start + at, is_draw & inside, 0.0).to(tl.float32)
        sums += dy * g
        squares += dy * dy
    inside_column = row < tl.load(ends + column)
    to = column[:, None] * column_stride + draw[None, :] * draw_stride + row
    tl.store(projection + to, tl.sum(sums, 2), inside_column[:, None] & (draw < n_draws)[None, :])
    tl.store(square + column * square_stride + row, tl.sum(tl.sum(squares, 2), 1), inside_column)


@triton.jit
def _fake_quantize_kernel(
    values, amax, result, n, n_columns, largest, smallest, AMAX: tl.constexpr, IS_FP8: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if AMAX == 0:
        range_ = tl.load(amax + at * 0)
    elif AMAX == 1:
        range_ = tl.load(amax + at // n_columns, inside, 1.0)
    else:
        range_ = tl.load(amax + at % n_columns, inside, 1.0)
    range_ = range_.to(tl.float32)
    value = tl.load(values + at, inside, 0.0).to(tl.float32)
    if IS_FP8:
        scale = tl.div_rn(largest, tl.where(range_ <= 5.9604644775390625e-08, 1.0, range_))
        quantized = (value * scale).to(tl.float8e4nv).to(tl.float32) * tl.div_rn(1.0, scale)
    else:
        scale = tl.div_rn(largest, range_)
        steps = libdevice.rint(value * scale)
        steps = tl.where(steps > largest, largest, steps)
        steps = tl.where(steps < smallest, smallest, steps)
        quantized = tl.where(range_ < 5.9604644775390625e-08, 0.0, tl.div_rn(steps, scale))
    tl.store(result + at, quantized, inside)


def deltas(quantized: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See workers.quant.kernels.deltas."""
    quantized, original = quantized.contiguous(), original.contiguous()
    n = quantized.numel()
    cast, difference = torch.empty_like(original), torch.empty_like(original)
    n_programs = triton.cdiv(n, _DELTA_BLOCK)
    squares = torch.empty(n_programs, dtype=torch.float32, device=original.device)
    _deltas_kernel[(n_programs,)](quantized, original, cast, difference, squares, n, BLOCK=_DELTA_BLOCK, num_warps=8)
    return cast, difference, squares.sum(dtype=torch.float64)


def score_rows(
    first: Tensor | None,
    seconds: Tensor,
    gradient: Tensor,
    ends: Sequence[int],
    second_ends: Sequence[int],
    score: Tensor,
    square: Tensor,
) -> None:
    """See workers.quant.kernels.score_rows.

    One kernel serves any number of recipes, so that a row's sum is taken in the same order whatever is scored beside
    it.
    """
    if not seconds.numel():
        assert first is not None
        seconds = first[None]  # never read: all `second_ends` are 0
    _score_rows_kernel[(max(ends),)](
        seconds if first is None else first,
        seconds,
        gradient,
        _table(tuple(ends), gradient.device),
        _table(tuple(second_ends), gradient.device),
        score,
        square,
        gradient.shape[1],
        seconds.stride(0),
        score.stride(0),
        HAS_FIRST=first is not None,
        COLUMNS=COLUMNS,
        BLOCK=_ROW_BLOCK,
        num_warps=4,
    )


def project_rows(
    first: Tensor | None,
    seconds: Tensor,
    gradients: Tensor,
    ends: Sequence[int],
    second_ends: Sequence[int],
    projection: Tensor,
    square: Tensor,
) -> None:
    """See workers.quant.kernels.project_rows.

    One kernel serves any number of recipes and up to DRAWS draws, as in `score_rows`. Each of its sums takes every
    128th product of a row; those are then added up in halves of halves.
    """
    if not seconds.numel():
        assert first is not None
        seconds = first[None]  # never read: all `second_ends` are 0
    for start in range(0, len(gradients), DRAWS):
        some, into = gradients[start : start + DRAWS], projection[:, start : start + DRAWS]
        _project_rows_kernel[(max(ends),)](
            seconds if first is None else first,
            seconds,
            some,
            _table(tuple(ends), gradients.device),
            _table(tuple(second_ends), gradients.device),
            into,
            square,
            gradients.shape[2],
            len(some),
            seconds.stride(0),
            some.stride(0),
            into.stride(0),
            into.stride(1),
            square.stride(0),
            HAS_FIRST=first is not None,
            COLUMNS=COLUMNS,
            DRAWS=DRAWS,
            BLOCK=_PROJECT_BLOCK,
            num_warps=4,
        )


def fake_quantize(values: Tensor, amax: Tensor, num_bits: int | tuple[int, int], *, narrow_range: bool) -> Tensor:
    """Fake-quantize to integers or E4M3, in float32, with the bits of ModelOpt's CUDA kernels on float32 values.

    Args:
        values: [rows, columns], any float dtype, contiguous.
        amax: one range for all, or [rows, 1], or [1, columns].
        num_bits: bits of an integer, or (4, 3).
        narrow_range: leave out the least integer.

    Returns: [rows, columns] float32.

    Source: `fake_tensor_quant_*` and `fake_e4m3fy_*` of ModelOpt 0.47's CUDA extensions; tests/gpu compares bit for
        bit.
    """
    result = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    kind = 0 if amax.numel() == 1 else 1 if amax.shape[0] > 1 else 2
    largest = 448.0 if isinstance(num_bits, tuple) else float(2 ** (num_bits - 1) - 1)
    smallest = -largest if narrow_range else -largest - 1
    grid = (triton.cdiv(values.numel(), _QUANTIZE_BLOCK),)
    is_fp8 = isinstance(num_bits, tuple)
    _fake_quantize_kernel[grid](
        values,
        amax,
        result,
        values.numel(),
        values.shape[-1],
        largest,
        smallest,
        AMAX=kind,
        IS_FP8=is_fp8,
        BLOCK=_QUANTIZE_BLOCK,
        num_warps=4,
    )
    return result


@cache
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers on the GPU, cached: a copy for each launch would cost more than the kernel."""
    return torch.tensor([*values, *[0] * (COLUMNS - len(values))], dtype=torch.int32, device=device)
