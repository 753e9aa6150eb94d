"""The one canonical plan of batches, which depends on the data alone.

Segments end at the boundaries of sizes (16, 128, 512, 1024...), so a smaller size is a prefix of a larger one down to
the last bit; batches are bounded in tokens and never padded.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final

import numpy as np

from sweep.core.batches import Batch, Int64Array, Plan, Sample
from sweep.core.sizes import boundaries

MAX_BATCH_TOKENS: Final = 2048  # enough to fill a GPU; attention over a packed row costs its square


def make_plan(samples: Sequence[Sample], *, packed: bool) -> Plan:
    """Lay out samples in batches that depend on the data alone.

    Args:
        samples: in data set order; the last segment ends with them.
        packed: several samples a row, kept apart by positions that start again at 0 (right only for models whose
            attention respects that, see workers.model.loading.PACKABLE). Otherwise a batch holds samples of one length.
    """
    if any(sample.pictures for sample in samples) and any(sample.positions is None for sample in samples):
        packed = False  # the model finds positions of pictures itself, and cannot tell samples apart
    segments: list[tuple[Batch, ...]] = []
    start = 0
    for boundary in boundaries(len(samples)):
        indices = sorted(range(start, min(boundary, len(samples))), key=lambda i: (len(samples[i].token_ids), i))
        segments.append(tuple(_batch(samples, chunk, packed) for chunk in _chunks(samples, indices, packed=packed)))
        start = boundary
    return Plan(segments=tuple(segments))


def _chunks(samples: Sequence[Sample], indices: Sequence[int], *, packed: bool) -> Iterator[list[int]]:
    chunk: list[int] = []
    n_tokens = 0
    for i in indices:
        length = len(samples[i].token_ids)
        if chunk and (
            n_tokens + length > MAX_BATCH_TOKENS or (not packed and _shape(samples[i]) != _shape(samples[chunk[0]]))
        ):
            yield chunk
            chunk, n_tokens = [], 0
        chunk.append(i)
        n_tokens += length
    yield chunk


def _shape(sample: Sample) -> tuple[int, bool]:
    """Samples of a batch have one length, and all have pictures or none has."""
    return len(sample.token_ids), bool(sample.pictures)


def in_rows(batches: Sequence[Batch], n_tokens: int) -> list[list[Batch]]:
    """Neighbouring batches that fit one row together, as `joined` makes it; any other is alone.

    Args:
        batches: of one segment.
        n_tokens: the most of a row; a batch of more is alone.
    """
    found: list[list[Batch]] = []
    for batch in batches:
        last = found[-1] if found else []
        total = sum(sum(each.lengths) for each in [*last, batch])
        if last and total <= n_tokens and _row(batch) is not None and _row(batch) == _row(last[0]):
            last.append(batch)
        else:
            found.append([batch])
    return found


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of all samples, in order. Args: batches: of `in_rows`."""
    first, *others = batches
    if not others:
        return first

    def row(name: str) -> Int64Array:
        return np.concatenate([batch.tensors[name] for batch in batches], axis=-1)

    return Batch(
        order=tuple(chain.from_iterable(batch.order for batch in batches)),
        lengths=tuple(chain.from_iterable(batch.lengths for batch in batches)),
        tensors={name: row(name) for name in first.tensors},
        kinds=np.concatenate([batch.kinds for batch in batches]),
        predicts=np.concatenate([batch.predicts for batch in batches]),
        pictures=tuple(chain.from_iterable(batch.pictures for batch in batches)),
    )


def _row(batch: Batch) -> dict[str, tuple[int, ...]] | None:
    """The tensors of a batch that is one row, with their axes before its tokens; None: positions keep nothing apart."""
    has_positions = len(batch.tensors["input_ids"]) == 1 and "position_ids" in batch.tensors
    return {key: values.shape[:-1] for key, values in batch.tensors.items()} if has_positions else None


def _with_pictures(sample: Sample) -> dict[str, Int64Array]:
    """What the model takes of a sample in a row with others, of which some have pictures."""
    assert sample.positions is not None  # see make_plan
    types = {"mm_token_type_ids": np.zeros(len(sample.token_ids), dtype=np.int64)}
    return {"input_ids": sample.token_ids, **types, **sample.arrays, "position_ids": sample.positions}


def _batch(samples: Sequence[Sample], indices: Sequence[int], packed: bool) -> Batch:
    chosen = [samples[i] for i in indices]
    arrays = [{"input_ids": sample.token_ids, **sample.arrays} for sample in chosen]
    if not any(sample.pictures for sample in chosen):
        arrays = [{**each, "position_ids": np.arange(len(each["input_ids"]), dtype=np.int64)} for each in arrays]
    elif packed:
        arrays = [_with_pictures(sample) for sample in chosen]
    tensors: dict[str, Int64Array] = {}
    for name in arrays[0]:
        values = [each[name] for each in arrays]
        tensors[name] = np.concatenate(values, axis=-1)[..., None, :] if packed else np.stack(values)
    return Batch(
        order=tuple(indices),
        lengths=tuple(len(sample.token_ids) for sample in chosen),
        tensors=tensors,
        kinds=np.concatenate([sample.token_kinds for sample in chosen]),
        predicts=np.concatenate([sample.predictions for sample in chosen]),
        pictures=tuple(sample.pictures for sample in chosen),
    )
