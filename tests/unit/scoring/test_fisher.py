"""Projections of method=fisher, against autograd on the unmodified model in float64; labels, windows, tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from sweep.core.batches import Sample
from tests.formats import job_of
from tests.models import random_model, random_samples
from tests.unit.scoring.test_gradient import INT8, INT8_CHANNEL, quantized
from workers.data.batches import make_plan
from workers.data.samples import with_scenes
from workers.model.forward import batch_to
from workers.quant import kernels
from workers.quant.modelopt import layer_groups
from workers.scoring.capture import Rows, capture
from workers.scoring.gradient import Engine
from workers.scoring.labels import Targets, drawn_labels, targets_of
from workers.scoring.scores import GroupScore
from workers.scoring.windows import captures

DRAWS: Final = 3
CPU: Final = torch.device("cpu")
INT4: Final[dict[str, Any]] = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
RECIPES: Final[dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]] = {
    "int4 weights": (INT4, None),
    "int8 w8a8": (INT8_CHANNEL, INT8),
}
Array = npt.NDArray[np.float64]


def samples_of(kind: str) -> list[Sample]:
    samples = random_samples(16)
    if kind == "qwen3_vl":
        captions = [Sample(token_ids=sample.token_ids[:6]) for sample in samples]
        samples = with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2)
    return samples


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def alone(sample: Sample) -> Any:
    """The batch of one sample."""
    return make_plan([sample], packed=True).segments[0][0]


def labels_by_sample(model: nn.Module, samples: Sequence[Sample]) -> list[Tensor]:
    """The labels that the model draws, sample by sample: [draws, tokens]."""
    found: list[Tensor] = []
    for sample in samples:
        batch = alone(sample)
        logits = model(**batch_to(batch, CPU, torch.float32), use_cache=False).logits
        found.append(targets_of(batch, DRAWS).of(logits.flatten(0, 1)))
    return found


def reference(
    model: nn.Module, samples: Sequence[Sample], labels: Sequence[Tensor], recipe: str, groups: Mapping[str, Any]
) -> dict[str, Array]:
    """Projections of each layer group, [samples, draws], by autograd in float64, one sample at a time."""
    exact, (weight, inputs) = model.double().requires_grad_(True), RECIPES[recipe]
    linears = linears_of(exact)
    seen: list[dict[str, tuple[Tensor, Tensor]]] = []
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda _, args, out, name=name: outputs.__setitem__(name, (args[0], out)))
    gradients: list[list[dict[str, Tensor]]] = []
    for sample, of_sample in zip(samples, labels, strict=True):
        outputs.clear()
        logits = exact(**batch_to(alone(sample), CPU, torch.float64), use_cache=False).logits.flatten(0, 1)
        kept = dict(outputs)
        seen.append(kept)
        gradients.append([])
        for labels_T in of_sample:
            loss = nn.functional.cross_entropy(logits, labels_T, ignore_index=-100, reduction="sum")
            found = torch.autograd.grad(loss, [out for _, out in kept.values()], retain_graph=True)
            gradients[-1].append(dict(zip(kept, found, strict=True)))
    projections: dict[str, Array] = {}
    for first, names in groups.items():
        found_SD = np.zeros((len(samples), DRAWS))
        for name in names:
            w = linears[name].weight.detach().numpy()
            x = [each[name][0].detach().flatten(0, -2).numpy() for each in seen]
            q_x, q_w = (
                np.split(quantized(np.concatenate(x), inputs), np.cumsum([*map(len, x)])[:-1]),
                quantized(w, weight),
            )
            for number, (own, own_q) in enumerate(zip(x, q_x, strict=True)):
                dy = own_q @ q_w.T - own @ w.T
                for draw in range(DRAWS):
                    found_SD[number, draw] += (gradients[number][draw][name].flatten(0, -2).numpy() * dy).sum()
        projections[first] = found_SD
    return projections


def scores(
    model: nn.Module, rows: Mapping[str, Rows], group: Sequence[str], recipes: Sequence[str], *sizes: str
) -> list[Mapping[str, GroupScore]]:
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in group}
    found = Engine(CPU).score_group(weights, rows, [job_of(name, *RECIPES[name], sizes) for name in recipes])()
    assert found is not None
    assert all(isinstance(each, dict) for each in found)
    return [each for each in found if isinstance(each, dict)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3_vl"])
def test_projections_are_those_of_autograd_in_float64(kind: str, dtype: torch.dtype) -> None:
    """Of every group, vision tower and lm_head included; captured in float64, so are x and g up to the last digit.

    An input that lies 1e-7 off may be rounded to another step, so recipes that quantize inputs agree to less.
    """
    torch.set_num_threads(1)
    model, samples = random_model(kind), samples_of(kind)
    plan, groups = make_plan(samples, packed=True), layer_groups(linears_of(model))
    labels = labels_by_sample(model, samples)
    rows = capture(model.to(dtype), plan.segments, list(linears_of(model)), DRAWS)
    model.float()
    mine = {first: scores(model, rows, group, list(RECIPES), "small") for first, group in groups.items()}
    assert kind == "llama" or any("visual" in first for first in groups)
    for place, recipe in enumerate(RECIPES):
        expected = reference(random_model(kind), samples, labels, recipe, groups)
        errors: list[float] = []
        for first, u_SD in expected.items():
            found = mine[first][place]["small"]
            assert found.projections is not None
            error = np.abs(found.projections - u_SD).max() / np.sqrt((u_SD**2).mean())
            of_score = abs(found.score / (u_SD**2).mean(axis=1).sum() - 1)
            np.testing.assert_allclose(found.sample_scores, np.square(found.projections).mean(axis=1), rtol=1e-12)
            errors.append(of_score)
            if recipe == "int4 weights":
                assert error < (1e-5 if dtype == torch.float32 else 3e-6), first
                assert of_score < (3e-6 if dtype == torch.float32 else 1e-6), first
        assert max(errors) < 0.03
        assert np.median(errors) < (1e-3 if dtype == torch.float32 else 3e-6)


def test_a_label_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.0, 0.5, 0.25, 0.25, 0.0]]).log()
    almost_1 = 1 - 2.0**-53
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.7499, 0.75, almost_1], dtype=torch.float64)[:, None]
    assert drawn_labels(logits, uniforms).flatten().tolist() == [1, 1, 2, 2, 3, 3]  # never one without probability
    for logits in (torch.randn(4, 50_000), torch.full((1, 3), float("nan")), torch.zeros(1, 1)):
        found = drawn_labels(logits, torch.full((1, len(logits)), almost_1, dtype=torch.float64))
        assert 0 <= int(found.min()) <= int(found.max()) < logits.shape[1]


def test_labels_come_as_often_as_the_model_says() -> None:
    n_draws, probabilities = 20_000, torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    (sample,) = random_samples(1)
    targets = targets_of(alone(sample), n_draws)
    labels = targets.of(probabilities.log().expand(len(sample.token_ids), -1))
    assert (labels[:, -1] == -100).all()  # nothing is predicted
    for of_position in labels[:, :-1].T:
        for label, probability in enumerate(probabilities.tolist()):
            frequency = float((of_position == label).double().mean())
            assert abs(frequency - probability) < 5 * (probability * (1 - probability) / n_draws) ** 0.5
    # Positions are drawn apart from each other: two that follow have the same label as often as chance has it.
    same, expected = float((labels[:, 0] == labels[:, 1]).double().mean()), float(probabilities.square().sum())
    assert len(sample.token_ids) > 2
    assert abs(same - expected) < 5 * (expected * (1 - expected) / n_draws) ** 0.5


def numbers(targets: Targets) -> Tensor:
    assert targets.uniforms_DT is not None
    return targets.uniforms_DT


def test_random_numbers_follow_the_sample_the_position_and_the_draw_alone() -> None:
    samples = samples_of("qwen3_vl")
    (batches,) = make_plan(samples, packed=True).segments
    for batch in batches:
        together = numbers(targets_of(batch, 5)).split(list(batch.lengths), dim=1)
        for index, found in zip(batch.order, together, strict=True):
            own = numbers(targets_of(alone(samples[index]), 2))
            assert torch.equal(own, found[:2])  # of the first draws, whatever their number and the samples beside it
    other = Sample(token_ids=samples[0].token_ids, pictures=samples[1].pictures, arrays=samples[0].arrays)
    assert not torch.equal(numbers(targets_of(alone(other), 2)), numbers(targets_of(alone(samples[0]), 2)))
    every = torch.cat([numbers(targets_of(batch, 5)).flatten() for batch in batches])
    assert len(every.unique()) == len(every)
    assert 0 <= float(every.min()) < float(every.max()) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3_vl", "other"])
def test_windows_are_bit_equal_to_one_capture(kind: str, dtype: torch.dtype) -> None:
    model = random_model("llama" if kind == "other" else kind, num_hidden_layers=3).to(dtype)
    if kind == "other":
        model.config.model_type = "other"
    plan, names = make_plan(samples_of(kind), packed=True), list(linears_of(model))
    layers = [[name for name in names if f"layers.{number}." in name] for number in range(3)]
    layers[0] += [name for name in names if "visual" in name]
    windows = [layers[0], [*layers[1], *layers[2], "lm_head"]]
    expected = capture(model, plan.segments, names, DRAWS)
    seen: set[str] = set()
    for _, rows in captures(model, plan.segments, windows, DRAWS):
        for name, found in rows.items():
            assert found.g_DTO.shape == (DRAWS, *expected[name].g_DTO.shape[1:])
            assert torch.equal(found.x_TI, expected[name].x_TI), name
            assert torch.equal(found.g_DTO, expected[name].g_DTO), name
            assert not torch.equal(found.g_DTO[0], found.g_DTO[1])
        seen |= rows.keys()
    assert seen == expected.keys()


def test_a_signed_sum_keeps_six_digits() -> None:
    """Of 9,728 products a row that cancel to a hundredth of their magnitudes, summed over 300 rows to one number."""
    generator = torch.Generator().manual_seed(3)
    n_rows, n_out = 300, 9_728
    first, second = (torch.randn(n_rows, n_out, generator=generator) for _ in range(2))
    g_DTO = torch.randn(DRAWS, n_rows, n_out, generator=generator)
    projection, square = torch.zeros(2, DRAWS, n_rows), torch.zeros(2, n_rows)
    both = torch.stack([torch.zeros_like(second), second])
    kernels.project_rows(first, both, g_DTO, [n_rows, 200], [0, 200], projection, square)
    for column, dy in enumerate((first, (first + second)[:200])):
        products = dy.double() * g_DTO[:, : len(dy)].double()
        found, exact = projection[column, :, : len(dy)].double().sum(1), products.sum((1, 2))
        assert float(products.abs().sum() / exact.abs().max()) > 100
        spread = float(products.sum(2).square().mean().sqrt()) * len(dy) ** 0.5  # of such a sum
        assert float((found - exact).abs().max()) < 1e-6 * spread
        np.testing.assert_allclose(square[column, : len(dy)].double(), dy.double().square().sum(1), rtol=1e-5)
    assert not projection[1, :, 200:].any()


def test_parts_of_kinds_and_tokens_add_up_and_may_be_negative() -> None:
    model, samples = random_model("qwen3_vl"), samples_of("qwen3_vl")
    plan, name = make_plan(samples, packed=True), "model.language_model.layers.0.mlp.down_proj"
    rows = capture(model, plan.segments, [name], DRAWS)
    found = scores(model, rows, [name], ["int4 weights"], "small", "12")[0]
    w, own = model.get_submodule(name).weight.double().numpy(), rows[name]
    dy = own.x_TI.double().numpy() @ (quantized(w, INT4) - w).T
    by_row_DT = (own.g_DTO.double().numpy() * dy).sum(2)
    sample_T = np.repeat(own.layout.samples, own.layout.lengths.numpy())
    kind_T = np.repeat(own.layout.run_kinds, own.layout.run_lengths.numpy())
    for size, n_samples in (("small", 16), ("12", 12)):
        score = found[size]
        u_SD = np.stack([by_row_DT[:, sample_T == sample].sum(1) for sample in range(n_samples)])
        parts_T = np.where(sample_T < n_samples, (by_row_DT * u_SD[np.minimum(sample_T, n_samples - 1)].T).mean(0), 0)
        assert score.projections is not None
        np.testing.assert_allclose(score.projections, u_SD, rtol=1e-4, atol=1e-5 * np.abs(u_SD).max())
        assert score.score == pytest.approx((u_SD**2).mean(1).sum(), rel=1e-5)
        assert score.kind_scores.sum() == pytest.approx(score.score, rel=1e-12)
        np.testing.assert_allclose(score.kind_scores.sum(0), score.sample_scores, rtol=1e-9)
        for kind, of_kind in enumerate(score.kind_scores):
            assert of_kind.sum() == pytest.approx(parts_T[kind_T == kind].sum(), abs=1e-5 * score.score)
        assert (score.kind_scores < 0).any()
        assert score.top_token_score == pytest.approx(parts_T.max(), rel=1e-4)
    few, all_ = found["12"].projections, found["small"].projections
    assert few is not None
    assert all_ is not None
    assert np.array_equal(few, all_[:12])


def test_data_labels_and_drawn_ones_share_x_and_errors() -> None:
    """So `output_rel_error` is the same by both methods; the score of drawn labels is no sum of squares."""
    model, plan = random_model("llama"), make_plan(random_samples(16), packed=True)
    group = layer_groups(linears_of(model))["model.layers.0.self_attn.q_proj"]
    by_method = [
        scores(model, capture(model, plan.segments, group, draws), group, ["int8 w8a8"], "small")[0]["small"]
        for draws in (None, DRAWS)
    ]
    own, drawn = by_method
    assert own.projections is None
    assert (own.dy_square_sum, own.y_square_sum, own.dw_square_sum, own.input_amax) == (
        drawn.dy_square_sum,
        drawn.y_square_sum,
        drawn.dw_square_sum,
        drawn.input_amax,
    )
    assert own.score != drawn.score
