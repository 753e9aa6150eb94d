"""Calibration sizes: numbers of samples, each a prefix of the next."""

from typing import Final, Literal

Size = Literal["small", "medium", "large"]
SIZES: Final = {"small": 16, "medium": 128, "large": 512}  # samples; each is a prefix of the next
