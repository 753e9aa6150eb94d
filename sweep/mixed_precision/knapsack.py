"""The best mix of formats under a budget: a multiple-choice knapsack, solved to the optimum by HiGHS.

Takes arrays of predicted KL and size, and returns the chosen option of each layer group. Where interactions of the
groups are known the optimum of the sum is where sweep.mixed_precision.interactions begins.
"""

import logging
import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, vstack

from sweep.mixed_precision.interactions import Form, Interactions, improved, least_value
from sweep.mixed_precision.pricing import priced, total
from sweep.report.analysis import FloatArray, IntArray

_GAP: Final = 1e-9  # relative: predicted KLs are not known to more digits
_ROUNDING: Final = 1e-12  # relative: so much over the budget is the rounding of the budget itself
_SCALE: Final = 1e6  # of the budget inside HiGHS
_SECONDS: Final = 20.0  # then the best choice so far counts, and its gap is said; real scores take less than one
_TIME_IS_UP: Final = 1  # status of scipy's milp

_log = logging.getLogger(__name__)
_Float = TypeVar("_Float", np.float32, np.float64)


class Infeasible(ValueError):
    """No choice fits the budget; the least that does is `least_cost`."""

    def __init__(self, least_cost: float) -> None:
        super().__init__(f"the least cost of all choices is {least_cost}")
        self.least_cost = least_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Predicted KL and cost of each option (a format, or 16 bits) of each layer group."""

    predicted_kl: FloatArray  # [groups, options], nats per prediction; infinite: not allowed
    cost: FloatArray  # [groups, options], bits of the group's weights
    together: IntArray  # [groups]: groups of equal numbers get the same option
    interactions: Interactions | None = None  # of the same groups and options; None: KL adds up

    def __post_init__(self) -> None:
        if not (self.predicted_kl.shape == self.cost.shape and self.together.shape == self.predicted_kl.shape[:1]):
            shapes = f"predicted_kl {self.predicted_kl.shape}, cost {self.cost.shape}, together {self.together.shape}"
            raise ValueError(f"shapes differ: {shapes}")
        if np.isnan(self.predicted_kl).any() or (self.predicted_kl < 0).any() or not np.isfinite(self.cost).all():
            raise ValueError("predicted_kl must be 0 or more, and cost finite")

    def kl(self, choice: IntArray) -> float:
        """Predicted KL of a mix, nats per prediction. Args: choice: [groups], an option each."""
        alone = total(self.predicted_kl, choice)
        return alone if self.interactions is None or not np.isfinite(alone) else self.interactions.kl(choice)


def solve(problem: Problem, budget: float) -> IntArray:
    """The choice of least predicted KL that costs no more than the budget; of equal ones any.

    Of a sum it is the optimum; with interactions the best that exchanges find from there.

    Args:
        problem: predicted KL and cost of every option.
        budget: bits of all groups together.

    Returns: [groups], the option of each.
    Raises: Infeasible: not even the cheapest choices fit.
    """
    joint, of_group = _apart(problem)
    choice = _solve_apart(joint, budget)
    if problem.interactions is not None:
        choice = improved(_form(joint, of_group, problem.interactions, budget), choice)
    return choice[of_group]


def gap(problem: Problem, budget: float, choice: IntArray) -> float:
    """By how much of its predicted KL a choice may be above the least at most, 0 to 1; 0 where KL adds up.

    Args:
        problem: with the choice's options.
        budget: that it was found under.
        choice: [groups].
    """
    joint, of_group = _apart(problem)
    if problem.interactions is None:
        return 0.0
    of_block = np.zeros(len(joint.together), dtype=np.int64)
    of_block[of_group] = choice
    form = _form(joint, of_group, problem.interactions, budget)
    value = form.value(of_block)
    return max(0.0, 1 - least_value(form, of_block) / value) if value > 0 else 0.0


def _apart(problem: Problem) -> tuple[Problem, IntArray]:
    """The problem of blocks of groups that get the same option, as a sum, and the block of each group."""
    blocks, of_group = np.unique(problem.together, return_inverse=True)
    joint = Problem(
        predicted_kl=_summed(problem.predicted_kl, of_group, len(blocks)),
        cost=_summed(problem.cost, of_group, len(blocks)),
        together=np.arange(len(blocks)),
    )
    return joint, of_group


def _form(joint: Problem, of_group: IntArray, interactions: Interactions, budget: float) -> Form:
    """The form of the blocks of `_apart`, from the interactions of the groups."""
    counted, n_blocks = interactions.counted, len(joint.together)
    if n_blocks < len(of_group):
        counted = _summed(counted, of_group, n_blocks)
    return Form.of(joint.predicted_kl, joint.cost, counted, interactions.weight, budget * (1 + _ROUNDING))


def front(problem: Problem, n_budgets: int) -> Iterator[tuple[float, IntArray]]:
    """The outline of the Pareto front: optimal choices at evenly spaced budgets.

    The budgets run from the least cost to the cost of the least predicted KL.

    Yields: budget and choices, each better than the one before.
    """
    low, high = cost_range(problem)
    last: IntArray | None = None
    for budget in np.linspace(low, high, n_budgets):
        choice = solve(problem, float(budget))
        if last is None or problem.kl(choice) < problem.kl(last):
            yield float(budget), choice
            last = choice


def cost_range(problem: Problem) -> tuple[float, float]:
    """The least cost of any choice, and the least cost of a choice of least predicted KL."""
    blocks, of_group = np.unique(problem.together, return_inverse=True)
    kl, cost = (_summed(each, of_group, len(blocks)) for each in (problem.predicted_kl, problem.cost))
    if not np.isfinite(kl).any(axis=1).all():
        raise Infeasible(float("inf"))
    low = np.where(np.isfinite(kl), cost, np.inf).min(axis=1).sum()
    best = kl.min(axis=1, keepdims=True)
    high = np.where(kl <= best, cost, np.inf).min(axis=1).sum()
    return float(low), float(high)


def useful_options(kl: FloatArray, cost: FloatArray) -> IntArray:
    """Options of one group that no other beats in both; cheapest first. Args: kl: [options]; cost: [options]."""
    kept: list[int] = []
    for option in np.lexsort((kl, cost)):
        if np.isfinite(kl[option]) and (not kept or kl[option] < kl[kept[-1]]):
            kept.append(int(option))
    return np.array(kept, dtype=np.int64)


def _summed(values: npt.NDArray[_Float], of_group: npt.NDArray[np.intp], n_blocks: int) -> npt.NDArray[_Float]:
    """Sums over the groups of each block. Args: values: [groups, ...]. Returns: [blocks, ...]."""
    result = np.zeros((n_blocks, *values.shape[1:]), dtype=values.dtype)
    np.add.at(result, of_group, values)
    return result


def _solve_apart(problem: Problem, budget: float) -> IntArray:
    low, high = cost_range(problem)
    room = budget * (1 + _ROUNDING)
    if low > room:
        raise Infeasible(low)
    if high <= room:
        return np.lexsort((problem.cost, problem.predicted_kl), axis=1)[:, 0]
    price, choice = priced(problem.predicted_kl, problem.cost / room)
    choice = _filled(problem, choice, room)
    options = [useful_options(kl, cost) for kl, cost in zip(problem.predicted_kl, problem.cost, strict=True)]
    groups = np.repeat(np.arange(len(options)), [len(some) for some in options])
    flat = np.concatenate(options)
    kl, cost = problem.predicted_kl[groups, flat], problem.cost[groups, flat]
    # An option that raises the bound above what is already reached is in no better choice: few are left.
    with_price = kl + price * cost / room
    bound, reached = float(_least(with_price, groups).sum()) - price, total(problem.predicted_kl, choice)
    left = (with_price - _least(with_price, groups)[groups] <= reached - bound + _GAP * reached) | (
        flat == choice[groups]
    )
    better = _exact(kl[left], cost[left], groups[left], room, reached)
    candidate = choice.copy()
    candidate[groups[left][better]] = flat[left][better]
    return candidate if total(problem.predicted_kl, candidate) < reached else choice


def _filled(problem: Problem, choice: IntArray, room: float) -> IntArray:
    """Improve a choice that fits the budget by exchanging one group's option at a time.

    Each exchange is the one, of all that fit, that lowers the predicted KL most; it ends when none does.
    """
    choice, groups = choice.copy(), np.arange(len(choice))
    while True:
        saved = problem.predicted_kl[groups, choice][:, None] - problem.predicted_kl
        more = problem.cost - problem.cost[groups, choice][:, None]
        saved[more > room - total(problem.cost, choice)] = 0.0
        group, option = np.unravel_index(np.argmax(saved), saved.shape)
        before, choice[group] = choice[group], option
        if saved[group, option] <= 0 or total(problem.cost, choice) > room:  # the latter by rounding
            choice[group] = before
            return choice


def _exact(kl: FloatArray, cost: FloatArray, groups: IntArray, room: float, reached: float) -> npt.NDArray[np.bool_]:
    """Solve for the options that are left, with HiGHS.

    Args:
        kl: [options], predicted KL.
        cost: [options], bits.
        groups: [options], the index of the option's layer group.
        room: bits that the chosen options may cost together.
        reached: predicted KL of a choice that fits, above 0.

    Returns: [options], whether each is chosen; none, if HiGHS finds nothing.
    """
    rows = _one_each(groups)
    n_groups = int(groups.max()) + 1
    # HiGHS' tolerances are absolute, 1e-6: scaled so that they are less than predicted KLs and budgets are known to.
    budget = csr_array(cost[None] * (_SCALE / room))
    objective = kl * (1e3 / reached)
    least, most = np.append(np.ones(n_groups), -np.inf), np.append(np.ones(n_groups), _SCALE)
    constraints = vstack([rows, budget], format="csr")
    end = time.monotonic() + _SECONDS
    while True:
        with _hushed():
            found = milp(
                objective,
                integrality=np.ones(len(kl)),
                bounds=Bounds(0, 1),
                constraints=LinearConstraint(constraints, least, most),  # pyright: ignore[reportArgumentType]
                options={"mip_rel_gap": _GAP, "time_limit": max(0.0, end - time.monotonic())},
            )
        if found.status == _TIME_IS_UP:
            _log.warning(
                "No proof of the best choice after %g s: it may be better than the one given by up to %.2g %%.",
                _SECONDS,
                _left_open(found),
            )
        if found.x is None:
            return np.zeros(len(kl), dtype=np.bool_)
        chosen = found.x > 0.5
        if cost[chosen].sum() <= room:
            return chosen
        # Within HiGHS' tolerance, but not within the budget: so is nothing that costs as much or more in every group.
        spent = np.zeros(n_groups)
        spent[groups[chosen]] = cost[chosen]
        constraints = vstack([constraints, csr_array((cost >= spent[groups]).astype(np.float64)[None])], format="csr")
        least, most = np.append(least, -np.inf), np.append(most, n_groups - 1.0)


@contextmanager
def _hushed() -> Generator[None]:
    """Silence standard output: HiGHS 1.12 prints a line now and then, past Python's streams and its own switch."""
    sys.stdout.flush()
    kept, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def _left_open(found: OptimizeResult) -> float:
    """By how much a better choice may be better, in per cent."""
    return 100.0 if found.x is None or not found.fun else 100 * (1 - (found.mip_dual_bound or 0.0) / found.fun)


def _one_each(groups: IntArray) -> csr_array:
    return csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))


def _least(values: FloatArray, groups: IntArray) -> FloatArray:
    """The least value of each group."""
    least = np.full(int(groups.max()) + 1, np.inf)
    np.minimum.at(least, groups, values)
    return least
