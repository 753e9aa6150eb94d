"""Scores by kind of token, sizes inside a segment, and ranges from more samples, against arithmetic of their own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sweep.core.batches import ANSWER, FIRST_TOKEN, IMAGE, PROMPT, TOKEN_KINDS, Plan, Sample
from sweep.formats.quantizer import Quantizer
from tests.formats import job_of
from tests.unit.scoring.test_gradient import INT4_BLOCK, INT8, PER_TOKEN, Bigrams, random_bigrams
from workers.data.batches import make_plan
from workers.model.forward import batch_to, labels_of
from workers.quant.modelopt import quantized
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.kl import KlEngine
from workers.scoring.scores import GroupScore, Scores
from workers.scoring.weights import Weights

INT8_TOKEN: dict[str, Any] = {"num_bits": 8, **PER_TOKEN}
NAMES = ["linears.0", "linears.1"]


def conversations(n: int, seed: int = 3) -> list[Sample]:
    """Samples of several kinds of tokens, answers predicted only."""
    random = np.random.default_rng(seed)
    found: list[Sample] = []
    for _ in range(n):
        kinds = np.repeat([PROMPT, IMAGE, PROMPT, ANSWER, PROMPT, ANSWER], random.integers(1, 6, size=6))
        predicts = np.roll(kinds == ANSWER, -1)
        predicts[-1] = False
        ids = random.integers(5, 500, size=len(kinds))
        found.append(Sample(token_ids=ids, kinds=kinds.astype(np.uint8), predicts=predicts))
    return found


def scored(model: Bigrams, plan: Plan, job: Job) -> dict[str, GroupScore]:
    rows = capture(model, plan.segments, NAMES)
    weights = {name: model.get_submodule(name).weight for name in NAMES}
    found = Engine(torch.device("cpu")).score_group(weights, rows, [job])()
    assert found is not None
    return dict(whole(found[0]))


def whole(scores: Scores) -> dict[str, GroupScore]:
    assert isinstance(scores, dict)
    return scores


def by_position(model: Bigrams, sample: Sample, weight: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The score of each position of one sample alone, by autograd, in float64: weights quantized."""
    weights = [linear.weight for linear in model.linears]
    x = model.embedding(torch.from_numpy(sample.token_ids)).double()
    outputs = [(x @ w.double().T).requires_grad_() for w in weights]
    labels = torch.from_numpy(np.where(sample.predictions, np.roll(sample.token_ids, -1), -100))
    F.cross_entropy(torch.stack(outputs).sum(0), labels, reduction="sum").backward()
    total = np.zeros(len(sample.token_ids))
    for w, y in zip(weights, outputs, strict=True):
        made = Weights().quantizers.weight("w", Quantizer(weight), w)
        dy = x @ (quantized(made, w).double() - w.double()).T
        assert y.grad is not None
        total += (y.grad * dy).square().sum(1).detach().numpy()
    return total


@pytest.mark.parametrize("packed", [True, False])
def test_a_score_is_split_by_the_kind_of_the_token_where_its_error_arises(packed: bool) -> None:
    model, samples = random_bigrams(torch.float32), conversations(20)
    samples[1::2] = [replace(sample, predicts=None) for sample in samples[1::2]]  # all tokens are predicted
    plan = make_plan(samples, packed=packed)
    found = scored(model, plan, job_of("int4", INT4_BLOCK, None, ["20", "small", "5"]))
    positions = [by_position(model, sample, INT4_BLOCK) for sample in samples]
    for size, n in (("20", 20), ("small", 16), ("5", 5)):
        score = found[size]
        expected = np.zeros((len(TOKEN_KINDS), n))
        for i, (sample, values) in enumerate(zip(samples[:n], positions[:n], strict=True)):
            np.add.at(expected[:, i], sample.token_kinds, values)
        np.testing.assert_allclose(score.kind_scores, expected, rtol=1e-4, atol=1e-9 * expected.sum())
        np.testing.assert_allclose(score.sample_scores, expected.sum(0), rtol=1e-4)
        assert score.kind_scores.sum() == pytest.approx(score.score, rel=1e-12)
        assert score.top_token_score == pytest.approx(max(values.max() for values in positions[:n]), rel=1e-4)
        assert all(score.kind_scores[kind].sum() > 0 for kind in (FIRST_TOKEN, IMAGE, PROMPT, ANSWER))


def test_labels_are_the_answers_alone() -> None:
    (batch,) = make_plan(conversations(2), packed=True).segments[0]
    labels, tokens = labels_of(batch).flatten(), torch.from_numpy(batch.tensors["input_ids"]).flatten()
    assert [int(i) for i in (labels != -100).nonzero()] == np.flatnonzero(batch.predicts).tolist()
    assert all(labels[i] == tokens[i + 1] for i in np.flatnonzero(batch.predicts))
    assert (batch.kinds[np.flatnonzero(batch.predicts) + 1] == ANSWER).all()


@pytest.mark.parametrize(("weight", "inputs"), [(INT4_BLOCK, None), (None, INT8_TOKEN), (None, INT8)])
def test_a_size_inside_a_segment_has_its_samples_scores_and_ranges_and_leaves_other_sizes_their_bits(
    weight: dict[str, Any] | None, inputs: dict[str, Any] | None
) -> None:
    """Token 1 is 50 times as large as all others, and appears in sample 40: size 32 must not see it."""
    model = random_bigrams(torch.float32)
    model.embedding.weight[1] *= 50
    samples = conversations(128)
    samples[40].token_ids[0] = 1
    plan = make_plan(samples, packed=True)
    alone = scored(model, plan, job_of("x", weight, inputs, ["small", "medium"]))
    beside = scored(model, plan, job_of("x", weight, inputs, ["small", "32", "medium"]))
    for size in ("small", "medium"):
        assert beside[size].sample_scores.tolist() == alone[size].sample_scores.tolist()
        assert beside[size].kind_scores.tolist() == alone[size].kind_scores.tolist()
    inside = beside["32"]
    np.testing.assert_array_equal(inside.sample_scores.shape, (32,))
    # The same samples in batches without the others: sums of another order.
    own = scored(model, make_plan(samples[:32], packed=True), job_of("x", weight, inputs, ["32"]))["32"]
    for name in ("score", "dy_square_sum", "y_square_sum", "top_token_score"):
        assert getattr(inside, name) == pytest.approx(getattr(own, name), rel=1e-5)
    assert inside.input_amax == own.input_amax < beside["medium"].input_amax / 10
    if inputs is not INT8:
        assert inside.sample_scores.tolist() == beside["medium"].sample_scores[:32].tolist()


@pytest.mark.parametrize("algorithm", ["max", "smoothquant"])
def test_ranges_may_come_from_more_samples_than_scores(algorithm: Any) -> None:
    model = random_bigrams(torch.float32)
    model.embedding.weight[1] *= 50
    samples = conversations(128)
    samples[100].token_ids[0] = 1
    plan = make_plan(samples, packed=True)
    static = job_of("x", INT8, INT8, ["small", "64"], algorithm=algorithm)
    own = scored(model, plan, static)
    calibrated = Job(name="x", format=static.format, sizes=static.sizes, calibration=128)
    wide = scored(model, plan, calibrated)
    medium = scored(model, plan, Job(name="x", format=static.format, sizes={"medium": 128}))["medium"]
    for size, n in static.sizes.items():
        np.testing.assert_allclose(wide[size].sample_scores, medium.sample_scores[:n], rtol=1e-4)
        assert wide[size].score > 2 * own[size].score
        assert wide[size].input_amax == own[size].input_amax  # of the samples that are scored


@pytest.mark.parametrize("size", ["small", "20", "40"])
@pytest.mark.parametrize("inputs", [None, INT8])
def test_a_divergence_is_split_by_the_kind_of_the_token_that_predicts(size: str, inputs: dict[str, Any] | None) -> None:
    model, samples = random_bigrams(torch.float32), conversations(40)
    plan, n = make_plan(samples, packed=True), int({"small": "16"}.get(size, size))
    job = job_of("x", INT4_BLOCK, inputs, [size])
    found = KlEngine(model, plan.segments, NAMES, [n]).score_group(NAMES, [job])()
    assert found is not None
    score = whole(found[0])[size]
    assert score.kind_scores.sum() == pytest.approx(score.score, rel=1e-12)
    # Predictions are made by the last token before an answer, which may be the first, and by answers.
    expected = np.zeros((len(TOKEN_KINDS), n))
    by_row = _divergences(model, samples[:n], inputs)
    for i, (sample, values) in enumerate(zip(samples[:n], by_row, strict=True)):
        np.add.at(expected[:, i], sample.token_kinds, values)
    np.testing.assert_allclose(score.kind_scores, expected, rtol=1e-3, atol=1e-6 * expected.sum())
    assert score.top_token_score == pytest.approx(max(values.max() for values in by_row), rel=1e-3)


@torch.no_grad()
def _divergences(model: Bigrams, samples: list[Sample], inputs: dict[str, Any] | None) -> list[np.ndarray[Any, Any]]:
    """KL(unquantized || quantized) at each position of each sample, 0 where nothing is predicted."""
    xs = [model.embedding(torch.from_numpy(sample.token_ids)) for sample in samples]
    made = Weights().quantizers
    input_quantizer = None
    if inputs is not None:
        x = torch.cat(xs)
        input_quantizer = made.inputs(Quantizer(inputs), x, float(x.abs().max()))
    found: list[np.ndarray[Any, Any]] = []
    for sample, x in zip(samples, xs, strict=True):
        base, changed = torch.zeros(()), torch.zeros(())
        for i, linear in enumerate(model.linears):
            w = quantized(made.weight(f"w{i}", Quantizer(INT4_BLOCK), linear.weight), linear.weight)
            xq = x if input_quantizer is None else quantized(input_quantizer, x)
            base, changed = base + linear(x).double(), changed + (xq @ w.T).double()
        kl = F.kl_div(changed.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        found.append(np.where(sample.predictions, kl.numpy(), 0.0))
    return found


def test_batches_have_what_forward_takes() -> None:
    (batch,) = make_plan(conversations(2), packed=True).segments[0]
    assert batch_to(batch, torch.device("cpu"), torch.float32).keys() == {"input_ids", "position_ids"}
