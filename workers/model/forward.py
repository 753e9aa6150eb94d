"""Forward passes: a batch as the model's arguments, next-token labels, and the summed loss."""

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sweep.core.batches import Batch, FloatArray, Picture, picture_tensors
from workers.data.pictures import picture_file


def batch_to(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch as forward's keyword arguments; the pixels of its pictures are read for it, and not kept.

    Raises: OSError: the file of a picture is not on this machine.
    """
    tensors = {key: torch.from_numpy(value).to(device) for key, value in batch.tensors.items()}
    return tensors | pictures_to(batch.all_pictures, device, dtype)


def pictures_to(pictures: Sequence[Picture], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pictures as forward's keyword arguments, one after another; none where there are none. Raises: as `batch_to`."""
    if not pictures:
        return {}
    tensors = {key: torch.from_numpy(value).to(device) for key, value in picture_tensors(pictures).items()}
    return {**tensors, "pixel_values": torch.cat([pixel_values(picture, device, dtype) for picture in pictures])}


def pixel_values(picture: Picture, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A picture's values as the model takes them, of `Picture.shape`.

    Whole numbers travel to the device and become values there: on a CPU that took 0.1 s a picture of 1,000 tokens.

    Raises: OSError: its file is not on this machine.
    """
    if picture.values is not None:
        return torch.from_numpy(picture.values).to(device, dtype)
    stored = torch.from_numpy(np.load(picture_file(picture.content))).to(device)
    return valued(stored, picture.levels, picture.shape).to(dtype)


def valued(stored: Tensor, levels: FloatArray | None, shape: tuple[int, ...]) -> Tensor:
    """The values of what is stored, in float32.

    Args:
        stored: [n, channels, values], of one frame where a picture has several, equal ones.
        levels: see `Picture.levels`.
        shape: of the values.
    """
    if levels is None:
        values = stored.float()
    else:
        by_channel = zip(torch.tensor(levels, device=stored.device), stored.unbind(1), strict=True)
        values = torch.stack([of_number[numbers.int()] for of_number, numbers in by_channel], dim=1)
    return values.repeat(1, 1, math.prod(shape) // values.numel()).reshape(shape)


@contextmanager
def attention_of(batches: Iterable[Batch], device: torch.device) -> Generator[None]:
    """Attention for batches of pictures without cuDNN's kernels on a GPU, until the block ends.

    Those take 0.1 s to plan for every new number of tokens, and batches of pictures have as many numbers as there are
    batches: 128 chats on the shape of Qwen3-VL-4B were captured in 10 s less (H100, torch 2.11).
    """
    has_files = any(picture.values is None for batch in batches for picture in batch.all_pictures)
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(others) if device.type == "cuda" and has_files else nullcontext():
        yield


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
