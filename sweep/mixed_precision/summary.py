"""Figures of a recipe and of its alternatives: size, predicted KL, ranks of layer groups, the Pareto front."""

from collections import Counter

import msgspec

from sweep.core.coverage import ModelCoverage
from sweep.core.errors import SweepError
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Candidates
from sweep.mixed_precision.knapsack import Problem, cost_range, front, gap
from sweep.mixed_precision.pricing import total
from sweep.mixed_precision.recipe import SIXTEEN, interval, uniform_choices, weights_gb
from sweep.report.analysis import IntArray
from sweep.report.plots import Point


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """GB (1e9 bytes) of a recipe's weights, and of their parts; None: the store does not know the model's size."""

    gb: float | None = None
    gb_covered: float | None = None
    gb_embeddings: float | None = None
    gb_lm_head: float | None = None  # None too where it is covered or tied to the embeddings
    gb_rest: float | None = None


class Joint(msgspec.Struct, frozen=True, kw_only=True):
    """What interactions between layer groups have to do with a recipe's predicted KL."""

    weight: float  # of the interactions in the choice, 0 to 1: as far as they agree between samples
    linear_kl: float  # predicted KL without them: the sum of each group's alone
    gap: float  # by so much at most a mix of this size is better by what the choice is made by, 0 to 1


class Figures(Sizes, frozen=True, kw_only=True):
    """Size and KL of a recipe, and its formats."""

    name: str
    target: str | None
    effective_bits: float  # mean bits a weight of the covered groups
    checkpoint_bits: float | None  # of all weights; None: the store does not know the model's size
    coverage: ModelCoverage | None  # what the groups cover of the model
    lm_head: str | None  # what becomes of it
    predicted_kl: float  # nats per prediction
    predicted_kl_interval: tuple[float, float] | None  # 90 %, over samples
    joint: Joint | None  # None: interactions are not known, or not asked for, and KL adds up
    formats: dict[str, int]  # number of layer groups, by label
    most_bits: list[str]  # names of the groups in the most bits
    tokens: tuple[str, ...]  # kinds that predicted_kl counts; empty: all
    measured_kl: float | msgspec.UnsetType = msgspec.UNSET
    measured_kl_interval: tuple[float, float] | msgspec.UnsetType = msgspec.UNSET

    @property
    def point(self) -> Point:
        """In the plot of KL over size."""
        return Point(
            name=self.name,
            effective_bits=self.effective_bits,
            checkpoint_bits=self.checkpoint_bits,
            gb=self.gb,
            predicted_kl=self.predicted_kl,
            measured_kl=self.measured_kl or None,
        )


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """A layer group with the predicted KL of its format, and what the format saves."""

    group: str
    name: str  # short
    format: str
    predicted_kl: float
    bytes_saved: float
    predicted_kl_per_gb_saved: float | None  # None: it saves nothing


def figures_of(candidates: Candidates, problem: Problem, choice: IntArray, made: MixedRecipe) -> Figures:
    """Figures of a recipe: size, predicted KL, how often each format is used, and the groups left in the most bits."""
    counts = Counter(group.format or SIXTEEN for group in made.groups)
    highest = max(made.bits_of(group) for group in made.groups)
    head, sizes = None, Sizes()
    if candidates.elements is not None:
        sizes = sizes_gb(candidates, made)
        head = (
            "covered"
            if candidates.covers_lm_head
            else "16 bits"
            if candidates.elements["lm_head"]
            else "tied to the embeddings"
        )
    return Figures(
        **msgspec.structs.asdict(sizes),
        name=made.name,
        target=made.target,
        effective_bits=made.effective_bits,
        checkpoint_bits=candidates.checkpoint_bits(made.effective_bits * float(candidates.weights.sum())),
        coverage=candidates.coverage,
        lm_head=head,
        predicted_kl=made.predicted_kl,
        joint=_joint(candidates, problem, choice, made),
        predicted_kl_interval=interval(candidates, choice),
        formats=dict(sorted(counts.items(), key=lambda item: -item[1])),
        tokens=made.tokens,
        most_bits=[each.group.short_name for each in made.groups if made.bits_of(each) == highest],
    )


def _joint(candidates: Candidates, problem: Problem, choice: IntArray, made: MixedRecipe) -> Joint | None:
    if problem.interactions is None:
        return None
    cost = made.effective_bits * float(candidates.weights.sum())
    return Joint(weight=problem.interactions.weight, linear_kl=made.linear_kl, gap=gap(problem, cost, choice))


def sizes_gb(candidates: Candidates, made: MixedRecipe) -> Sizes:
    """GB of all weights, and of their parts, of a model whose size the store knows."""
    assert candidates.elements is not None
    gb_embeddings, head = candidates.elements["embeddings"] * 2 / 1e9, candidates.elements["lm_head"]
    gb_lm_head = head * 2 / 1e9 if head and not candidates.covers_lm_head else None
    gb = weights_gb(candidates, made)
    return Sizes(
        gb=gb,
        gb_covered=gb - candidates.other_bytes / 1e9,
        gb_embeddings=gb_embeddings,
        gb_lm_head=gb_lm_head,
        gb_rest=candidates.other_bytes / 1e9 - gb_embeddings - (gb_lm_head or 0.0),
    )


def ranked(candidates: Candidates, problem: Problem, choice: IntArray) -> list[Ranked]:
    """Layer groups by the predicted KL of their format, with the predicted KL for each GB that the format saves."""
    rows: list[Ranked] = []
    for index, group in enumerate(candidates.groups):
        predicted_kl, cost = problem.predicted_kl[index, choice[index]], problem.cost[index, choice[index]]
        saved = (problem.cost[index, -1] - cost) / 8
        label = SIXTEEN if choice[index] == len(candidates.formats) else candidates.formats[choice[index]].format.label
        rows.append(
            Ranked(
                group=group.name,
                name=group.short_name,
                format=label,
                predicted_kl=float(predicted_kl),
                bytes_saved=float(saved),
                predicted_kl_per_gb_saved=float(predicted_kl / saved * 1e9) if saved else None,
            )
        )
    return sorted(rows, key=lambda row: -row.predicted_kl)


def front_points(candidates: Candidates, problem: Problem, n_budgets: int) -> list[Point]:
    """The Pareto front at `n_budgets` budgets.

    Raises: SweepError: fewer than two budgets, or one recipe is both the smallest and the best.
    """
    if n_budgets < 2:
        raise SweepError(f"--front {n_budgets} is no front. Type at least 2, or --front alone for 24.")
    low, high = cost_range(problem)
    if high <= low:
        raise SweepError("One recipe is the smallest and the best: there is no front. Score more formats.")
    return [
        _point(candidates, total(problem.cost, choice), problem.kl(choice)) for _, choice in front(problem, n_budgets)
    ]


def uniform_points(candidates: Candidates, problem: Problem) -> list[Point]:
    """Size and predicted KL of every recipe with one format for all groups."""
    return [
        _point(candidates, cost, predicted_kl, label)
        for label, (cost, predicted_kl) in uniform_choices(candidates, problem).items()
    ]


def _point(candidates: Candidates, cost: float, predicted_kl: float, label: str = "") -> Point:
    return Point(
        format=label,
        effective_bits=cost / float(candidates.weights.sum()),
        checkpoint_bits=candidates.checkpoint_bits(cost),
        gb=None if candidates.elements is None else candidates.gb(cost),
        predicted_kl=predicted_kl,
    )
