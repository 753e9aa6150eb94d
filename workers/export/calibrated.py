"""The quantizers of an export, calibrated as validation and scoring calibrate: on the same device, in the same dtype.

There they are equal bit for bit. Ranges of inputs differ between devices and dtypes, as the model's activations do, so
a reader who repeats them elsewhere finds them close, not equal.
"""

from collections.abc import Sequence

from sweep.core.batches import Batch
from sweep.core.groups import Linear
from sweep.formats.mixed import MixedRecipe
from workers.export.folding import check_folds, output_scales
from workers.model.loading import PreTrainedModel
from workers.quant.applied import calibrated_model
from workers.quant.linear import LinearQuant


def calibrated(
    model: PreTrainedModel, recipe: MixedRecipe, linears: Sequence[Linear], batches: Sequence[Batch]
) -> dict[str, LinearQuant]:
    """ModelOpt's calibration ranges and pre-quantization scales by module name, checked to be foldable.

    Args:
        model: on the device and in the dtype that `validate` measures with; it is as it was afterwards.
        recipe: the format of each layer group.
        linears: of the whole model.
        batches: calibration samples.

    Raises: Inexpressible: a pre-quantization scale that cannot be folded into the module before
        (workers.export.folding.check_folds).
    """
    quants = calibrated_model(model, batches, recipe)
    check_folds(model, output_scales(recipe, quants, linears), linears, batches)
    return quants
