"""Sums over the outputs, rows and linears of a layer group, of every recipe that it is scored under.

By squares: a score is the sum of (g * dy)^2. By projections: it is the mean over draws of the square of a sample's
projection, the sum of g * dy over all its rows and the group's linears, signed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from workers.quant import kernels
from workers.scoring.layout import FloatArray, Layout

_FLOAT64_BYTES: Final = 2.5e8  # of the projections of rows that are in float64 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """dy of one linear under some recipes, as workers.quant.kernels takes it, and its g."""

    first: Tensor | None  # [rows, out]
    seconds: Tensor  # [recipes, rows, out]
    g_DTO: Tensor
    ends: Sequence[int]
    second_ends: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What `RowSums` has found; columns are recipes, samples are in data set order."""

    samples: FloatArray  # [columns, samples], scores
    squares: FloatArray  # [columns, samples], sums of dy^2
    by_kind: FloatArray  # [columns, kinds, samples], parts of the scores
    run_maxes: FloatArray  # [columns, runs], largest parts of single rows
    projections: FloatArray | None = None  # [columns, samples, draws]


class RowSums(Protocol):
    """Sums over one layer group."""

    def add(self, place: int, columns: slice, errors: Errors) -> None:
        """Add a linear's under some recipes.

        Args:
            place: of the linear in the group.
            columns: of the recipes.
            errors: of these.
        """
        ...

    def figures(self) -> Tensor:
        """What `found` needs, as one float64 vector on the device."""
        ...

    def found(self, values: FloatArray) -> Sums:
        """The sums. Args: values: of `figures`, on the host."""
        ...


class SquareSums:
    """RowSums of squares: method=gradient."""

    def __init__(self, layout: Layout, n_linears: int, n_columns: int, device: torch.device) -> None:
        self._layout, self._n_columns = layout, n_columns
        # Sums of (g * dy)^2 and of dy^2 over the outputs.
        self._sums = torch.zeros(n_linears, 2, n_columns, layout.ends[-1], device=device)

    def add(self, place: int, columns: slice, errors: Errors) -> None:
        """See RowSums."""
        scores, squares = self._sums[place, :, columns]
        (g_TO,) = errors.g_DTO
        kernels.score_rows(errors.first, errors.seconds, g_TO, errors.ends, errors.second_ends, scores, squares)

    def figures(self) -> Tensor:
        """See RowSums."""
        by_row = self._sums.flatten(0, 2).T.to(torch.float64, memory_format=torch.contiguous_format)
        n_linears, _, n_columns, _ = self._sums.shape
        linears = self._layout.sample_sums(by_row).unflatten(1, (n_linears, -1)).unbind(1)
        samples = sum(linears[1:], start=linears[0])
        scores_TC = by_row.unflatten(1, (n_linears, 2, n_columns))[:, :, 0].sum(1)
        return torch.cat([self._layout.run_figures(scores_TC).flatten(), samples.flatten()])

    def found(self, values: FloatArray) -> Sums:
        """See RowSums."""
        layout, n_columns = self._layout, self._n_columns
        runs, in_rows = np.split(values, [2 * len(layout.run_samples) * n_columns])
        run_sums, run_maxes = runs.reshape(2, -1, n_columns).transpose(0, 2, 1)
        # One row for each column, so that the order of its sum doesn't depend on the others.
        samples = layout.in_order(in_rows.reshape(-1, 2 * n_columns).T)
        scores, squares = samples[:n_columns], samples[n_columns:]
        return Sums(samples=scores, squares=squares, by_kind=layout.by_kind(run_sums), run_maxes=run_maxes)


class ProjectionSums:
    """RowSums of projections: method=fisher.

    A row's products are summed in float32, in halves of halves; rows in float64. Both are signed: a projection is
    smaller than the sum of its terms' magnitudes by their number's root, and keeps six digits
    (tests/unit/scoring/test_fisher.py).
    """

    def __init__(self, layout: Layout, n_draws: int, n_columns: int, device: torch.device) -> None:
        self._layout, self._n_draws, self._n_columns = layout, n_draws, n_columns
        # Sums of g * dy over the outputs and linears.
        self._rows = torch.zeros(n_columns, n_draws, layout.ends[-1], device=device)
        self._squares = torch.zeros(len(layout.samples), n_columns, dtype=torch.float64, device=device)

    def add(self, place: int, columns: slice, errors: Errors) -> None:
        """See RowSums."""
        into = self._rows[columns]
        rows, squares = torch.zeros_like(into), into.new_zeros(len(into), into.shape[2])
        kernels.project_rows(errors.first, errors.seconds, errors.g_DTO, errors.ends, errors.second_ends, rows, squares)
        into += rows
        self._squares[:, columns] += self._layout.sample_sums(squares.T.double().contiguous())

    def figures(self) -> Tensor:
        """See RowSums."""
        step = max(1, int(_FLOAT64_BYTES / (8 * self._rows[0].numel())))
        runs, maxes = zip(*map(self._run_figures, self._rows.split(step)), strict=True)
        del self._rows  # by far the largest; results of several groups are waited for at a time
        return torch.cat([torch.cat(runs, dim=1).flatten(), torch.cat(maxes, dim=1).flatten(), self._squares.flatten()])

    def _run_figures(self, rows_CDT: Tensor) -> tuple[Tensor, Tensor]:
        """Of some columns the projections of runs, [runs, columns, draws], and the largest parts, [runs, columns].

        A row's part of a score is the mean over draws of its projection times its sample's.
        """
        layout = self._layout
        rows_TCD = rows_CDT.permute(2, 0, 1).double().contiguous()
        samples = layout.sample_sums(rows_TCD)
        lengths = layout.lengths.to(samples.device)
        whole = samples.repeat_interleave(lengths, dim=0, output_size=len(rows_TCD))
        parts_TC = (rows_TCD * whole).mean(2)
        return layout.over_runs(rows_TCD, "sum"), layout.over_runs(parts_TC, "max")

    def found(self, values: FloatArray) -> Sums:
        """See RowSums."""
        layout, n_columns, n_draws = self._layout, self._n_columns, self._n_draws
        n_runs = len(layout.run_samples)
        runs, maxes, squares = np.split(values, np.cumsum([n_runs * n_columns * n_draws, n_runs * n_columns]))
        by_kind = layout.by_kind(
            runs.reshape(n_runs, n_columns, n_draws).transpose(1, 2, 0)
        )  # and [.., kinds, samples]
        whole = by_kind.sum(axis=2)
        return Sums(
            samples=np.square(whole).mean(axis=1),
            squares=layout.in_order(squares.reshape(-1, n_columns).T),
            by_kind=(by_kind * whole[:, :, None]).mean(axis=1),
            run_maxes=maxes.reshape(n_runs, n_columns).T,
            projections=whole.transpose(0, 2, 1),
        )
