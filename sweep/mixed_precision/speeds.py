"""The measured speeds of the formats that recipes use, for the page of `sweep recommend` and for its JSON."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from sweep.config.speeds import UNQUANTIZED, Speed, Speeds
from sweep.config.targets import Target
from sweep.formats.mixed import MixedRecipe

_COLUMNS = {"gb": ".2f", "decode_1": ",.0f", "decode_32": ",.0f", "prefill": ",.0f"}  # how each is written
_HEADING = "format, in all layers | GB of weights | decode at batch 1 | decode at batch 32 | prefill"


def document(target: Target, recipes: Iterable[MixedRecipe]) -> dict[str, str | dict[str, dict[str, float] | None]]:
    """The target's speeds as JSON, of the formats used: null for one without figures; empty: none were measured."""
    speeds = target.speeds
    if speeds is None:
        return {}
    used = {name: None if each is None else asdict(each) for name, each in _used(target, speeds, recipes).items()}
    return {**asdict(speeds), "recipes": used}


def section(target: Target, recipes: Iterable[MixedRecipe]) -> list[str]:
    """Paragraphs of Markdown: on what was measured, and a table of the formats used, beside the unquantized model."""
    speeds = target.speeds
    if speeds is None:
        return ["No speeds were measured for this target."]
    rows = (_row(name, each, speeds) for name, each in _used(target, speeds, recipes).items())
    return [
        f"{speeds.runtime} on {speeds.card}, {speeds.model}; measured {speeds.date}: {speeds.how}. Each row is that "
        "model with one format in all layers, in tokens a second; in parentheses, how many times the unquantized "
        "model's. A mix lies between its formats (and the unquantized model, where it leaves layers in 16 bits); "
        "it was not measured.",
        "\n".join([f"| {_HEADING} |", "|---|---:|---:|---:|---:|", *rows]),
    ]


def _used(target: Target, speeds: Speeds, recipes: Iterable[MixedRecipe]) -> Mapping[str, Speed | None]:
    """By "pair/granularity", in the recipes' order, the unquantized model first. None: not measured."""
    found: dict[str, Speed | None] = {UNQUANTIZED: speeds.recipes[UNQUANTIZED]}
    for each in (chosen for recipe in recipes for chosen in recipe.formats.values()):
        found[f"{each.quant_pair}/{each.quant_granularity}"] = target.speed(each.quant_pair, each.quant_granularity)
    return found


def _row(name: str, speed: Speed | None, speeds: Speeds) -> str:
    if speed is None:
        return f"| {name} | not measured | - | - | - |"
    found, base = asdict(speed), asdict(speeds.recipes[UNQUANTIZED])
    cells = [f"{found[key]:{style}}" for key, style in _COLUMNS.items()]
    if name != UNQUANTIZED:
        cells = [f"{cell} ({found[key] / base[key]:.2f})" for cell, key in zip(cells, _COLUMNS, strict=True)]
    return f"| {' | '.join([name, *cells])} |"
