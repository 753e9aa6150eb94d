"""Seconds for the best mix of 24 recipes over 144 layer groups, and ModelOpt's solver on the same scores and budgets.

    python -m tests.bench.solve [--store DIR --overrides ...]

Without a store, predicted KLs are made up: spread over the groups as measured ones are, falling with the bits. With
one, they are its own.
"""

# pyright: basic

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sweep.mixed_precision.candidates import read_candidates
from sweep.mixed_precision.knapsack import Problem, cost_range, solve, total
from sweep.mixed_precision.recipe import Rules, problem_of
from sweep.store.store import Store
from tests.bench.setup import report

N_GROUPS, N_FORMATS, N_PREDICTIONS = 144, 24, 6633  # of Qwen3-VL-4B and 512 captions
ELEMENTS = (2560 * 6144, 4096 * 2560, 2560 * 9728 * 2, 9728 * 2560)  # q/k/v, o, gate/up, down
BITS = (4.0, 4.125, 4.25, 4.5, 5.0, 6.0, 8.0, 8.0009765625, 8.25)
BUDGETS = (4.1, 4.25, 4.5, 5.0, 6.0, 7.5, 9.0, 12.0)  # bits a weight


def made_up(seed: int) -> Problem:
    """Predicted KLs of the size and spread that a real sweep has; the last option is 16 bits."""
    rng = np.random.default_rng(seed)
    elements = np.resize(np.array(ELEMENTS, dtype=np.float64), N_GROUPS)
    bits = np.append(rng.choice(BITS, N_FORMATS), 16.0)
    kl = (
        10 ** rng.normal(-4, 0.8, (N_GROUPS, 1))
        * 4.0 ** (4 - bits)
        * 10 ** rng.normal(0, 0.2, (N_GROUPS, N_FORMATS + 1))
    )
    kl[:, -1] = 0.0
    return Problem(predicted_kl=kl, cost=elements[:, None] * bits, together=np.arange(N_GROUPS))


def modelopt_choice(problem: Problem, budget: float) -> np.ndarray[Any, Any]:
    """The choice of ModelOpt's own solver, given scores and costs in its units."""
    from modelopt.torch.opt.searcher import LPS

    allowed = np.where(np.isfinite(problem.predicted_kl), problem.predicted_kl, 1e9)
    picks, status = LPS(
        name="AutoQuantize",
        constraints={"weight_size": budget / 16},
        constraints_to_candidate_costs={"weight_size": (problem.cost / 16).tolist()},
        candidate_scores=(allowed * 2 * N_PREDICTIONS).tolist(),
    )()
    assert status == "Optimal", status
    return np.array(picks)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--instances", type=int, default=10, help="sets of made-up predicted KLs")
    parser.add_argument("--store", help="take the predicted KLs of this store instead")
    parser.add_argument("--overrides", nargs="*", default=[], help="which of its trials")
    asked = parser.parse_args(arguments)
    if asked.store:
        candidates = read_candidates(Store(asked.store), [*asked.overrides, f"store.uri={asked.store}"])
        problems = [problem_of(candidates, Rules(pins={}))]
    else:
        problems = [made_up(seed) for seed in range(asked.instances)]
    seconds: list[float] = []
    theirs_seconds: list[float] = []
    ratios: list[float] = []
    modelopt_choice(problems[0], cost_range(problems[0])[1])  # imports ModelOpt
    for problem in problems:
        weights = problem.cost[:, -1].sum() / 16
        for bits in BUDGETS:
            if not cost_range(problem)[0] <= bits * weights < cost_range(problem)[1]:
                continue
            started = time.perf_counter()
            ours = solve(problem, bits * weights)
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            theirs = modelopt_choice(problem, bits * weights)
            theirs_seconds.append(time.perf_counter() - started)
            ratios.append(total(problem.predicted_kl, theirs) / total(problem.predicted_kl, ours))
    figures = {
        "groups": problems[0].cost.shape[0],
        "recipes": problems[0].cost.shape[1] - 1,
        "solved": len(seconds),
        "seconds": float(np.mean(seconds)),
        "seconds_longest": max(seconds),
        "modelopt_seconds": float(np.mean(theirs_seconds)),
        "modelopt_kl_over_ours_least": min(ratios) - 1,
        "modelopt_kl_over_ours_median": float(np.median(ratios)) - 1,
        "modelopt_kl_over_ours_most": max(ratios) - 1,
    }
    report("solve", torch.device("cpu"), figures)


if __name__ == "__main__":
    main(sys.argv[1:])
