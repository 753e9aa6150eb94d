"""What a quantized model does on samples that nobody calibrated on: KL divergence and loss change, sample by sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sweep.errors import SweepError
from workers.applied import applied, output_error
from workers.baseline import Baseline
from workers.capture import Segments
from workers.divergence import divergence
from workers.linear_quant import LinearQuant

_HEAD_ROWS: Final = 512  # rows whose logits are held in float32 at once

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What one recipe does, summed over each sample's predictions, in nats."""

    kl: FloatArray  # [samples], KL(unquantized || quantized)
    loss_change: FloatArray  # [samples], cross entropy of the next token, quantized minus unquantized


class Yardstick:
    """The unquantized model on a set of samples, run once and kept to measure against."""

    @torch.no_grad()
    def __init__(self, model: Any, segments: Segments) -> None:
        """Run the unquantized model.

        Args:
            model: evaluation mode, no parameter requiring a gradient (workers.modeling.load).
            segments: of a plan over the samples to measure on (workers.data.make_plan).

        Raises: SweepError: the unquantized model itself gives a NaN or an infinity.
        """
        self._model, self._base = model, Baseline(model, segments, ())
        if (sample := self._base.first_broken_sample) is not None:
            raise SweepError(f"The unquantized model's output for held-out sample {sample} is NaN or infinite. Check the checkpoint: sweep doctor.")
        self._batches = self._base.batches(len(segments))
        self.n_predictions = np.zeros(len(self._base.layout.samples), dtype=np.int64)  # of each sample
        self.n_predictions[list(self._base.layout.samples)] = self._base.layout.lengths.cpu().numpy()

    @torch.no_grad()
    def damage(self, quants: Mapping[str, LinearQuant]) -> Damage:
        """Measure the model with these linears quantized.

        Args:
            quants: calibrated, by module name.

        Raises: SweepError: the quantized model gives a NaN or an infinity; names the first sample.
        """
        with applied(self._model, quants):
            rows = [self._measured(number, quants) for number in self._batches]
        by_sample = torch.segment_reduce(torch.cat(rows), "sum", lengths=self._base.layout.lengths, unsafe=True)
        found = np.zeros((len(self.n_predictions), 2))
        found[list(self._base.layout.samples)] = by_sample.cpu().numpy()
        if not np.isfinite(found).all():
            first = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
            raise SweepError(f"The quantized model's output for held-out sample {first} is NaN or infinite. Choose another format for its worst groups.")
        return Damage(kl=found[:, 0], loss_change=found[:, 1])

    def _measured(self, number: int, quants: Mapping[str, LinearQuant]) -> Tensor:
        """KL divergence and loss change of each prediction of a batch, [predictions, 2] float64."""
        base, decoder = self._base, self._base.decoder
        head = None if decoder is None else quants.get(decoder.head_name)
        change = base.change_after(number, None, None if decoder is None or head is None else lambda x: output_error(head, decoder.head.weight, x))
        log_probs, labels = base.log_probs(number), base.labels(number)
        pieces = zip(log_probs.split(_HEAD_ROWS), change.split(_HEAD_ROWS), labels.split(_HEAD_ROWS), strict=True)
        return torch.stack([divergence(log_probs, change), torch.cat([_loss_change(*piece) for piece in pieces])], dim=1)


def _loss_change(log_probs_TV: Tensor, change_TV: Tensor, labels_T: Tensor) -> Tensor:
    """How much the cross entropy grows when logits change: log E[e^change] - change of the label's logit, [rows] float64.

    The expectation is under the base's probabilities; their rounding is evened out by the second term, as if each row summed to 1.
    """
    log_probs, change = log_probs_TV.float(), change_TV.float()
    label_change = change.gather(1, labels_T[:, None])[:, 0]
    return ((log_probs + change).logsumexp(1) - log_probs.logsumexp(1)).double() - label_change.double()
