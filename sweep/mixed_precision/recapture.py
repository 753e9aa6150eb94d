"""Predicted KL of every candidate around a recipe instead of around the unquantized model, to solve again with."""

import numpy as np

from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Candidates
from sweep.mixed_precision.recipe_context import RecipeContext, load_model
from sweep.plan.trials import Device
from sweep.report.analysis import FloatArray


def recaptured_kl(context: RecipeContext, recipe: MixedRecipe, candidates: Candidates, device: Device) -> FloatArray:
    """Predicted KL of every candidate in every layer group, all other groups being quantized as in the recipe.

    Args:
        context: the model and the samples that the recipe was calibrated and scored on.
        recipe: the current choices; to recapture again after solving again, the new ones.
        candidates: formats from the store; a group is not scored under one that was not measured there.
        device: that the model runs on.

    Returns: [groups, formats], nats per prediction, infinite where nothing is known: the argument `predicted_kl` of
        sweep.mixed_precision.recipe.problem_of and recipe_of_choice.

    Raises: SweepError: a score is NaN or infinite; names the group and the format.
    """
    from workers.scoring.recapture import recaptured_scores

    places = {group.name: index for index, group in enumerate(candidates.groups)}
    columns = {candidate.format.label: number for number, candidate in enumerate(candidates.formats)}
    wanted: dict[str, list[GroupFormat]] = {}
    for group, index in places.items():
        measured = [candidate for candidate in candidates.formats if np.isfinite(candidate.predicted_kl[index])]
        wanted[group] = [candidate.format for candidate in measured]
    found = np.full((len(places), len(columns)), np.inf)
    for row in recaptured_scores(load_model(context, device), recipe, wanted, context.plan):
        found[places[row.group], columns[row.format]] = row.predicted_kl
    return found
