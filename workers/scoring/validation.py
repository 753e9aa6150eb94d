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
        with applied(self._model, quants):
            for batch, base in zip(self._batches, self._base, strict=True):
                labels = labels_of(batch).flatten().to(base.device)
                hidden, head_quant = self._hidden(batch), quants.get(self._head_name)
                found = _compared(base, hidden, self._head, head_quant, labels).cpu().numpy()
                if not np.isfinite(found).all():
                    raise SweepError("The quantized model gives NaN or infinite logits: the recipe breaks it.")
                owners = np.repeat(batch.order, batch.lengths)[(labels != -100).cpu().numpy()]
                np.add.at(kl, owners, found[0])
                np.add.at(change, owners, found[1])
                np.add.at(counts, owners, 1)
        seen = counts > 0
        return MeasuredKl(kl=kl[seen], loss_change=change[seen], n_predictions=counts[seen])

    def _hidden(self, batch: Batch) -> Tensor:
        """The output layer's input on a batch, [rows, hidden]."""
        parameter = next(self._model.parameters())
        with _input_of(self._head) as last_input:
            self._model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False)
            return last_input()


def _compared(
    base_TH: Tensor, new_TH: Tensor, head: nn.Linear, head_quant: LinearQuant | None, labels_T: Tensor
) -> Tensor:
    """KL divergence and change of the loss at each prediction.

    Args:
        base_TH: [rows, hidden], the output layer's input in the unquantized model.
        new_TH: the same in the quantized model.
        head: the output layer, unquantized.
        head_quant: its quantizers; None: it stays unquantized.
        labels_T: [rows], already shifted; -100 where nothing is predicted.

    Returns: [2, predictions] float64, nats.
    """
    rows = (labels_T != -100).nonzero().flatten()
    found: list[Tensor] = []
    for some in rows.split(HEAD_ROWS):
        change = float_logits(head, new_TH[some] - base_TH[some])  # the difference of two logits would cancel
        if head_quant is not None:
            change += output_error(head_quant, head.weight, new_TH[some])
        log_probs = float_logits(head, base_TH[some]).log_softmax(1)
        loss = (log_probs + change).logsumexp(1) - change.gather(1, labels_T[some][:, None])[:, 0]
        found.append(torch.stack([divergence(log_probs, change), loss.double()]))
    return torch.cat(found, dim=1)


@contextmanager
def _input_of(head: nn.Linear) -> Generator[Callable[[], Tensor]]:
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
    held_out: Sequence[Batch],
) -> Callable[[MixedRecipe], MeasuredKl]:
    """A function that measures any of the recipes; each format of each layer group is calibrated once for all of them.

    Args:
        model: as for `Validator`.
        groups: of the model, in its order.
        recipes: of this model, that will be measured.
        calibration: samples that calibrate.
        held_out: samples to measure on.
    """
    formats: dict[str, list[Format]] = {}
    for recipe in recipes:
        for choice in recipe.groups:
            chosen = recipe.format_of(choice)
            if chosen is not None and chosen not in formats.setdefault(choice.group.name, []):
                formats[choice.group.name].append(chosen)
    quants = calibrated_groups(model, calibration, groups, formats)
    validator = Validator(model, held_out)

    def measure(recipe: MixedRecipe) -> MeasuredKl:
        by_module: dict[str, LinearQuant] = {}
        for choice in recipe.groups:
            if (chosen := recipe.format_of(choice)) is not None:
                by_module |= quants[choice.group.name][formats[choice.group.name].index(chosen)]
        return validator.measure(folded(by_module))

    return measure
