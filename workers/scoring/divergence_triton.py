# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Triton kernel of workers.scoring.divergence.

Triton comes with PyTorch's CUDA builds; nothing imports this module without a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # entries of the vocabulary read at once


@triton.jit
def _moments_kernel(
    log_probs, change, means, moments, vocabulary, LARGEST: tl.constexpr, HAS_MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * vocabulary
    if HAS_MEAN:
        mean = tl.load(means + tl.program_id(0))
    else:
        sums = tl.zeros((BLOCK,), tl.float32)
        moved = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < vocabulary
            p = tl.exp(tl.load(log_probs + row + at, inside, float("-inf")).to(tl.float32))
            sums += p
            moved += p * tl.load(change + row + at, inside, 0.0).to(tl.float32)
        mean = tl.sum(moved, 0) / tl.sum(sums, 0)
    totals = tl.zeros((BLOCK,), tl.float32)
    drift = tl.zeros((BLOCK,), tl.float32)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        log_p = tl.load(log_probs + row + at, inside, float("-inf")).to(tl.float32)
        x = tl.load(change + row + at, inside, 0.0).to(tl.float32) - mean
        p = tl.exp(log_p)
        totals += p
        drift += p * x
        series = p * x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
        exponent = log_p + x
        large = tl.exp(tl.where(exponent > LARGEST, LARGEST, exponent)) - p - p * x
        terms += tl.where(inside, tl.where(tl.abs(x) < 0.5, series, large), 0.0)
    total = tl.sum(totals, 0)
    tl.store(moments + tl.program_id(0), tl.sum(drift, 0) / total)
    tl.store(moments + tl.num_programs(0) + tl.program_id(0), tl.sum(terms, 0) / total)


def moments(log_probs_TV: Tensor, change_TV: Tensor, mean_T: Tensor | None, largest: float) -> Tensor:
    """E[x] and E[e^x - 1 - x] of each row, [2, rows] float32; see workers.scoring.divergence."""
    log_probs_TV, change_TV = log_probs_TV.contiguous(), change_TV.contiguous()
    n_rows, vocabulary = change_TV.shape
    result = torch.empty(2, n_rows, dtype=torch.float32, device=change_TV.device)
    if n_rows:
        _moments_kernel[(n_rows,)](
            log_probs_TV,
            change_TV,
            result if mean_T is None else mean_T,
            result,
            vocabulary,
            LARGEST=largest,
            HAS_MEAN=mean_T is not None,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=8,
        )
    return result
