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
def _excess_kernel(log_probs, change, excess, vocabulary, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * vocabulary
    totals = tl.zeros((BLOCK,), tl.float32)
    moved = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        p = tl.exp(tl.load(log_probs + row + at, inside, float("-inf")).to(tl.float32))
        totals += p
        moved += p * tl.load(change + row + at, inside, 0.0).to(tl.float32)
    total = tl.sum(totals, 0)
    mean = tl.sum(moved, 0) / total
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        log_p = tl.load(log_probs + row + at, inside, float("-inf")).to(tl.float32)
        x = tl.load(change + row + at, inside, 0.0).to(tl.float32) - mean
        p = tl.exp(log_p)
        series = p * x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
        exponent = log_p + x
        large = tl.exp(tl.where(exponent > LARGEST, LARGEST, exponent)) - p - p * x
        terms += tl.where(inside, tl.where(tl.abs(x) < 0.5, series, large), 0.0)
    tl.store(excess + tl.program_id(0), tl.sum(terms, 0) / total)


def excess(log_probs_TV: Tensor, change_TV: Tensor, largest: float) -> Tensor:
    """E[e^x - 1 - x] of each row, [rows] float32; see workers.scoring.divergence."""
    log_probs_TV, change_TV = log_probs_TV.contiguous(), change_TV.contiguous()
    n_rows, vocabulary = change_TV.shape
    result = torch.empty(n_rows, dtype=torch.float32, device=change_TV.device)
    if n_rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        _excess_kernel[(n_rows,)](
            log_probs_TV, change_TV, result, vocabulary, LARGEST=largest, BLOCK=block, num_warps=8
        )
    return result
