"""What a layer group's quantization does, in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class NotFinite(ArithmeticError):
    """A NaN or an infinity; names the layer group, the recipe and the first sample. The trial fails, others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """What quantizing one layer group does, in one calibration size."""

    score: float  # the sum of:
    sample_scores: npt.NDArray[
        np.float64
    ]  # [n_samples], in data set order; 0 for a sample that never reached the group
    dy_square_sum: float
    y_square_sum: float
    dw_square_sum: float
    w_square_sum: float
    input_amax: float


Scores = Mapping[str, GroupScore] | NotFinite  # by size
PartScores = Mapping[
    str, Sequence[GroupScore | float | None]
]  # of a part's groups, by size; float: only the score is known; None: never called
Measured = PartScores | NotFinite
