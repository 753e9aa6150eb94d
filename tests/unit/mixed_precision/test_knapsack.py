"""The solver against enumeration of every choice, against ModelOpt's own, and against hand arithmetic."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from sweep.mixed_precision.knapsack import Infeasible, Problem, cost_range, front, solve, total, useful_options

ELEMENTS = np.array(
    [2560 * 6144, 4096 * 2560, 2560 * 9728 * 2, 9728 * 2560], dtype=np.float64
)  # of Qwen3-VL-4B's layer groups
BITS = (4.0, 4.125, 4.25, 4.5, 5.0, 6.0, 8.0, 8.0009765625, 8.25)
N_PREDICTIONS = 7000


def instance(seed: int, n_groups: int, n_formats: int, *, share_layers: bool = False) -> Problem:
    """Predicted KLs over some powers of ten; one option more than there are formats: 16 bits, with a KL of 0."""
    rng = np.random.default_rng(seed)
    elements = np.resize(ELEMENTS, n_groups) if n_groups > 10 else rng.choice(ELEMENTS, n_groups)
    bits = np.append(rng.choice(BITS, n_formats), 16.0)
    kl = 10 ** rng.normal(-4, 1, (n_groups, 1)) * 4.0 ** (4 - bits) * 10 ** rng.normal(0, 0.2, (n_groups, len(bits)))
    kl[:, -1] = 0.0
    together = np.arange(n_groups) // 2 if share_layers else np.arange(n_groups)
    return Problem(predicted_kl=kl, cost=elements[:, None] * bits[None, :], together=together)


def best_of_all(problem: Problem, budget: float) -> float:
    """The least predicted KL of all choices that fit; infinite if none does."""
    n_groups, n_options = problem.predicted_kl.shape
    best = np.inf
    for picks in itertools.product(range(n_options), repeat=n_groups):
        choice = np.array(picks)
        apart = any(len(set(choice[problem.together == block])) > 1 for block in problem.together)
        if not apart and total(problem.cost, choice) <= budget:
            best = min(best, total(problem.predicted_kl, choice))
    return best


def somewhere(problem: Problem, rng: np.random.Generator) -> float:
    """A budget between the smallest and the largest choice."""
    low, high = problem.cost.min(axis=1).sum(), problem.cost.max(axis=1).sum()
    return float(low + rng.random() * (high - low))


def met_to_the_bit(problem: Problem, rng: np.random.Generator) -> float:
    """The exact cost of some choice."""
    return total(problem.cost, rng.integers(0, problem.cost.shape[1], len(problem.cost)))


def missed_by_a_hair(problem: Problem, rng: np.random.Generator) -> float:
    """A billionth less: within a solver's tolerance, over the budget all the same."""
    return met_to_the_bit(problem, rng) * (1 - 1e-9)


@pytest.mark.parametrize("budget_of", [somewhere, met_to_the_bit, missed_by_a_hair])
@pytest.mark.parametrize("share_layers", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("part", range(5))
def test_no_choice_that_fits_is_better(
    budget_of: Callable[[Problem, np.random.Generator], float], share_layers: bool, part: int
) -> None:
    for seed in range(10 * part, 10 * part + 10):
        rng = np.random.default_rng(seed)
        problem = instance(seed, int(rng.integers(2, 6)), int(rng.integers(1, 4)), share_layers=share_layers)
        budget = budget_of(problem, rng)
        best = best_of_all(problem, budget)
        if np.isinf(best):
            with pytest.raises(Infeasible):
                solve(problem, budget)
            continue
        choice = solve(problem, budget)
        assert total(problem.cost, choice) <= budget
        assert total(problem.predicted_kl, choice) == pytest.approx(best, rel=1e-9)
        assert all(len(set(choice[problem.together == block])) == 1 for block in problem.together)


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_modelopts_solver_on_the_same_scores_and_budget(seed: int) -> None:
    from modelopt.torch.opt.searcher import LPS

    problem = instance(seed, 144, 24)
    rng = np.random.default_rng(seed)
    budget = rng.uniform(4.2, 10) / 16 * total(problem.cost, np.full(144, 24))
    scores, costs = problem.predicted_kl * 2 * N_PREDICTIONS, problem.cost / 16
    theirs, status = LPS(
        name="AutoQuantize",
        constraints={"weight_size": budget / 16},
        constraints_to_candidate_costs={"weight_size": costs.tolist()},
        candidate_scores=scores.tolist(),
    )()
    assert status == "Optimal"
    ours = solve(problem, budget)
    assert total(problem.cost, ours) <= budget
    assert total(scores, ours) <= total(scores, np.array(theirs)) * (1 + 1e-9)


def test_a_small_case_by_hand() -> None:
    """Budget 24: the second group's 8 bits save 9 for 4, the first one's 5 for 4; both are too much."""
    problem = Problem(
        predicted_kl=np.array([[6.0, 1.0, 0.0], [10.0, 1.0, 0.0]]),
        cost=np.array([[4.0, 8, 16], [8.0, 12, 32]]),
        together=np.arange(2),
    )
    assert solve(problem, 12).tolist() == [0, 0]
    assert solve(problem, 16).tolist() == [0, 1]
    assert solve(problem, 20).tolist() == [1, 1]
    assert solve(problem, 48).tolist() == [2, 2]
    assert cost_range(problem) == (12.0, 48.0)


def test_a_budget_below_the_cheapest_choice_names_what_that_costs() -> None:
    problem = Problem(
        predicted_kl=np.array([[6.0, 1.0], [np.inf, 1.0]]), cost=np.array([[4.0, 8], [4.0, 8]]), together=np.arange(2)
    )
    with pytest.raises(Infeasible) as found:
        solve(problem, 11.9)
    assert found.value.least_cost == 12.0  # the second group cannot have the cheaper option


def test_a_group_without_an_option_fits_no_budget() -> None:
    problem = Problem(
        predicted_kl=np.array([[1.0, np.inf], [np.inf, 1.0]]), cost=np.ones((2, 2)), together=np.zeros(2, dtype=int)
    )
    with pytest.raises(Infeasible) as found:
        solve(problem, 1e9)
    assert np.isinf(found.value.least_cost)


def test_rounding_of_the_budget_costs_no_choice() -> None:
    """0.1 + 0.2 is a little more than 0.3 in binary."""
    problem = Problem(
        predicted_kl=np.array([[1.0, 0.0], [1.0, 0.0]]), cost=np.array([[0.0, 0.1], [0.0, 0.2]]), together=np.arange(2)
    )
    assert solve(problem, 0.3).tolist() == [1, 1]


def test_options_that_another_one_beats_in_both_are_dropped() -> None:
    kl, cost = np.array([5.0, 3.0, 3.0, 4.0, np.inf, 0.0]), np.array([4.0, 5.0, 6.0, 7.0, 1.0, 16.0])
    assert useful_options(kl, cost).tolist() == [0, 1, 5]


def test_the_front_falls_from_the_cheapest_choice_to_the_best_one() -> None:
    problem = instance(0, 12, 6)
    points = list(front(problem, 9))
    budgets, kls = [budget for budget, _ in points], [total(problem.predicted_kl, choice) for _, choice in points]
    assert (budgets[0], budgets[-1]) == cost_range(problem)
    assert sorted(kls, reverse=True) == kls == list(dict.fromkeys(kls))
    assert kls[-1] == 0.0


@pytest.mark.parametrize(
    ("kl", "cost"),
    [([[np.nan]], [[1.0]]), ([[-1.0]], [[1.0]]), ([[1.0]], [[np.inf]]), ([[1.0, 2.0]], [[1.0]])],
    ids=["nan", "negative", "infinite", "shape"],
)
def test_what_is_no_problem_is_refused(kl: list[list[float]], cost: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"predicted_kl|shapes"):
        Problem(predicted_kl=np.array(kl), cost=np.array(cost), together=np.arange(1))


def test_a_choice_that_could_not_be_proven_the_best_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A predicted KL in proportion to the weights makes all choices alike, the hardest case."""
    rng = np.random.default_rng(0)
    elements, bits = rng.integers(10**5, 10**7, 100), np.append(rng.choice(BITS, 12), 16.0)
    kl = elements[:, None] * 2.0**-bits * 1e-9 * (1 + 1e-3 * rng.random((100, 13)))
    kl[:, -1] = 0.0
    problem = Problem(predicted_kl=kl, cost=elements[:, None] * bits, together=np.arange(100))
    monkeypatch.setattr("sweep.mixed_precision.knapsack._SECONDS", 0.0)
    choice = solve(problem, 6.7 * elements.sum())
    assert total(problem.cost, choice) <= 6.7 * elements.sum()
    assert "No proof of the best choice after 0 s" in caplog.text
