"""The best mix of formats under a budget: a multiple-choice knapsack, solved to the optimum by HiGHS. Arrays in, choices out."""

import os
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array, vstack

from sweep.analysis import FloatArray, IntArray

_GAP: Final = 1e-9  # relative: damages are not known to more digits
_SECONDS: Final = 20.0  # then the best choice found so far counts; never seen to be needed


class Infeasible(ValueError):
    """No choice fits the budget; the least that does is `least_cost`."""

    def __init__(self, least_cost: float) -> None:
        super().__init__(f"the least cost of all choices is {least_cost}")
        self.least_cost = least_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What each option of each layer group damages and costs."""

    damage: FloatArray  # [groups, options], nats per prediction; infinite: not allowed
    cost: FloatArray  # [groups, options], bits of the group's weights
    together: IntArray  # [groups]: groups of equal numbers get the same option

    def __post_init__(self) -> None:
        if not (self.damage.shape == self.cost.shape and self.together.shape == self.damage.shape[:1]):
            raise ValueError(f"shapes differ: damage {self.damage.shape}, cost {self.cost.shape}, together {self.together.shape}")
        if np.isnan(self.damage).any() or (self.damage < 0).any() or not np.isfinite(self.cost).all():
            raise ValueError("damage must be 0 or more, and cost finite")


def solve(problem: Problem, budget: float) -> IntArray:
    """The choice of least summed damage that costs no more than the budget; of equal ones any.

    Args:
        problem: damages and costs.
        budget: bits of all groups together.

    Returns: [groups], the option of each.
    Raises: Infeasible: not even the cheapest choices fit.
    """
    blocks, of_group = np.unique(problem.together, return_inverse=True)
    joint = Problem(damage=_summed(problem.damage, of_group, len(blocks)), cost=_summed(problem.cost, of_group, len(blocks)), together=np.arange(len(blocks)))
    return _solve_apart(joint, budget)[of_group]


def front(problem: Problem, n_budgets: int) -> Iterator[tuple[float, IntArray]]:
    """Optimal choices at budgets evenly spaced from the least cost to that of least damage: the Pareto front's outline.

    Yields: budget and choices, each better than the one before.
    """
    low, high = cost_range(problem)
    last: IntArray | None = None
    for budget in np.linspace(low, high, n_budgets):
        choice = solve(problem, float(budget))
        if last is None or total(problem.damage, choice) < total(problem.damage, last):
            yield float(budget), choice
        last = choice


def cost_range(problem: Problem) -> tuple[float, float]:
    """The least cost of any choice, and the least cost of a choice of least damage."""
    blocks, of_group = np.unique(problem.together, return_inverse=True)
    damage, cost = (_summed(each, of_group, len(blocks)) for each in (problem.damage, problem.cost))
    if not np.isfinite(damage).any(axis=1).all():
        raise Infeasible(float("inf"))
    low = np.where(np.isfinite(damage), cost, np.inf).min(axis=1).sum()
    best = damage.min(axis=1, keepdims=True)
    high = np.where(damage <= best, cost, np.inf).min(axis=1).sum()
    return float(low), float(high)


def total(values: FloatArray, choice: IntArray) -> float:
    """Sum of each group's value under its choice. Args: values: [groups, options]; choice: [groups]."""
    return float(values[np.arange(len(choice)), choice].sum())


def useful_options(damage: FloatArray, cost: FloatArray) -> IntArray:
    """Options of one group that no other beats in both; cheapest first. Args: damage, cost: [options]."""
    kept: list[int] = []
    for option in np.lexsort((damage, cost)):
        if np.isfinite(damage[option]) and (not kept or damage[option] < damage[kept[-1]]):
            kept.append(int(option))
    return np.array(kept, dtype=np.int64)


def _summed(values: FloatArray, of_group: npt.NDArray[np.intp], n_blocks: int) -> FloatArray:
    result = np.zeros((n_blocks, values.shape[1]))
    np.add.at(result, of_group, values)
    return result


def _solve_apart(problem: Problem, budget: float) -> IntArray:
    low, _ = cost_range(problem)
    if low > budget:
        raise Infeasible(low)
    options = [useful_options(damage, cost) for damage, cost in zip(problem.damage, problem.cost, strict=True)]
    groups = np.repeat(np.arange(len(options)), [len(some) for some in options])
    flat = np.concatenate(options)
    damage, cost = problem.damage[groups, flat], problem.cost[groups, flat] / max(budget, 1.0)
    price, bound, choice = _relaxed(problem, options, groups, damage, cost)
    # An option that raises the bound above what is already reached is in no better choice: few are left.
    excess = damage + price * cost - _least(damage + price * cost, groups)[groups]
    left = excess <= (total(problem.damage, choice) - bound) * (1 + 1e-9)
    left |= flat == choice[groups]
    better = _exact(damage[left], cost[left], groups[left], scale=1e3 / bound if bound > 0 else 1.0)
    candidate = choice.copy()
    candidate[groups[left][better]] = flat[left][better]
    fits = total(problem.cost, candidate) <= budget and total(problem.damage, candidate) <= total(problem.damage, choice)
    return candidate if fits else choice


def _relaxed(problem: Problem, options: Sequence[IntArray], groups: IntArray, damage: FloatArray, cost: FloatArray) -> tuple[float, float, IntArray]:
    """The price of a unit of budget, a bound from below on the damage, and a choice that fits: what the linear relaxation says.

    Args: damage and cost of each useful option, in units of the budget; groups: whose it is.
    """
    rows = _one_each(groups)
    found: Any = linprog(damage, A_ub=cost[None], b_ub=[1.0], A_eq=rows, b_eq=np.ones(rows.shape[0]), method="highs")
    price = max(0.0, -float(found.ineqlin.marginals[0]))
    bound = float(_least(damage + price * cost, groups).sum()) - price
    # A choice that fits: from the cheapest options on, exchanges in the order of what they save for their cost.
    choice = np.array([some[0] for some in options])
    starts = np.searchsorted(groups, np.arange(len(options)))
    spent, room = cost[starts].copy(), 1.0 - float(cost[starts].sum())
    exchanges: list[tuple[float, int, int, int]] = []
    for group, (start, some) in enumerate(zip(starts.tolist(), options, strict=True)):
        upward = range(start + 1, start + len(some))
        exchanges += [((damage[i - 1] - damage[i]) / (cost[i] - cost[i - 1]), group, i, int(some[i - start])) for i in upward]
    for _, group, i, option in sorted(exchanges, reverse=True):
        if cost[i] > spent[group] and cost[i] - spent[group] <= room:
            room -= cost[i] - spent[group]
            spent[group], choice[group] = cost[i], option
    return price, bound, choice


def _exact(damage: FloatArray, cost: FloatArray, groups: IntArray, scale: float) -> npt.NDArray[np.bool_]:
    """Which of the options that are left are chosen."""
    rows = _one_each(groups)
    least: Any = np.append(np.ones(rows.shape[0]), -np.inf)
    most: Any = np.ones(rows.shape[0] + 1)
    with _hushed():
        found: Any = milp(
            damage * scale,  # HiGHS' tolerances are absolute
            integrality=np.ones(len(damage)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(vstack([rows, csr_array(cost[None])]).tocsr(), least, most),
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    return np.zeros(len(damage), dtype=np.bool_) if found.x is None else found.x > 0.5


@contextmanager
def _hushed() -> Generator[None]:
    """HiGHS 1.12 prints a line of its own making now and then, past Python's streams and its own switch."""
    sys.stdout.flush()
    kept, sink = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def _one_each(groups: IntArray) -> Any:
    return coo_array((np.ones(len(groups)), (groups, np.arange(len(groups))))).tocsr()


def _least(values: FloatArray, groups: IntArray) -> FloatArray:
    """The least value of each group."""
    least = np.full(int(groups.max()) + 1, np.inf)
    np.minimum.at(least, groups, values)
    return least
