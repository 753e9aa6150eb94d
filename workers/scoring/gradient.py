"""The scores of one layer group under many recipes, from captured tensors, for every calibration size at once.

Delta form: with dW = Q(W) - W and dx = Q(x) - x, the error of the output is dy = x dW^T + dx Q(W)^T. Subtracting two
quantized outputs instead would cancel: in bf16 that overstates INT8 scores by 4-15 %. The first term is shared by all
recipes with the same weights, dx by all with the same inputs, and a weight-only recipe needs no second term.

A GEMM's shape depends on the cell alone, so the bits of a score do not depend on what is scored beside it: x dW^T goes
segment by segment; so does dx Q(W)^T where the inputs' range is dynamic, and as one piece where each size has its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.formats.format import Format
from sweep.formats.quantizer import Quantizer
from workers.quant import kernels
from workers.quant.calibration import (
    calibrated_linears,
    fake_quantized,
    quantized_inputs,
    smoothed_inputs,
    smoothed_weight,
)
from workers.quant.linear import LinearQuant
from workers.quant.modelopt import quantized
from workers.scoring.capture import Rows, square_sum
from workers.scoring.host_copy import start_host_copy
from workers.scoring.layout import Layout
from workers.scoring.scores import GroupScore, NotFinite, Scores, first_not_finite
from workers.scoring.sums import Errors, ProjectionSums, RowSums, SquareSums
from workers.scoring.weights import QuantizedWeight, Weights

_PRODUCT_BYTES = 2e9  # of dx Q(W)^T held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One format, and the calibration sizes in which it is to be scored."""

    name: str  # for error messages
    format: Format
    sizes: Mapping[str, int]  # number of leading samples, by size
    calibration: int | None = None  # number of leading samples that find the inputs' ranges; None: those of each size

    @property
    def has_ranges_by_size(self) -> bool:
        """Whether each size has ranges of the inputs of its own."""
        return self.format.calibrates_inputs and self.calibration is None

    def calibration_of(self, size: str | None) -> int:
        """Number of leading samples that find the inputs' ranges. Args: size: None: all sizes have one range."""
        if self.calibration is not None:
            return self.calibration
        return max(self.sizes.values()) if size is None else self.sizes[size]

    def of_linear(self, module: str, weight_OI: Tensor) -> "Job":
        """The same with the format as a linear computes it; see Format.of_linear."""
        return replace(self, format=self.format.of_linear(module, weight_OI.shape[1]))


@dataclass(frozen=True, slots=True)
class _Column:
    """The column of a matrix of row sums that one pass of one job fills.

    A pass serves every size, or one size if each has its own range of the inputs.
    """

    index: int
    job: int
    size: str | None
    calibration: int  # number of leading samples that find the ranges of the inputs
    pieces: tuple[tuple[int, int], ...]  # of rows, first and past the last; one GEMM each

    @property
    def end(self) -> int:
        return self.pieces[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A layer group, its linears that were called, in the model's order, and the recipes to score it under."""

    name: str
    weights: Mapping[str, Tensor]  # [out, in], by module name
    rows: Mapping[str, Rows]
    jobs: Sequence[Job]
    columns: Sequence[_Column]


@dataclass(frozen=True, slots=True)
class _Visit:
    """The operands of one module under one weight recipe, for all jobs that share it.

    They are ready on the main stream, although the kernels that make them may not have run yet.
    """

    name: str
    weight: QuantizedWeight
    jobs: tuple[int, ...]
    inputs: Mapping[tuple[str, int], Tensor]  # dx [rows, in] by recipe of the inputs and calibration samples


class Engine:
    """Scores layer groups of one device by their gradients.

    It keeps quantizers and weight ranges between calls, so use one for each loaded model.
    """

    def __init__(self, device: torch.device) -> None:
        self._weights = Weights()
        # There ModelOpt's calibrators may wait for the GPU while the main stream multiplies the operands before.
        self._side_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @torch.no_grad()
    def score_group(
        self, weights: Mapping[str, Tensor], rows: Mapping[str, Rows], jobs: Sequence[Job]
    ) -> Callable[[], list[Scores] | None]:
        """Start scoring one layer group under several recipes.

        Args:
            weights: the group's weights [out, in] in the model's dtype, by module name.
            rows: captured rows by module name, over at least the segments of every job.
            jobs: recipes.

        Returns: a function that waits for the GPU and gives each job's scores (or NotFinite), None if
            no module of the group was called. Call it after the next group has been started, so that the GPU never
            waits.
        """
        name = next(iter(weights))
        called = [module for module in weights if module in rows]
        if not called:
            return lambda: None
        jobs = [job.of_linear(name, weights[name]) for job in jobs]
        with torch.cuda.device_of(weights[name]):  # nothing on a CPU
            reason = self._weights.not_finite(weights) or _not_finite_input([rows[module] for module in called])
            if reason is not None:
                return lambda: [NotFinite.of(name, job.name, reason) for job in jobs]
            layout = rows[called[0]].layout
            if any(rows[module].layout is not layout for module in called):
                raise SweepError(f"The linears of layer group {name} do not see the same rows: it cannot be scored.")
            group = _Group(
                name=name,
                weights={module: weights[module] for module in called},
                rows={module: rows[module] for module in called},
                jobs=jobs,
                columns=_columns(jobs, layout),
            )
            total = _GroupSums(group)
            for visit in self._visits(group):
                here = [column for column in group.columns if column.job in visit.jobs]
                total.add(visit, rows[visit.name], here, self._weights.square(visit.name, weights[visit.name]))
            for column in group.columns:
                if jobs[column.job].format.algorithm != "max":
                    self._score_calibrated(column, group, total)
            total.close()
        return total.results

    def _visits(self, group: _Group) -> Iterator[_Visit]:
        """The operands of every module and distinct weight recipe, for the jobs whose ranges `max` finds."""
        by_weight: dict[str, list[int]] = {}
        for index, job in enumerate(group.jobs):
            if job.format.algorithm == "max":
                by_weight.setdefault(job.format.weight_id, []).append(index)
        if not by_weight:
            return
        inputs: dict[tuple[str, int], Tensor] = {}
        fresh: list[Tensor] = []
        x_TI: Tensor | None = None
        for name, weight in group.weights.items():
            if group.rows[name].x_TI is not x_TI:
                x_TI = group.rows[name].x_TI
                with torch.cuda.stream(self._side_stream):
                    inputs = self._input_deltas(group.rows[name], group)
                fresh = list(inputs.values())
            for indices in by_weight.values():
                chosen = group.jobs[indices[0]].format
                with torch.cuda.stream(self._side_stream):
                    operand = self._weights.quantized(name, chosen, weight, group.weights)
                self._wait_for_side_stream(operand.quantized_OI, operand.delta_OI, operand.dw_square_sum, *fresh)
                fresh = []
                yield _Visit(name, operand, tuple(indices), inputs)

    def _score_calibrated(self, column: _Column, group: _Group, total: "_GroupSums") -> None:
        """Score one column of a recipe whose ranges or scales are found by another algorithm than `max`.

        It is calibrated on its samples' inputs, and scored on the inputs times the pre-quantization scale, where there
        is one.
        """
        chosen = group.jobs[column.job].format
        largest = max((other for other in group.columns if other.job == column.job), key=lambda other: other.end)
        for _, members in groupby(group.weights, key=lambda name: id(group.rows[name].x_TI)):
            names = list(members)
            first = group.rows[names[0]]
            x_TI, batches = first.x_TI[: column.end], first.layout.leading_batches(first.x_TI, column.calibration)
            weights = {name: group.weights[name] for name in names}
            found = calibrated_linears(weights, batches, chosen)
            for name, weight in weights.items():
                quant, dtype = found[name], weight.dtype
                x = smoothed_inputs(quant, x_TI)
                inputs: dict[tuple[str, int], Tensor] = {}
                if chosen.inputs is not None:
                    inputs[chosen.input_id, column.calibration] = (quantized_inputs(quant, x_TI) - x).to(dtype)
                visit = _Visit(name, _smoothed(quant, weight), (column.job,), inputs)
                square = self._weights.square(name, weight) if column is largest else None
                total.add(visit, replace(group.rows[name], x_TI=x.to(dtype)), [column], square)

    def _input_deltas(self, rows: Rows, group: _Group) -> dict[tuple[str, int], Tensor]:
        """The dx of every distinct recipe of the inputs, by its key, over the rows of its longest column."""
        wanted: dict[tuple[str, int], tuple[Quantizer, int]] = {}
        for column in group.columns:
            chosen = group.jobs[column.job].format
            if chosen.inputs is not None and chosen.algorithm == "max":
                key = (chosen.input_id, column.calibration)
                wanted[key] = chosen.inputs, max(column.end, wanted.get(key, (chosen.inputs, 0))[1])
        deltas: dict[tuple[str, int], Tensor] = {}
        for key, (quantizer, end) in wanted.items():
            x_TI, n_samples = rows.x_TI[:end], key[1]
            seen_TI = rows.layout.leading(n_samples).of(rows.x_TI) if quantizer.is_calibrated else x_TI
            amax = float(rows.input_amaxes[:n_samples].max())
            made = self._weights.quantizers.inputs(quantizer, seen_TI, amax, rows.input_ranges)
            deltas[key] = kernels.deltas(quantized(made, x_TI), x_TI)[1]
        return deltas

    def _wait_for_side_stream(self, *values: Tensor | float | None) -> None:
        """Have the main stream wait for the second one, and use the tensors among `values`, which that one makes."""
        if self._side_stream is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self._side_stream)
            for value in values:
                if isinstance(value, Tensor):
                    value.record_stream(main)


def _not_finite_input(rows: Sequence[Rows]) -> str | None:
    """The reason why no recipe can be scored: a NaN or an infinity in a captured input, None if there is none."""
    for seen in rows:
        if not np.isfinite(seen.input_amaxes).all():
            bad_row = int((~torch.isfinite(seen.x_TI)).any(dim=1).nonzero()[0])
            return f"the input of sample {seen.layout.sample_of(bad_row)} is NaN or infinite."
    return None


class _GroupSums:
    """Sums over the modules of a layer group, always in the model's order."""

    def __init__(self, group: _Group) -> None:
        rows = list(group.rows.values())  # not kept: their memory may be needed before the results are
        first, n_columns = rows[0], len(group.columns)
        self._name, self._jobs, self._columns, self._layout = group.name, group.jobs, group.columns, first.layout
        self._y_squares = np.sum([seen.y_square_sums for seen in rows], axis=0)  # of each sample
        self._amaxes = np.max([seen.input_amaxes for seen in rows], axis=0)
        self._place = {name: place for place, name in enumerate(group.rows)}
        device = first.x_TI.device
        self._sums: RowSums
        if first.is_drawn:
            self._sums = ProjectionSums(first.layout, len(first.g_DTO), n_columns, device)
        else:
            self._sums = SquareSums(first.layout, len(rows), n_columns, device)
        # Of each module and weight recipe, the jobs that have it and the sum of dW^2.
        self._weights: list[tuple[tuple[int, ...], Tensor | float]] = []
        self._w_squares: dict[str, Tensor] = {}
        self._n_squares = 0
        self._on_host: Callable[[], Tensor] | None = None

    def add(self, visit: _Visit, rows: Rows, columns: Sequence[_Column], w_square: Tensor | None) -> None:
        """Add the row sums of one module under one weight recipe, for every recipe of the inputs that occurs with it.

        Args:
            visit: the module's operands.
            rows: its captured rows.
            columns: those of the visit's jobs.
            w_square: sum of squares of the module's weight; None: the visit's weight is counted by another call.
        """
        if w_square is not None:
            self._w_squares[visit.name] = w_square
            self._weights.append((visit.jobs, visit.weight.dw_square_sum))
        delta, weight = visit.weight.delta_OI, visit.weight.quantized_OI
        # On a CPU bf16 products are float32: its own bf16 GEMM is slower. On a GPU rounding to bf16 is exact enough:
        # the products are errors already, and the roundings of their elements average out (some 1e-6 of a score).
        dtype, n_out = weight.dtype if weight.is_cuda else torch.float32, len(weight)
        by_weight: Tensor | None = None  # x dW^T
        if delta is not None:
            n_rows = max(column.end for column in columns)
            by_weight = rows.g_DTO.new_empty(n_rows, n_out, dtype=dtype)
            for start, end in _pieces(rows.layout):
                if start < n_rows:
                    _matmul(rows.x_TI[start:end], delta, by_weight[start:end])
        room = max(1, int(_PRODUCT_BYTES / (rows.layout.ends[-1] * n_out * 4)))
        # On a CPU several at once gain nothing, and fall out of its cache.
        step = min(kernels.COLUMNS, room) if weight.is_cuda else 1
        for first in range(0, len(columns), step):
            together = columns[first : first + step]
            ends = [column.end for column in together]
            input_ends = [0 if self._jobs[column.job].format.inputs is None else column.end for column in together]
            by_inputs = rows.g_DTO.new_empty(len(together), max(input_ends), n_out, dtype=dtype)  # dx Q(W)^T
            for place, column in enumerate(together):
                if input_ends[place]:
                    deltas = visit.inputs[self._jobs[column.job].format.input_id, column.calibration]
                    for start, end in column.pieces:
                        _matmul(deltas[start:end], weight, by_inputs[place, start:end])
            errors = Errors(first=by_weight, seconds=by_inputs, g_DTO=rows.g_DTO, ends=ends, second_ends=input_ends)
            self._sums.add(self._place[visit.name], slice(together[0].index, together[-1].index + 1), errors)

    def close(self) -> None:
        """Sum rows to samples and start the copy of all sums to the host, without waiting for the GPU."""
        squares = [*self._w_squares.values(), *(square for _, square in self._weights if isinstance(square, Tensor))]
        self._n_squares = len(squares)
        self._on_host = start_host_copy(torch.cat([torch.stack(squares), self._sums.figures()]))

    def results(self) -> list[Scores]:
        """Each job's scores. Waits for the copy that `close` has started, not for kernels launched since."""
        assert self._on_host is not None
        jobs, layout, values = self._jobs, self._layout, self._on_host().numpy()
        sums = self._sums.found(values[self._n_squares :])
        squares = iter(values[: self._n_squares].tolist())
        w_square = sum(next(squares) for _ in self._w_squares)
        dw_squares = [0.0] * len(jobs)
        for indices, square in self._weights:
            value = next(squares) if isinstance(square, Tensor) else square
            for index in indices:
                dw_squares[index] += value
        all_finite = bool(np.isfinite(sums.samples).all() and np.isfinite(sums.squares).all())
        sizes = {size: n_samples for job in jobs for size, n_samples in job.sizes.items()}
        totals = {size: sums.samples[:, :n].sum(axis=1) for size, n in sizes.items()}
        dy_squares = {size: sums.squares[:, :n].sum(axis=1) for size, n in sizes.items()}
        tops = {size: layout.largest(sums.run_maxes, n) for size, n in sizes.items()}
        y_squares = {size: float(self._y_squares[:n].sum()) for size, n in sizes.items()}
        amaxes = {size: float(self._amaxes[:n].max()) for size, n in sizes.items()}
        found: list[dict[str, GroupScore] | NotFinite] = [{} for _ in jobs]
        for column in self._columns:
            job, by_size = jobs[column.job], found[column.job]
            for size in job.sizes if column.size is None else (column.size,):
                if isinstance(by_size, NotFinite):
                    continue
                n_samples = job.sizes[size]
                scores = sums.samples[column.index, :n_samples]
                if not all_finite and (reason := first_not_finite(scores, "score")) is not None:
                    by_size = found[column.job] = NotFinite.of(self._name, job.name, reason)
                    continue
                by_size[size] = GroupScore(
                    score=float(totals[size][column.index]),
                    sample_scores=scores,
                    kind_scores=sums.by_kind[column.index, :, :n_samples],
                    top_token_score=float(tops[size][column.index]),
                    dy_square_sum=float(dy_squares[size][column.index]),
                    y_square_sum=y_squares[size],
                    dw_square_sum=dw_squares[column.job],
                    w_square_sum=w_square,
                    input_amax=amaxes[size],
                    projections=None if sums.projections is None else sums.projections[column.index, :n_samples],
                )
        return list(found)


def _smoothed(quant: LinearQuant, weight: Tensor) -> QuantizedWeight:
    """A weight W' with the pre-quantization scale divided out, quantized.

    Its change is taken before the cast: rounded to bf16 first, W' would change by that as well.
    """
    quantized_OI = fake_quantized(quant, weight)
    if quant.weight is None:
        return QuantizedWeight(quantized_OI.to(weight.dtype), None, 0.0)
    delta_OI = quantized_OI - smoothed_weight(quant, weight)
    own = delta_OI if quant.pre_quant_scale is None else delta_OI * quant.pre_quant_scale  # as a change of W
    return QuantizedWeight(quantized_OI.to(weight.dtype), delta_OI.to(weight.dtype), square_sum(own))


def _columns(jobs: Sequence[Job], layout: Layout) -> list[_Column]:
    """The columns of all jobs; those of jobs with equal weights lie side by side."""
    order: dict[str, int] = {}
    for job in jobs:
        order.setdefault(job.format.weight_id, len(order))
    columns: list[_Column] = []
    for index in sorted(range(len(jobs)), key=lambda index: order[jobs[index].format.weight_id]):
        job = jobs[index]
        for size, n_samples in job.sizes.items() if job.has_ranges_by_size else [(None, max(job.sizes.values()))]:
            leading = layout.leading(n_samples)
            pieces = ((0, leading.end),) if size is not None else tuple(_pieces(layout)[: leading.n_segments])
            columns.append(_Column(len(columns), index, size, job.calibration_of(size), pieces))
    return columns


def _pieces(layout: Layout) -> list[tuple[int, int]]:
    """The first row of each segment, and the one past its last."""
    return list(pairwise((0, *layout.ends)))


def _matmul(a_TI: Tensor, b_OI: Tensor, out_TO: Tensor) -> Tensor:
    """A b^T, accumulated in float32."""
    if out_TO.dtype != a_TI.dtype:
        return torch.mm(a_TI.float(), b_OI.float().T, out=out_TO)
    return torch.mm(a_TI, b_OI.T, out=out_TO)
