"""The scores of one layer group under many recipes, from captured tensors, for every calibration size at once.

Delta form: with dW = Q(W) - W and dx = Q(x) - x, the error of the output is dy = x dW^T + dx Q(W)^T. Subtracting two
quantized outputs instead would cancel: in bf16 that overstates INT8 scores by 4-15 %. The first term is shared by all
recipes with the same weights, dx by all with the same inputs, and a weight-only recipe needs no second term.

A GEMM's shape depends on the cell alone, so the bits of a score do not depend on what is scored beside it: x dW^T goes
segment by segment; so does dx Q(W)^T where the inputs' range is dynamic, and as one piece where each size has its own.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.core.sizes import SIZES
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
from workers.quant.modelopt import Quantizers, quantized
from workers.scoring.capture import Layout, Rows, square_sum
from workers.scoring.host_copy import start_host_copy
from workers.scoring.scores import GroupScore, NotFinite, Scores, not_finite_weight

_PRODUCT_BYTES = 2e9  # of dx Q(W)^T held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One format, and the calibration sizes in which it is to be scored."""

    name: str  # for error messages
    format: Format
    sizes: Mapping[str, int]  # number of leading segments, by size


@dataclass(frozen=True, slots=True)
class _Column:
    """The column of a matrix of row sums that one pass of one job fills.

    A pass serves every size, or one size if each has its own range of the inputs.
    """

    index: int
    job: int
    size: str | None
    pieces: tuple[tuple[int, int], ...]  # of rows, first and past the last; one GEMM each

    @property
    def end(self) -> int:
        return self.pieces[-1][1]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A module's weight under one recipe."""

    quantized_OI: Tensor  # operand dtype
    delta_OI: Tensor | None  # operand dtype; None: the weight is left unquantized
    dw_square_sum: Tensor | float


@dataclass(frozen=True, slots=True)
class _Visit:
    """The operands of one module under one weight recipe, for all jobs that share it.

    They are ready on the main stream, although the kernels that make them may not have run yet.
    """

    name: str
    weight: _Weight
    jobs: tuple[int, ...]
    inputs: Mapping[tuple[str, str | None], Tensor]  # dx [rows, in] by recipe of the inputs and size


class Engine:
    """Scores layer groups of one device by their gradients.

    It keeps quantizers and weight ranges between calls, so use one for each loaded model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._quantizers = Quantizers()
        self._finite: set[str] = set()  # names of modules whose weights have been checked
        self._weight_squares: dict[str, Tensor] = {}
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

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
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            return self._score_group(weights, rows, jobs)

    def _score_group(
        self, weights: Mapping[str, Tensor], rows: Mapping[str, Rows], jobs: Sequence[Job]
    ) -> Callable[[], list[Scores] | None]:
        group = next(iter(weights))
        called = [name for name in weights if name in rows]
        if not called:
            return lambda: None
        if (broken := self._not_finite(group, weights, rows, jobs)) is not None:
            return lambda: broken
        layout = rows[called[0]].layout
        if any(rows[name].layout is not layout for name in called):
            raise SweepError(f"The linears of layer group {group} do not see the same rows: it cannot be scored.")
        columns = _columns(jobs, layout)
        total = _GroupSums(group, jobs, columns, [rows[name] for name in called])
        for visit in self._visits(called, weights, rows, jobs, columns):
            if visit.name not in self._weight_squares:
                self._weight_squares[visit.name] = square_sum(weights[visit.name])
            here = [column for column in columns if column.job in visit.jobs]
            _score_visit(visit, rows[visit.name], jobs, here, total.sums[called.index(visit.name)])
            total.add_weight(visit, self._weight_squares[visit.name])
        for index, job in enumerate(jobs):
            if job.format.algorithm != "max":
                own = [column for column in columns if column.job == index]
                self._score_calibrated(index, called, weights, rows, jobs, own, total)
        total.close()
        return total.results

    def _visits(
        self,
        called: Sequence[str],
        weights: Mapping[str, Tensor],
        rows: Mapping[str, Rows],
        jobs: Sequence[Job],
        columns: Sequence[_Column],
    ) -> Iterator[_Visit]:
        """The operands of every module and distinct weight recipe, for the jobs whose ranges `max` finds."""
        by_weight: dict[str, list[int]] = {}
        for index, job in enumerate(jobs):
            if job.format.algorithm == "max":
                by_weight.setdefault(job.format.weight_id, []).append(index)
        if not by_weight:
            return
        inputs: dict[tuple[str, str | None], Tensor] = {}
        fresh: list[Tensor] = []
        x_TI: Tensor | None = None
        for name in called:
            if rows[name].x_TI is not x_TI:
                x_TI = rows[name].x_TI
                with self._on_side_stream():
                    inputs = self._input_deltas(rows[name], jobs, columns)
                fresh = list(inputs.values())
            for indices in by_weight.values():
                first = jobs[indices[0]]
                fused = {module: weights[module] for module in called} if first.format.is_fused else None
                with self._on_side_stream():
                    operand = self._weight(name, first.format.weight, weights[name], fused)
                self._wait_for_side_stream(operand.quantized_OI, operand.delta_OI, operand.dw_square_sum, *fresh)
                fresh = []
                yield _Visit(name, operand, tuple(indices), inputs)

    def _score_calibrated(
        self,
        index: int,
        called: Sequence[str],
        weights: Mapping[str, Tensor],
        rows: Mapping[str, Rows],
        jobs: Sequence[Job],
        columns: Sequence[_Column],
        total: "_GroupSums",
    ) -> None:
        """Score a recipe whose ranges or scales are found by another algorithm than `max`.

        Each size is calibrated on its own inputs, and scored on these times the pre-quantization scale, where there is
        one.
        """
        job, largest = jobs[index], max(columns, key=lambda column: column.end)
        for column in columns:
            for names in _by_shared_input(called, rows):
                x_TI, layout = rows[names[0]].x_TI[: column.end], rows[names[0]].layout
                ends = [end for end in layout.batch_ends if end <= column.end]
                batches = [x_TI[start:end] for start, end in pairwise(ends) if end > start]
                found = calibrated_linears({name: weights[name] for name in names}, batches, job.format)
                for name in names:
                    quant, dtype = found[name], weights[name].dtype
                    x = smoothed_inputs(quant, x_TI)
                    inputs: dict[tuple[str, str | None], Tensor] = {}
                    if job.format.inputs is not None:
                        inputs[job.format.input_id, column.size] = (quantized_inputs(quant, x_TI) - x).to(dtype)
                    visit = _Visit(name, _smoothed(quant, weights[name]), (index,), inputs)
                    seen = replace(rows[name], x_TI=x.to(dtype))
                    _score_visit(visit, seen, jobs, [column], total.sums[called.index(name)])
                    if column is largest:
                        if name not in self._weight_squares:
                            self._weight_squares[name] = square_sum(weights[name])
                        total.add_weight(visit, self._weight_squares[name])

    def _weight(
        self, name: str, attributes: Quantizer | None, weight: Tensor, fused: Mapping[str, Tensor] | None
    ) -> _Weight:
        if attributes is None:
            return _Weight(weight, None, 0.0)
        quantizer = self._quantizers.weight(name, attributes, weight, fused)
        return _Weight(*kernels.deltas(quantized(quantizer, weight), weight))

    def _input_deltas(
        self, rows: Rows, jobs: Sequence[Job], columns: Sequence[_Column]
    ) -> dict[tuple[str, str | None], Tensor]:
        """The dx of every distinct recipe of the inputs, by its key and size, over the rows of its longest column."""
        wanted: dict[tuple[str, str | None], tuple[Quantizer, int]] = {}
        for column in columns:
            attributes = jobs[column.job].format.inputs
            if attributes is not None and jobs[column.job].format.algorithm == "max":
                key = (jobs[column.job].format.input_id, column.size)
                wanted[key] = attributes, max(column.end, wanted.get(key, (attributes, 0))[1])
        deltas: dict[tuple[str, str | None], Tensor] = {}
        for key, (attributes, end) in wanted.items():
            x_TI = rows.x_TI[:end]
            amaxes = rows.input_amaxes[: rows.layout.ends.index(end) + 1]
            quantizer = self._quantizers.inputs(attributes, x_TI, amaxes, rows.input_ranges)
            deltas[key] = kernels.deltas(quantized(quantizer, x_TI), x_TI)[1]
        return deltas

    @contextmanager
    def _on_side_stream(self) -> Generator[None]:
        """Launch kernels on a second stream.

        There ModelOpt's calibrators may wait for the GPU while the main stream multiplies the operands before.
        """
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _wait_for_side_stream(self, *values: object) -> None:
        """Have the main stream wait for the second one, and use the tensors among `values`, which that one makes."""
        if self._stream is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self._stream)
            for value in values:
                if isinstance(value, Tensor):
                    value.record_stream(main)

    def _not_finite(
        self, group: str, weights: Mapping[str, Tensor], rows: Mapping[str, Rows], jobs: Sequence[Job]
    ) -> list[Scores] | None:
        """NotFinite for every job if a weight or an input has a NaN or an infinity, else None."""
        text = None
        for name, weight in weights.items():
            if name in self._finite:
                continue
            if torch.isfinite(weight).all():
                self._finite.add(name)
            else:
                text = not_finite_weight(name)
        for name in weights:
            if text is None and name in rows and not all(amax < float("inf") for amax in rows[name].input_amaxes):
                bad_row = int((~torch.isfinite(rows[name].x_TI)).any(dim=1).nonzero()[0])
                text = f"the input of sample {rows[name].layout.sample_of(bad_row)} is NaN or infinite."
        return None if text is None else [NotFinite(f"Layer group {group} under {job.name}: {text}") for job in jobs]


class _GroupSums:
    """Sums over the modules of a layer group, always in the model's order."""

    def __init__(self, group: str, jobs: Sequence[Job], columns: Sequence[_Column], rows: Sequence[Rows]) -> None:
        self._group, self._jobs, self._columns, self._layout = group, jobs, columns, rows[0].layout
        self._y_squares, self._amaxes = [seen.y_square_sums for seen in rows], [seen.input_amaxes for seen in rows]
        x_TI = rows[0].x_TI  # not kept: its memory may be needed before the results are
        # [modules, 2, columns, rows]: sums of (g * dy)^2 and of dy^2 over the outputs.
        self.sums = torch.zeros(len(rows), 2, len(columns), len(x_TI), device=x_TI.device)
        # Of each module and weight recipe, the jobs that have it and the sum of dW^2.
        self._weights: list[tuple[tuple[int, ...], Tensor | float]] = []
        self._w_squares: dict[str, Tensor] = {}
        self._on_host: Callable[[], Tensor] | None = None

    def add_weight(self, visit: _Visit, w_square: Tensor) -> None:
        """Add the squares of a module's weight and of its error."""
        self._w_squares[visit.name] = w_square
        self._weights.append((visit.jobs, visit.weight.dw_square_sum))

    def close(self) -> None:
        """Sum rows to samples and start the copy of all sums to the host, without waiting for the GPU."""
        by_row = self.sums.flatten(0, 2).T.to(torch.float64, memory_format=torch.contiguous_format)
        lengths = self._layout.lengths.to(by_row.device)
        # unsafe: a check of the lengths would wait for the GPU.
        by_sample = torch.segment_reduce(by_row, "sum", lengths=lengths, axis=0, unsafe=True)
        modules = by_sample.unflatten(1, (len(self._amaxes), -1)).unbind(1)
        samples = sum(modules[1:], start=modules[0])
        squares = [*self._w_squares.values(), *(square for _, square in self._weights if isinstance(square, Tensor))]
        self._on_host = start_host_copy(torch.cat([torch.stack(squares), samples.flatten()]))

    def results(self) -> list[Scores]:
        """Each job's scores. Waits for the copy that `close` has started, not for kernels launched since."""
        assert self._on_host is not None
        jobs, layout = self._jobs, self._layout
        values = self._on_host().numpy()
        in_rows = values[-len(layout.samples) * 2 * len(self._columns) :].reshape(len(layout.samples), -1)
        # One row for each column, so that the order of its sum doesn't depend on the others.
        samples = np.zeros((in_rows.shape[1], max(layout.samples) + 1))
        samples[:, list(layout.samples)] = in_rows.T
        squares = iter(values[: len(values) - in_rows.size].tolist())
        w_square = sum(next(squares) for _ in self._w_squares)
        dw_squares = [0.0] * len(jobs)
        for indices, square in self._weights:
            value = next(squares) if isinstance(square, Tensor) else square
            for index in indices:
                dw_squares[index] += value
        all_finite = bool(np.isfinite(samples).all())
        sizes = {size: n_segments for job in jobs for size, n_segments in job.sizes.items()}
        sums = {size: samples[:, : SIZES[size]].sum(axis=1) for size in sizes}
        y_squares = {size: _over_modules(sum, self._y_squares, n) for size, n in sizes.items()}
        amaxes = {size: _over_modules(max, self._amaxes, n) for size, n in sizes.items()}
        found: list[dict[str, GroupScore] | NotFinite] = [{} for _ in jobs]
        for column in self._columns:
            job, by_size = jobs[column.job], found[column.job]
            scores = samples[column.index]
            for size in job.sizes if column.size is None else (column.size,):
                if isinstance(by_size, NotFinite):
                    continue
                n_samples = SIZES[size]
                if not all_finite and not np.isfinite(scores[:n_samples]).all():
                    first = int(np.flatnonzero(~np.isfinite(scores))[0])
                    by_size = found[column.job] = NotFinite(
                        f"Layer group {self._group} under {job.name}: the score of sample {first} is NaN or infinite."
                    )
                    continue
                by_size[size] = GroupScore(
                    score=float(sums[size][column.index]),
                    sample_scores=scores[:n_samples],
                    dy_square_sum=float(sums[size][len(self._columns) + column.index]),
                    y_square_sum=y_squares[size],
                    dw_square_sum=dw_squares[column.job],
                    w_square_sum=w_square,
                    input_amax=amaxes[size],
                )
        return list(found)


def _over_modules(
    reduce: Callable[[Iterable[float]], float], by_module: Sequence[Sequence[float]], n_segments: int
) -> float:
    """The sum or largest of the modules' values, each of which is the sum or largest over leading segments."""
    return reduce([reduce(values[:n_segments]) for values in by_module])


def _score_visit(visit: _Visit, rows: Rows, jobs: Sequence[Job], columns: Sequence[_Column], sums: Tensor) -> None:
    """Add up the row sums of one module under one weight recipe, for every recipe of the inputs that occurs with it.

    Args:
        visit: the module's operands.
        rows: its captured rows.
        jobs: all of them.
        columns: those of the visit's jobs.
        sums: [2, columns, rows], receives the sums of (g * dy)^2 and of dy^2.
    """
    delta, weight = visit.weight.delta_OI, visit.weight.quantized_OI
    dtype, n_out = _result_dtype(weight), len(weight)
    by_weight: Tensor | None = None  # x dW^T
    if delta is not None:
        n_rows = max(column.end for column in columns)
        by_weight = rows.g_TO.new_empty(n_rows, n_out, dtype=dtype)
        for start, end in _pieces(rows.layout):
            if start < n_rows:
                _matmul(rows.x_TI[start:end], delta, by_weight[start:end])
    room = max(1, int(_PRODUCT_BYTES / (rows.layout.ends[-1] * n_out * 4)))
    # On a CPU several at once gain nothing, and fall out of its cache.
    step = min(kernels.COLUMNS, room) if weight.is_cuda else 1
    for first in range(0, len(columns), step):
        together = columns[first : first + step]
        ends = [column.end for column in together]
        input_ends = [0 if jobs[column.job].format.inputs is None else column.end for column in together]
        by_inputs = rows.g_TO.new_empty(len(together), max(input_ends), n_out, dtype=dtype)  # dx Q(W)^T
        for place, column in enumerate(together):
            if input_ends[place]:
                deltas = visit.inputs[jobs[column.job].format.input_id, column.size]
                for start, end in column.pieces:
                    _matmul(deltas[start:end], weight, by_inputs[place, start:end])
        into = slice(together[0].index, together[-1].index + 1)
        kernels.score_rows(by_weight, by_inputs, rows.g_TO, ends, input_ends, sums[0, into], sums[1, into])


def _smoothed(quant: LinearQuant, weight: Tensor) -> _Weight:
    """A weight W' with the pre-quantization scale divided out, quantized.

    Its change is taken before the cast: rounded to bf16 first, W' would change by that as well.
    """
    quantized_OI = fake_quantized(quant, weight)
    if quant.weight is None:
        return _Weight(quantized_OI.to(weight.dtype), None, 0.0)
    delta_OI = quantized_OI - smoothed_weight(quant, weight)
    own = delta_OI if quant.pre_quant_scale is None else delta_OI * quant.pre_quant_scale  # as a change of W
    return _Weight(quantized_OI.to(weight.dtype), delta_OI.to(weight.dtype), square_sum(own))


def _by_shared_input(called: Sequence[str], rows: Mapping[str, Rows]) -> list[list[str]]:
    """Consecutive modules that share their input tensor, together."""
    groups: list[list[str]] = []
    for name in called:
        if groups and rows[groups[-1][0]].x_TI is rows[name].x_TI:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _columns(jobs: Sequence[Job], layout: Layout) -> list[_Column]:
    """The columns of all jobs; those of jobs with equal weights lie side by side."""
    order: dict[str, int] = {}
    for job in jobs:
        order.setdefault(job.format.weight_id, len(order))
    columns: list[_Column] = []
    for index in sorted(range(len(jobs)), key=lambda index: order[jobs[index].format.weight_id]):
        job = jobs[index]
        if job.format.calibrates_inputs:
            for size, n_segments in job.sizes.items():
                columns.append(_Column(len(columns), index, size, ((0, layout.ends[n_segments - 1]),)))
        else:
            columns.append(_Column(len(columns), index, None, tuple(_pieces(layout)[: max(job.sizes.values())])))
    return columns


def _pieces(layout: Layout) -> list[tuple[int, int]]:
    """The first row of each segment, and the one past its last."""
    return list(pairwise((0, *layout.ends)))


def _matmul(a_TI: Tensor, b_OI: Tensor, out_TO: Tensor) -> Tensor:
    """A b^T, accumulated in float32."""
    if out_TO.dtype != a_TI.dtype:
        return torch.mm(a_TI.float(), b_OI.float().T, out=out_TO)
    return torch.mm(a_TI, b_OI.T, out=out_TO)


def _result_dtype(operand: Tensor) -> torch.dtype:
    """A product's dtype: that of its operands, but float32 for bf16 on a CPU, whose own bf16 GEMM is slower.

    Rounding to bf16 is exact enough: the products are errors already, and the roundings of their elements average out
    (some 1e-6 of a score).
    """
    return torch.float32 if not operand.is_cuda else operand.dtype
