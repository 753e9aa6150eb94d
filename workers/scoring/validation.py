"""Measured KL divergence and loss change of a quantized model from the unquantized one, on held-out samples."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.core.errors import SweepError
from sweep.core.groups import LayerGroup
from sweep.formats.format import Format
from sweep.formats.mixed import MixedRecipe
from workers.model.decoder import head_of
from workers.model.forward import batch_to, labels_of
from workers.model.hooks import removed_after
from workers.model.loading import PreTrainedModel
from workers.model.memory import HEAD_ROWS
from workers.quant.applied import applied, calibrated_groups, output_error
from workers.quant.folds import folded
from workers.quant.linear import LinearQuant
from workers.scoring.baseline import float_logits
from workers.scoring.divergence import divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredKl:
    """Measured KL divergence and loss change of each held-out sample under one recipe."""

    kl: npt.NDArray[np.float64]  # [samples], nats summed over predictions, KL(unquantized || quantized)
    loss_change: npt.NDArray[np.float64]  # [samples], nats summed over predictions
    n_predictions: npt.NDArray[np.int64]  # [samples]

    @property
    def mean_kl(self) -> float:
        """Nats per prediction."""
        return float(self.kl.sum() / self.n_predictions.sum())

    @property
    def mean_loss_change(self) -> float:
        """Nats per prediction."""
        return float(self.loss_change.sum() / self.n_predictions.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some predictions of a batch under the unquantized model and a quantized one."""

    batch: Batch
    rows_R: Tensor  # of the flattened batch
    labels_R: Tensor  # next tokens
    log_probs_RV: Tensor  # of the unquantized model, nats
    change_RV: Tensor  # of the logits

    def loss_change(self) -> Tensor:
        """Log probability of the next token in the unquantized model minus that in the quantized one, [rows] nats."""
        moved = (self.log_probs_RV + self.change_RV).logsumexp(1)
        return moved - self.change_RV.gather(1, self.labels_R[:, None])[:, 0]


class Validator:
    """The unquantized model's final hidden states on held-out samples, to compare quantized models with.

    Logits are made in float32 from hidden states, a few rows at a time: rounded to bf16 they would hide a mild
    recipe's effect.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Run the unquantized model once.

        Args:
            model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
            batches: held-out samples.

        Raises: SweepError: the model's output layer is not a linear without a bias.
        """
        self._model, (self._head_name, self._head) = model, head_of(model)
        self._batches = list(batches)
        self._base = [self._hidden(batch) for batch in self._batches]

    @torch.no_grad()
    def measure(self, quants: Mapping[str, LinearQuant]) -> MeasuredKl:
        """Run the model with these quantizers, by module name, and compare it with the unquantized one.

        Raises: SweepError: a logit is NaN or infinite.
        """
        n_samples = 1 + max(max(batch.order) for batch in self._batches)
        kl, change, counts = np.zeros(n_samples), np.zeros(n_samples), np.zeros(n_samples, dtype=np.int64)

        def add(rows: Rows) -> None:
            owners = np.repeat(rows.batch.order, rows.batch.lengths)[rows.rows_R.cpu().numpy()]
            found = torch.stack([divergence(rows.log_probs_RV, rows.change_RV), rows.loss_change().double()])
            found = finite(found.cpu().numpy())
            np.add.at(kl, owners, found[0])
            np.add.at(change, owners, found[1])
            np.add.at(counts, owners, 1)

        self.compare(quants, add)
        seen = counts > 0
        return MeasuredKl(kl=kl[seen], loss_change=change[seen], n_predictions=counts[seen])

    @torch.no_grad()
    def compare(self, quants: Mapping[str, LinearQuant], see: Callable[[Rows], None]) -> None:
        """Run the model with these quantizers, by module name, and show its predictions beside the unquantized one's.

        Args:
            quants: calibrated.
            see: called with some predictions at a time, batch by batch, in the order of their rows.
        """
        with applied(self._model, quants):
            for batch, base_TH in zip(self._batches, self._base, strict=True):
                labels_T = labels_of(batch).flatten().to(base_TH.device)
                new_TH, head_quant = self._hidden(batch), quants.get(self._head_name)
                for some in (labels_T != -100).nonzero().flatten().split(HEAD_ROWS):
                    log_probs, change = _compared(base_TH[some], new_TH[some], self._head, head_quant)
                    see(
                        Rows(
                            batch=batch, rows_R=some, labels_R=labels_T[some], log_probs_RV=log_probs, change_RV=change
                        )
                    )

    def _hidden(self, batch: Batch) -> Tensor:
        """The output layer's input on a batch, [rows, hidden]."""
        parameter = next(self._model.parameters())
        with input_of(self._head) as last_input:
            self._model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False)
            return last_input()


def finite(found: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The figures themselves. Raises: SweepError: one of them is NaN or infinite."""
    if not np.isfinite(found).all():
        raise SweepError("The quantized model gives NaN or infinite logits: the recipe breaks it.")
    return found


def _compared(
    base_RH: Tensor, new_RH: Tensor, head: nn.Linear, head_quant: LinearQuant | None
) -> tuple[Tensor, Tensor]:
    """Log probabilities of the unquantized model, and the change of the logits.

    Args:
        base_RH: [rows, hidden], the output layer's input in the unquantized model.
        new_RH: the same in the quantized model.
        head: the output layer, unquantized.
        head_quant: its quantizers; None: it stays unquantized.

    Returns: two of [rows, vocabulary] float32, nats.
    """
    change = float_logits(head, new_RH - base_RH)  # the difference of two logits would cancel
    if head_quant is not None:
        change += output_error(head_quant, head.weight, new_RH)
    return float_logits(head, base_RH).log_softmax(1), change


@contextmanager
def input_of(head: nn.Linear) -> Generator[Callable[[], Tensor]]:
    """Keep the output layer's input, before that is quantized, and have the layer multiply one row only.

    Yields: a function that gives the last input, [rows, hidden].
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0].detach())
        return (args[0][:, :1],)

    with removed_after([head.register_forward_pre_hook(keep)]):
        yield lambda: seen[-1].flatten(0, -2)


def measurer(
    model: PreTrainedModel,
    groups: Sequence[LayerGroup],
    recipes: Sequence[MixedRecipe],
    calibration: Sequence[Batch],
) -> Callable[[MixedRecipe, Validator], MeasuredKl]:
    """A function that measures any of the recipes on a validator's samples.

    Each format of each layer group is calibrated once for all of them.

    Args:
        model: as for `Validator`.
        groups: of the model, in its order.
        recipes: of this model, that will be measured.
        calibration: samples that calibrate.
    """
    formats: dict[str, list[Format]] = {}
    for recipe in recipes:
        for choice in recipe.groups:
            chosen = recipe.format_of(choice)
            if chosen is not None and chosen not in formats.setdefault(choice.group.name, []):
                formats[choice.group.name].append(chosen)
    quants = calibrated_groups(model, calibration, groups, formats)

    def measure(recipe: MixedRecipe, validator: Validator) -> MeasuredKl:
        by_module: dict[str, LinearQuant] = {}
        for choice in recipe.groups:
            if (chosen := recipe.format_of(choice)) is not None:
                by_module |= quants[choice.group.name][formats[choice.group.name].index(chosen)]
        return validator.measure(folded(by_module))

    return measure
