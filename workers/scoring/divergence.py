"""KL divergence of next-token distributions, from the change of their logits. On a GPU it is a Triton kernel."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

_COLUMNS: Final = 8192  # entries of the vocabulary held in float32 at once
_LARGEST_EXPONENT: Final = 80.0  # exp() of more overflows in float32


def divergence(log_probs_TV: Tensor, change_TV: Tensor, mean_T: Tensor | None = None) -> Tensor:
    """KL(base || changed) of each row, in nats.

    Two almost equal log-softmaxes would cancel. With x = change - E[change] under the base's probabilities, the
    divergence is log(1 + E[e^x - 1 - x]): no term is negative, and a shift of all logits drops out. With x = change - m
    for an m near the mean it is log(1 + E[x] + E[e^x - 1 - x]) - E[x], where E[x] is small beside the spread of x.

    Args:
        log_probs_TV: [rows, vocabulary] of the base, any float dtype; each row is normalized to sum to 1 in spite of
            rounding.
        change_TV: [rows, vocabulary], logits minus the base's logits, any float dtype.
        mean_T: [rows] float32, near E[change]: a GPU then reads all of it once; None: it finds E[change] first.

    Returns: [rows] float64, not negative; NaN or infinite where a change is; more than about 80 nats are cut to 80.
    """
    if change_TV.is_cuda:
        from workers.scoring import divergence_triton

        drift, excess = divergence_triton.moments(log_probs_TV, change_TV, mean_T, _LARGEST_EXPONENT).double()
        return (torch.log1p(drift + excess) - drift).clamp_(min=0.0)
    total, moved, excess = (torch.zeros(len(change_TV), dtype=torch.float64) for _ in range(3))
    for log_probs, change in _blocks(log_probs_TV, change_TV):
        probs = log_probs.exp()
        total += probs.sum(1, dtype=torch.float64)
        moved += probs.mul_(change).sum(1, dtype=torch.float64)
    mean = (moved / total).float()[:, None]
    for log_probs, change in _blocks(log_probs_TV, change_TV):
        excess += _excess(log_probs, change - mean).sum(1, dtype=torch.float64)
    return torch.log1p(excess / total)


def _excess(log_probs: Tensor, x: Tensor) -> Tensor:
    """The probability times e^x - 1 - x: by its series near 0, where the difference would cancel."""
    probs = log_probs.exp()
    series = x * x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    large = (log_probs + x).clamp(max=_LARGEST_EXPONENT).exp() - probs - probs * x
    return torch.where(x.abs() < 0.5, probs * series, large)


def _blocks(log_probs_TV: Tensor, change_TV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for log_probs, change in zip(log_probs_TV.split(_COLUMNS, 1), change_TV.split(_COLUMNS, 1), strict=True):
        yield log_probs.float(), change.float()
