"""The one canonical plan of batches, which depends on the data alone.

Segments end at the size boundaries (16, 128, 512), so a smaller size is a prefix of a larger one down to the last bit;
batches are bounded in tokens and never padded.
"""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from sweep.core.batches import Batch, Plan, Sample
from sweep.core.sizes import SIZES

MAX_BATCH_TOKENS: Final = 2048  # enough to fill a GPU; attention over a packed row costs its square


def make_plan(samples: Sequence[Sample], *, packed: bool) -> Plan:
    """Lay out samples in batches that depend on the data alone.

    Args:
        samples: in data set order; their number is one of SIZES.
        packed: several samples a row, kept apart by positions that start again at 0 (right only for models whose
            attention respects that, see workers.model.loading.PACKABLE). Otherwise a batch holds samples of one length.
    """
    if any(sample.pixel_values is not None for sample in samples):
        packed = False  # image positions have three coordinates, which cannot tell samples apart
    segments: list[tuple[Batch, ...]] = []
    start = 0
    for boundary in SIZES.values():
        if start >= len(samples):
            break
        indices = sorted(range(start, min(boundary, len(samples))), key=lambda i: (len(samples[i].token_ids), i))
        layout = _packed if packed else _stacked
        segments.append(tuple(layout(samples, chunk) for chunk in _chunks(samples, indices, packed=packed)))
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
        grids = [samples[i].image_grid_thw for i in indices if samples[i].image_grid_thw]
        tensors["image_grid_thw"] = np.array(grids, dtype=np.int64)
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
