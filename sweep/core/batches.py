"""Batches: the samples that one forward pass sees, and the plan of them, as the driver sends it to workers."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sweep.core.sizes import SIZES

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One calibration text, with its image if it has one."""

    token_ids: Int64Array  # [n_tokens]
    pixel_values: npt.NDArray[np.float32] | None = None  # [n_patches, 3 * 2 * 16 * 16]
    image_grid_thw: tuple[int, int, int] | None = None  # patches in time, height, width
    image_token: int = -1  # the id in token_ids that stands for a merged patch


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one forward pass. Rows of the flattened batch are their tokens, sample after sample, no padding."""

    order: tuple[int, ...]  # data set indices, in the order of the rows
    lengths: tuple[int, ...]  # tokens a sample
    patch_counts: tuple[int, ...]  # image patches a sample, zeros without images
    tensors: dict[str, npt.NDArray[np.generic]]  # forward's keyword arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Batches of each segment; segment i holds the samples between size boundary i-1 and i."""

    segments: tuple[tuple[Batch, ...], ...]

    def segments_of(self, size: str) -> int:
        """Number of leading segments that hold the samples of `size`."""
        return list(SIZES).index(size) + 1

    def n_predictions(self, size: str) -> int:
        """Positions whose next token is valid, over the samples of `size`."""
        return sum(length - 1 for batch in self.batches(size) for length in batch.lengths)

    def batches(self, size: str) -> Iterator[Batch]:
        """All batches of `size`, in canonical order."""
        for segment in self.segments[: self.segments_of(size)]:
            yield from segment

    def digest(self, size: str) -> str:
        """Hash of every tensor fed to the model for `size`, and of which sample each row is, in canonical order."""
        sha = hashlib.sha256()
        for batch in self.batches(size):
            # Data sets in other orders may have equal batches, but not equal sample scores.
            sha.update(f"{batch.order}:".encode())
            for key in sorted(batch.tensors):
                array = np.ascontiguousarray(batch.tensors[key])
                sha.update(f"{key}:{array.dtype.str}:{array.shape}:".encode())
                sha.update(array.data)
        return sha.hexdigest()
