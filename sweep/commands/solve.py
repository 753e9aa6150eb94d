"""`sweep solve`: the mixed-precision recipe of least predicted damage under a budget, from the store alone."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sweep.config.compose import expand
from sweep.config.targets import Target
from sweep.core.errors import SweepError
from sweep.formats.mixed import GroupFormat, MixedRecipe
from sweep.mixed_precision.candidates import Options, read_options, sized
from sweep.mixed_precision.knapsack import Problem, cost_range, front, total
from sweep.mixed_precision.recipe import SIXTEEN, Budget, Rules, interval, problem_of, recipe, solved, uniform_choices, weights_gb
from sweep.mixed_precision.solution_text import lines
from sweep.report.analysis import IntArray
from sweep.report.rows import short_group
from sweep.store.select import opened


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was typed."""

    overrides: Sequence[str]
    bits: float | None
    gb: float | None
    pins: Sequence[str]  # PATTERN=LABEL
    excludes: Sequence[str]
    uniform_layer: bool
    out: str | None
    recapture: int  # how often the model is captured again with the recipe applied
    n_front: int | None
    rank: bool
    as_json: bool


def solve_command(request: Request) -> int:
    """Solve, write the recipe, and say what it is. Returns the exit code.

    Raises: SweepError: nothing to choose from, or a budget or rules that nothing fits.
    """
    config = expand(request.overrides, multirun=True).points[0]
    target = Target.from_config(config.target)
    with opened(config.store.uri) as store:
        options = read_options(store, request.overrides)
    if request.gb is not None:
        options = sized(options)
    rules = rules_of(request.pins, request.excludes, request.uniform_layer, target, options)
    problem = problem_of(options, rules)
    budget = budget_of(request, options, problem)
    choice = solved(options, problem, budget, rules)
    name = f"{options.trial.model}-{target.name}-{budget.slug}"
    made = recipe(options, choice, name, target.name)
    for _ in range(request.recapture):
        from sweep.mixed_precision.prepared import prepared
        from sweep.mixed_precision.recapture import recaptured_damage

        ready = prepared(made, replace(options.config, cluster=config.cluster))
        damage = recaptured_damage(ready, made, options)
        problem = problem_of(options, rules, damage)
        choice = solved(options, problem, budget, rules)
        made = recipe(options, choice, name, target.name, damage)
    out = Path(request.out).expanduser() if request.out else Path("outputs/recipes") / f"{made.name}.yaml"
    document: dict[str, Any] = summary(options, problem, choice, made) | {"recipe": str(out)}
    n_usable = sum(rules.allowed(option.format) for option in options.formats)
    document["scored"] = {"recipes": len(options.formats), "usable": n_usable, "dataset": options.trial.dataset, "size": options.trial.size}
    if request.rank:
        document["rank"] = ranked(options, problem, choice)
    if request.n_front is not None:
        document["front"] = front_rows(options, problem, request.n_front)
        document["uniform"] = uniform_rows(options, problem)
        document["picture"] = str(out.with_suffix(".svg"))
    _write(out, made.to_yaml().encode())
    if request.n_front is not None:
        from sweep.report.plots import front_picture

        _write(out.with_suffix(".svg"), front_picture(document["front"], document["uniform"], [document]))
    if request.as_json:
        print(json.dumps(document, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
    else:
        next_steps = f"Next: sweep validate {out}, then sweep export {out} --format compressed-tensors --out DIR"
        sys.stdout.write("\n".join([*lines(document), f"Written: {out}", next_steps]) + "\n")
    return 0


def budget_of(request: Request, options: Options, problem: Problem) -> Budget:
    """What was typed; the smallest recipe's size if the question is about ranks or the front alone.

    Raises: SweepError: no budget, two of them, or none that is above 0.
    """
    if request.bits is None and request.gb is None and (request.rank or request.n_front is not None):
        return Budget(bits=cost_range(problem)[0] / float(options.weights.sum()))
    return Budget(bits=request.bits, gb=request.gb)


def rules_of(typed_pins: Sequence[str], excludes: Sequence[str], uniform_layer: bool, target: Target, options: Options) -> Rules:
    """The rules that were typed. Raises: SweepError: a pin without a label, or a target that runs none of the formats."""
    pins: dict[str, str] = {}
    for pin in typed_pins:
        pattern, sign, label = pin.rpartition("=")
        if not sign or not pattern:
            raise SweepError(f"--pin {pin!r} is not PATTERN=FORMAT. Type for example --pin '*.down_proj=wfp8_afp8/default', or =16 for 16 bits.")
        pins[pattern] = label
    formats = [option.format for option in options.formats]
    if not any(runs_natively(target, each) for each in formats):
        found = "; ".join(f"{each.label}: {target.status(each.quant_pair, each.quant_granularity, each.algorithm).words}" for each in formats[:6])
        raise SweepError(
            f"target={target.name} runs none of the {len(formats)} recipes as they are scored ({found}). "
            f"Score what it runs: sweep run -m grid=deployable target={target.name}"
        )
    return Rules(pins=pins, excludes=excludes, uniform_layer=uniform_layer, allowed=lambda each: runs_natively(target, each))


def runs_natively(target: Target, chosen: GroupFormat) -> bool:
    """Whether the target computes a format as it was scored: what runs as another one has another damage."""
    return target.status(chosen.quant_pair, chosen.quant_granularity, chosen.algorithm).kind == "native"


def summary(options: Options, problem: Problem, choice: IntArray, made: MixedRecipe) -> dict[str, Any]:
    """A recipe in figures: size, damage, how often each format is used, and what stays in the most bits."""
    counts = Counter(group.format or SIXTEEN for group in made.groups)
    highest = max(made.bits_of(group) for group in made.groups)
    head = None
    sizes: dict[str, float | None] = dict.fromkeys(("gb", "gb_covered", "gb_embeddings", "gb_lm_head", "gb_rest"))
    if options.elements is not None:
        sizes = sizes_gb(options, made)
        head = "covered" if options.covers_lm_head else "16 bits" if options.elements["lm_head"] else "tied to the embeddings"
    return {
        "name": made.name,
        "target": made.target,
        "effective_bits": made.effective_bits,
        **sizes,
        "lm_head": head,
        "predicted_kl": total(problem.damage, choice),
        "predicted_kl_interval": interval(options, choice),
        "formats": dict(sorted(counts.items(), key=lambda item: -item[1])),
        "most_bits": [short_group(group.group, list(group.modules)) for group in made.groups if made.bits_of(group) == highest],
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
    return [_point(options, total(problem.cost, choice), total(problem.damage, choice)) for _, choice in front(problem, n_budgets)]


def uniform_rows(options: Options, problem: Problem) -> list[dict[str, Any]]:
    """One format for all groups, each."""
    return [{"format": label, **_point(options, cost, damage)} for label, (cost, damage) in uniform_choices(options, problem).items()]


def _point(options: Options, cost: float, damage: float) -> dict[str, Any]:
    gb = None if options.elements is None else options.gb(cost)
    return {"effective_bits": cost / float(options.weights.sum()), "gb": gb, "predicted_kl": damage}


def _write(path: Path, content: bytes) -> None:
    from sweep.store.files import Files

    path = path.absolute()
    try:
        Files(str(path.parent)).write(path.name, content)
    except OSError as error:
        raise SweepError(f"Cannot write {path}: {error.strerror or error}. Give another place with --out.") from error
