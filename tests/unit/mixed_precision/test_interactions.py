"""The best mix with interactions against enumeration of every choice, and the gap that is said of it."""

import itertools

import numpy as np
import pytest

from sweep.mixed_precision.interactions import Form, Interactions, improved, least_value
from sweep.mixed_precision.knapsack import Problem, gap, solve
from sweep.mixed_precision.pricing import total
from tests.unit.mixed_precision.test_knapsack import instance, somewhere


def interacting(seed: int, n_groups: int, n_formats: int, weight: float, *, share_layers: bool = False) -> Problem:
    """An instance whose groups' errors have a direction in common, and undo or add up to each other's."""
    problem, rng = instance(seed, n_groups, n_formats, share_layers=share_layers), np.random.default_rng(seed)
    shape = (n_groups, n_formats + 1, 6, 4)
    directions = rng.normal(size=shape) + 2 * rng.normal(size=(1, 1, 6, 4)) * rng.choice([-1, 1], (n_groups, 1, 1, 1))
    directions /= np.linalg.norm(directions, axis=(2, 3), keepdims=True)
    projections = (directions * np.sqrt(problem.predicted_kl)[:, :, None, None]).astype(np.float32)
    interactions = Interactions(
        projections=projections, counted=projections, weight=weight, n_predictions=np.full(6, 1e3)
    )
    return Problem(
        predicted_kl=problem.predicted_kl, cost=problem.cost, together=problem.together, interactions=interactions
    )


def form_of(problem: Problem, budget: float) -> Form:
    assert problem.interactions is not None
    return Form.of(
        problem.predicted_kl, problem.cost, problem.interactions.counted, problem.interactions.weight, budget
    )


def every_choice(problem: Problem, budget: float) -> list[np.ndarray]:
    """All that fit and give groups of one block one option."""
    n_groups, n_options = problem.predicted_kl.shape
    found = (np.array(picks) for picks in itertools.product(range(n_options), repeat=n_groups))
    return [each for each in found if total(problem.cost, each) <= budget and _is_together(problem, each)]


def _is_together(problem: Problem, choice: np.ndarray) -> bool:
    return all(len(set(choice[problem.together == block])) == 1 for block in set(problem.together.tolist()))


@pytest.mark.parametrize("share_layers", [False, True], ids=["apart", "together"])
@pytest.mark.parametrize("weight", [0.1, 0.4])
@pytest.mark.parametrize("seed", range(6))
def test_the_mix_is_close_to_the_best_of_all_and_the_gap_covers_the_rest(
    seed: int, weight: float, share_layers: bool
) -> None:
    problem = interacting(seed, 6, 3, weight, share_layers=share_layers)
    budget = somewhere(problem, np.random.default_rng(seed))
    choice = solve(problem, budget)
    form = form_of(problem, budget)
    best = min(map(form.value, every_choice(problem, budget)))
    assert total(problem.cost, choice) <= budget
    assert _is_together(problem, choice)
    assert best * (1 - 1e-6) <= form.value(choice) <= best * 1.02
    assert form.value(choice) * (1 - gap(problem, budget, choice)) <= best * (1 + 1e-6)


def test_exchanges_never_make_it_worse_and_reach_what_no_exchange_betters() -> None:
    problem = interacting(3, 40, 6, 0.5)
    budget = somewhere(problem, np.random.default_rng(3))
    linear = solve(Problem(predicted_kl=problem.predicted_kl, cost=problem.cost, together=problem.together), budget)
    form = form_of(problem, budget)
    choice = improved(form, linear)
    assert form.value(choice) < form.value(linear)
    for group, option in itertools.product(range(40), range(7)):
        other = choice.copy()
        other[group] = option
        if total(problem.cost, other) <= budget:
            assert form.value(other) >= form.value(choice) * (1 - 2e-6)


def test_what_is_not_allowed_is_never_chosen() -> None:
    problem = interacting(1, 12, 4, 1.0)
    forbidden = problem.predicted_kl.copy()
    forbidden[:, 1] = np.inf
    problem = Problem(
        predicted_kl=forbidden, cost=problem.cost, together=problem.together, interactions=problem.interactions
    )
    budget = somewhere(problem, np.random.default_rng(1)) * 1.2
    choice = solve(problem, budget)
    assert 1 not in choice
    assert 0 <= gap(problem, budget, choice) <= 1


def test_two_groups_that_undo_each_other_are_quantized_together() -> None:
    """Alone the first two formats cost 0.02 and 0.02 more than 16 bits; together they cost nothing."""
    direction = np.ones((1, 1)) * np.sqrt(0.02)
    projections = np.zeros((3, 2, 1, 1), dtype=np.float32)
    projections[0, 0], projections[1, 0], projections[2, 0] = direction, -direction, direction * 0.9
    kl = np.square(projections).sum((2, 3)).astype(np.float64)
    cost = np.array([[4.0, 16.0]] * 3)
    interactions = Interactions(
        projections=projections, counted=projections, weight=1.0, n_predictions=np.array([100.0])
    )
    problem = Problem(predicted_kl=kl, cost=cost, together=np.arange(3), interactions=interactions)
    assert solve(problem, 24.0).tolist() == [0, 0, 1]
    assert problem.kl(np.array([0, 0, 1])) == pytest.approx(0.0, abs=1e-9)
    alone = Problem(predicted_kl=kl, cost=cost, together=np.arange(3))
    assert solve(alone, 24.0).tolist() in ([0, 1, 0], [1, 0, 0])


def test_formats_that_differ_by_less_than_rounding_end_the_exchanges() -> None:
    """Groups whose errors cancel, under formats that differ by 1e-5: gains are below what float32 products tell."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        shared = rng.normal(size=(1, 1, 32, 8)) * rng.choice([-1, 1], (8, 1, 1, 1))
        shared = shared * (1 + 1e-5 * rng.normal(size=(8, 4, 32, 8)))
        projections = (0.01 * shared).astype(np.float32)
        projections[:, -1] = 0
        interactions = Interactions(
            projections=projections, counted=projections, weight=0.99, n_predictions=np.full(32, 1e3)
        )
        kl = np.square(projections, dtype=np.float64).sum((2, 3))
        cost = np.tile([4.0, 4.0, 8.0, 16.0], (8, 1))
        problem = Problem(predicted_kl=kl, cost=cost, together=np.arange(8), interactions=interactions)
        assert total(cost, solve(problem, 64.0)) <= 64.0


def test_the_gap_is_small_where_interactions_are() -> None:
    problem = interacting(7, 30, 5, 0.05)
    budget = somewhere(problem, np.random.default_rng(7))
    choice = solve(problem, budget)
    assert gap(problem, total(problem.cost, choice), choice) < 0.1


def test_without_weight_the_form_is_the_sum() -> None:
    problem = interacting(5, 10, 4, 0.0)
    budget = somewhere(problem, np.random.default_rng(5))
    choice = solve(problem, budget)
    form = form_of(problem, budget)
    assert form.value(choice) == pytest.approx(total(problem.predicted_kl, choice))
    assert least_value(form, choice) <= form.value(choice)
