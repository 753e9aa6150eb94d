"""Scores and error sums of one layer group under one recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class NotFinite(ArithmeticError):
    """A NaN or an infinity; names the layer group, the recipe and the first sample. The trial fails, others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """Score and error sums of one layer group under one recipe, in one calibration size, over all its linears."""

    score: float  # the sum of `sample_scores`
    sample_scores: npt.NDArray[
        np.float64
    ]  # [n_samples], in data set order; 0 for a sample that never reached the group
    dy_square_sum: float  # of the errors of the outputs
    y_square_sum: float  # of the unquantized outputs
    dw_square_sum: float  # of the errors of the weights
    w_square_sum: float  # of the unquantized weights
    input_amax: float  # largest |x|


Scores = Mapping[str, GroupScore] | NotFinite  # by size
# Of a part's groups, by size; float: only the score is known; None: never called.
PartScores = Mapping[str, Sequence[GroupScore | float | None]]
Measured = PartScores | NotFinite


def not_finite_weight(module: str) -> str:
    """The reason why no recipe of a module can be scored: a NaN or an infinity in its weight."""
    return f"the weight of {module} is NaN or infinite. Compare the checkpoint's checksum with the published one."
