"""Rows of captured tensors: which sample each belongs to, which kind of token it is, and sums over both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sweep.core.batches import IMAGE, TOKEN_KINDS, Batch, Int64Array, KindArray
from sweep.core.errors import SweepError

Segments = Sequence[Sequence[Batch]]  # of a plan, up to the largest size wanted
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Leading:
    """The rows of leading samples, in the segments that hold them."""

    n_samples: int
    n_segments: int
    end: int  # the row past the last segment's last
    rows: Tensor | None  # [its rows] int64 on the device, ascending; None: all up to `end`

    def of(self, by_row: Tensor) -> Tensor:
        """Values of its rows alone. Args: by_row: [rows, ...], of all segments."""
        return by_row[: self.end] if self.rows is None else by_row[self.rows]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Which rows of a captured tensor belong to which sample: its tokens, or its patches, sample after sample."""

    ends: tuple[int, ...]  # row at which each segment ends
    samples: tuple[int, ...]  # data set index of each sample, in row order
    sample_ends: tuple[int, ...]  # number of samples up to the end of each segment
    batch_ends: tuple[int, ...]  # row at which each batch ends, after a leading 0
    lengths: Tensor  # [samples] int64 on the device: rows of each sample
    # Runs: neighbouring rows of one sample and one kind of token.
    run_ends: tuple[int, ...]  # number of runs up to the end of each segment
    run_lengths: Tensor  # [runs] int64 on the device: rows of each
    run_samples: Int64Array  # [runs], data set index
    run_kinds: KindArray  # [runs], see TOKEN_KINDS
    _leading: dict[int, Leading] = field(default_factory=dict)

    def sample_of(self, row: int) -> int:
        """Data set index of the sample that a row belongs to."""
        return self.samples[int(torch.searchsorted(self.lengths.cumsum(0), row, right=True))]

    def leading(self, n_samples: int) -> Leading:
        """The rows of that many leading samples."""
        if n_samples not in self._leading:
            last = int(np.searchsorted(self.sample_ends, min(n_samples, self.sample_ends[-1])))
            inside = torch.tensor(self.samples[: self.sample_ends[last]], device=self.lengths.device) < n_samples
            rows = None
            if n_samples < self.sample_ends[last]:
                rows = inside.repeat_interleave(self.lengths[: self.sample_ends[last]]).nonzero().flatten()
            self._leading[n_samples] = Leading(n_samples=n_samples, n_segments=last + 1, end=self.ends[last], rows=rows)
        return self._leading[n_samples]

    def leading_batches(self, x_TI: Tensor, n_samples: int) -> list[Tensor]:
        """The rows of leading samples, batch by batch; none for a batch without any of them."""
        leading = self.leading(n_samples)
        ends = torch.tensor([end for end in self.batch_ends if 0 < end <= leading.end])
        if leading.rows is not None:
            ends = torch.searchsorted(leading.rows.cpu(), ends)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        return [part for part in leading.of(x_TI).split(counts) if len(part)]

    def sample_sums(self, by_row: Tensor, n_segments: int = 0) -> Tensor:
        """Sums over the rows of each sample, [samples, ...] in the order of the rows.

        Args:
            by_row: [rows, ...].
            n_segments: leading segments whose rows these are; 0: all.
        """
        return _reduced(by_row, self.lengths[: self.sample_ends[n_segments - 1]], "sum")

    def run_figures(self, by_row: Tensor, n_segments: int = 0) -> Tensor:
        """Sums and largest values over the rows of each run: [2, runs, ...]. Args: as for `sample_sums`."""
        return torch.stack([self.over_runs(by_row, "sum", n_segments), self.over_runs(by_row, "max", n_segments)])

    def over_runs(self, by_row: Tensor, reduce: Literal["sum", "max"], n_segments: int = 0) -> Tensor:
        """The sum of the rows of each run, or the largest and at least 0: [runs, ...]. Args: as for `sample_sums`."""
        return _reduced(by_row, self.run_lengths[: self.run_ends[n_segments - 1]], reduce)

    def by_sample(self, by_row: Tensor, reduce: Literal["sum", "max"]) -> FloatArray:
        """The sum or largest of the rows of each sample, [samples] in data set order. Args: by_row: [rows]."""
        found = _reduced(by_row, self.lengths, reduce).double().cpu().numpy()
        return self.in_order(found)

    def in_order(self, by_sample: FloatArray) -> FloatArray:
        """Values of leading samples, [..., samples] in the order of the rows, in data set order."""
        samples = list(self.samples[: by_sample.shape[-1]])
        found = np.zeros((*by_sample.shape[:-1], max(samples) + 1))
        found[..., samples] = by_sample
        return found

    def by_kind(self, run_sums: FloatArray) -> FloatArray:
        """Sums over the runs of each kind of token and sample: [..., kinds, samples] in data set order.

        Args:
            run_sums: [..., runs], of leading segments.
        """
        n_runs = run_sums.shape[-1]
        kinds, samples = self.run_kinds[:n_runs].astype(np.int64), self.run_samples[:n_runs]
        n_samples = int(samples.max()) + 1
        places = kinds * n_samples + samples
        order = np.argsort(places, kind="stable")
        firsts = np.flatnonzero(np.diff(places[order], prepend=-1))
        found = np.zeros((*run_sums.shape[:-1], len(TOKEN_KINDS) * n_samples))
        found[..., places[order][firsts]] = np.add.reduceat(run_sums[..., order], firsts, axis=-1)
        return found.reshape(*run_sums.shape[:-1], len(TOKEN_KINDS), n_samples)

    def largest(self, run_maxes: FloatArray, n_samples: int) -> FloatArray:
        """The largest of leading samples' rows. Args: run_maxes: [..., runs], of leading segments."""
        inside = self.run_samples[: run_maxes.shape[-1]] < n_samples
        return run_maxes[..., inside].max(axis=-1, initial=0.0)


def layout_of(segments: Segments, kinds_of: Callable[[Batch], Sequence[KindArray]], device: torch.device) -> Layout:
    """The layout of captured rows.

    Args:
        segments: in canonical order.
        kinds_of: from a batch to the kinds of the rows of each of its samples.
        device: where the layout's `lengths` are needed.
    """
    ends, sample_ends, batch_ends, run_ends = list[int](), list[int](), [0], list[int]()
    samples, lengths = list[int](), list[int]()
    run_samples, run_kinds, run_lengths = list[int](), list[int](), list[int]()
    for batches in segments:
        for batch in batches:
            by_sample = kinds_of(batch)
            samples += batch.order
            lengths += map(len, by_sample)
            batch_ends.append(batch_ends[-1] + sum(map(len, by_sample)))
            for sample, kinds in zip(batch.order, by_sample, strict=True):
                starts = np.flatnonzero(np.diff(kinds.astype(np.int16), prepend=-1))
                run_samples += [sample] * len(starts)
                run_kinds += kinds[starts].tolist()
                run_lengths += np.diff(starts, append=len(kinds)).tolist()
        ends.append(batch_ends[-1])
        sample_ends.append(len(samples))
        run_ends.append(len(run_lengths))
    return Layout(
        ends=tuple(ends),
        samples=tuple(samples),
        sample_ends=tuple(sample_ends),
        batch_ends=tuple(batch_ends),
        lengths=torch.tensor(lengths, device=device),
        run_ends=tuple(run_ends),
        run_lengths=torch.tensor(run_lengths, dtype=torch.int64, device=device),
        run_samples=np.array(run_samples, dtype=np.int64),
        run_kinds=np.array(run_kinds, dtype=np.uint8),
    )


def token_kinds(batch: Batch) -> list[KindArray]:
    """Kinds of the rows of a linear that sees tokens, sample by sample."""
    return batch.by_sample(batch.kinds)


def prediction_kinds(batch: Batch) -> list[KindArray]:
    """Kinds of the tokens after which something is predicted, sample by sample."""
    pairs = zip(batch.by_sample(batch.kinds), batch.by_sample(batch.predicts), strict=True)
    return [kinds[predicts] for kinds, predicts in pairs]


def patch_kinds(batch: Batch, rows_a_patch: Fraction) -> list[KindArray]:
    """Kinds of the rows of a linear that sees pictures, sample by sample.

    Raises: SweepError: the rows cannot be told apart by picture.
    """
    counts = [count * rows_a_patch for count in batch.patch_counts]
    if any(count.denominator != 1 for count in counts):
        raise SweepError(
            f"A linear of the vision tower is called on {rows_a_patch} rows a patch, which do not divide the pictures "
            "of a batch: it cannot be scored. Choose sensitivity.coverage=lm_only."
        )
    return [np.full(int(count), IMAGE, dtype=np.uint8) for count in counts]


def _reduced(by_row: Tensor, lengths: Tensor, reduce: Literal["sum", "max"]) -> Tensor:
    """Reduce the rows of each of consecutive pieces; 0 for an empty one."""
    # unsafe: a check of the lengths would wait for the GPU.
    return torch.segment_reduce(by_row, reduce, lengths=lengths.to(by_row.device), axis=0, unsafe=True, initial=0)
