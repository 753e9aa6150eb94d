"""What formats do around a recipe instead of around the unquantized model, in the shape that `sweep solve` solves again with."""

import numpy as np

from sweep.analysis import FloatArray
from sweep.machine import pick_workers
from sweep.mixed import MixedRecipe
from sweep.options import Options
from sweep.prepared import Prepared


def recaptured_damage(prepared: Prepared, recipe: MixedRecipe, options: Options) -> FloatArray:
    """Predicted damage of every option of every layer group, all others being as the recipe has them.

    Args:
        prepared: the model and the samples that the recipe was calibrated and scored on.
        recipe: the current choices; to recapture again after solving again, the new ones.
        options: what the store says the groups may get; what was not measured there is not scored here.

    Returns: [groups, formats], nats per prediction, infinite where nothing is known: `damage` of sweep.mixing.problem_of and recipe.

    Raises: SweepError: a score is NaN or infinite; names the group and the format.
    """
    import torch

    from workers.modeling import load
    from workers.recapture import recaptured_scores

    device, config = pick_workers(prepared.config.cluster).device, prepared.config
    dtype = config.model.dtype if config.model.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    if device == "cpu":
        torch.set_num_threads(1)  # as a sweep's workers
    places = {group["group"]: index for index, group in enumerate(options.groups)}
    columns = {option.format.label: number for number, option in enumerate(options.formats)}
    wanted = {group: [option.format for option in options.formats if np.isfinite(option.predicted_kl[index])] for group, index in places.items()}
    found = np.full((len(places), len(columns)), np.inf)
    model = load(prepared.model.path, dtype=getattr(torch, dtype), device=device)
    for row in recaptured_scores(model, recipe, wanted, prepared.plan):
        found[places[row.group], columns[row.format]] = row.predicted_kl
    return found
