"""Labels that a capture's loss is taken against: the data's own, or drawn from the unquantized model's distribution.

The Fisher matrix of the model's own distribution is KL's second-order form. It is the mean of g g^T where labels are
drawn from that distribution, each prediction's apart from all others.

A label depends on its sample, its position, the number of the draw and the logits, and on nothing else: the random
numbers come from a counter-based generator whose key is the sample's content. Probabilities become whole numbers before
they are added up, so that their sums are exact, in whatever order a device adds.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sweep.core.batches import Batch
from workers.model.forward import labels_of
from workers.model.memory import HEAD_ROWS

_STEPS: Final = 2.0**46  # of a probability: all of a vocabulary's together are below 2^53, and whole in float64


@dataclass(frozen=True, slots=True)
class Targets:
    """What one batch's loss is taken against, in one pass or, of draws, in as many as there are."""

    own_T: Tensor  # [rows] int64, the data's next tokens; -100 where nothing is predicted
    uniforms_DT: Tensor | None  # [draws, rows] float64, from 0 to below 1; None: the data's own labels count

    @property
    def n_passes(self) -> int:
        """Backward passes: one a draw."""
        return 1 if self.uniforms_DT is None else len(self.uniforms_DT)

    def of(self, logits_TV: Tensor, start: int = 0) -> Tensor:
        """The labels of some rows: [passes, rows] int64, -100 where nothing is predicted.

        Args:
            logits_TV: of these rows.
            start: the first of them.
        """
        rows = slice(start, start + len(logits_TV))
        own_T = self.own_T[rows].to(logits_TV.device)
        if self.uniforms_DT is None:
            return own_T[None]
        uniforms_DT = self.uniforms_DT[:, rows].to(logits_TV.device)
        pieces = zip(logits_TV.split(HEAD_ROWS), uniforms_DT.split(HEAD_ROWS, dim=1), strict=True)
        return torch.where(own_T == -100, -100, torch.cat([drawn_labels(*piece) for piece in pieces], dim=1))


def targets_of(batch: Batch, draws: int | None) -> Targets:
    """The targets of a batch. Args: draws: labels at each prediction; None: the data's own."""
    own_T = labels_of(batch).flatten()
    return Targets(own_T, None if draws is None else torch.from_numpy(_uniforms(batch, draws)))


def drawn_labels(logits_TV: Tensor, uniforms_DT: Tensor) -> Tensor:
    """Labels by inverting the cumulative distribution: [draws, rows] int64, each below the vocabulary's size.

    Args:
        logits_TV: of the unquantized model.
        uniforms_DT: float64, from 0 to below 1.
    """
    steps_TV = logits_TV.detach().softmax(-1, dtype=torch.float32).mul_(_STEPS).long()
    cumulative_TV = steps_TV.cumsum_(1)
    wanted_TD = (uniforms_DT.T * cumulative_TV[:, -1:].double()).long()
    found_DT = torch.searchsorted(cumulative_TV, wanted_TD.contiguous(), right=True).T
    return found_DT.clamp_(max=logits_TV.shape[1] - 1)  # logits that are NaN, whose scores will name the sample


def _uniforms(batch: Batch, draws: int) -> npt.NDArray[np.float64]:
    """Numbers from 0 to below 1, [draws, rows]; those of the first draws are the same whatever their number."""
    tokens = batch.by_sample(batch.tensors["input_ids"].flatten())
    found: list[npt.NDArray[np.float64]] = []
    for ids, pictures in zip(tokens, batch.pictures, strict=True):
        sha = hashlib.sha256(ids.astype("<i8").tobytes())
        for picture in pictures:
            sha.update(f"picture:{picture.content}:".encode())
        # 53 bits, as float64 has them.
        numbers = np.random.Philox(key=int.from_bytes(sha.digest()[:16], "little")).random_raw(draws * len(ids))
        found.append((numbers >> np.uint64(11)).reshape(draws, len(ids)).astype(np.float64) * 2.0**-53)
    return np.concatenate(found, axis=1)
