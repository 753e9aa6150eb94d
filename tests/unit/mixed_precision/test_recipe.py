"""Budgets, rules and recipes by hand arithmetic, on a made-up store of 10,000 weights."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sweep.core.errors import SweepError
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Candidates, read_candidates
from sweep.mixed_precision.knapsack import total
from sweep.mixed_precision.recipe import (
    Budget,
    Rules,
    interval,
    problem_of,
    recipe_of_choice,
    solved,
    uniform_choices,
    weights_gb,
)
from tests.scored import FP8, GROUPS, INT4, INT8, N_WEIGHTS, PREDICTED_KL, store_at

ANY = Rules(pins={})


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    path = tmp_path_factory.mktemp("store")
    return read_candidates(store_at(path), [f"store.uri={path}"])


def formats(candidates: Candidates, budget: Budget, rules: Rules = ANY) -> list[str]:
    """The label of each group's format; "16" where it has none."""
    choice = solved(candidates, problem_of(candidates, rules), budget, rules)
    return [choice.format or "16" for choice in recipe_of_choice(candidates, choice, "n", None).groups]


def only(*labels: str) -> Callable[[GroupFormat], bool]:
    return lambda each: each.label in labels


def test_budgets_are_bits_of_all_groups(candidates: Candidates) -> None:
    assert Budget(bits=4.5).cost(candidates) == 4.5 * N_WEIGHTS
    # 40,000 bytes, of which 30,000 are the 15,000 parameters that no recipe touches.
    assert Budget(gb=40e-6).cost(candidates) == pytest.approx(80_000)
    assert (Budget(bits=4.5).slug, Budget(gb=3.2).slug) == ("4_5bits", "3_2gb")


@pytest.mark.parametrize(
    "sizes", [{}, {"bits": 4.0, "gb": 3.0}, {"bits": 0.0}, {"bits": -1.0}, {"gb": float("nan")}, {"gb": float("inf")}]
)
def test_what_is_no_budget_is_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(SweepError, match=r"Type (one of the two|a number above 0)\."):
        Budget(**sizes)


def test_the_mix_of_least_predicted_kl(candidates: Candidates) -> None:
    """All in INT4 take 4.125 bits. A weight in 8 bits costs 3.875 more.

    That is 0.3875 bits for 1,000 of the 10,000 weights, 1.1625 for 3,000.
    """
    assert formats(candidates, Budget(bits=4.125)) == [INT4] * 5
    assert formats(candidates, Budget(bits=4.5125)) == [INT8, INT4, INT4, INT4, INT4]  # 0.036 less
    assert formats(candidates, Budget(bits=4.9)) == [
        INT8,
        INT4,
        INT8,
        INT4,
        INT4,
    ]  # 0.036 + 0.017, where the last group would save 0.0495
    assert formats(candidates, Budget(bits=5.2875)) == [INT8, INT4, INT4, INT4, FP8]
    assert formats(candidates, Budget(bits=16)) == ["16"] * 5


def test_gb_and_bits_are_two_words_for_one_budget(candidates: Candidates) -> None:
    gb = (4.9 * N_WEIGHTS / 8 + 30_000) / 1e9
    assert formats(candidates, Budget(gb=gb)) == formats(candidates, Budget(bits=4.9))


def test_what_the_target_does_not_run_is_no_option(candidates: Candidates) -> None:
    assert formats(candidates, Budget(bits=8), replace(ANY, allowed=only(FP8))) == [FP8] * 5


def test_pins_and_exclusions_hold_whatever_they_cost(candidates: Candidates) -> None:
    rules = Rules(pins={"down_proj": FP8, "*merger*": INT4}, excludes=["layers.0*q_proj"])
    assert formats(candidates, Budget(bits=8.5), rules) == [
        "16",
        FP8,
        INT8,
        FP8,
        INT4,
    ]  # 72,250 bits are taken; 16,000 more are too much


def test_a_layers_groups_get_one_format(candidates: Candidates) -> None:
    found = formats(candidates, Budget(bits=6), Rules(pins={}, uniform_layer=True))
    assert len(set(found[:2])) == len(set(found[2:4])) == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            Rules(pins={"up_proj": INT4}),
            r"'up_proj' matches no layer group\. Groups are called like 'm\.layers\.0\.attn\.q_proj'",
        ),
        (
            Rules(pins={"q_proj": "wint4_afp16/defualt"}),
            r"Unknown format 'wint4_afp16/defualt'\. Did you mean 'wint4_afp16/default'",
        ),
        (
            Rules(pins={"q_proj": INT4}, excludes=["layers.0*"]),
            r"m\.layers\.0\.attn\.q_proj cannot be 16: .* another rule forbids it",
        ),
        (Rules(pins={"q_proj": FP8}, allowed=only(INT4)), r"cannot be wfp8_afp8/default: the target does not run it"),
    ],
    ids=["pattern", "label", "conflict", "target"],
)
def test_rules_that_cannot_be_kept_are_refused(rules: Rules, message: str, candidates: Candidates) -> None:
    with pytest.raises(SweepError, match=message):
        problem_of(candidates, rules)


def test_a_layer_of_one_format_cannot_have_two_pins(candidates: Candidates) -> None:
    with pytest.raises(SweepError, match=r"Loosen --pin, --exclude or --uniform-layer\."):
        formats(
            candidates,
            Budget(bits=9),
            Rules(pins={"layers.0*q_proj": INT4, "layers.0*down_proj": INT8}, uniform_layer=True),
        )


@pytest.mark.parametrize(
    ("budget", "rules", "message"),
    [
        (
            Budget(bits=4),
            ANY,
            r"--bits 4 is too little\. The nearest that works: --bits 4\.125; "
            r"the smallest format .* wint4_afp16/default, 4\.125 bits",
        ),
        # 41,250 bits and 30,000 bytes
        (Budget(gb=30e-6), ANY, r"--gb 3e-05 is too little\. The nearest that works: --gb 4e-05;"),
        # 2,000 weights stay in 16 bits: 0.8 * 4.125 + 0.2 * 16
        (Budget(bits=6), Rules(pins={}, excludes=["fc"]), r"--bits 6\.5; --bits 4\.125 without --exclude;"),
        (
            Budget(bits=6),
            Rules(pins={}, allowed=only(FP8)),
            r"--bits 8; --bits 4\.125 without the target; .* wfp8_afp8/default, 8 bits",
        ),
        # 0.9 * 4.125 + 0.1 * 8 alone, but the layer's 3,000 other weights go with it
        (
            Budget(bits=4.2),
            Rules(pins={"layers.0*q_proj": INT8}, uniform_layer=True),
            r"--bits 5\.675; --bits 4\.125 without --pin; --bits 4\.5125 without --uni",
        ),
    ],
    ids=["bits", "gb", "exclude", "target", "uniform layer"],
)
def test_too_small_a_budget_names_the_nearest_and_what_binds(
    budget: Budget, rules: Rules, message: str, candidates: Candidates
) -> None:
    with pytest.raises(SweepError, match=message):
        formats(candidates, budget, rules)


def test_the_recipe_is_what_was_chosen(candidates: Candidates) -> None:
    labels = [candidate.format.label for candidate in candidates.formats]
    choice = np.array([labels.index(label) for label in (INT8, INT4, INT4, INT4, FP8)])
    choice[1] = len(candidates.formats)  # 16 bits
    made = recipe_of_choice(candidates, choice, "name", "vllm_sm90")
    assert made.effective_bits == pytest.approx((1000 * 8 + 3000 * 16 + 4000 * 4.125 + 2000 * 8) / N_WEIGHTS)
    assert made.predicted_kl == pytest.approx(0.004 + 0 + 0.02 + 0.03 + 0.0005)
    assert weights_gb(candidates, made) == pytest.approx((made.effective_bits * N_WEIGHTS / 8 + 30_000) / 1e9)
    assert [choice.group.modules for choice in made.groups] == [group[1] for group in GROUPS]
    assert set(made.formats) == {INT8, INT4, FP8}
    assert MixedRecipe.from_yaml(made.to_yaml(), "file") == made


def test_the_interval_is_that_of_the_sum_over_groups(candidates: Candidates) -> None:
    """Two samples with 1/4 and 3/4: drawn twice, the sum is half, all or one and a half."""
    choice = np.zeros(len(GROUPS), dtype=np.int64)
    sum_of = float(candidates.formats[0].predicted_kl.sum())
    assert interval(candidates, choice) == pytest.approx((sum_of / 2, sum_of * 3 / 2))
    assert interval(candidates, np.full(len(GROUPS), len(candidates.formats))) == (0.0, 0.0)
    blind = replace(candidates, formats=tuple(replace(candidate, sample_kl=None) for candidate in candidates.formats))
    assert interval(blind, choice) is None


def test_the_interval_draws_samples_with_their_predictions(candidates: Candidates) -> None:
    """1/4 of the sum with 10 of 50 predictions, 3/4 with 40: drawn twice, a sample's KL per prediction is its own."""
    counts = np.array([10.0, 40.0])
    known = replace(candidates, formats=tuple(replace(each, sample_predictions=counts) for each in candidates.formats))
    sum_of = float(candidates.formats[0].predicted_kl.sum())
    assert interval(known, np.zeros(len(GROUPS), dtype=np.int64)) == pytest.approx((sum_of * 15 / 16, sum_of * 5 / 4))


def test_one_format_for_all(candidates: Candidates) -> None:
    def expected(label: str, bits: float) -> Any:
        return pytest.approx((bits * N_WEIGHTS, sum(each or 0 for each in PREDICTED_KL[label])))

    assert uniform_choices(candidates, problem_of(candidates, ANY)) == {
        INT4: expected(INT4, 4.125),
        INT8: expected(INT8, 8),
        FP8: expected(FP8, 8),
    }
    pinned = problem_of(candidates, Rules(pins={"*fc": INT4}))
    assert set(uniform_choices(candidates, pinned)) == {INT4}


def test_predicted_kl_from_elsewhere_replaces_that_of_the_store(candidates: Candidates) -> None:
    kl = np.stack([candidate.predicted_kl * 2 for candidate in candidates.formats], axis=1)
    problem = problem_of(candidates, ANY, kl)
    choice = np.zeros(len(GROUPS), dtype=np.int64)
    assert total(problem.predicted_kl, choice) == pytest.approx(
        2 * total(problem_of(candidates, ANY).predicted_kl, choice)
    )
    assert recipe_of_choice(candidates, choice, "n", None, kl).predicted_kl == pytest.approx(
        total(problem.predicted_kl, choice)
    )
