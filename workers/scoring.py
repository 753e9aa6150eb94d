"""The scores of one layer group under many recipes, from captured tensors, for every calibration size at once.

Delta form: with dW = Q(W) - W and dx = Q(x) - x, the error of the output is dy = x dW^T + dx Q(W)^T. Subtracting two
quantized outputs instead would cancel: in bf16 that overstates INT8 scores by 4-15 %. The first term is shared by all
recipes with the same weights, dx by all with the same inputs, and a weight-only recipe needs no second term.

A GEMM's shape depends on the cell alone, so the bits of a score do not depend on what is scored beside it: x dW^T goes
segment by segment; so does dx Q(W)^T where the inputs' range is dynamic, and as one piece where each size has its own.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from workers import kernels
from workers.capture import Layout, Rows, square_sum
from workers.data import SIZES
from workers.quantization import Attributes, Quantizers


class NotFinite(ArithmeticError):
    """A NaN or an infinity; names the layer group, the recipe and the first sample. The trial fails, others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One recipe, and the calibration sizes in which it is wanted."""

    name: str  # for errors
    weight: Attributes | None  # None: left unquantized
    inputs: Attributes | None
    calibrates_inputs: bool  # the input quantizer's range is static, set by the samples of each size
    sizes: Mapping[str, int]  # number of leading segments, by size


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """What quantizing one layer group does, in one calibration size."""

    sample_scores: Tensor  # [n_samples] float64 on the CPU, in data set order; 0 for a sample that never reached the group
    dy_square_sum: float
    y_square_sum: float
    dw_square_sum: float
    w_square_sum: float
    input_amax: float


Scores = Mapping[str, GroupScore] | NotFinite  # by size


@dataclass(frozen=True, slots=True)
class _Column:
    """Where one pass of one job puts its row sums: a pass serves every size, or one if each size has its own range."""

    index: int
    job: int
    size: str | None
    ranges: tuple[tuple[int, int], ...]  # of rows, one GEMM each

    @property
    def end(self) -> int:
        return self.ranges[-1][1]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A module's weight under one recipe."""

    quantized_OI: Tensor  # operand dtype
    delta_OI: Tensor | None  # operand dtype; None: the weight is left unquantized
    dw_square_sum: Tensor | float


@dataclass(frozen=True, slots=True)
class _Visit:
    """One module under one weight recipe: its operands are ready (or will be, when the stream gets there)."""

    name: str
    weight: _Weight
    jobs: tuple[int, ...]
    inputs: Mapping[tuple[str, str | None], Tensor]  # dx [rows, in] by recipe of the inputs and size


class Engine:
    """Scores layer groups; keeps quantizers and weight ranges between calls, so use one for each loaded model."""

    def __init__(self, device: torch.device) -> None:
        self._quantizers = Quantizers()
        self._finite: set[str] = set()  # weights that were looked at
        self._stream: Any = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @torch.no_grad()
    def score_group(self, weights: Mapping[str, Tensor], rows: Mapping[str, Rows], jobs: Sequence[Job]) -> Callable[[], list[Scores] | None]:
        """Start scoring one layer group under several recipes in one visit.

        Args:
            weights: the group's weights [out, in] in the model's dtype, by module name.
            rows: captured rows by module name, over at least the segments that the jobs want.
            jobs: recipes.

        Returns: a function that waits for the GPU and gives each job's scores (or what is not finite in them), None if no
            module of the group was called. Call it after the next group has been started, so that the GPU never waits.
        """
        group = next(iter(weights))
        called = [name for name in weights if name in rows]
        if not called:
            return lambda: None
        if (broken := self._not_finite(group, weights, rows, jobs)) is not None:
            return lambda: broken
        columns = _columns(jobs, rows[called[0]].layout)
        total = _Total(len(jobs), columns)
        for name, visits in groupby(self._visits(called, weights, rows, jobs, columns), key=lambda visit: visit.name):
            sums = torch.zeros(2, len(columns), len(rows[name].x_TI), device=rows[name].x_TI.device)
            for visit in visits:
                _score_visit(visit, rows[name], jobs, [column for column in columns if column.job in visit.jobs], sums)
                total.add_weight(visit)
            total.add_rows(rows[name], sums, square_sum(weights[name]))
        return lambda: total.results(group, jobs)

    def _visits(
        self, called: Sequence[str], weights: Mapping[str, Tensor], rows: Mapping[str, Rows], jobs: Sequence[Job], columns: Sequence[_Column]
    ) -> Iterator[_Visit]:
        by_weight: dict[str, list[int]] = {}
        for index, job in enumerate(jobs):
            by_weight.setdefault(_key(job.weight), []).append(index)
        inputs: dict[tuple[str, str | None], Tensor] = {}
        x_TI: Tensor | None = None
        for name in called:
            if rows[name].x_TI is not x_TI:
                x_TI = rows[name].x_TI
                with self._aside():
                    inputs = self._input_deltas(rows[name], jobs, columns)
            weight: Tensor | None = None
            for indices in by_weight.values():
                attributes = jobs[indices[0]].weight
                with self._aside():
                    if attributes is not None and weight is None:
                        weight = weights[name].float()
                    operand = self._weight(name, attributes, weights[name], weight)
                self._hand_over(operand.quantized_OI, operand.delta_OI, operand.dw_square_sum, *inputs.values())
                yield _Visit(name, operand, tuple(indices), inputs)

    def _weight(self, name: str, attributes: Attributes | None, original: Tensor, weight: Tensor | None) -> _Weight:
        if attributes is None or weight is None:
            return _Weight(original, None, 0.0)
        return _Weight(*kernels.deltas(self._quantizers.weight(name, attributes, weight)(weight), original))

    def _input_deltas(self, rows: Rows, jobs: Sequence[Job], columns: Sequence[_Column]) -> dict[tuple[str, str | None], Tensor]:
        """Dx of every recipe of the inputs that the jobs have, over the rows of its largest column."""
        wanted: dict[tuple[str, str | None], tuple[Attributes, int]] = {}
        for column in columns:
            attributes = jobs[column.job].inputs
            if attributes is not None:
                key = (_key(attributes), column.size)
                wanted[key] = attributes, max(column.end, wanted.get(key, (attributes, 0))[1])
        if not wanted:
            return {}
        x_TI = rows.x_TI.float()
        amaxes = torch.tensor(rows.input_amaxes, device=x_TI.device)
        deltas: dict[tuple[str, str | None], Tensor] = {}
        for key, (attributes, end) in wanted.items():
            quantizer = self._quantizers.inputs(attributes, x_TI[:end], amaxes[: rows.layout.ends.index(end) + 1])
            deltas[key] = kernels.deltas(quantizer(x_TI[:end]), rows.x_TI[:end])[1]
        return deltas

    @contextmanager
    def _aside(self) -> Generator[None]:
        """Work on the second stream, where ModelOpt's calibrators may wait for the GPU while it multiplies for the visit before."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _hand_over(self, *values: object) -> None:
        """Let the main stream use what the second one makes."""
        if self._stream is not None:
            main = torch.cuda.current_stream()
            main.wait_stream(self._stream)
            for value in values:
                if isinstance(value, Tensor):
                    value.record_stream(main)

    def _not_finite(self, group: str, weights: Mapping[str, Tensor], rows: Mapping[str, Rows], jobs: Sequence[Job]) -> list[Scores] | None:
        """What no recipe can score: a NaN or an infinity in a weight or an input."""
        text = None
        for name, weight in weights.items():
            if name in self._finite:
                continue
            if torch.isfinite(weight).all():
                self._finite.add(name)
            else:
                text = f"the weight of {name} is NaN or infinite. Compare the checkpoint's checksum with the published one."
        for name in weights:
            if text is None and name in rows and not all(amax < float("inf") for amax in rows[name].input_amaxes):
                bad_row = int((~torch.isfinite(rows[name].x_TI)).any(dim=1).nonzero()[0])
                text = f"the input of sample {rows[name].layout.sample_of(bad_row)} is NaN or infinite."
        return None if text is None else [NotFinite(f"Layer group {group} under {job.name}: {text}") for job in jobs]


class _Total:
    """Sums over the modules of a group, always in the model's order."""

    def __init__(self, n_jobs: int, columns: Sequence[_Column]) -> None:
        self._columns = columns
        self._samples: Tensor | None = None  # [samples in row order, 2 * columns] float64: g * dy, then dy
        self._layout: Layout | None = None
        self._y_squares: list[tuple[float, ...]] = []
        self._amaxes: list[tuple[float, ...]] = []
        self._dw_squares: list[list[Tensor | float]] = [[] for _ in range(n_jobs)]
        self._w_squares: list[Tensor] = []

    def add_weight(self, visit: _Visit) -> None:
        for job in visit.jobs:
            self._dw_squares[job].append(visit.weight.dw_square_sum)

    def add_rows(self, rows: Rows, sums: Tensor, w_square_sum: Tensor) -> None:
        """Take over a module's row sums, [2, columns, rows]."""
        by_row = sums.flatten(0, 1).T.double().contiguous()
        samples = torch.segment_reduce(by_row, "sum", lengths=rows.layout.lengths, axis=0)
        self._samples = samples if self._samples is None else self._samples + samples
        self._layout = rows.layout
        self._y_squares.append(rows.y_square_sums)
        self._amaxes.append(rows.input_amaxes)
        self._w_squares.append(w_square_sum)

    def results(self, group: str, jobs: Sequence[Job]) -> list[Scores]:
        assert self._samples is not None
        assert self._layout is not None
        samples, layout = self._samples.cpu(), self._layout
        dw_squares = [sum(float(square) for square in squares) for squares in self._dw_squares]
        w_square = sum(float(square) for square in self._w_squares)
        order = torch.tensor(layout.samples)
        found: list[Scores] = []
        for index, job in enumerate(jobs):
            by_size: dict[str, GroupScore] = {}
            broken: NotFinite | None = None
            for size, n_segments in job.sizes.items():
                column = next(column for column in self._columns if column.job == index and column.size in (None, size))
                n_rows = layout.sample_ends[n_segments - 1]
                scores = torch.zeros(SIZES[size], dtype=torch.float64)
                scores[order[:n_rows]] = samples[:n_rows, column.index]
                if not torch.isfinite(scores).all():
                    first = int((~torch.isfinite(scores)).nonzero()[0])
                    broken = NotFinite(f"Layer group {group} under {job.name}: the score of sample {first} is NaN or infinite.")
                    break
                by_size[size] = GroupScore(
                    sample_scores=scores,
                    dy_square_sum=samples[:n_rows, len(self._columns) + column.index].sum().item(),
                    y_square_sum=sum(sum(squares[:n_segments]) for squares in self._y_squares),
                    dw_square_sum=dw_squares[index],
                    w_square_sum=w_square,
                    input_amax=max(max(amaxes[:n_segments]) for amaxes in self._amaxes),
                )
            found.append(broken or by_size)
        return found


def _score_visit(visit: _Visit, rows: Rows, jobs: Sequence[Job], columns: Sequence[_Column], sums: Tensor) -> None:
    """Row sums of one module under one weight recipe, for every recipe of the inputs that comes with it."""
    layout, delta = rows.layout, visit.weight.delta_OI
    by_weight: Tensor | None = None  # x dW^T
    if delta is not None:
        n_rows = max(column.end for column in columns)
        by_weight = rows.g_TO.new_empty(n_rows, len(delta), dtype=_result_dtype(delta))
        for start, end in _pieces(layout):
            if start < n_rows:
                _matmul(rows.x_TI[start:end], delta, by_weight[start:end])
    for column in columns:
        attributes = jobs[column.job].inputs
        for start, end in column.ranges:
            errors: list[Tensor] = [] if by_weight is None else [by_weight[start:end]]
            if attributes is not None:
                quantized = visit.weight.quantized_OI
                result = rows.g_TO.new_empty(end - start, len(quantized), dtype=_result_dtype(quantized))
                errors.append(_matmul(visit.inputs[_key(attributes), column.size][start:end], quantized, result))
            kernels.score_rows(tuple(errors), rows.g_TO[start:end], sums[0, column.index, start:end], sums[1, column.index, start:end])


def _columns(jobs: Sequence[Job], layout: Layout) -> list[_Column]:
    columns: list[_Column] = []
    for index, job in enumerate(jobs):
        if job.calibrates_inputs:
            for size, n_segments in job.sizes.items():
                columns.append(_Column(len(columns), index, size, ((0, layout.ends[n_segments - 1]),)))
        else:
            columns.append(_Column(len(columns), index, None, tuple(_pieces(layout)[: max(job.sizes.values())])))
    return columns


def _pieces(layout: Layout) -> list[tuple[int, int]]:
    return list(zip((0, *layout.ends), layout.ends, strict=False))


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


def _key(attributes: Attributes | None) -> str:
    return repr(attributes and sorted(attributes.items(), key=str))
