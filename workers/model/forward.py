"""Forward passes: a batch as the model's arguments, next-token labels, and the summed loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sweep.core.batches import Batch


def batch_to(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch's tensors as forward's keyword arguments."""
    tensors = {key: torch.from_numpy(value).to(device) for key, value in batch.tensors.items()}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def labels_of(batch: Batch) -> Tensor:
    """Next-token labels [batch, tokens] in which a sample's last token predicts nothing (-100)."""
    tokens = torch.from_numpy(batch.tensors["input_ids"]).flatten()
    labels = tokens.roll(-1)
    labels[torch.tensor(batch.lengths).cumsum(0) - 1] = -100
    return labels.view(batch.tensors["input_ids"].shape)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats, summed over predictions: a score then does not depend on how samples are batched.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens], already shifted; -100 where nothing is predicted.
    """
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten().to(logits.device), ignore_index=-100, reduction="sum"
    )
