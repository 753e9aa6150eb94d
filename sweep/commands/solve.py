"""`sweep solve`: the mixed-precision recipe of least predicted KL under a budget, from the store alone."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from sweep.config.compose import expand
from sweep.config.targets import Target
from sweep.core.coverage import ModelCoverage
from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE
from sweep.core.sample_kl import TRUSTED_KL
from sweep.core.screen import say, show_next, show_table
from sweep.formats.mixed import RECIPE_BEGINS, counted
from sweep.formats.quantizer import UNQUANTIZED_BITS
from sweep.mixed_precision.candidates import Candidates, kinds_typed, read_candidates, sized
from sweep.mixed_precision.knapsack import Problem, cost_range
from sweep.mixed_precision.recipe import SIXTEEN, Budget, Rules, problem_of, recipe_of_choice, rules_of, solved
from sweep.mixed_precision.shapes import Misfit, candidate_misfits, misfit_lines, other_ranks_line
from sweep.mixed_precision.summary import Figures, Ranked, figures_of, front_points, ranked, uniform_points
from sweep.report.plots import FRONT_BEGINS, Point, front_picture
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
    linear: bool  # leave interactions of layer groups out
    n_front: int | None
    rank: bool
    tokens: str | None  # kinds of token whose scores alone count, "answer,image"
    as_json: bool


class Scored(msgspec.Struct, frozen=True, kw_only=True):
    """The scored recipes that a mix was chosen from."""

    recipes: int  # scored
    usable: int  # of them, by the target as they are scored
    dataset: str
    size: str


class Tables(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A solved recipe beside its figures: files, and the tables that were asked for."""

    recipe: str  # the file
    scored: Scored
    shapes: list[str] = []  # formats that are left out, a line a reason: the target's kernels, its number of ranks
    rank: list[Ranked] | None = None
    front: list[Point] | None = None
    uniform: list[Point] | None = None
    picture: str | None = None


def solve_command(request: Request) -> int:
    """Solve, write the recipe, and print its figures. Returns the exit code.

    Raises: SweepError: nothing to choose from, a budget or rules that nothing fits, or kinds of token that are not
        known.
    """
    tokens = kinds_typed(request.tokens)
    config = expand(request.overrides, multirun=True).points[0]
    target = Target.from_config(config.target)
    with opened(config.store.uri) as store:
        candidates = read_candidates(store, request.overrides, tokens=tokens)
    if request.linear:
        candidates = replace(candidates, interaction_weight=None)
    _check_recapture(request, candidates)
    if request.gb is not None:
        candidates = sized(candidates)
    rules = rules_of(request.pins, request.excludes, request.uniform_layer, target, candidates)
    left_out = candidate_misfits(target, candidates)
    rules = replace(rules, refused={(each.label, each.group.name): each.reason for each in left_out})
    problem = problem_of(candidates, rules)
    budget = budget_of(request, candidates, problem)
    choice = solved(candidates, problem, budget, rules)
    name = "-".join([candidates.trial.model, target.slug, budget.slug, *tokens])
    out = typed_path(request.out or f"outputs/recipes/{name}.yaml")
    file = OutputFile(path=out, begins=RECIPE_BEGINS)
    file.check()
    picture = OutputFile(path=out.with_suffix(".svg"), begins=FRONT_BEGINS)
    if request.n_front is not None:
        picture.check()
    made = recipe_of_choice(candidates, choice, name, target.label)
    for _ in range(request.recapture):
        from sweep.mixed_precision.recapture import recaptured_kl
        from sweep.mixed_precision.recipe_context import context_of

        context = context_of(made, replace(candidates.config, cluster=config.cluster))
        kl = recaptured_kl(context, made, candidates, own_device(config.cluster))
        problem = problem_of(candidates, rules, kl)
        choice = solved(candidates, problem, budget, rules)
        made = recipe_of_choice(candidates, choice, name, target.label, kl)
    figures = figures_of(candidates, problem, choice, made)
    tables = _tables(candidates, rules, target, left_out, out)
    if request.rank:
        tables.rank = ranked(candidates, problem, choice)
    if request.n_front is not None:
        tables.front = front_points(candidates, problem, request.n_front)
        tables.uniform = uniform_points(candidates, problem)
        tables.picture = str(picture.path)
    file.put(made.to_yaml().encode())
    if tables.front is not None:
        picture.put(front_picture(tables.front, tables.uniform or [], [figures.point], candidates.trial.setting))
    if request.as_json:
        document = msgspec.to_builtins(figures) | msgspec.to_builtins(tables)
        print(json.dumps(document, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
    else:
        console = Console()
        show(console, figures, tables)
        say(console, f"Written: {out}")
        show_next(console, *_next_steps(request, out, target))
    return EXIT_DONE


def _check_recapture(request: Request, candidates: Candidates) -> None:
    """Refuse to mix scores. Raises: SweepError: --recapture's would be of other tokens or labels than the store's."""
    if candidates.tokens and request.recapture:
        raise SweepError(
            "--recapture scores again by all tokens, --tokens decides by some. Type one of the two without the other."
        )
    if request.recapture and candidates.trial.method == "fisher":
        raise SweepError(
            "--recapture scores again by the data's own labels, as sensitivity.method=gradient does; these are of "
            "method=fisher. Type sensitivity.method=gradient, or leave --recapture out."
        )


def _next_steps(request: Request, out: Path, target: Target) -> tuple[str, str]:
    """The commands to type next, on the data sets of `validation` that were typed."""
    on = [override for override in request.overrides if override.startswith("validation.")]
    validated = shlex.join(["sweep", "validate", str(out), *on])
    exported = shlex.join(["sweep", "export", str(out), "--format", target.checkpoint, "--out", "DIR"])
    return validated, exported


def _tables(candidates: Candidates, rules: Rules, target: Target, left_out: Sequence[Misfit], out: Path) -> Tables:
    """Where the recipe lies, and what it was chosen from."""
    usable = [candidate.format for candidate in candidates.formats if rules.allowed(candidate.format)]
    labels, trial = {each.label for each in usable}, candidates.trial
    shapes = [*misfit_lines(target, [each for each in left_out if each.label in labels])]
    if (line := other_ranks_line(target, candidates)) is not None:
        shapes.append(line)
    scored = Scored(recipes=len(candidates.formats), usable=len(usable), dataset=trial.dataset, size=trial.size)
    return Tables(recipe=str(out), scored=scored, shapes=shapes)


def budget_of(request: Request, candidates: Candidates, problem: Problem) -> Budget:
    """The typed budget; the smallest recipe's size where only ranks or the front are asked for.

    Raises: SweepError: no budget, two of them, or none that is above 0.
    """
    if request.bits is None and request.gb is None and (request.rank or request.n_front is not None):
        return Budget(bits=cost_range(problem)[0] / float(candidates.weights.sum()))
    return Budget(bits=request.bits, gb=request.gb)


def show(console: Console, figures: Figures, tables: Tables) -> None:
    """Print a solved recipe: size, predicted KL, formats, and the tables that were asked for."""
    say(console, "\n".join([*_lines(figures, tables.scored), *tables.shapes]), indent="  ")
    if tables.rank is not None:
        _show_ranks(console, tables.rank)
    if tables.front is not None:
        _show_front(console, [*tables.front, *(tables.uniform or [])])
        say(console, f"Picture: {tables.picture}")


def _lines(figures: Figures, scored: Scored) -> Iterator[str]:
    bits = f"{figures.effective_bits:.3f} bits a weight of the covered layers"
    if figures.checkpoint_bits is not None:
        bits += f", {figures.checkpoint_bits:.3f} of the whole checkpoint"
    yield f"Recipe {figures.name} for {figures.target}: {bits}"
    recipes = f"{scored.usable} of {scored.recipes} recipes scored on {scored.dataset}/{scored.size}"
    yield f"from {recipes} that the target runs as scored, and 16 bits"
    if figures.coverage is not None:
        yield figures.coverage.text
        yield from _size(figures, figures.coverage)
    spread = figures.predicted_kl_interval
    interval = "" if spread is None else f" (90 % interval over samples: {spread[0]:.3g} to {spread[1]:.3g})"
    yield f"predicted KL {figures.predicted_kl:.4g} nats per prediction{interval}"
    if figures.tokens:
        yield f"  counting {counted(figures.tokens)}"
    if figures.joint is not None:
        joint = figures.joint
        yield f"  {joint.linear_kl:.4g} as the sum of each layer group alone; in the choice interactions count"
        yield f"  {joint.weight:.0%}, as far as samples agree on them; no mix of this size is better by {joint.gap:.1%}"
    if figures.predicted_kl > TRUSTED_KL:
        yield f"  above {TRUSTED_KL:g} nats an estimate of small changes ends: trust the order, not the size"
    for label, n in figures.formats.items():
        yield f"  {n:4d} layer groups: {label if label != SIXTEEN else '16 bits'}"
    most = figures.most_bits
    if len(most) < sum(figures.formats.values()):
        more = f" and {len(most) - _SHOWN_GROUPS} more" if len(most) > _SHOWN_GROUPS else ""
        yield "most bits: " + ", ".join(most[:_SHOWN_GROUPS]) + more


def _size(figures: Figures, coverage: ModelCoverage) -> Iterator[str]:
    yield f"{figures.gb:.4g} GB of weights; lm_head: {figures.lm_head}"
    yield f"  {figures.gb_covered:10.4g} GB  covered layers"
    for each in coverage.not_covered:
        yield f"  {each.elements * UNQUANTIZED_BITS / 8e9:10.4g} GB  {each.name}, in 16 bits"


def _show_ranks(console: Console, rows: Sequence[Ranked]) -> None:
    """Layer groups by predicted KL, with their rank by predicted KL per GB saved beside it."""
    by_byte = sorted(
        (row for row in rows if row.predicted_kl_per_gb_saved is not None),
        key=lambda row: -(row.predicted_kl_per_gb_saved or 0.0),
    )
    place = {row.group: rank for rank, row in enumerate(by_byte, start=1)}
    heading = ["rank", "layer group", "format", "predicted KL", "KL per GB saved", "rank by that"]
    table: list[list[str]] = []
    for rank, row in enumerate(rows[:_SHOWN_RANKS], start=1):
        per_gb = row.predicted_kl_per_gb_saved
        saved, second = ("-", "-") if per_gb is None else (f"{per_gb:.3g}", str(place[row.group]))
        table.append([str(rank), row.name, row.format, f"{row.predicted_kl:.3g}", saved, second])
    show_table(console, heading, table, figures=[heading[0], *heading[3:]])
    if len(rows) > _SHOWN_RANKS:
        say(console, f"and {len(rows) - _SHOWN_RANKS} more: --json has all")


def _show_front(console: Console, points: Sequence[Point]) -> None:
    heading, table = ["recipe", "bits", "of all", "GB of all", "predicted KL"], list[list[str]]()
    for point in points:
        gb = "-" if point.gb is None else f"{point.gb:.4g}"
        whole = "-" if point.checkpoint_bits is None else f"{point.checkpoint_bits:.3f}"
        bits = [f"{point.effective_bits:.3f}", whole]
        table.append([point.format or "best mix", *bits, gb, f"{point.predicted_kl:.4g}"])
    show_table(console, heading, table, figures=heading[1:])
