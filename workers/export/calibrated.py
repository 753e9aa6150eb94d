"""The quantizers of an export: calibrated on a CPU, whose arithmetic a reader has everywhere."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sweep.core.batches import Batch
from sweep.formats.mixed import MixedRecipe
from workers.export.folding import Linears, check_folds, output_scales
from workers.model.loading import load
from workers.quant.applied import calibrated_model
from workers.quant.linear import LinearQuant


def calibrated(
    path: Path, dtype: str, recipe: MixedRecipe, linears: Linears, batches: Sequence[Batch]
) -> dict[str, LinearQuant]:
    """ModelOpt's ranges and scales by module name, of a recipe whose scales of inputs can be folded.

    Args:
        path: checkpoint directory.
        dtype: what the model computes in, by torch's name.
        recipe: what each layer group gets.
        linears: of the whole model.
        batches: calibration samples.

    Raises: Inexpressible: a scale that cannot be multiplied into what computes the inputs (workers.export.folding.check_folds).
    """
    model = load(path, dtype=getattr(torch, dtype), device="cpu")
    quants = calibrated_model(model, batches, recipe)
    check_folds(model, output_scales(recipe, quants, linears), linears, batches)
    return quants
