"""Scores and error metrics of one layer group, against arithmetic in float64 that shares no code with them."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from sweep.core.batches import Plan
from tests.formats import job_of
from tests.models import random_samples
from workers.data.batches import make_plan
from workers.data.samples import text_samples
from workers.scoring.capture import Rows, capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.scores import GroupScore

Array = npt.NDArray[np.float64]

INT8 = {"num_bits": 8, "axis": None}
INT8_CHANNEL = {"num_bits": 8, "axis": 0}
FP8 = {"num_bits": (4, 3), "axis": None}
INT4_BLOCK = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
E8M0_WEIGHT: dict[str, Any] = {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128, "scale_bits": (8, 0)}}
E8M0_INPUTS: dict[str, Any] = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: 128, "scale_bits": (8, 0)}}
PER_TOKEN: dict[str, Any] = {"type": "dynamic", "block_sizes": {-1: None}}


class Bigrams(nn.Module):
    """The smallest language model with a group of two linears: its logits are their sum, of a token's embedding."""

    config = SimpleNamespace(model_type="bigrams")

    def __init__(self, embedding: Tensor, *weights: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding)
        self.linears = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in weights)
        for linear, weight in zip(self.linears, weights, strict=True):
            linear.weight = nn.Parameter(weight)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        x = self.embedding(input_ids)
        return SimpleNamespace(logits=torch.stack([linear(x) for linear in self.linears]).sum(0))


def random_bigrams(dtype: torch.dtype, n_words: int = 512, n_inputs: int = 256, n_linears: int = 2) -> Bigrams:
    generator = torch.Generator().manual_seed(7)
    embedding = torch.randn(n_words, n_inputs, generator=generator)
    weights = [torch.randn(n_words, n_inputs, generator=generator) * 0.08 for _ in range(n_linears)]
    return Bigrams(embedding.to(dtype), *(weight.to(dtype) for weight in weights))


def job(weight: dict[str, Any] | None, inputs: dict[str, Any] | None, *sizes: str) -> Job:
    return job_of("recipe", weight, inputs, sizes)


def score(
    model: Bigrams, plan: Plan, weight: dict[str, Any] | None, inputs: dict[str, Any] | None, size: str
) -> tuple[GroupScore, dict[str, Rows]]:
    """The score of the model's only group, and what was captured."""
    n_segments = plan.segments_of(size)
    names = [f"linears.{i}" for i in range(len(model.linears))]
    rows = capture(model, plan.segments[:n_segments], names)
    found = Engine(torch.device("cpu")).score_group(
        {name: model.get_submodule(name).weight for name in names}, rows, [job(weight, inputs, size)]
    )()
    assert found is not None
    assert isinstance(found[0], dict)
    return found[0][size], rows


def quantized(values: Array, attributes: dict[str, Any] | None) -> Array:
    """A matrix quantized by a format's definition: scale = largest magnitude / largest number, ties to even."""
    if attributes is None:
        return values
    blocks, is_float = attributes.get("block_sizes") or {}, isinstance(attributes["num_bits"], tuple)
    if blocks.get("scale_bits") == (8, 0):
        return under_powers_of_two(values, blocks.get(-2, 1), blocks[-1])
    shaped = values.reshape(len(values), -1, blocks[-1]) if blocks.get(-1) else values
    per_row = bool(blocks) or attributes.get("axis") == 0
    amax = np.abs(shaped).max(axis=-1 if per_row else None, keepdims=True)
    scale = amax / (448.0 if is_float else 2 ** (attributes["num_bits"] - 1) - 1)
    steps = torch.from_numpy(shaped / scale)
    rounded = steps.to(torch.float8_e4m3fn).double() if is_float else steps.round()
    return (rounded.numpy() * scale).reshape(values.shape)


def under_powers_of_two(values: Array, rows: int, columns: int) -> Array:
    """A matrix in FP8 blocks whose scale is the least power of two that keeps them in range."""
    shaped = values.reshape(len(values) // rows, rows, -1, columns)
    amax = np.abs(shaped).max(axis=(1, 3), keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(amax, 1e-30) / 448.0))
    codes = torch.from_numpy(shaped / scale).to(torch.float8_e4m3fn).double().numpy()
    return (codes * scale).reshape(values.shape)


def test_the_score_is_the_sum_of_squares_of_gradient_times_output_error() -> None:
    """One sample, tokens 0 1 2, in numbers that a person can follow: x is a row of the embedding, y = W x."""
    embedding = torch.tensor([[1.0, 0.5], [-2.0, 0.25], [0.125, 4.0]])
    weight = torch.tensor([[1.0, -0.3], [0.2, 0.77], [-0.4, 0.6]])
    plan = make_plan(text_samples([[0, 1, 2]] * 16, 512), packed=False)
    found, _ = score(Bigrams(embedding, weight), plan, INT8, INT8, "small")
    x, w = embedding.double().numpy(), weight.double().numpy()
    q_x = np.round(x / (4 / 127)) * (4 / 127)  # amax 4
    q_w = np.round(w / (1 / 127)) * (1 / 127)  # amax 1
    y = x @ w.T
    probabilities = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
    gradient = probabilities - np.eye(3)[[1, 2, 0]]  # of -log p(next token)
    gradient[2] = 0.0  # the last token predicts nothing
    dy = q_x @ q_w.T - y
    one_sample = ((gradient * dy) ** 2).sum()
    assert found.sample_scores.tolist() == pytest.approx([one_sample] * 16, rel=1e-5)
    assert found.score == pytest.approx(16 * one_sample, rel=1e-5)
    assert found.dy_square_sum == pytest.approx(16 * (dy**2).sum(), rel=1e-5)
    assert found.y_square_sum == pytest.approx(16 * (y**2).sum(), rel=1e-6)
    assert found.dw_square_sum == pytest.approx(((q_w - w) ** 2).sum(), rel=1e-5)
    assert found.w_square_sum == pytest.approx((w**2).sum(), rel=1e-6)
    assert found.input_amax == 4.0


RECIPES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "int8 w8a8": (INT8_CHANNEL, INT8),
    "int8 w8a8 per token": (INT8_CHANNEL, INT8 | PER_TOKEN),
    "int8 weights": (INT8_CHANNEL, None),
    "int8 inputs": (None, INT8),
    "fp8 w8a8": (FP8, FP8),
    "fp8 weights": (FP8, None),
    "int4 weights": (INT4_BLOCK, None),
    "int4 weights, fp8 inputs": (INT4_BLOCK, FP8),
    "fp8 blocks, e8m0": (E8M0_WEIGHT, E8M0_INPUTS),
    "fp8 block weights, e8m0": (E8M0_WEIGHT, None),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_and_errors_are_within_tolerance_of_float64(recipe: str, dtype: torch.dtype, tolerance: float) -> None:
    """Subtracting two bf16 outputs instead would overstate INT8 by 4-15 %."""
    weight, inputs = RECIPES[recipe]
    model, plan = random_bigrams(dtype), make_plan(random_samples(128), packed=True)
    found, rows = score(model, plan, weight, inputs, "medium")
    dy_squares, y_squares, dw_squares, w_squares, total = 0.0, 0.0, 0.0, 0.0, 0.0
    for name, row in rows.items():
        w, x, g = (value.double().numpy() for value in (model.get_submodule(name).weight, row.x_TI, row.g_TO))
        dy = quantized(x, inputs) @ quantized(w, weight).T - x @ w.T
        total += ((g * dy) ** 2).sum()
        dy_squares += (dy**2).sum()
        y_squares += ((x @ w.T) ** 2).sum()
        dw_squares += ((quantized(w, weight) - w) ** 2).sum()
        w_squares += (w**2).sum()
    assert found.score == pytest.approx(total, rel=tolerance)
    assert found.output_rel_error == pytest.approx(math.sqrt(dy_squares / y_squares), rel=tolerance)
    assert found.output_sqnr_db == pytest.approx(10 * math.log10(y_squares / dy_squares), abs=0.05)
    assert found.weight_rel_error == pytest.approx(math.sqrt(dw_squares / w_squares), rel=tolerance)
    assert found.input_amax == max(float(row.x_TI.abs().max()) for row in rows.values())


def test_each_sample_has_its_own_sum_in_data_set_order() -> None:
    """The plan orders rows by length; scores come back in the order of the data set."""
    samples = random_samples(16)
    model, plan = random_bigrams(torch.float32), make_plan(samples, packed=True)
    found, rows = score(model, plan, INT4_BLOCK, None, "small")
    expected = np.zeros(16)
    for name, row in rows.items():
        w, x, g = (value.double().numpy() for value in (model.get_submodule(name).weight, row.x_TI, row.g_TO))
        squares = ((g * (x @ quantized(w, INT4_BLOCK).T - x @ w.T)) ** 2).sum(axis=1)
        start = 0
        for index in row.layout.samples:
            end = start + len(samples[index].token_ids)
            assert torch.equal(row.x_TI[start:end], model.embedding(torch.from_numpy(samples[index].token_ids)))
            expected[index] += squares[start:end].sum()
            start = end
    np.testing.assert_allclose(found.sample_scores, expected, rtol=1e-4)
    assert len({len(sample.token_ids) for sample in samples}) > 8


def test_a_static_range_is_set_by_the_samples_of_its_own_size() -> None:
    """Token 1 is 50 times as large as all others, and appears in sample 100 only: `small` must not see it."""
    model = random_bigrams(torch.float32)
    model.embedding.weight[1] *= 50
    tokens = [sample.token_ids.tolist() for sample in random_samples(128)]
    tokens[100][0] = 1
    plan = make_plan(text_samples(tokens, 512), packed=True)
    alone, _ = score(model, make_plan(text_samples(tokens[:16], 512), packed=True), None, INT8, "small")
    names = ["linears.0", "linears.1"]
    rows = capture(model, plan.segments, names)
    found = Engine(torch.device("cpu")).score_group(
        {name: model.get_submodule(name).weight for name in names}, rows, [job(None, INT8, "small", "medium")]
    )()
    assert found is not None
    assert isinstance(found[0], dict)
    small, medium = found[0]["small"], found[0]["medium"]
    assert small.sample_scores.tolist() == alone.sample_scores.tolist()
    assert medium.input_amax > 10 * small.input_amax
    assert medium.sample_scores[:16].sum() > 100 * small.score  # steps 50 times as wide
