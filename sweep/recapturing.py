"""What each format does to each layer group once a recipe is applied to all others: the second look of `sweep solve --recapture`."""

from dataclasses import replace

import numpy as np

from sweep.analysis import FloatArray
from sweep.config import SweepConfig
from sweep.machine import pick_workers
from sweep.mixed import MixedRecipe
from sweep.options import Options
from sweep.prepared import prepared


def recaptured_damage(options: Options, made: MixedRecipe, config: SweepConfig) -> FloatArray:
    """Predicted KL in the model that a recipe makes.

    Args:
        options: the formats to score.
        made: the recipe that is applied.
        config: where the workers' device is chosen.

    Returns: [groups, formats], nats per prediction; infinite where nothing was measured.
    Raises: SweepError: the model or the samples that the options come from are not there any more.
    """
    import torch

    from workers.modeling import load
    from workers.recapture import recaptured_scores

    ready = prepared(made, replace(options.config, cluster=config.cluster))
    device = pick_workers(config.cluster).device
    model = load(ready.model.path, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)
    formats = [option.format for option in options.formats]
    found = recaptured_scores(model, made, {group["group"]: formats for group in options.groups}, ready.plan)
    rows = {group["group"]: index for index, group in enumerate(options.groups)}
    columns = {each.label: index for index, each in enumerate(formats)}
    damage = np.full((len(rows), len(columns)), np.inf)
    for score in found:
        damage[rows[score.group], columns[score.format]] = score.predicted_kl
    return damage
