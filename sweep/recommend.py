"""`sweep recommend`: from a model, a target and a budget to recipes that were measured, files that load, and a page to read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from rich.console import Console

from sweep.compose import expand
from sweep.doctor import examine
from sweep.export import export_checkpoint, export_text
from sweep.files import Files
from sweep.mixed import MixedRecipe
from sweep.mixing import Budget, problem_of, recipe, solved
from sweep.options import read_options, sized
from sweep.pictures import front_picture
from sweep.prepared import Prepared, prepared
from sweep.run import run
from sweep.solve import cost_range
from sweep.solving import front_rows, rules_of, summary, uniform_rows
from sweep.store import Store
from sweep.targets import Target
from sweep.validate import Measured, markdown_table, uniform_recipes, validate

_FRONT = 24
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:left}pre{background:#f5f5f5;padding:.6em;overflow-x:auto}img{max-width:100%}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was typed."""

    overrides: Sequence[str]
    bits: float | None
    gb: float | None
    out: str | None
    as_json: bool


def recommend(request: Request, console: Console) -> int:
    """The whole way. Returns the exit code.

    Raises: SweepError: wrong input, a budget that nothing fits, or an export that cannot hold the recipe.
    """
    asked = Budget(bits=request.bits, gb=request.gb)
    grid = ["grid=deployable", *request.overrides]
    config = expand(grid, multirun=True).points[0]
    target = Target.from_config(config.target)
    if (code := examine(grid, multirun=True, as_json=False) if not request.as_json else 0) or (code := run(grid, multirun=True, console=console)):
        return code
    typed = [*request.overrides, f"dataset.size={config.dataset.size}", "sensitivity.scales=fused"]
    options = read_options(Store(config.store.uri), _without_repeats(typed))
    if options.elements is not None:
        options = sized(options)
    rules = rules_of((), (), False, target, options)
    problem = problem_of(options, rules)
    choice = solved(options, problem, asked, rules)  # says so before anything else if nothing fits
    low, high = cost_range(problem)
    cost = min(asked.cost(options), high)
    weights = float(options.weights.sum())
    budgets = {"compact": (low + cost) / 2, "balanced": cost, "faithful": cost + (high - cost) / 4}
    choices = {name: choice if name == "balanced" else solved(options, problem, Budget(bits=each / weights), rules) for name, each in budgets.items()}
    made = {name: recipe(options, each, name, target.name) for name, each in choices.items()}
    ready = prepared(made["balanced"], config)
    uniform = [each for each in uniform_recipes(options) if rules.allowed(next(iter(each.formats.values())))]
    rows = validate(ready, [*(("recipe", each) for each in made.values()), *(("uniform", each) for each in uniform)])
    summaries = [summary(options, problem, choices[name], each) for name, each in made.items()]
    measured = {row.name: row for row in rows}
    for each in summaries:
        each["measured_kl"] = measured[each["name"]].measured_kl
    out = Path(request.out or f"outputs/recommended/{options.trial.model}-{target.name}-{asked.slug}").expanduser().absolute()
    files = Files(str(out))
    for name, each in made.items():
        files.write(f"{name}.yaml", each.to_yaml().encode())
    picture = front_picture(front_rows(options, problem, _FRONT) if high > low else [], uniform_rows(options, problem), summaries)
    files.write("front.svg", picture)
    exported = _export(ready, target, out)
    page = render(ready, target, asked, summaries, rows, exported)
    files.write("README.md", page.encode())
    files.write("index.html", to_html(page, f"{options.trial.model} on {target.name}").encode())
    if request.as_json:
        document = {"recipes": summaries, "measured": [asdict(row) for row in rows], "page": str(out / "index.html"), "export": str(exported)}
        print(json.dumps(document, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
        return 0
    balanced = measured["balanced"]
    bits = f"{made['balanced'].effective_bits:.3f} bits a weight"
    console.print(f"\nRecommended: balanced, {bits}, KL {balanced.measured_kl:.3g} measured, {balanced.predicted_kl:.3g} predicted.", highlight=False)
    console.print(f"Page: {out / 'index.html'}", highlight=False, soft_wrap=True)
    console.print(_serve(target, exported), highlight=False, soft_wrap=True, markup=False)
    return 0


def render(ready: Prepared, target: Target, asked: Budget, summaries: Sequence[dict[str, Any]], rows: Sequence[Measured], exported: Path) -> str:
    """The page, as Markdown."""
    made, first = ready.recipe, rows[0]
    parts = [
        f"# {made.model} on {target.runtime}: mixed precision under {asked}",
        f"Scored on {made.dataset}, {made.size} (revision {made.dataset_revision[:12]}); the model is revision {made.model_revision[:12]}. "
        f"Damage was measured on {first.n_samples} samples that neither calibrated nor scored ({first.n_predictions} predictions), "
        "in nats per prediction, with 90 % bootstrap intervals.",
        "![KL over size: the best mixes, one format for all, and the recommended recipes](front.svg)",
        "## Recipes",
        "\n".join(_recipe_lines(summaries)),
        "## Predicted and measured",
        markdown_table(rows),
        "## Serve it",
        f"```\n{_serve(target, exported)}\n```",
        "The other recipes: `sweep export compact.yaml` or `faithful.yaml`. What the formats are called there:",
        "\n".join(_names(made, target)),
    ]
    return "\n\n".join(parts) + "\n"


def to_html(page: str, title: str) -> str:
    """The page as one HTML file beside its picture."""
    body = MarkdownIt("commonmark").enable("table").render(page)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n'
    )


def _recipe_lines(summaries: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| recipe | bits a weight | GB of weights | predicted KL (90 %) | measured KL | layer groups by format |", "|---|---:|---:|---:|---:|---|"]
    for each in summaries:
        spread = each["predicted_kl_interval"]
        interval = "" if spread is None else f" ({spread[0]:.3g} to {spread[1]:.3g})"
        formats = ", ".join(f"{n} {label if label != '16' else 'in 16 bits'}" for label, n in each["formats"].items())
        gb = "-" if each["gb"] is None else f"{each['gb']:.4g}"
        figures = f"{each['effective_bits']:.3f} | {gb} | {each['predicted_kl']:.3g}{interval} | {each['measured_kl']:.3g}"
        lines.append(f"| [{each['name']}]({each['name']}.yaml) | {figures} | {formats} |")
    return lines


def _names(made: MixedRecipe, target: Target) -> list[str]:
    found = {label: target.status(each.quant_pair, each.quant_granularity, each.algorithm) for label, each in made.formats.items()}
    return [f"- {label}: {status.reader_name} ({status.source})" + (f". {status.reason}" if status.reason else "") for label, status in found.items()]


def _export(ready: Prepared, target: Target, out: Path) -> Path:
    """What the target's runtime reads: a compressed-tensors checkpoint for vLLM, ModelOpt's recipe for the rest."""
    if target.name.startswith("vllm"):
        export_checkpoint(ready.recipe, ready.config, ready.model, out / "checkpoint")
        return out / "checkpoint"
    export_text(ready.recipe, "modelopt", ready.model, out / "modelopt_recipe.yaml")
    return out / "modelopt_recipe.yaml"


def _serve(target: Target, exported: Path) -> str:
    if target.name.startswith("vllm"):
        return f"vllm serve {exported}"
    return f"python hf_ptq.py --recipe {exported}   # ModelOpt's example makes the checkpoint that the runtime reads"


def _without_repeats(overrides: Sequence[str]) -> list[str]:
    """The first of the overrides of each key."""
    found: dict[str, str] = {}
    for override in overrides:
        found.setdefault(override.partition("=")[0], override)
    return list(found.values())
