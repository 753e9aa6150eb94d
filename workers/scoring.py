"""The score of one layer group under one recipe, from captured tensors, for every calibration size at once.

Delta form: with dW = Q(W) - W and dx = Q(x) - x, the error of the output is dy = x dW^T + dx Q(W)^T. Subtracting two
quantized outputs instead would cancel: in bf16 that overstates INT8 scores by 4-15 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.capture import Rows, row_square_sums, square_sum
from workers.data import SIZES
from workers.quantization import Attributes, calibrated

_CHUNK_ROWS = 8192  # bounds the fp32 error to 8192 x 9728 x 4 B = 0.3 GB; fixed, because GEMM shapes decide bits


class NotFinite(ArithmeticError):
    """A NaN or an infinity; names the layer group, the recipe and the first sample. The trial fails, others go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """What a recipe does to every linear that it covers; None: left unquantized."""

    name: str  # for errors
    weight: Attributes | None
    inputs: Attributes | None
    calibrates_inputs: bool  # the input quantizer's range is static, set by the samples of each size


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScore:
    """What quantizing one layer group does, in one calibration size."""

    sample_scores: Tensor  # [n_samples] float64 on the CPU, in data set order; 0 for a sample that never reached the group
    dy_square_sum: float
    y_square_sum: float
    dw_square_sum: float
    w_square_sum: float
    input_amax: float


@torch.no_grad()
def score_group(
    weights: Mapping[str, Tensor], formats: Formats, segments: Sequence[Mapping[str, Rows]], sizes: Mapping[str, int]
) -> dict[str, GroupScore] | None:
    """Score one layer group for several calibration sizes in one visit.

    Args:
        weights: the group's weights [out, in] in the model's dtype, by module name.
        formats: what the recipe does to them and to their inputs.
        segments: captured rows by module name, one mapping a segment of the plan.
        sizes: number of leading segments of each size wanted.

    Returns: by size; None if no module of the group was called.

    Raises: NotFinite: a weight, an input, a gradient or the score is NaN or infinite.
    """
    group = next(iter(weights))
    called = [name for name in weights if any(name in rows for rows in segments)]
    if not called:
        return None
    totals = {size: _Total(SIZES[size]) for size in sizes}
    for name in called:
        module = _quantize_weight(name, weights[name], formats)
        rows = [segment.get(name) for segment in segments]
        amaxes = [0.0 if row is None else _input_amax(row, group, formats) for row in rows]
        errors: dict[int | None, list[_SegmentError | None]] = {}  # by number of calibrating segments; None: it does not matter
        for size, n_segments in sizes.items():
            quantizer = None
            if formats.inputs is not None:
                quantizer = calibrated(formats.inputs, [row.x_TI.float() for row in rows[:n_segments] if row is not None])
            done = errors.setdefault(n_segments if formats.calibrates_inputs else None, [])
            for row in rows[len(done) : n_segments]:
                done.append(None if row is None else _segment_error(module, row, quantizer))
            totals[size].add(module, done[:n_segments], rows[:n_segments], max(amaxes[:n_segments]))
    return {size: total.result(group, formats) for size, total in totals.items()}


@dataclass(frozen=True, slots=True)
class _Module:
    quantized_OI: Tensor  # operand dtype
    delta_OI: Tensor | None  # operand dtype; None: the weight is left unquantized
    dw_square_sum: float
    w_square_sum: float


@dataclass(frozen=True, slots=True)
class _SegmentError:
    sample_scores: Tensor  # [samples] float64 on the CPU, in row order
    dy_square_sum: float


class _Total:
    """Sums over the modules of a group and the segments of a size, always in the same order."""

    def __init__(self, n_samples: int) -> None:
        self.sample_scores = torch.zeros(n_samples, dtype=torch.float64)
        self.dy_square = self.y_square = self.dw_square = self.w_square = self.amax = 0.0

    def add(self, module: _Module, errors: Sequence[_SegmentError | None], rows: Sequence[Rows | None], amax: float) -> None:
        for error, row in zip(errors, rows, strict=True):
            if error is not None and row is not None:
                self.sample_scores[list(row.samples)] += error.sample_scores
                self.dy_square += error.dy_square_sum
                self.y_square += row.y_square_sum
        self.amax = max(self.amax, amax)
        self.dw_square += module.dw_square_sum
        self.w_square += module.w_square_sum

    def result(self, group: str, formats: Formats) -> GroupScore:
        if not torch.isfinite(self.sample_scores).all():
            first = int((~torch.isfinite(self.sample_scores)).nonzero()[0])
            raise NotFinite(f"Layer group {group} under {formats.name}: the score of sample {first} is NaN or infinite.")
        return GroupScore(
            sample_scores=self.sample_scores,
            dy_square_sum=self.dy_square,
            y_square_sum=self.y_square,
            dw_square_sum=self.dw_square,
            w_square_sum=self.w_square,
            input_amax=self.amax,
        )


def _quantize_weight(name: str, weight_OI: Tensor, formats: Formats) -> _Module:
    weight = weight_OI.float()
    if not torch.isfinite(weight).all():
        raise NotFinite(f"The weight of {name} (under {formats.name}) is NaN or infinite. Compare the checkpoint's checksum with the published one.")
    w_square_sum = square_sum(weight)
    if formats.weight is None:
        return _Module(weight_OI, None, 0.0, w_square_sum)
    quantized = calibrated(formats.weight, [weight])(weight)
    delta = quantized - weight
    return _Module(quantized.to(weight_OI.dtype), delta.to(weight_OI.dtype), square_sum(delta), w_square_sum)


def _segment_error(module: _Module, rows: Rows, quantizer: torch.nn.Module | None) -> _SegmentError:
    per_row: list[Tensor] = []
    dy_square_per_row: list[Tensor] = []
    quantized_TI = None if quantizer is None else quantizer(rows.x_TI.float())
    for start in range(0, len(rows.x_TI), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        dy_TO = _output_error(module, rows.x_TI[chunk], None if quantized_TI is None else quantized_TI[chunk])
        dy_square_per_row.append(row_square_sums(dy_TO))
        per_row.append(row_square_sums(dy_TO * rows.g_TO[chunk]))
    scores = torch.segment_reduce(torch.cat(per_row).double(), "sum", lengths=rows.lengths)
    return _SegmentError(scores.cpu(), torch.cat(dy_square_per_row).double().sum().item())


def _output_error(module: _Module, x_TI: Tensor, quantized_TI: Tensor | None) -> Tensor:
    """Dy = x dW^T + dx Q(W)^T in fp32, from operands in the model's dtype."""
    terms: list[Tensor] = []
    if module.delta_OI is not None:
        terms.append(_matmul(x_TI, module.delta_OI))
    if quantized_TI is not None:
        terms.append(_matmul((quantized_TI - x_TI.float()).to(x_TI.dtype), module.quantized_OI))
    if not terms:
        return x_TI.new_zeros(len(x_TI), len(module.quantized_OI), dtype=torch.float32)
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _matmul(a_TI: Tensor, b_OI: Tensor) -> Tensor:
    """A b^T with fp32 accumulation and output."""
    if a_TI.dtype == torch.float32:
        return a_TI @ b_OI.T
    if a_TI.is_cuda:
        return torch.mm(a_TI, b_OI.T, out_dtype=torch.float32)
    return a_TI.float() @ b_OI.float().T  # the CPU has no bf16 GEMM with fp32 output


def _input_amax(rows: Rows, group: str, formats: Formats) -> float:
    amax = rows.x_TI.abs().amax().item()
    if amax != amax or amax == float("inf"):
        bad_row = int((~torch.isfinite(rows.x_TI)).any(dim=1).nonzero()[0])
        sample = rows.samples[int(torch.searchsorted(rows.lengths.cumsum(0), bad_row, right=True))]
        raise NotFinite(f"Layer group {group} under {formats.name}: the input of sample {sample} is NaN or infinite.")
    return amax
