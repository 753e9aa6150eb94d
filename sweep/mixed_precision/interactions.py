"""The best mix where the errors of layer groups interact: predicted KL is a quadratic form in the choice.

A choice is made by that form with its interactions shrunk, as sweep.report.interactions says. Its linear part, the sum
of the groups' own KL, has an optimum that is found exactly (sweep.mixed_precision.knapsack). From there on options are
exchanged, one group's or two groups' at a time, as long as the form falls. How far from the least it may be at most is
known from its convex relaxation, by Frank and Wolfe's method.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from sweep.mixed_precision.pricing import priced, total
from sweep.report.analysis import FloatArray, IntArray
from sweep.report.interactions import Float32Array, joint_samples

_PAIRED: Final = 100  # exchanges on either side of a pair, by each of two orders
_LEAST_GAIN: Final = 1e-6  # of the predicted KL: less is no reason to exchange
_STEPS: Final = 60  # of the relaxation
_CLOSE: Final = 1e-3  # relative gap at which they end


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactions:
    """Projections of each layer group under each option, and how much their products count in a choice."""

    projections: Float32Array  # [groups, options, samples, draws], root nats; 0 where an option is 16 bits or not known
    counted: Float32Array  # the same, as they count in a choice: see sweep.report.interactions.counted_projections
    weight: float  # 0 to 1: see sweep.report.interactions.interaction_weight
    n_predictions: FloatArray  # [samples]

    def kl(self, choice: IntArray) -> float:
        """Predicted KL of a mix, nats per prediction. Args: choice: [groups], an option each."""
        chosen = [*self.projections[np.arange(len(choice)), choice]]
        return float(joint_samples(chosen, self.n_predictions).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The quadratic form ``(1 - weight) * sum of kl + weight * |sum of projections|^2`` under a budget."""

    kl: FloatArray  # [groups, options], of each alone; infinite: not allowed
    share: FloatArray  # [groups, options], cost as a share of the budget
    terms: Float32Array  # [groups, options, samples * draws]
    weight: float

    @classmethod
    def of(cls, kl: FloatArray, cost: FloatArray, counted: Float32Array, weight: float, room: float) -> "Form":
        """The form of some groups, or of blocks of them, whose rows are sums of their groups'.

        Args:
            kl: [groups, options].
            cost: [groups, options], bits.
            counted: [groups, options, samples, draws], see Interactions, as `weight`.
            weight: of the interactions.
            room: bits that the chosen options may cost together.
        """
        return cls(kl=kl, share=cost / room, terms=counted.reshape(*kl.shape, -1), weight=weight)

    def chosen(self, choice: IntArray) -> Float32Array:
        """Terms of each group's choice, [groups, terms]."""
        return self.terms[np.arange(len(choice)), choice]

    def value(self, choice: IntArray) -> float:
        """Of a choice, nats per prediction."""
        together = self.chosen(choice).sum(0, dtype=np.float64)
        return (1 - self.weight) * total(self.kl, choice) + self.weight * float(together @ together)

    def dots(self, together: FloatArray) -> FloatArray:
        """Products of every option's terms with a sum of terms, [groups, options]."""
        return (self.terms @ together.astype(np.float32)).astype(np.float64)


def improved(form: Form, choice: IntArray) -> IntArray:
    """Exchange options, one group's or two groups' at a time, until no exchange that fits lowers the form.

    Args:
        form: of the options and the budget.
        choice: [groups], that fits.
    """
    groups, choice = np.arange(len(choice)), choice.copy()
    products = np.matmul(form.terms, form.terms.transpose(0, 2, 1)).astype(np.float64)  # of a group's own options
    squares, allowed = products.diagonal(axis1=1, axis2=2), np.isfinite(form.kl)
    kl = np.where(allowed, form.kl, 0.0)
    while True:
        terms = form.chosen(choice)
        dots = form.dots(terms.sum(0, dtype=np.float64))
        moved = 2 * (dots - dots[groups, choice][:, None]) - 2 * products[groups, :, choice]
        moved += squares + squares[groups, choice][:, None]  # |V - old + new|^2 - |V|^2
        gain = (1 - form.weight) * (kl - kl[groups, choice][:, None]) + form.weight * moved
        gain[~allowed] = np.inf
        more = form.share - form.share[groups, choice][:, None]
        left, value = 1 - total(form.share, choice), form.value(choice)
        fits = np.where(more <= left, gain, np.inf)
        best = np.unravel_index(int(np.argmin(fits)), fits.shape)
        pair, by_pair = _best_pair(form, choice, gain, more, left)
        other = choice.copy()
        for group, option in pair if by_pair < fits[best] else [(int(best[0]), int(best[1]))]:
            other[group] = option
        # Gains are of float32 products; where errors cancel, only the value itself tells a gain from their rounding.
        if form.value(other) >= (1 - _LEAST_GAIN) * value:
            return choice
        choice = other


def _best_pair(
    form: Form, choice: IntArray, gain: FloatArray, more: FloatArray, left: float
) -> tuple[list[tuple[int, int]], float]:
    """The exchange of two groups' options that lowers the form most: one that is good by itself, one that is cheaper.

    Args:
        form: of the options.
        choice: before it.
        gain: [groups, options], change of the form by each exchange alone.
        more: [groups, options], what it costs more.
        left: of the budget.

    Returns: group and option of both, and the change of the form; none, and infinity: there is no such pair.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        per_share = np.where(more < 0, gain / -more, np.inf)
    better = _leading(gain)
    cheaper = np.union1d(_leading(np.where(more < 0, gain, np.inf)), _leading(per_share))
    if not len(better) or not len(cheaper):
        return [], np.inf
    n_options = gain.shape[1]
    changes: list[Float32Array] = []
    for flat in (better, cheaper):
        owners = flat // n_options
        changes.append(form.terms[owners, flat % n_options] - form.terms[owners, choice[owners]])
    cross = (changes[0] @ changes[1].T).astype(np.float64)
    both = gain.flat[better][:, None] + gain.flat[cheaper][None] + 2 * form.weight * cross
    cost = more.flat[better][:, None] + more.flat[cheaper][None]
    both[(cost > left) | (better[:, None] // n_options == cheaper[None] // n_options)] = np.inf
    first, second = np.unravel_index(int(np.argmin(both)), both.shape)
    found = [divmod(int(flat), n_options) for flat in (better[first], cheaper[second])]
    return found, float(both[first, second])


def _leading(values: FloatArray) -> IntArray:
    """Flat places of the `_PAIRED` smallest values, those that are infinite left out."""
    order = np.argsort(values, axis=None, kind="stable")[:_PAIRED]
    return order[np.isfinite(values.flat[order])]


def least_value(form: Form, choice: IntArray) -> float:
    """A value that no choice within the budget is below: by the form's relaxation to shares of options.

    Args:
        form: convex, as a sum of squares is.
        choice: [groups], that fits; where the relaxation begins.
    """
    groups = np.arange(len(choice))
    allowed = np.isfinite(form.kl)
    kl, shares = np.where(allowed, form.kl, 0.0), np.zeros(form.kl.shape)
    shares[groups, choice] = 1.0
    together, least = form.chosen(choice).sum(0, dtype=np.float64), -np.inf
    for _ in range(_STEPS):
        slope = np.where(allowed, (1 - form.weight) * kl + 2 * form.weight * form.dots(together), np.inf)
        floor = slope.min(axis=1, keepdims=True)
        price, corner = priced(slope - floor, form.share)
        linear = float((slope + price * form.share).min(axis=1).sum()) - price  # no choice's sum of slopes is below
        here = float((shares * np.where(allowed, slope, 0.0)).sum())
        value = (1 - form.weight) * float((shares * kl).sum()) + form.weight * float(together @ together)
        least = max(least, value + linear - here)
        if value - least <= _CLOSE * value:
            break
        towards = form.chosen(corner).sum(0, dtype=np.float64) - together
        fall, bend = here - total(slope, corner), 2 * form.weight * float(towards @ towards)
        step = min(1.0, fall / bend) if bend > 0 else 1.0
        shares *= 1 - step
        shares[groups, corner] += step
        together = together + step * towards
    return max(0.0, least)
