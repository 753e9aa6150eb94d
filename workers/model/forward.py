"""Forward passes: a batch as the model's arguments, next-token labels, and the summed loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sweep.core.batches import Batch
from workers.data.pictures import pixel_values


def batch_to(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch as forward's keyword arguments; the pixels of its pictures are read for it, and not kept.

    Raises: OSError: the file of a picture is not on this machine.
    """
    arrays = {**batch.tensors, **batch.picture_tensors}
    tensors = {key: torch.from_numpy(value).to(device) for key, value in arrays.items()}
    if pixels := [torch.from_numpy(pixel_values(picture)) for picture in batch.all_pictures]:
        tensors["pixel_values"] = torch.cat(pixels).to(device, dtype)
    return tensors


def labels_of(batch: Batch) -> Tensor:
    """Next-token labels [batch, tokens], -100 where none is predicted."""
    tokens = torch.from_numpy(batch.tensors["input_ids"]).flatten()
    labels = tokens.roll(-1)
    labels[torch.from_numpy(~batch.predicts)] = -100
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
