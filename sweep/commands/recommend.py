"""`sweep recommend`: from a model, a target and a budget to measured recipes, files that load, and a page to read."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import msgspec
import numpy as np
from markdown_it import MarkdownIt
from rich.console import Console

from sweep.commands.doctor import examine_prepared
from sweep.commands.export import checkpoint_at, export_checkpoint, is_exported, serve_line
from sweep.commands.run import Prepared, prepare, run_prepared
from sweep.commands.validate import remarks
from sweep.config.compose import expand
from sweep.config.targets import Target
from sweep.core.coverage import ModelCoverage
from sweep.core.exits import EXIT_DONE
from sweep.core.screen import say
from sweep.core.sizes import n_samples_of
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision import speeds
from sweep.mixed_precision.candidates import (
    Candidate,
    Candidates,
    format_of,
    kinds_typed,
    read_candidates,
    sized,
)
from sweep.mixed_precision.knapsack import Problem, cost_range
from sweep.mixed_precision.measured import (
    Measured,
    counts,
    held_out,
    markdown_table,
    uniform_recipes,
    validate,
    warning,
)
from sweep.mixed_precision.recipe import Budget, Rules, problem_of, recipe_of_choice, rules_of, solved
from sweep.mixed_precision.recipe_context import RecipeContext, context_of
from sweep.mixed_precision.shapes import candidate_misfits, misfit_lines
from sweep.mixed_precision.summary import Figures, figures_of, front_points, uniform_points
from sweep.plan.model import Model, checkpoint_dir
from sweep.plan.trials import SweepPlan
from sweep.report.analysis import IntArray
from sweep.report.plots import front_picture
from sweep.run.resources import own_device
from sweep.run.session import row_of
from sweep.store.outputs import OutputDirectory, place_of, typed_path
from sweep.store.store import Store
from workers.model.checkpoint import NOT_HELD

_FRONT = 24
# Names among the results.
_RECIPES = ("compact", "balanced", "faithful")
_PICTURE = "front.svg"
_PAGES = ("README.md", "index.html")
_CHECKPOINT = "checkpoint"  # a directory
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:left}"
    "pre{background:#f5f5f5;padding:.6em;overflow-x:auto}img{max-width:100%}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options of one `sweep recommend` command."""

    overrides: Sequence[str]
    bits: float | None
    gb: float | None
    out: str | None
    tokens: str | None  # kinds of token whose scores alone count, "answer,image"
    as_json: bool


def recommend(request: Request, console: Console) -> int:
    """Check, score, solve, measure, export and write a page. Returns the exit code.

    Raises: SweepError: wrong input, a budget that nothing fits, or an export that cannot hold the recipe.
    """
    asked, started, tokens = Budget(bits=request.bits, gb=request.gb), time.monotonic(), kinds_typed(request.tokens)
    grid = expand(["grid=deployable", *request.overrides], multirun=True)
    config = grid.points[0]
    target = Target.from_config(config.target)
    name = "-".join([config.model.name or "", target.slug, asked.slug, *tokens])
    out = typed_path(request.out or f"outputs/recommended/{name}").absolute()
    prepared = prepare(grid)
    model = Model(checkpoint_dir(config.model))
    _refuse_ahead(prepared, asked, target, model)
    results = _results_at(out)
    results.check()
    checkpoint = checkpoint_at(out / _CHECKPOINT, model, overwrite=True, others=True)
    checkpoint.check()
    # With --json nothing else is printed; a run by itself refuses everything that would stop it.
    if code := (0 if request.as_json else examine_prepared(prepared)) or run_prepared(prepared, console, started):
        return code
    typed = [*request.overrides, f"dataset.size={config.dataset.size}", "sensitivity.scales=fused"]
    candidates = sized(read_candidates(Store(config.store.uri), _without_repeats(typed), grid.points, tokens))
    rules = _rules(target, candidates, model)
    problem = problem_of(candidates, rules)
    choices = _choices(candidates, problem, asked, rules)
    made = {name: recipe_of_choice(candidates, each, name, target.label) for name, each in choices.items()}
    context = context_of(made["balanced"], config)
    uniform = [each for each in uniform_recipes(candidates) if _is_served(each, rules)]
    recipes = [*(("recipe", each) for each in made.values()), *(("uniform", each) for each in uniform)]
    rows = validate(context, recipes, own_device(config.cluster))
    measured = {row.name: row for row in reversed(rows)}  # on the first data set
    predicted = {name: figures_of(candidates, problem, choices[name], each) for name, each in made.items()}
    figures = [_with_measured(each, measured[name]) for name, each in predicted.items()]
    files = {f"{name}.yaml": each.to_yaml().encode() for name, each in made.items()}
    files[_PICTURE] = _picture(candidates, problem, figures)
    if not is_exported(context.recipe, checkpoint):
        export_checkpoint(context, checkpoint, target.checkpoint)
    exported = out / _CHECKPOINT
    trial = candidates.trial
    shapes, used = _shapes(target, candidates), [each for _, each in recipes]
    page = render(context, target, asked, figures, rows, used, exported, trial.variant_words, shapes)
    html = to_html(page, f"{trial.model} on {target.label}, {trial.variant_words}")
    files |= dict(zip(_PAGES, (page.encode(), html.encode()), strict=True))
    with results.filled() as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
    if request.as_json:
        own = {"recipes": msgspec.to_builtins(figures), "measured": [asdict(row) for row in rows]}
        own["speeds"] = speeds.document(target, used)
        if (warned := warning(rows)) is not None:
            own["warning"] = warned
        own |= {"page": str(out / "index.html"), "export": str(exported)}
        print(json.dumps(own, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
        return EXIT_DONE
    said = _recommended(made["balanced"], predicted["balanced"], rows)
    say(console, "\n".join(["", said, f"Page: {out / 'index.html'}", *remarks(context, rows)]))
    console.print(serve_line(exported, target), markup=False, highlight=False, soft_wrap=True)  # a line to copy
    return EXIT_DONE


def _recommended(balanced: MixedRecipe, figures: Figures, rows: Sequence[Measured]) -> str:
    on = [f"{row.measured_kl:.3g} measured on {row.dataset}" for row in rows if row.name == balanced.name]
    kl = f"KL {', '.join(on)}, {balanced.predicted_kl:.3g} predicted"
    whole = "" if figures.checkpoint_bits is None else f", {figures.checkpoint_bits:.3f} of the whole checkpoint"
    bits = f"{balanced.effective_bits:.3f} bits a weight of the covered layers{whole}"
    left = None if figures.coverage is None else figures.coverage.warning
    return "\n".join(
        [f"Recommended: balanced, {bits}, {kl}.", *([] if left is None else [f"{balanced.model}: {left}."])]
    )


def _with_measured(figures: Figures, row: Measured) -> Figures:
    return msgspec.structs.replace(figures, measured_kl=row.measured_kl, measured_kl_interval=row.measured_kl_interval)


def _choices(candidates: Candidates, problem: Problem, asked: Budget, rules: Rules) -> dict[str, IntArray]:
    """Optimal choices at the budget ("balanced"), below it and above it, by recipe name.

    Raises: SweepError: nothing fits the budget.
    """
    balanced = solved(candidates, problem, asked, rules)
    low, high = cost_range(problem)
    cost = min(asked.cost(candidates), high)
    weights = float(candidates.weights.sum())
    budgets = dict(zip(_RECIPES, ((low + cost) / 2, cost, cost + (high - cost) / 4), strict=True))
    return {
        name: balanced if name == "balanced" else solved(candidates, problem, Budget(bits=each / weights), rules)
        for name, each in budgets.items()
    }


def _picture(candidates: Candidates, problem: Problem, figures: Sequence[Figures]) -> bytes:
    """KL over size, as SVG; without a front where one recipe is both the smallest and the best."""
    low, high = cost_range(problem)
    front = front_points(candidates, problem, _FRONT) if high > low else []
    chosen = [each.point for each in figures]
    return front_picture(front, uniform_points(candidates, problem), chosen, candidates.trial.setting)


def render(
    context: RecipeContext,
    target: Target,
    asked: Budget,
    figures: Sequence[Figures],
    rows: Sequence[Measured],
    recipes: Sequence[MixedRecipe],
    exported: Path,
    shared: str,
    shapes: Sequence[str],
) -> str:
    """The page, as Markdown.

    Args:
        context: of the balanced recipe.
        target: that runs it.
        asked: the budget.
        figures: of the named recipes.
        rows: KL of all recipes.
        recipes: all of them, whose formats' speeds are shown.
        exported: the checkpoint.
        shared: scales and dtype of all formats, in words.
        shapes: lines of `_shapes`.
    """
    made = context.recipe
    parts = [
        f"# {made.model} on {target.runtime}: mixed precision under {asked}, {shared}",
        f"Scored on {made.dataset}, {made.size} (revision {made.dataset_revision[:12]}); "
        f"the model is revision {made.model_revision[:12]}. "
        f"KL was measured on samples that neither calibrated nor scored ({counts(rows)}), "
        "in nats per prediction, with 90 % bootstrap intervals.",
        *(f"The sweep {each.text}. All else stays in 16 bits." for each in _coverage(figures)),
        *remarks(context, rows),
        "![KL over size: the best mixes, one format for all, and the recommended recipes](front.svg)",
        "## Recipes",
        "\n".join(_recipe_lines(figures, rows)),
        "## Predicted and measured",
        markdown_table(rows),
        "## Speed, measured",
        *speeds.section(target, recipes),
        "## Serve it",
        f"```\n{serve_line(exported, target)}\n```",
        "The other recipes become files in the same way: "
        f"`sweep export compact.yaml --format {target.checkpoint} --out compact`",
        "What the formats are called there:",
        "\n".join(_names(made, target)),
        *(["Left out for their shapes:", "\n".join(f"- {line}" for line in shapes)] if shapes else []),
    ]
    return "\n\n".join(parts) + "\n"


def _coverage(figures: Sequence[Figures]) -> list[ModelCoverage]:
    """What the recipes cover of the model: the same in all, so one; none where the store does not know."""
    return [each.coverage for each in figures[:1] if each.coverage is not None]


def to_html(page: str, title: str) -> str:
    """The page as one HTML file beside its picture."""
    body = MarkdownIt("commonmark").enable("table").render(page)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _recipe_lines(figures: Sequence[Figures], rows: Sequence[Measured]) -> list[str]:
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    on = [f" on {dataset}" if len(datasets) > 1 else "" for dataset in datasets]
    kl_columns = " | ".join(["predicted KL (90 %)", *(f"measured KL{name} (90 %)" for name in on)])
    lines = [
        f"| recipe | bits a covered weight | bits a weight of all | GB covered | GB of all weights | {kl_columns} "
        "| layer groups by format |",
        f"|---|{'---:|' * (5 + len(datasets))}---|",
    ]
    for each in figures:
        formats = ", ".join(f"{n} {label if label != '16' else 'in 16 bits'}" for label, n in each.formats.items())
        predicted = f"{each.predicted_kl:.3g}{_spread(each.predicted_kl_interval)}"
        own = [row for row in rows if row.name == each.name]
        measured = " | ".join(f"{row.measured_kl:.3g}{_spread(row.measured_kl_interval)}" for row in own)
        gb = ["-" if size is None else f"{size:.4g}" for size in (each.gb_covered, each.gb)]
        whole = "-" if each.checkpoint_bits is None else f"{each.checkpoint_bits:.3f}"
        sizes = " | ".join([f"{each.effective_bits:.3f}", whole, *gb])
        lines.append(f"| [{each.name}]({each.name}.yaml) | {sizes} | {predicted} | {measured} | {formats} |")
    return lines


def _spread(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g})"


def _names(made: MixedRecipe, target: Target) -> list[str]:
    found = {
        label: target.status(each.quant_pair, each.quant_granularity, each.algorithm)
        for label, each in made.formats.items()
    }
    return [
        f"- {label}: {status.reader_name} ({status.source})" + (f". {status.reason}" if status.reason else "")
        for label, status in found.items()
    ]


def _refuse_ahead(prepared: Prepared, asked: Budget, target: Target, model: Model) -> None:
    """Refuse what no score can change, before hours are spent on scoring.

    Raises: SweepError: a target that runs nothing of the grid as scored, a budget below its smallest recipe, or samples
        to measure on that are too few or calibrated.
    """
    candidates = planned_candidates(prepared.plan)
    rules = _rules(target, candidates, model)
    choice = solved(candidates, problem_of(candidates, rules), asked, rules)
    recipe = recipe_of_choice(candidates, choice, "planned", target.label)
    held_out(context_of(recipe, prepared.grid.points[0]))


def _rules(target: Target, candidates: Candidates, model: Model) -> Rules:
    """What the target runs as scored, its checkpoints can hold and its kernels take. Raises: SweepError: no format.

    A layer group whose weight is no tensor of its own in the checkpoint stays in 16 bits.
    """
    rules = rules_of((), (), False, target, candidates)

    def allowed(each: GroupFormat) -> bool:
        return rules.allowed(each) and target.exports(each.quant_pair, each.quant_granularity, each.algorithm)

    left_out = candidate_misfits(target, candidates)
    refused = {(each.label, each.group.name): each.reason for each in left_out}
    for group in model.without_weights(candidates.groups):
        refused |= {(each.format.label, group.name): f"it is {NOT_HELD}" for each in candidates.formats}
    return replace(rules, allowed=allowed, refused=refused)


def _is_served(uniform: MixedRecipe, rules: Rules) -> bool:
    """Whether the target runs one format in every layer group."""
    refused = {label for label, _ in rules.refused}
    return all(rules.allowed(each) and label not in refused for label, each in uniform.formats.items())


def _shapes(target: Target, candidates: Candidates) -> list[str]:
    """Layer groups that a format is left out for, a line a kernel."""
    return [*misfit_lines(target, candidate_misfits(target, candidates))]


def _results_at(out: Path) -> OutputDirectory:
    """The directory of everything but a checkpoint, where files of an earlier call are replaced."""
    names = [*(f"{name}.yaml" for name in _RECIPES), _PICTURE, *_PAGES]
    return OutputDirectory(directory=place_of(out), kind="recommendation", names=names, overwrite=True)


def _without_repeats(overrides: Sequence[str]) -> list[str]:
    """The first of the overrides of each key."""
    found: dict[str, str] = {}
    for override in overrides:
        found.setdefault(override.partition("=")[0], override)
    return list(found.values())


def planned_candidates(plan: SweepPlan) -> Candidates:
    """The candidates that a grid will give, with a predicted KL of 0: enough to tell which fit a budget before scoring.

    Args:
        plan: of one model and one data set.
    """
    trials = [trial for trial in plan.trials if trial.cell_id is not None and trial.task_id is not None]
    first = max(trials, key=lambda trial: n_samples_of(trial.config.dataset.size))
    groups = plan.tasks[first.task_id or ""].groups
    formats = {found.label: (found, trial.cell_id or "") for trial in trials for found in [format_of(trial.config)]}
    return Candidates(
        trial=row_of(first, "planned", None, ""),
        config=first.config,
        groups=groups,
        formats=tuple(
            Candidate(format=found, cell_id=cell, predicted_kl=np.zeros(len(groups)), sample_kl=None)
            for found, cell in formats.values()
        ),
        elements=plan.models[first.model_revision],
    )
