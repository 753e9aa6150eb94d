"""`sweep solve`: the mixed-precision recipe of least predicted damage under a budget, from the store alone."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sweep.analysis import IntArray
from sweep.compose import expand
from sweep.errors import SweepError
from sweep.mixed import GroupFormat, MixedRecipe
from sweep.mixing import SIXTEEN, Budget, Rules, interval, problem_of, recipe, solved, uniform_choices, weights_gb
from sweep.options import Options, read_options
from sweep.report_rows import short_group
from sweep.solve import Problem, cost_range, front, total
from sweep.store import Store
from sweep.targets import Target

_SHOWN_GROUPS = 8


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
    options = read_options(Store(config.store.uri), request.overrides)
    rules, budget = rules_of(request, target, options), Budget(bits=request.bits, gb=request.gb)
    problem = problem_of(options, rules)
    choice = solved(options, problem, budget)
    name = f"{options.trial.model}-{target.name}-{budget.slug}"
    made = recipe(options, choice, name, target.name)
    for _ in range(request.recapture):
        from sweep.recapturing import recaptured_damage

        damage = recaptured_damage(options, made, config)
        problem = problem_of(options, rules, damage)
        choice = solved(options, problem, budget)
        made = recipe(options, choice, name, target.name, damage)
    out = Path(request.out).expanduser() if request.out else Path("outputs/recipes") / f"{made.name}.yaml"
    document: dict[str, Any] = summary(options, problem, choice, made) | {"recipe": str(out)}
    if request.rank:
        document["rank"] = ranked(options, problem, choice)
    if request.n_front:
        document["front"] = front_rows(options, problem, request.n_front)
        document["uniform"] = uniform_rows(options, problem)
        document["picture"] = str(out.with_suffix(".svg"))
    _write(out, made.to_yaml().encode())
    if request.n_front:
        from sweep.pictures import front_picture

        _write(out.with_suffix(".svg"), front_picture(document["front"], document["uniform"], [document]))
    if request.as_json:
        print(json.dumps(document, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
    else:
        _print(document, Console(markup=False, soft_wrap=True, highlight=False))
    return 0


def rules_of(request: Request, target: Target, options: Options) -> Rules:
    """The rules that were typed. Raises: SweepError: a pin without a label, or a target that runs none of the formats."""
    pins: dict[str, str] = {}
    for pin in request.pins:
        pattern, sign, label = pin.rpartition("=")
        if not sign or not pattern:
            raise SweepError(f"--pin {pin!r} is not PATTERN=FORMAT. Type for example --pin '*.down_proj=wfp8_afp8/default', or =16 for 16 bits.")
        pins[pattern] = label
    formats = [option.format for option in options.formats]
    if not any(runs_natively(target, each) for each in formats):
        found = "; ".join(f"{each.label}: {target.status(each.quant_pair, each.quant_granularity, each.algorithm).words}" for each in formats[:6])
        raise SweepError(
            f"target={target.name} runs none of the {len(formats)} scored recipes as they are ({found}). "
            f"Score what it runs: sweep run -m grid=deployable target={target.name}"
        )
    return Rules(pins=pins, excludes=request.excludes, uniform_layer=request.uniform_layer, allowed=lambda each: runs_natively(target, each))


def runs_natively(target: Target, chosen: GroupFormat) -> bool:
    """Whether the target computes a format as it was scored: what runs as another one has another damage."""
    return target.status(chosen.quant_pair, chosen.quant_granularity, chosen.algorithm).kind == "native"


def summary(options: Options, problem: Problem, choice: IntArray, made: MixedRecipe) -> dict[str, Any]:
    """A recipe in figures: size, damage, how often each format is used, and what stays in the most bits."""
    counts = Counter(group.format or SIXTEEN for group in made.groups)
    highest = max(made.bits_of(group) for group in made.groups)
    known = options.elements is not None
    return {
        "name": made.name,
        "target": made.target,
        "effective_bits": made.effective_bits,
        "gb": weights_gb(options, made) if known else None,
        "gb_not_covered": options.other_bytes / 1e9 if known else None,
        "gb_embeddings": options.elements["embeddings"] * 2 / 1e9 if options.elements is not None else None,
        "gb_lm_head": options.elements["lm_head"] * 2 / 1e9 if options.elements is not None else None,
        "predicted_kl": total(problem.damage, choice),
        "predicted_kl_interval": interval(options, choice),
        "formats": dict(sorted(counts.items(), key=lambda item: -item[1])),
        "most_bits": [short_group(group.group, list(group.modules)) for group in made.groups if made.bits_of(group) == highest],
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
                "format": label,
                "predicted_kl": float(damage),
                "bytes_saved": float(saved),
                "predicted_kl_per_gb_saved": float(damage / saved * 1e9) if saved else None,
            }
        )
    return sorted(rows, key=lambda row: -row["predicted_kl"])


def front_rows(options: Options, problem: Problem, n_budgets: int) -> list[dict[str, Any]]:
    """The Pareto front at so many budgets."""
    low, high = cost_range(problem)
    if high <= low:
        raise SweepError("One recipe is the smallest and the best: there is no front. Score more formats.")
    return [_point(options, total(problem.cost, choice), total(problem.damage, choice)) for _, choice in front(problem, n_budgets)]


def uniform_rows(options: Options, problem: Problem) -> list[dict[str, Any]]:
    """One format for all groups, each."""
    return [{"format": label, **_point(options, cost, damage)} for label, (cost, damage) in uniform_choices(options, problem).items()]


def _point(options: Options, cost: float, damage: float) -> dict[str, Any]:
    gb = None if options.elements is None else (cost / 8 + options.other_bytes) / 1e9
    return {"effective_bits": cost / float(options.weights.sum()), "gb": gb, "predicted_kl": damage}


def _write(path: Path, content: bytes) -> None:
    from sweep.files import Files

    path = path.absolute()
    try:
        Files(str(path.parent)).write(path.name, content)
    except OSError as error:
        raise SweepError(f"Cannot write {path}: {error.strerror or error}. Give another place with --out.") from error


def _print(document: dict[str, Any], console: Console) -> None:
    size = f"{document['effective_bits']:.3f} bits a weight of the covered layers"
    if document["gb"] is not None:
        rest = f"{document['gb_not_covered']:.3g} GB of it not covered, in 16 bits: embeddings {document['gb_embeddings']:.3g}"
        rest += f", lm_head {document['gb_lm_head']:.3g}" if document["gb_lm_head"] else ", lm_head tied to them"
        size += f"; {document['gb']:.4g} GB of weights ({rest})"
    console.print(f"Recipe {document['name']} for {document['target']}: {size}")
    low_high = document["predicted_kl_interval"]
    spread = "" if low_high is None else f" (90 %: {low_high[0]:.3g} to {low_high[1]:.3g})"
    console.print(f"predicted KL {document['predicted_kl']:.4g} nats per prediction{spread}")
    for label, n in document["formats"].items():
        console.print(f"  {n:4d} layer groups: {label if label != SIXTEEN else '16 bits'}")
    most = document["most_bits"]
    if len(most) < sum(document["formats"].values()):
        console.print("most bits: " + ", ".join(most[:_SHOWN_GROUPS]) + (f" and {len(most) - _SHOWN_GROUPS} more" if len(most) > _SHOWN_GROUPS else ""))
    if "rank" in document:
        table = Table("layer group", "format", "predicted KL", "KL per GB saved", box=None)
        for row in document["rank"]:
            per_gb = row["predicted_kl_per_gb_saved"]
            table.add_row(row["group"], row["format"], f"{row['predicted_kl']:.3g}", "-" if per_gb is None else f"{per_gb:.3g}")
        console.print(table)
    if "front" in document:
        table = Table("", "bits", "GB", "predicted KL", box=None)
        for row in [*document["front"], *document["uniform"]]:
            table.add_row(
                row.get("format", "mixed"), f"{row['effective_bits']:.3f}", "-" if row["gb"] is None else f"{row['gb']:.4g}", f"{row['predicted_kl']:.4g}"
            )
        console.print(table)
        console.print(f"Picture: {document['picture']}")
    console.print(f"Written: {document['recipe']}")
    console.print(f"Next: sweep validate {document['recipe']}, then sweep export {document['recipe']} --format compressed-tensors --out DIR")
