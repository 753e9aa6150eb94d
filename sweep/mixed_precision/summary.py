"""A recipe and what else there was to choose, in figures: size, predicted KL, ranks of layer groups, the Pareto front."""

from collections import Counter
from typing import Any

from sweep.core.errors import SweepError
from sweep.core.groups import short_group
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Options
from sweep.mixed_precision.knapsack import Problem, cost_range, front, total
from sweep.mixed_precision.recipe import SIXTEEN, interval, uniform_choices, weights_gb
from sweep.report.analysis import IntArray


def summary(options: Options, problem: Problem, choice: IntArray, made: MixedRecipe) -> dict[str, Any]:
    """A recipe in figures: size, damage, how often each format is used, and what stays in the most bits."""
    counts = Counter(group.format or SIXTEEN for group in made.groups)
    highest = max(made.bits_of(group) for group in made.groups)
    head = None
    sizes: dict[str, float | None] = dict.fromkeys(("gb", "gb_covered", "gb_embeddings", "gb_lm_head", "gb_rest"))
    if options.elements is not None:
        sizes = sizes_gb(options, made)
        head = (
            "covered"
            if options.covers_lm_head
            else "16 bits"
            if options.elements["lm_head"]
            else "tied to the embeddings"
        )
    return {
        "name": made.name,
        "target": made.target,
        "effective_bits": made.effective_bits,
        **sizes,
        "lm_head": head,
        "predicted_kl": total(problem.damage, choice),
        "predicted_kl_interval": interval(options, choice),
        "formats": dict(sorted(counts.items(), key=lambda item: -item[1])),
        "most_bits": [
            short_group(group.group, list(group.modules)) for group in made.groups if made.bits_of(group) == highest
        ],
    }


def sizes_gb(options: Options, made: MixedRecipe) -> dict[str, float | None]:
    """GB (1e9 bytes) of weights: all, and what they consist of; `gb_lm_head` is None where it is covered or tied to the embeddings."""
    assert options.elements is not None
    gb_embeddings, head = options.elements["embeddings"] * 2 / 1e9, options.elements["lm_head"]
    gb_lm_head = head * 2 / 1e9 if head and not options.covers_lm_head else None
    gb = weights_gb(options, made)
    return {
        "gb": gb,
        "gb_covered": gb - options.other_bytes / 1e9,
        "gb_embeddings": gb_embeddings,
        "gb_lm_head": gb_lm_head,
        "gb_rest": options.other_bytes / 1e9 - gb_embeddings - (gb_lm_head or 0.0),
    }


def ranked(options: Options, problem: Problem, choice: IntArray) -> list[dict[str, Any]]:
    """Groups by what their format damages, with what leaving them in 16 bits would gain for each byte."""
    rows: list[dict[str, Any]] = []
    for index, group in enumerate(options.groups):
        damage, cost = problem.damage[index, choice[index]], problem.cost[index, choice[index]]
        saved = (problem.cost[index, -1] - cost) / 8
        label = SIXTEEN if choice[index] == len(options.formats) else options.formats[choice[index]].format.label
        rows.append(
            {
                "group": group["group"],
                "name": short_group(group["group"], group["modules"]),
                "format": label,
                "predicted_kl": float(damage),
                "bytes_saved": float(saved),
                "predicted_kl_per_gb_saved": float(damage / saved * 1e9) if saved else None,
            }
        )
    return sorted(rows, key=lambda row: -row["predicted_kl"])


def front_rows(options: Options, problem: Problem, n_budgets: int) -> list[dict[str, Any]]:
    """The Pareto front at so many budgets. Raises: SweepError: fewer than two of them, or one recipe is the smallest and the best."""
    if n_budgets < 2:
        raise SweepError(f"--front {n_budgets} is no front. Type at least 2, or --front alone for 24.")
    low, high = cost_range(problem)
    if high <= low:
        raise SweepError("One recipe is the smallest and the best: there is no front. Score more formats.")
    return [
        _point(options, total(problem.cost, choice), total(problem.damage, choice))
        for _, choice in front(problem, n_budgets)
    ]


def uniform_rows(options: Options, problem: Problem) -> list[dict[str, Any]]:
    """One format for all groups, each."""
    return [
        {"format": label, **_point(options, cost, damage)}
        for label, (cost, damage) in uniform_choices(options, problem).items()
    ]


def _point(options: Options, cost: float, damage: float) -> dict[str, Any]:
    gb = None if options.elements is None else options.gb(cost)
    return {"effective_bits": cost / float(options.weights.sum()), "gb": gb, "predicted_kl": damage}
