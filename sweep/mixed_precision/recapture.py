"""What formats do around a recipe instead of around the unquantized model, in the shape that `sweep solve` solves again with."""

import numpy as np

from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Options
from sweep.mixed_precision.prepared import Prepared, loaded
from sweep.plan.trials import Device
from sweep.report.analysis import FloatArray


def recaptured_damage(prepared: Prepared, recipe: MixedRecipe, options: Options, device: Device) -> FloatArray:
    """Predicted damage of every option of every layer group, all others being as the recipe has them.

    Args:
        prepared: the model and the samples that the recipe was calibrated and scored on.
        recipe: the current choices; to recapture again after solving again, the new ones.
        options: what the store says the groups may get; what was not measured there is not scored here.
        device: that the model runs on.

    Returns: [groups, formats], nats per prediction, infinite where nothing is known: `damage` of sweep.mixed_precision.recipe.problem_of and recipe.

    Raises: SweepError: a score is NaN or infinite; names the group and the format.
    """
    from workers.scoring.recapture import recaptured_scores

    places = {group["group"]: index for index, group in enumerate(options.groups)}
    columns = {option.format.label: number for number, option in enumerate(options.formats)}
    wanted = {
        group: [option.format for option in options.formats if np.isfinite(option.predicted_kl[index])]
        for group, index in places.items()
    }
    found = np.full((len(places), len(columns)), np.inf)
    for row in recaptured_scores(loaded(prepared, device), recipe, wanted, prepared.plan):
        found[places[row.group], columns[row.format]] = row.predicted_kl
    return found
