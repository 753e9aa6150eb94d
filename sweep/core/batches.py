"""Batches: the samples that one forward pass sees, and the plan of them, as the driver sends it to workers."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from sweep.core.sizes import n_samples_of, size_name

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
KindArray = npt.NDArray[np.uint8]  # places in TOKEN_KINDS
BoolArray = npt.NDArray[np.bool_]
T = TypeVar("T", bound=np.generic)

# Kinds of input tokens, by which a score is split. An answer is what the model writes in a conversation, its
# end-of-turn token included; a prompt is all other text, that of texts and captions too. A sample's first token is a
# kind of its own, whatever it says: many models keep attention sinks and massive activations there.
TOKEN_KINDS: Final = ("first_token", "image", "prompt", "answer")
FIRST_TOKEN, IMAGE, PROMPT, ANSWER = range(len(TOKEN_KINDS))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Picture:
    """A picture as a model's vision tower takes it; its values lie in a file, so that plans stay small."""

    content: str  # hash of its values: those of equal ones are equal
    shape: tuple[int, ...]  # of its pixel_values; pictures of a batch are concatenated along the first axis
    n_rows: int  # that the vision tower makes of it: patches
    tensors: Mapping[str, Int64Array]  # beside pixel_values, concatenated as they are: {"image_grid_thw": [1, 3]}
    # [channels, 256], the value of each number of a file of uint8 [n, channels, values]; None: a file of float32. The
    # file holds one frame where `shape` has several, which are equal then.
    levels: FloatArray | None = None
    values: FloatArray | None = None  # pixel_values, where they are drawn and no file has them
    text: str = ""  # that stands for it where the chat template has its mark, unless that follows from its shape


def picture_tensors(pictures: Iterable[Picture]) -> dict[str, Int64Array]:
    """Forward's keyword arguments that describe pictures, but for their pixels, one picture after another."""
    tensors = [picture.tensors for picture in pictures]
    names = tensors[0] if tensors else ()
    return {name: np.concatenate([*map(itemgetter(name), tensors)]) for name in names}


def _n_rows(pictures: Iterable[Picture]) -> int:
    """Rows that the vision tower makes of some pictures."""
    return sum(picture.n_rows for picture in pictures)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One calibration text or conversation, with its pictures if it has some."""

    token_ids: Int64Array  # [n_tokens]
    kinds: KindArray | None = None  # [n_tokens]; None: all of it is text
    # [n_tokens], whether the token after each is predicted; None: all but the last's.
    predicts: BoolArray | None = None
    # Further arguments of the model, a value a token: {"mm_token_type_ids": [n_tokens]}.
    arrays: Mapping[str, Int64Array] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()  # in the order of their tokens
    # [4, n_tokens]: its place in the text, and where it stands in time, height and width of the pictures. Rows can hold
    # several samples of a model that takes these; None: it takes others, or finds them itself.
    positions: Int64Array | None = None

    @property
    def token_kinds(self) -> KindArray:
        """The kind of each token, the first token's own included: [n_tokens]."""
        kinds = np.full(len(self.token_ids), PROMPT, dtype=np.uint8) if self.kinds is None else self.kinds.copy()
        kinds[0] = FIRST_TOKEN
        return kinds

    @property
    def predictions(self) -> BoolArray:
        """Whether the token after each is predicted: [n_tokens]."""
        if self.predicts is not None:
            return self.predicts
        return np.arange(len(self.token_ids)) < len(self.token_ids) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples of one forward pass. Rows of the flattened batch are their tokens, sample after sample, no padding."""

    order: tuple[int, ...]  # data set indices, in the order of the rows
    lengths: tuple[int, ...]  # tokens a sample
    # Forward's keyword arguments that have a value a token: [samples, tokens], or [1, rows] where they are packed;
    # position_ids may have axes before these.
    tensors: dict[str, Int64Array]
    kinds: KindArray  # [rows]
    predicts: BoolArray  # [rows]: whether the next token is predicted
    pictures: tuple[tuple[Picture, ...], ...]  # of each sample; workers.model.forward reads their pixels

    @property
    def patch_counts(self) -> tuple[int, ...]:
        """Rows that the vision tower makes of each sample's pictures."""
        return tuple(map(_n_rows, self.pictures))

    @property
    def all_pictures(self) -> list[Picture]:
        """Of all samples, in the order of their rows."""
        return [picture for pictures in self.pictures for picture in pictures]

    def by_sample(self, by_row: npt.NDArray[T]) -> list[npt.NDArray[T]]:
        """Values of rows, sample by sample."""
        return np.split(by_row, np.cumsum(self.lengths)[:-1])

    @property
    def n_predictions(self) -> tuple[int, ...]:
        """Of each sample."""
        return tuple(int(rows.sum()) for rows in self.by_sample(self.predicts))

    @property
    def has_answers(self) -> bool:
        """Whether kinds and predictions are others than those of plain texts and captions."""
        return bool((self.kinds == ANSWER).any()) or sum(self.n_predictions) != sum(self.lengths) - len(self.lengths)

    def leading(self, n_samples: int) -> "Batch | None":
        """The batch without the samples from that number on; None: no sample is left."""
        kept = [index for index, sample in enumerate(self.order) if sample < n_samples]
        if len(kept) == len(self.order):
            return self
        if not kept:
            return None
        rows = np.isin(np.repeat(np.arange(len(self.order)), self.lengths), kept)
        is_packed = len(self.tensors["input_ids"]) < len(self.order)
        return Batch(
            order=tuple(self.order[index] for index in kept),
            lengths=tuple(self.lengths[index] for index in kept),
            tensors={key: values[..., rows] if is_packed else values[kept] for key, values in self.tensors.items()},
            kinds=self.kinds[rows],
            predicts=self.predicts[rows],
            pictures=tuple(self.pictures[index] for index in kept),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Batches of each segment; segment i holds the samples between boundary i-1 and i of `sweep.core.sizes`.

    A size that ends inside a segment is the rows of its samples there: the segment is laid out, captured and multiplied
    whole, so that no size changes the bits of another.
    """

    segments: tuple[tuple[Batch, ...], ...]

    @cached_property
    def segment_ends(self) -> tuple[int, ...]:
        """Number of samples up to the end of each segment."""
        ends: list[int] = []
        for batches in self.segments:
            n_samples = sum(len(batch.order) for batch in batches)
            ends.append(n_samples + (ends[-1] if ends else 0))
        return tuple(ends)

    @property
    def size(self) -> str:
        """The size of all samples."""
        return size_name(self.segment_ends[-1])

    def segments_of(self, size: str) -> int:
        """Number of leading segments that hold the samples of `size`."""
        n_samples = min(n_samples_of(size), self.segment_ends[-1])
        return int(np.searchsorted(self.segment_ends, n_samples)) + 1

    def is_inside(self, size: str) -> bool:
        """Whether the size ends inside a segment."""
        return n_samples_of(size) < self.segment_ends[self.segments_of(size) - 1]

    def n_predictions(self, size: str) -> int:
        """Positions whose next token is predicted, over the samples of `size`."""
        return sum(self.sample_predictions(size))

    def sample_predictions(self, size: str) -> list[int]:
        """The same of each sample, in data set order."""
        found: dict[int, int] = {}
        for batch in self._whole(size):
            found |= zip(batch.order, batch.n_predictions, strict=True)
        return [found[sample] for sample in sorted(found)[: n_samples_of(size)]]

    def batches(self, size: str) -> Iterator[Batch]:
        """All batches of `size`, in canonical order; of those that hold other samples, too, what is left of them."""
        for batch in self._whole(size):
            if (leading := batch.leading(n_samples_of(size))) is not None:
                yield leading

    def _whole(self, size: str) -> Iterator[Batch]:
        for segment in self.segments[: self.segments_of(size)]:
            yield from segment

    def digest(self, size: str) -> str:
        """Hash of every tensor fed to the model for `size`, and of which sample each row is, in canonical order."""
        sha = hashlib.sha256()
        for batch in self._whole(size):
            # Data sets in other orders may have equal batches, but not equal sample scores.
            sha.update(f"{batch.order}:".encode())
            arrays: dict[str, npt.NDArray[np.generic]] = {**batch.tensors, **picture_tensors(batch.all_pictures)}
            if drawn := [picture.values for picture in batch.all_pictures if picture.values is not None]:
                arrays["pixel_values"] = np.concatenate(drawn)
            for key in sorted(arrays):
                array = np.ascontiguousarray(arrays[key])
                sha.update(f"{key}:{array.dtype.str}:{array.shape}:".encode())
                sha.update(array.data)
            for picture in batch.all_pictures:
                sha.update(f"picture:{picture.content}:".encode() if picture.values is None else b"")
            if batch.has_answers:
                sha.update(b"kinds:" + batch.kinds.tobytes() + b"predicts:" + batch.predicts.tobytes())
        if self.is_inside(size):
            sha.update(f"first {n_samples_of(size)} samples".encode())
        return sha.hexdigest()
