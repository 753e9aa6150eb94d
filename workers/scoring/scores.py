"""Scores and error sums of one layer group under one recipe."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt


class NotFinite(ArithmeticError):
    """A NaN or an infinity; names the layer group, the recipe and the first sample. The trial fails, others go on."""

    @classmethod
    def of(cls, group: str, recipe: str, reason: str) -> Self:
        """The error of a layer group under a recipe."""
        return cls(f"Layer group {group} under {recipe}: {reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """Score and error sums of one layer group under one recipe, in one calibration size, over all its linears."""

    score: float  # the sum of `sample_scores`
    # [n_samples], in data set order; 0 for a sample that never reached the group
    sample_scores: npt.NDArray[np.float64]
    # [kinds of tokens, n_samples], see TOKEN_KINDS; they sum to `score`. Of projections a kind's is the mean over draws
    # of its own times the sample's, which may be negative.
    kind_scores: npt.NDArray[np.float64]
    top_token_score: float  # the largest of a single row
    dy_square_sum: float  # of the errors of the outputs
    y_square_sum: float  # of the unquantized outputs
    dw_square_sum: float  # of the errors of the weights
    w_square_sum: float  # of the unquantized weights
    input_amax: float  # largest |x|
    # [n_samples, draws], of method=fisher: sums of g * dy over the sample's rows, signed; None: another method
    projections: npt.NDArray[np.float64] | None = None

    @property
    def output_rel_error(self) -> float | None:
        """sqrt(sum dy^2 / sum y^2); None: the outputs are 0, or not recorded."""
        return _ratio(self.dy_square_sum, self.y_square_sum)

    @property
    def output_sqnr_db(self) -> float | None:
        """-20 log10 of `output_rel_error`; None: there is no error."""
        return -20 * math.log10(self.output_rel_error) if self.output_rel_error else None

    @property
    def weight_rel_error(self) -> float | None:
        """sqrt(sum dW^2 / sum W^2); None: the weights are 0."""
        return _ratio(self.dw_square_sum, self.w_square_sum)


def _ratio(error_square: float, signal_square: float) -> float | None:
    return math.sqrt(error_square / signal_square) if signal_square else None


Scores = Mapping[str, GroupScore] | NotFinite  # by size
# Of a part's groups, by size; float: only the score is known; None: never called.
PartScores = Mapping[str, Sequence[GroupScore | float | None]]
Measured = PartScores | NotFinite


def first_not_finite(sample_scores: npt.NDArray[np.float64], what: str) -> str | None:
    """A reason that names the first sample with a NaN or an infinity, None if there is none.

    Args:
        sample_scores: [samples], in data set order.
        what: they are, in the words of the reason.
    """
    if np.isfinite(sample_scores).all():
        return None
    return f"the {what} of sample {int(np.flatnonzero(~np.isfinite(sample_scores))[0])} is NaN or infinite."
