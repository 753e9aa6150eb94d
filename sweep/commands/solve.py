"""`sweep solve`: the mixed-precision recipe of least predicted KL under a budget, from the store alone."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sweep.config.compose import expand
from sweep.config.targets import Target
from sweep.core.exits import EXIT_DONE
from sweep.core.text import aligned
from sweep.formats.mixed import RECIPE_BEGINS
from sweep.mixed_precision.candidates import Candidates, read_candidates, sized
from sweep.mixed_precision.knapsack import Problem, cost_range
from sweep.mixed_precision.recipe import SIXTEEN, Budget, problem_of, recipe_of_choice, rules_of, solved
from sweep.mixed_precision.summary import front_rows, ranked, summary, uniform_rows
from sweep.report.plots import FRONT_BEGINS, front_picture
from sweep.run.resources import own_device
from sweep.store.outputs import OutputFile, typed_path
from sweep.store.select import opened

_SHOWN_GROUPS: Final = 8
_SHOWN_RANKS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one `sweep solve` command."""

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
    """Solve, write the recipe, and print its figures. Returns the exit code.

    Raises: SweepError: nothing to choose from, or a budget or rules that nothing fits.
    """
    config = expand(request.overrides, multirun=True).points[0]
    target = Target.from_config(config.target)
    with opened(config.store.uri) as store:
        candidates = read_candidates(store, request.overrides)
    if request.gb is not None:
        candidates = sized(candidates)
    rules = rules_of(request.pins, request.excludes, request.uniform_layer, target, candidates)
    problem = problem_of(candidates, rules)
    budget = budget_of(request, candidates, problem)
    choice = solved(candidates, problem, budget, rules)
    name = f"{candidates.trial.model}-{target.name}-{budget.slug}"
    out = typed_path(request.out or f"outputs/recipes/{name}.yaml")
    file = OutputFile(path=out, begins=RECIPE_BEGINS)
    file.check()
    picture = OutputFile(path=out.with_suffix(".svg"), begins=FRONT_BEGINS)
    if request.n_front is not None:
        picture.check()
    made = recipe_of_choice(candidates, choice, name, target.name)
    for _ in range(request.recapture):
        from sweep.mixed_precision.recapture import recaptured_kl
        from sweep.mixed_precision.recipe_context import context_of

        context = context_of(made, replace(candidates.config, cluster=config.cluster))
        kl = recaptured_kl(context, made, candidates, own_device(config.cluster))
        problem = problem_of(candidates, rules, kl)
        choice = solved(candidates, problem, budget, rules)
        made = recipe_of_choice(candidates, choice, name, target.name, kl)
    document: dict[str, Any] = summary(candidates, problem, choice, made) | {"recipe": str(out)}
    n_usable = sum(rules.allowed(candidate.format) for candidate in candidates.formats)
    document["scored"] = {
        "recipes": len(candidates.formats),
        "usable": n_usable,
        "dataset": candidates.trial.dataset,
        "size": candidates.trial.size,
    }
    if request.rank:
        document["rank"] = ranked(candidates, problem, choice)
    if request.n_front is not None:
        document["front"] = front_rows(candidates, problem, request.n_front)
        document["uniform"] = uniform_rows(candidates, problem)
        document["picture"] = str(picture.path)
    file.put(made.to_yaml().encode())
    if request.n_front is not None:
        picture.put(front_picture(document["front"], document["uniform"], [document], candidates.trial.setting))
    if request.as_json:
        print(json.dumps(document, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
    else:
        next_steps = f"Next: sweep validate {out}, then sweep export {out} --format compressed-tensors --out DIR"
        sys.stdout.write("\n".join([*lines(document), f"Written: {out}", next_steps]) + "\n")
    return EXIT_DONE


def budget_of(request: Request, candidates: Candidates, problem: Problem) -> Budget:
    """The typed budget; the smallest recipe's size where only ranks or the front are asked for.

    Raises: SweepError: no budget, two of them, or none that is above 0.
    """
    if request.bits is None and request.gb is None and (request.rank or request.n_front is not None):
        return Budget(bits=cost_range(problem)[0] / float(candidates.weights.sum()))
    return Budget(bits=request.bits, gb=request.gb)


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """A solved recipe for the screen: size, predicted KL, formats, and the tables that were asked for."""
    bits = f"{document['effective_bits']:.3f} bits a weight of the covered layers"
    yield f"Recipe {document['name']} for {document['target']}: {bits}"
    scored = document["scored"]
    recipes = f"{scored['usable']} of {scored['recipes']} recipes scored on {scored['dataset']}/{scored['size']}"
    yield f"from {recipes} that the target runs as scored, and 16 bits"
    if document["gb"] is not None:
        yield from _size(document)
    spread = document["predicted_kl_interval"]
    interval = "" if spread is None else f" (90 % interval over samples: {spread[0]:.3g} to {spread[1]:.3g})"
    yield f"predicted KL {document['predicted_kl']:.4g} nats per prediction{interval}"
    for label, n in document["formats"].items():
        yield f"  {n:4d} layer groups: {label if label != SIXTEEN else '16 bits'}"
    most = document["most_bits"]
    if len(most) < sum(document["formats"].values()):
        more = f" and {len(most) - _SHOWN_GROUPS} more" if len(most) > _SHOWN_GROUPS else ""
        yield "most bits: " + ", ".join(most[:_SHOWN_GROUPS]) + more
    if "rank" in document:
        yield from _ranks(document["rank"])
    if "front" in document:
        yield from _front([*document["front"], *document["uniform"]])
        yield f"Picture: {document['picture']}"


def _size(document: Mapping[str, Any]) -> Iterator[str]:
    parts = {
        "covered layers": "gb_covered",
        "embeddings, in 16 bits": "gb_embeddings",
        "lm_head, in 16 bits": "gb_lm_head",
        "all else, in 16 bits": "gb_rest",
    }
    yield f"{document['gb']:.4g} GB of weights; lm_head: {document['lm_head']}"
    yield from (f"  {document[key]:10.4g} GB  {name}" for name, key in parts.items() if document[key] is not None)


def _ranks(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Layer groups by predicted KL, with their rank by predicted KL per GB saved beside it."""
    by_byte = sorted(
        (row for row in rows if row["predicted_kl_per_gb_saved"] is not None),
        key=lambda row: -row["predicted_kl_per_gb_saved"],
    )
    place = {row["group"]: rank for rank, row in enumerate(by_byte, start=1)}
    table = [("rank", "layer group", "format", "predicted KL", "KL per GB saved", "rank by that")]
    for rank, row in enumerate(rows[:_SHOWN_RANKS], start=1):
        per_gb = row["predicted_kl_per_gb_saved"]
        saved, second = ("-", "-") if per_gb is None else (f"{per_gb:.3g}", str(place[row["group"]]))
        table.append((str(rank), str(row["name"]), str(row["format"]), f"{row['predicted_kl']:.3g}", saved, second))
    yield from (f"  {line}" for line in aligned(table))
    if len(rows) > _SHOWN_RANKS:
        yield f"and {len(rows) - _SHOWN_RANKS} more: --json has all"


def _front(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    table = [("recipe", "bits", "GB", "predicted KL")]
    table += [
        (
            row.get("format", "best mix"),
            f"{row['effective_bits']:.3f}",
            "-" if row["gb"] is None else f"{row['gb']:.4g}",
            f"{row['predicted_kl']:.4g}",
        )
        for row in rows
    ]
    yield from (f"  {line}" for line in aligned(table))
