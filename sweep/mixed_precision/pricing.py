"""Lagrange's relaxation of a multiple-choice knapsack: the price at which each group's own best choice fits."""

from typing import Final

import numpy as np

from sweep.report.analysis import FloatArray, IntArray

_DOUBLINGS: Final = 200  # of a price until the choices fit: then they are the cheapest
_HALVINGS: Final = 80  # until it is exact


def total(values: FloatArray, choice: IntArray) -> float:
    """Sum of each group's value under its choice. Args: values: [groups, options]; choice: [groups]."""
    return float(values[np.arange(len(choice)), choice].sum())


def priced(kl: FloatArray, share: FloatArray) -> tuple[float, IntArray]:
    """The least price of the whole budget at which the best choice of each group alone fits.

    Args:
        kl: [groups, options], nats per prediction; 0 or more.
        share: [groups, options], cost as a share of the budget; the cheapest options fit.

    Returns: the price, in nats per prediction, and the choices at that price.
    """

    def choice_at(price: float) -> IntArray:
        return np.argmin(kl + price * share, axis=1)

    cheapest = np.lexsort((kl, np.where(np.isfinite(kl), share, np.inf)), axis=1)[:, 0]
    low, high, chosen = 0.0, total(kl, cheapest), cheapest
    for _ in range(_DOUBLINGS):
        if total(share, choice := choice_at(high)) <= 1:
            chosen = choice
            break
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        if total(share, choice := choice_at(price)) <= 1:
            high, chosen = price, choice
        else:
            low = price
    return high, chosen
