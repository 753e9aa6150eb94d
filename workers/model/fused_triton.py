# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernels of workers.model.fused.

Triton comes with PyTorch's CUDA builds; nothing imports this module without a GPU.
A row's sums have one order, whatever rows are beside it; attention's begins where the first sample of its block does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PRODUCT_BLOCK = 2048  # elements a program
_UNSEEN = tl.constexpr(-1e30)  # finite: a row may see nothing in a whole block, and its difference must not be NaN


@triton.jit
def _add_norm_kernel(x, added, weight, total, normed, n, eps, HAS_ADDED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < n
    row = tl.program_id(0).to(tl.int64) * n
    value = tl.load(x + row + at, inside, 0.0).to(tl.float32)
    if HAS_ADDED:
        summed = (value + tl.load(added + row + at, inside, 0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row + at, summed, inside)
        value = summed.to(tl.float32)
    scaled = value * tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    scaled = scaled.to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + row + at, scaled * tl.load(weight + at, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _turned(
    x,
    to,
    weight,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One row's heads, from `x` to `to`; blocks are powers of two, of at least HEADS and HALF."""
    dtype = to.dtype.element_ty
    head = tl.arange(0, HEADS_BLOCK)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    inside_half = d < HALF
    inside = (head < HEADS) & inside_half
    at = head * (2 * HALF) + d
    first = tl.load(x + at, inside, 0.0).to(tl.float32)
    second = tl.load(x + at + HALF, inside, 0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first = (first * scale).to(dtype).to(tl.float32) * tl.load(weight + d, inside_half, 0.0).to(tl.float32)
        second = (second * scale).to(dtype).to(tl.float32) * tl.load(weight + d + HALF, inside_half, 0.0).to(tl.float32)
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
    cos_first = tl.load(cos + d, inside_half, 0.0).to(tl.float32)
    cos_second = tl.load(cos + d + HALF, inside_half, 0.0).to(tl.float32)
    sin_first = tl.load(sin + d, inside_half, 0.0).to(tl.float32)
    sin_second = tl.load(sin + d + HALF, inside_half, 0.0).to(tl.float32)
    turned = (first * cos_first).to(dtype).to(tl.float32) - (second * sin_first).to(dtype).to(tl.float32)
    tl.store(to + at, turned, inside)
    turned = (second * cos_second).to(dtype).to(tl.float32) + (first * sin_second).to(dtype).to(tl.float32)
    tl.store(to + at + HALF, turned, inside)


@triton.jit
def _rotated_kernel(
    q,
    k,
    q_to,
    k_to,
    q_weight,
    k_weight,
    cos,
    sin,
    eps,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    q_row, k_row = row * (HEADS * 2 * HALF), row * (KEY_HEADS * 2 * HALF)
    cos += row * (2 * HALF)
    sin += row * (2 * HALF)
    _turned(q + q_row, q_to + q_row, q_weight, cos, sin, eps, HEADS, HEADS_BLOCK, HALF, BLOCK, HAS_NORM)
    _turned(k + k_row, k_to + k_row, k_weight, cos, sin, eps, KEY_HEADS, KEY_HEADS_BLOCK, HALF, BLOCK, HAS_NORM)


@triton.jit(do_not_specialize=["n_rows"])
def _attention_kernel(
    q,
    k,
    v,
    starts,
    result,
    n_rows,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    key_head = head // (HEADS // KEY_HEADS)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    is_row = (row < n_rows)[:, None] & (d < HEAD_DIM)[None, :]
    row_at = row.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + d[None, :]
    query = tl.load(q + row_at, is_row, 0.0)
    start = tl.load(starts + row, row < n_rows, n_rows)
    largest = tl.full((BLOCK,), _UNSEEN, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    attended = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    # Starts ascend, so the block's first row sees the first key that any of its rows sees.
    for first in range(tl.load(starts + tl.program_id(0) * BLOCK), tl.program_id(0) * BLOCK + BLOCK, BLOCK):
        key = first + tl.arange(0, BLOCK)
        is_key = (key < n_rows)[:, None] & (d < HEAD_DIM)[None, :]
        key_at = key.to(tl.int64)[:, None] * (KEY_HEADS * HEAD_DIM) + key_head * HEAD_DIM + d[None, :]
        # ieee: float32 in full; other dtypes are multiplied exactly either way.
        products = tl.dot(query, tl.trans(tl.load(k + key_at, is_key, 0.0)), input_precision="ieee") * scale
        is_seen = (key[None, :] <= row[:, None]) & (key[None, :] >= start[:, None])
        products = tl.where(is_seen, products, _UNSEEN)
        next_largest = tl.maximum(largest, tl.max(products, 1))
        weights = tl.exp2(products - next_largest[:, None])
        kept = tl.exp2(largest - next_largest)
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(v + key_at, is_key, 0.0)
        attended = attended * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        largest = next_largest
    tl.store(result + row_at, attended / total[:, None], is_row)


@triton.jit
def _silu_product_kernel(gate, up, result, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(gate + at, inside, 0.0).to(tl.float32)
    silu = (x / (1.0 + tl.exp(-x))).to(result.dtype.element_ty).to(tl.float32)
    tl.store(result + at, silu * tl.load(up + at, inside, 0.0).to(tl.float32), inside)


def add_norm(x_TH: Tensor, added_TH: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See workers.model.fused.add_norm."""
    x_TH = x_TH.contiguous()
    added_TH = None if added_TH is None else added_TH.contiguous()
    total_TH = x_TH if added_TH is None else torch.empty_like(x_TH)
    normed_TH = torch.empty_like(x_TH)
    n_rows, n = x_TH.shape
    block = triton.next_power_of_2(n)
    _add_norm_kernel[(n_rows,)](
        x_TH,
        x_TH if added_TH is None else added_TH,
        weight,
        total_TH,
        normed_TH,
        n,
        eps,
        HAS_ADDED=added_TH is not None,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return total_TH, normed_TH


def rotated(
    q_TN: Tensor, k_TN: Tensor, norms: tuple[Tensor, Tensor, float] | None, cos_TD: Tensor, sin_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """See workers.model.fused.rotated. Args: norms: weights of the queries' norm and the keys', and their epsilon."""
    q_TN, k_TN, cos_TD, sin_TD = (each.contiguous() for each in (q_TN, k_TN, cos_TD, sin_TD))
    q_weight, k_weight, eps = norms or (cos_TD, cos_TD, 0.0)  # never read
    (n_rows, head_dim), q, k = cos_TD.shape, torch.empty_like(q_TN), torch.empty_like(k_TN)
    heads, key_heads = (each.shape[1] // head_dim for each in (q_TN, k_TN))
    _rotated_kernel[(n_rows,)](
        q_TN,
        k_TN,
        q,
        k,
        q_weight,
        k_weight,
        cos_TD,
        sin_TD,
        eps,
        HEADS=heads,
        HEADS_BLOCK=triton.next_power_of_2(heads),
        KEY_HEADS=key_heads,
        KEY_HEADS_BLOCK=triton.next_power_of_2(key_heads),
        HALF=head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=norms is not None,
        num_warps=4,
    )
    return q, k


def attention(q_TN: Tensor, k_TN: Tensor, v_TN: Tensor, starts_T: Tensor, head_dim: int, scale: float) -> Tensor:
    """See workers.model.fused.attention."""
    q_TN, k_TN, v_TN = (each.contiguous() for each in (q_TN, k_TN, v_TN))
    n_rows, n_heads, result = len(starts_T), q_TN.shape[1] // head_dim, torch.empty_like(q_TN)
    # Blocks of queries, keys and values, the latter two of two steps at once, in the 99 KB of the smallest GPUs.
    block = 64 if head_dim * q_TN.element_size() <= 256 else 32
    _attention_kernel[(triton.cdiv(n_rows, block), n_heads)](
        q_TN,
        k_TN,
        v_TN,
        starts_T,
        result,
        n_rows,
        scale * 1.4426950408889634,  # log2(e): exp2 is the hardware's
        HEADS=n_heads,
        KEY_HEADS=k_TN.shape[1] // head_dim,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK=block,
        num_warps=4,
        num_stages=2,
    )
    return result


def silu_product(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """See workers.model.fused.silu_product."""
    gate_TI, up_TI = gate_TI.contiguous(), up_TI.contiguous()
    result, n = torch.empty_like(gate_TI), gate_TI.numel()
    _silu_product_kernel[(triton.cdiv(n, _PRODUCT_BLOCK),)](
        gate_TI, up_TI, result, n, BLOCK=_PRODUCT_BLOCK, num_warps=8
    )
    return result
