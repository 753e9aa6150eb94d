"""Calibration data: texts and images become samples, samples become the one canonical plan of batches.

The plan depends on the data alone. Segments end at the size boundaries (16, 128, 512), so a smaller size is a prefix of a
larger one down to the last bit; batches are bounded in tokens and never padded.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from sweep.core.errors import SweepError
from workers.data.scenes import patches, scene

SIZES: Final = {"small": 16, "medium": 128, "large": 512}  # samples; each is a prefix of the next
MAX_BATCH_TOKENS: Final = 2048  # what fills a GPU; attention over a packed row costs its square

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
    """What one forward pass sees. Rows of the flattened batch are the samples' tokens, sample after sample, no padding."""

    order: tuple[int, ...]  # data set indices, in the order of the rows
    lengths: tuple[int, ...]  # tokens a sample
    patch_counts: tuple[int, ...]  # image patches a sample, zeros without images
    tensors: dict[str, npt.NDArray[np.generic]]  # forward's keyword arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Batches of each segment; segment i holds the samples between size boundary i-1 and i."""

    segments: tuple[tuple[Batch, ...], ...]

    def segments_of(self, size: str) -> int:
        """How many leading segments make up `size`."""
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
            sha.update(f"{batch.order}:".encode())  # data sets in other orders may have equal batches, but not equal sample scores
            for key in sorted(batch.tensors):
                array = np.ascontiguousarray(batch.tensors[key])
                sha.update(f"{key}:{array.dtype.str}:{array.shape}:".encode())
                sha.update(array.data)
        return sha.hexdigest()


def make_plan(samples: Sequence[Sample], *, packed: bool) -> Plan:
    """Lay out samples in batches that depend on the data alone.

    Args:
        samples: in data set order; their number is one of SIZES.
        packed: several samples a row, told apart by positions that start again at 0 (right only for models whose attention
            reads that, see workers.model.loading.PACKABLE). Otherwise a batch holds samples of one length.
    """
    if any(sample.pixel_values is not None for sample in samples):
        packed = False  # image positions have three coordinates, which cannot tell samples apart
    segments: list[tuple[Batch, ...]] = []
    start = 0
    for boundary in SIZES.values():
        if start >= len(samples):
            break
        indices = sorted(range(start, min(boundary, len(samples))), key=lambda i: (len(samples[i].token_ids), i))
        segments.append(tuple(_packed(samples, chunk) if packed else _stacked(samples, chunk) for chunk in _chunks(samples, indices, packed=packed)))
        start = boundary
    return Plan(segments=tuple(segments))


def _chunks(samples: Sequence[Sample], indices: Sequence[int], *, packed: bool) -> Iterator[list[int]]:
    chunk: list[int] = []
    n_tokens = 0
    for i in indices:
        length = len(samples[i].token_ids)
        other_length = bool(chunk) and not packed and length != len(samples[chunk[0]].token_ids)
        if chunk and (other_length or n_tokens + length > MAX_BATCH_TOKENS):
            yield chunk
            chunk, n_tokens = [], 0
        chunk.append(i)
        n_tokens += length
    yield chunk


def _packed(samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
    tokens = [samples[i].token_ids for i in indices]
    tensors: dict[str, npt.NDArray[np.generic]] = {
        "input_ids": np.concatenate(tokens)[None],
        "position_ids": np.concatenate([np.arange(len(t), dtype=np.int64) for t in tokens])[None],
    }
    return _batch(samples, indices, tensors)


def _stacked(samples: Sequence[Sample], indices: Sequence[int]) -> Batch:
    input_ids = np.stack([samples[i].token_ids for i in indices])
    tensors: dict[str, npt.NDArray[np.generic]] = {"input_ids": input_ids}
    pixels = [p for i in indices if (p := samples[i].pixel_values) is not None]
    if pixels:
        tensors["pixel_values"] = np.concatenate(pixels)
        tensors["image_grid_thw"] = np.array([samples[i].image_grid_thw for i in indices if samples[i].image_grid_thw], dtype=np.int64)
        tensors["mm_token_type_ids"] = (input_ids == samples[indices[0]].image_token).astype(np.int64)
    else:
        tensors["position_ids"] = np.broadcast_to(np.arange(input_ids.shape[1], dtype=np.int64), input_ids.shape).copy()
    return _batch(samples, indices, tensors)


def _batch(samples: Sequence[Sample], indices: Sequence[int], tensors: dict[str, npt.NDArray[np.generic]]) -> Batch:
    pixels = [samples[i].pixel_values for i in indices]
    return Batch(
        order=tuple(indices),
        lengths=tuple(len(samples[i].token_ids) for i in indices),
        patch_counts=tuple(0 if p is None else len(p) for p in pixels),
        tensors=tensors,
    )


def read_captions(path: Path, n_samples: int) -> list[str]:
    """The first `n_samples` captions of a text file, one a line.

    Raises: SweepError: unreadable, not UTF-8, an empty line among the captions, or fewer captions than asked for.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut captions at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(
            f"Cannot read the captions file {path}: {error}. Give a UTF-8 text file with one caption a line: dataset.captions_path=FILE."
        ) from error
    return first_texts([line.strip() for line in lines], n_samples, f"captions file {path}")


def read_hub_captions(hub_id: str, split: str, column: str, n_samples: int) -> list[str]:
    """The first `n_samples` captions of a Hugging Face data set's text column, streamed.

    Raises: SweepError: the data set, split or column cannot be read.
    """
    import datasets

    try:
        stream = datasets.load_dataset(hub_id, split=split, streaming=True)
        texts: list[str] = []
        for row in stream.take(n_samples):
            value = row[column]
            first = next(iter(value), None) if isinstance(value, list) else value
            texts.append("" if first is None else str(first).strip())
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise SweepError(
            f"Cannot read data set {hub_id!r} (split {split!r}, column {column!r}) from the hub: {type(error).__name__}: {error}. "
            "Give a local file with one caption a line instead: dataset.captions_path=FILE."
        ) from error
    return first_texts(texts, n_samples, f"data set {hub_id!r}")


def first_texts(texts: Sequence[str], n_samples: int, source: str) -> list[str]:
    """The first `n_samples` texts, refused with what is wrong if there are fewer or one of them is blank."""
    while texts and not texts[-1]:
        texts = texts[:-1]
    fitting = [f"dataset.size={size}" for size, n in SIZES.items() if n <= len(texts)]
    if len(texts) < n_samples:
        advice = f"Choose {' or '.join(fitting)}, or give more captions." if fitting else f"The smallest size needs {min(SIZES.values())}: give more captions."
        raise SweepError(f"The {source} holds {len(texts)} captions; {n_samples} are needed. {advice}")
    for number, text in enumerate(texts[:n_samples], start=1):
        if not text:
            raise SweepError(f"Caption {number} of the {source} is empty. Remove blank lines: one caption a line.")
    return list(texts[:n_samples])


def text_samples(token_ids: Sequence[Sequence[int]], max_tokens: int) -> list[Sample]:
    """Tokenized texts as samples, cut at `max_tokens`.

    Raises: SweepError: a text of fewer than 2 tokens has no token to predict.
    """
    for number, ids in enumerate(token_ids, start=1):
        if len(ids) < 2:
            raise SweepError(f"Sample {number} has {len(ids)} token(s); at least 2 are needed to predict one. Remove or lengthen that caption.")
    return [Sample(token_ids=np.array(ids[:max_tokens], dtype=np.int64)) for ids in token_ids]


def scene_captions(n_samples: int) -> list[str]:
    """Captions of the first `n_samples` drawn scenes."""
    return [scene(i).caption for i in range(n_samples)]


def with_scenes(captions: Sequence[Sample], *, vision_start: int, vision_end: int, image_token: int, merge: int) -> list[Sample]:
    """Put the drawn image of each scene before its tokenized caption.

    Args:
        captions: samples of scene_captions, in order.
        vision_start: token id that opens an image; vision_end closes it; image_token stands for one merged patch.
        vision_end: see vision_start.
        image_token: see vision_start.
        merge: patches merged into one token along each side (the model's spatial_merge_size).
    """
    samples: list[Sample] = []
    for index, caption in enumerate(captions):
        pixel_values, grid = patches(scene(index).pixels)
        n_image_tokens = int(np.prod(grid)) // merge**2
        image = np.array([vision_start, *[image_token] * n_image_tokens, vision_end], dtype=np.int64)
        samples.append(
            replace(caption, token_ids=np.concatenate([image, caption.token_ids]), pixel_values=pixel_values, image_grid_thw=grid, image_token=image_token)
        )
    return samples
