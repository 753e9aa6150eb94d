"""KL divergence of one quantized layer group, against a full forward of a copy with fake-quantized linears."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.core.batches import Batch, Sample
from sweep.core.sizes import SIZES
from tests.formats import job_of
from tests.models import random_model, random_samples
from workers.data.batches import make_plan
from workers.data.samples import with_scenes
from workers.model.forward import batch_to
from workers.model.fused import FusedDecoder, fused_decoder
from workers.quant.modelopt import Quantizers, layer_groups
from workers.scoring import baseline
from workers.scoring.gradient import Job
from workers.scoring.kl import KlEngine
from workers.scoring.layout import Segments
from workers.scoring.scores import GroupScore, NotFinite

N_LAYERS = 3
PER_TOKEN: dict[str, Any] = {"type": "dynamic", "block_sizes": {-1: None}}
NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
RECIPES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "fp8": ({"num_bits": (4, 3), "axis": None}, {"num_bits": (4, 3), "axis": None}),
    "int8_static": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}),
    "int8_per_token": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, **PER_TOKEN}),
    "int4_block": ({"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}, None),
    "nvfp4": (NVFP4, NVFP4),
    "fp8_blocks_e8m0": (
        {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128, "scale_bits": (8, 0)}},
        {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: 128, "scale_bits": (8, 0)}},
    ),
    "activations_only": (None, {"num_bits": 8, "axis": None}),
}
DATA = [("llama", False), ("qwen3_vl", False), ("qwen3_vl", True)]


def job(recipe: str, *sizes: str) -> Job:
    return job_of(recipe, *RECIPES[recipe], sizes)


def segments_of(*, images: bool, n: int = 128) -> Segments:
    samples = random_samples(n)
    if images:
        captions = [Sample(token_ids=sample.token_ids[:9]) for sample in samples]
        samples = with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2)
    return make_plan(samples, packed=True).segments


def linears(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


class FakeQuantized(nn.Module):
    """F.linear(Q(x), Q(W)), with a quantizer of its own."""

    def __init__(self, linear: nn.Linear, recipe: Job, amax: Tensor) -> None:
        super().__init__()
        self.bias, weight = linear.bias, linear.weight.detach().float()
        given = recipe.format
        self.weight = weight if given.weight is None else Quantizers().weight("w", given.weight, weight)(weight)
        self.weight = self.weight.to(linear.weight.dtype)
        self.quantizer = (
            None
            if given.inputs is None
            else Quantizers().inputs(given.inputs, weight.new_empty(0, weight.shape[1]), amax.tolist())
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizer is not None:
            x = self.quantizer(x.flatten(0, -2).float()).to(x.dtype).view_as(x)
        return F.linear(x, self.weight, self.bias)


class Reference:
    """The same KL divergences by whole passes of the model, without any of the engine's shortcuts."""

    def __init__(self, model: Any, segments: Segments, modules: Sequence[str]) -> None:
        self.model, self.segments = model, segments
        self.amaxes: dict[str, list[Tensor]] = {}
        current: list[int] = []

        def hook(name: str) -> Any:
            def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found = self.amaxes.setdefault(name, [torch.zeros(()) for _ in segments])
                found[current[-1]] = torch.maximum(found[current[-1]], args[0].abs().max().float())

            return see

        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
        self.logits: list[Tensor] = []
        for index, batches in enumerate(segments):
            current.append(index)
            self.logits += [self.forward(model, batch) for batch in batches]
        for handle in handles:
            handle.remove()

    @staticmethod
    @torch.no_grad()
    def forward(model: Any, batch: Batch) -> Tensor:
        return (
            model(**batch_to(batch, torch.device("cpu"), next(model.parameters()).dtype), use_cache=False)
            .logits.flatten(0, 1)
            .double()
        )

    def scores(self, modules: Sequence[str], recipe: Job, size: str) -> np.ndarray[Any, Any]:
        n_segments = list(SIZES).index(size) + 1
        quantized = copy.deepcopy(self.model)
        for name in modules:
            amax = torch.stack(self.amaxes[name][:n_segments])
            parent, _, child = name.rpartition(".")
            setattr(quantized.get_submodule(parent), child, FakeQuantized(self.model.get_submodule(name), recipe, amax))
        scores = np.zeros(SIZES[size])
        batches = [batch for segment in self.segments[:n_segments] for batch in segment]
        for batch, base in zip(batches, self.logits, strict=False):
            found = self.forward(quantized, batch)
            by_row = F.kl_div(found.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="none").sum(-1)
            start = 0
            for sample, length in zip(batch.order, batch.lengths, strict=True):
                scores[sample] = by_row[start : start + length - 1].sum()
                start += length
        return scores


@pytest.fixture(scope="module", params=DATA, ids=lambda pair: f"{pair[0]}-{'images' if pair[1] else 'text'}")
def both(request: pytest.FixtureRequest) -> tuple[KlEngine, Reference]:
    torch.set_num_threads(1)
    kind, images = request.param
    model = random_model(kind, num_hidden_layers=N_LAYERS)
    segments = segments_of(images=images)
    return KlEngine(model, segments, linears(model)), Reference(model, segments, linears(model))


def score(engine: KlEngine, modules: Sequence[str], *jobs: Job) -> list[dict[str, GroupScore]]:
    found = engine.score_group(modules, jobs)()
    assert found is not None
    for scores in found:
        assert not isinstance(scores, NotFinite), scores
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("recipe", RECIPES)
def test_groups_of_every_kind_equal_a_full_forward_of_a_quantized_copy(
    both: tuple[KlEngine, Reference], recipe: str
) -> None:
    """First and last layer, fused and single groups, the head, and with images the vision tower and the mergers."""
    engine, reference = both
    groups = layer_groups(linears(reference.model))
    chosen = [
        group for group in groups if ".layers.0." in group or ".layers.2.mlp.down_proj" in group or group == "lm_head"
    ]
    chosen += [group for group in groups if "visual" in group and group in reference.amaxes][1::3]
    for group in chosen:
        asked = job(recipe, "small", "medium")
        (scores,) = score(engine, groups[group], asked)
        for size in asked.sizes:
            expected = reference.scores(groups[group], asked, size)
            assert scores[size].score == pytest.approx(expected.sum(), rel=1e-4), (group, size)
            np.testing.assert_allclose(scores[size].sample_scores, expected, rtol=1e-3, atol=1e-6 * expected.max())
            assert scores[size].sample_scores.min() >= 0


@pytest.fixture(params=[True, False], ids=["images", "text"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[KlEngine, Reference]:
    """An engine that runs as on a GPU: fused layers, and batches in rows."""

    def made(self: Any, segments: Segments) -> FusedDecoder | None:
        batch = segments[0][0]
        inputs = batch_to(batch, torch.device("cpu"), torch.float32)
        return fused_decoder(self.decoder, inputs, batch.lengths, max(batch.lengths))

    torch.set_num_threads(1)
    monkeypatch.setattr(baseline.Baseline, "_fused_decoder", made)
    monkeypatch.setattr("workers.data.batches.MAX_BATCH_TOKENS", 300)
    model, segments = random_model("qwen3_vl", num_hidden_layers=N_LAYERS), segments_of(images=request.param)
    engine = KlEngine(model, segments, linears(model))
    assert engine._base._fused is not None
    assert (len(engine.shapes) < sum(map(len, segments))) != request.param  # samples with pictures keep their batches
    return engine, Reference(model, segments, linears(model))


def test_fused_layers_give_the_scores_of_the_model_s_own(fused: tuple[KlEngine, Reference]) -> None:
    engine, reference = fused
    groups = layer_groups(linears(reference.model))
    chosen = [name for name in groups if ".layers.1." in name or "visual.blocks.0.mlp.linear_fc1" in name]
    for group in [name for name in chosen if name in reference.amaxes] + ["lm_head"]:
        asked = job("int8_static", "small", "medium")
        (scores,) = score(engine, groups[group], asked)
        for size in asked.sizes:
            expected = reference.scores(groups[group], asked, size)
            assert scores[size].score == pytest.approx(expected.sum(), rel=1e-3), (group, size)
            np.testing.assert_allclose(scores[size].sample_scores, expected, rtol=1e-2, atol=1e-5 * expected.max())


def test_an_unquantized_group_has_no_divergence_under_fused_layers(fused: tuple[KlEngine, Reference]) -> None:
    """To the bit: the unquantized model's pass, reruns of layers and whole passes are the same arithmetic."""
    engine, reference = fused
    groups = layer_groups(linears(reference.model))
    chosen = [name for name in groups if ".layers." in name or "visual" in name]
    for group in [name for name in chosen if name in reference.amaxes]:
        (scores,) = score(engine, groups[group], job_of("none", None, None, ["small", "medium"]))
        assert scores["medium"].score == 0.0, group


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_are_the_same_whichever_sizes_groups_and_jobs_are_asked(
    both: tuple[KlEngine, Reference], recipe: str
) -> None:
    engine, reference = both
    groups = layer_groups(linears(reference.model))
    group = groups[next(name for name in groups if "layers.1.self_attn.q_proj" in name)]
    later = groups[next(name for name in groups if "layers.2.mlp" in name)]
    _, together = score(engine, group, job("fp8", "small"), job(recipe, "small", "medium"))
    score(engine, later, job("int8_static", "medium"))  # the engine has gone on, and must come back
    for size in ("small", "medium"):
        (alone,) = score(engine, group, job(recipe, size))
        assert np.array_equal(alone[size].sample_scores, together[size].sample_scores)
        assert alone[size].input_amax == together[size].input_amax
    small = KlEngine(reference.model, reference.segments[:1], linears(reference.model))
    (of_small,) = score(small, group, job(recipe, "small"))
    assert np.array_equal(of_small["small"].sample_scores, together["small"].sample_scores)


def test_log_probabilities_that_do_not_fit_are_made_again_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, segments = random_model("llama"), segments_of(images=False)
    kept = KlEngine(model, segments, linears(model))
    monkeypatch.setattr("workers.scoring.baseline._CPU_BYTES", 0)
    made = KlEngine(model, segments, linears(model))
    for group in ("model.layers.0.mlp.down_proj", "lm_head"):
        (one,), (other,) = (score(engine, [group], job("int4_block", "medium")) for engine in (kept, made))
        assert np.array_equal(one["medium"].sample_scores, other["medium"].sample_scores)


def test_an_unknown_model_type_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, segments = random_model("llama"), segments_of(images=False)
    monkeypatch.setattr(model.config, "model_type", "other")
    engine, reference = KlEngine(model, segments, linears(model)), Reference(model, segments, linears(model))
    asked = job("int8_static", "small", "medium")
    for group in ("model.layers.1.mlp.down_proj", "lm_head"):
        (scores,) = score(engine, [group], asked)
        for size in asked.sizes:
            assert scores[size].score == pytest.approx(reference.scores([group], asked, size).sum(), rel=1e-4)


def test_bfloat16_agrees_within_the_rounding_of_bfloat16_logits() -> None:
    """The reference rounds its logits to bf16, and counts what that does as divergence: a large recipe hides it."""
    model = random_model("llama").bfloat16()
    segments = segments_of(images=False)
    engine, reference = KlEngine(model, segments, linears(model)), Reference(model, segments, linears(model))
    asked = job("int4_block", "medium")
    (scores,) = score(engine, ["model.layers.0.mlp.down_proj"], asked)
    assert scores["medium"].score == pytest.approx(
        reference.scores(["model.layers.0.mlp.down_proj"], asked, "medium").sum(), rel=0.02
    )


def test_weight_errors_and_input_ranges_come_along(both: tuple[KlEngine, Reference]) -> None:
    engine, reference = both
    group = next(name for name in linears(reference.model) if "layers.1.mlp.down_proj" in name)
    (scores,) = score(engine, [group], job("int4_block", "medium"))
    weight = reference.model.get_submodule(group).weight
    quantized = FakeQuantized(reference.model.get_submodule(group), job("int4_block"), torch.zeros(1)).weight
    assert scores["medium"].dw_square_sum == pytest.approx((quantized - weight).square().sum().item(), rel=1e-5)
    assert scores["medium"].w_square_sum == pytest.approx(weight.square().sum().item(), rel=1e-5)
    assert scores["medium"].input_amax == torch.stack(reference.amaxes[group]).max()
    assert scores["medium"].y_square_sum == 0.0


def test_the_model_is_left_as_it_was(both: tuple[KlEngine, Reference]) -> None:
    engine, reference = both
    score(
        engine,
        [next(name for name in linears(reference.model) if "layers.0.mlp.down_proj" in name)],
        job("fp8", "small"),
    )
    assert not [name for name, module in reference.model.named_modules() if "forward" in vars(module)]
    batch = reference.segments[0][0]
    assert torch.equal(reference.forward(reference.model, batch), reference.logits[0])


def test_a_group_that_no_batch_calls_has_no_score() -> None:
    model = random_model("qwen3_vl")
    engine = KlEngine(model, segments_of(images=False, n=16), linears(model))
    assert (
        engine.score_group([next(name for name in linears(model) if "visual" in name)], [job("fp8", "small")])() is None
    )


def test_what_is_not_finite_is_named() -> None:
    """Once in a weight, once in what the unquantized model gives for one sample."""
    model, group = random_model("llama"), "model.layers.0.mlp.down_proj"
    samples = random_samples(16)
    segments = make_plan(samples, packed=False).segments
    model.get_submodule(group).weight[3, 4] = float("nan")
    found = KlEngine(model, segments, linears(model)).score_group([group], [job("fp8", "small")])()
    assert found is not None
    assert str(found[0]).startswith(f"Layer group {group} under fp8: the weight of {group} is NaN or infinite.")

    model, token = random_model("llama"), 5
    samples = [Sample(token_ids=np.where(sample.token_ids == token, 6, sample.token_ids)) for sample in samples]
    for bad in (11, 9):
        samples[bad].token_ids[-1] = token
    model.model.embed_tokens.weight[token] = float("inf")
    found = KlEngine(model, make_plan(samples, packed=False).segments, linears(model)).score_group(
        [group], [job("fp8", "small")]
    )()
    assert found is not None
    assert (
        str(found[0])
        == f"Layer group {group} under fp8: the unquantized model's output for sample 9 is NaN or infinite."
    )


def test_a_divergence_that_is_not_finite_fails_the_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, segments, group = random_model("llama"), segments_of(images=False, n=16), ["model.layers.0.mlp.down_proj"]
    engine = KlEngine(model, segments, linears(model))
    alone, original = score(engine, group, job("fp8", "small"))[0], baseline.divergence
    n_calls: list[int] = []

    def broken(log_probs: Tensor, change: Tensor, mean: Tensor | None) -> Tensor:
        n_calls.append(1)
        return original(log_probs, change, mean).index_fill_(
            0, torch.tensor([0, 1]), torch.nan if len(n_calls) == 1 else 0
        )

    monkeypatch.setattr(baseline, "divergence", broken)
    found = engine.score_group(group, [job("int8_static", "small"), job("fp8", "small")])()
    assert found is not None
    assert str(found[0]).startswith(
        "Layer group model.layers.0.mlp.down_proj under int8_static: the KL divergence of sample "
    )
    assert str(segments[0][0].order[0]) in str(found[0])
    assert isinstance(found[1], dict)
    assert found[1]["small"].input_amax == alone["small"].input_amax
