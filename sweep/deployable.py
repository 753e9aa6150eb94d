"""The grid that was asked for; of `grid=deployable` only what the target runs as it is."""

from collections.abc import Sequence
from dataclasses import replace

from sweep.compose import Grid, expand
from sweep.config import SweepConfig
from sweep.errors import InvalidRecipe, SweepError
from sweep.planning import recipe_of
from sweep.targets import Status, Target, load_target


def asked_grid(overrides: Sequence[str], *, multirun: bool) -> Grid:
    """Compose the grid of a run. Without an axis of its own it is what the target runs.

    Args: as for sweep.compose.expand.
    Raises: SweepError: as there, or the target runs nothing of what was asked for.
    """
    grid = expand(overrides, multirun=multirun)
    if multirun and not grid.axes and not any(override.startswith("grid=") for override in overrides):
        grid = expand(["grid=deployable", *overrides], multirun=True)
    if not grid.only_runnable:
        return grid
    target = load_target(grid.target)
    points: list[SweepConfig] = []
    seen: set[tuple[str, ...]] = set()
    asked: dict[str, Status | str] = {}
    for point in grid.points:
        try:
            recipe = recipe_of(point)
        except InvalidRecipe as error:
            asked[f"{point.quant_pair.name}/{point.quant_granularity.name}"] = str(error)
            continue
        status = target.status(recipe.weight and recipe.weight.attributes, recipe.activation and recipe.activation.attributes, recipe.algorithm)
        asked[f"{point.quant_pair.name}/{point.quant_granularity.name}"] = status
        key = (recipe.canonical, str(replace(point, quant_pair=grid.points[0].quant_pair, quant_granularity=grid.points[0].quant_granularity)))
        if status.kind == "native" and key not in seen:  # the same recipe under another name would only be listed twice
            seen.add(key)
            points.append(point)
    if not points:
        raise SweepError(f"target={target.name} runs none of what was asked for: " + "; ".join(f"{name}: {_why(what)}" for name, what in asked.items()))
    return replace(grid, points=tuple(points))


def status_of(target: Target, point: SweepConfig) -> Status | None:
    """What becomes of a point's recipe on a target; None: it is no valid recipe."""
    try:
        recipe = recipe_of(point)
    except InvalidRecipe:
        return None
    return target.status(recipe.weight and recipe.weight.attributes, recipe.activation and recipe.activation.attributes, recipe.algorithm)


def _why(what: Status | str) -> str:
    return what if isinstance(what, str) else what.reason or str(what)
