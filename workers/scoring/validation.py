"""How far a quantized model is from the unquantized one, measured: KL divergence and change of the loss on samples of their own."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.core.errors import SweepError
from sweep.formats.mixed import GroupChoice, GroupFormat, MixedRecipe
from workers.model.forward import batch_to, labels_of
from workers.quant.applied import applied, calibrated_groups, output_error
from workers.quant.linear import LinearQuant
from workers.scoring.baseline import float_logits
from workers.scoring.divergence import divergence

_HEAD_ROWS: Final = 512  # rows whose logits are held in float32 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What quantizing did to each sample."""

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

    Logits are made in float32 from hidden states, a few rows at a time: rounded to bf16 they would hide what a mild recipe does.
    """

    @torch.no_grad()
    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        """Run the unquantized model once.

        Args:
            model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
            batches: held-out samples.

        Raises: SweepError: a model whose output layer is no linear without a bias.
        """
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
            raise SweepError(
                f"{type(model).__name__} has no output layer to compare logits of. Only causal language models can be validated."
            )
        self._model, self._head = model, head
        self._head_name = next(name for name, module in model.named_modules() if module is head)
        self._batches = list(batches)
        self._base = [self._hidden(batch) for batch in self._batches]

    @torch.no_grad()
    def measure(self, quants: Mapping[str, LinearQuant]) -> Damage:
        """Run the model with these quantizers. Raises: SweepError: a logit is NaN or infinite."""
        n_samples = 1 + max(max(batch.order) for batch in self._batches)
        kl, change, counts = np.zeros(n_samples), np.zeros(n_samples), np.zeros(n_samples, dtype=np.int64)
        with applied(self._model, quants):
            for batch, base in zip(self._batches, self._base, strict=True):
                labels = labels_of(batch).flatten().to(base.device)
                found = (
                    _compared(base, self._hidden(batch), self._head, quants.get(self._head_name), labels).cpu().numpy()
                )
                if not np.isfinite(found).all():
                    raise SweepError("The quantized model gives NaN or infinite logits: the recipe breaks it.")
                owners = np.repeat(batch.order, batch.lengths)[(labels != -100).cpu().numpy()]
                np.add.at(kl, owners, found[0])
                np.add.at(change, owners, found[1])
                np.add.at(counts, owners, 1)
        seen = counts > 0
        return Damage(kl=kl[seen], loss_change=change[seen], n_predictions=counts[seen])

    def _hidden(self, batch: Batch) -> Tensor:
        """What the output layer reads, [rows, hidden]."""
        parameter = next(self._model.parameters())
        with _reading(self._head) as read:
            self._model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False)
            return read()


def _compared(
    base_TH: Tensor, new_TH: Tensor, head: nn.Linear, head_quant: LinearQuant | None, labels_T: Tensor
) -> Tensor:
    """KL and change of the loss at each prediction, [2, predictions] float64. Args: head: unquantized."""
    rows = (labels_T != -100).nonzero().flatten()
    found: list[Tensor] = []
    for some in rows.split(_HEAD_ROWS):
        change = float_logits(
            head, new_TH[some] - base_TH[some]
        )  # the difference of two outputs of the head would cancel
        if head_quant is not None:
            change += output_error(head_quant, head.weight, new_TH[some])
        log_probs = float_logits(head, base_TH[some]).log_softmax(1)
        loss = (log_probs + change).logsumexp(1) - change.gather(1, labels_T[some][:, None])[:, 0]
        found.append(torch.stack([divergence(log_probs, change), loss.double()]))
    return torch.cat(found, dim=1)


@contextmanager
def _reading(head: nn.Linear) -> Generator[Callable[[], Tensor]]:
    """Keep what the output layer reads, before that is quantized, and have it multiply one row only."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0].detach())
        return (args[0][:, :1],)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield lambda: seen[-1].flatten(0, -2)
    finally:
        handle.remove()


def measurer(
    model: Any,
    groups: Sequence[GroupChoice],
    recipes: Sequence[MixedRecipe],
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
) -> Callable[[MixedRecipe], Damage]:
    """What measures any of the recipes, each format of each layer group being calibrated once for all of them.

    Args:
        model: as for `Validator`.
        groups: of the model, in its order; their choices are not looked at.
        recipes: of this model, that will be measured.
        calibration: samples that calibrate.
        held_out: samples to measure on.
    """
    formats: dict[str, list[GroupFormat]] = {}
    for recipe in recipes:
        for choice in recipe.groups:
            chosen = recipe.format_of(choice)
            if chosen is not None and chosen not in formats.setdefault(choice.group, []):
                formats[choice.group].append(chosen)
    quants = calibrated_groups(model, calibration, groups, formats)
    validator = Validator(model, held_out)

    def measure(recipe: MixedRecipe) -> Damage:
        chosen = [(choice.group, found) for choice in recipe.groups if (found := recipe.format_of(choice)) is not None]
        return validator.measure(
            {
                name: quant
                for group, found in chosen
                for name, quant in quants[group][formats[group].index(found)].items()
            }
        )

    return measure
