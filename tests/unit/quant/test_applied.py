"""A recipe applied to a model, against engines that score one layer group: output errors, one-group KL, gradients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sweep.core.errors import SweepError
from sweep.core.pairs import Scales
from sweep.formats.quantizer import Quantizer
from tests.floors import sample_logits
from tests.formats import job_of
from tests.models import random_model, random_samples
from tests.recipes import FORMATS, format_of, recipe_of
from workers.data.batches import make_plan
from workers.quant.applied import applied, calibrated_model, output_error
from workers.quant.calibration import fake_quantized, quantized_inputs
from workers.quant.linear import LinearQuant
from workers.quant.modelopt import layer_groups
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.kl import KlEngine
from workers.scoring.scores import NotFinite
from workers.scoring.validation import Validator

PLAN = make_plan(random_samples(16), packed=True)
GROUPS = (
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.1.mlp.gate_proj",
    "model.language_model.layers.1.mlp.down_proj",
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return random_model("qwen3_vl")


# scales of packed integers are rounded where they are fused
EACH: list[tuple[str, Scales]] = [*((name, "private") for name in FORMATS), ("int4_block", "fused"), ("fp8", "fused")]


def job(name: str, scales: Scales = "private") -> Job:
    return job_of(name, *FORMATS[name], ["small"], scales=scales)


def modules_of(model: nn.Module, group: str) -> tuple[str, ...]:
    return layer_groups(name for name, module in model.named_modules() if isinstance(module, nn.Linear))[group]


def quants_of(model: nn.Module, group: str, name: str, scales: Scales = "private") -> dict[str, LinearQuant]:
    recipe = recipe_of(model, [format_of(name, scales=scales)])
    alone = replace(recipe, groups=tuple(choice for choice in recipe.groups if choice.group.name == group))
    return calibrated_model(model, list(PLAN.batches("small")), alone)


@pytest.mark.parametrize(("name", "scales"), EACH)
def test_the_output_error_is_the_one_that_the_engine_scores(model: Any, name: str, scales: Scales) -> None:
    for group in GROUPS:
        modules = modules_of(model, group)
        rows = capture(model, PLAN.segments, modules)
        weights = {module: model.get_submodule(module).weight for module in modules}
        scores = Engine(torch.device("cpu")).score_group(weights, rows, [job(name, scales)])()
        assert scores is not None
        assert not isinstance(scores[0], NotFinite)
        quants = quants_of(model, group, name, scales)
        squares = in_delta_form = 0.0
        for module in modules:
            linear, x = model.get_submodule(module), rows[module].x_TI
            before = linear(x).double()
            with applied(model, quants):
                squares += float((linear(x).double() - before).square().sum())
            in_delta_form += float(output_error(quants[module], weights[module], x).double().square().sum())
        assert in_delta_form == pytest.approx(scores[0]["small"].dy_square_sum, rel=1e-5)
        assert squares == pytest.approx(
            scores[0]["small"].dy_square_sum, rel=1e-3
        )  # a difference of outputs in float32 cancels


@pytest.mark.parametrize(("name", "scales"), EACH)
def test_one_group_diverges_as_the_kl_engine_measures(model: Any, name: str, scales: Scales) -> None:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    engine, yardstick = KlEngine(model, PLAN.segments, linears), Validator(model, list(PLAN.batches("small")))
    for group in (*GROUPS, "lm_head"):
        found = engine.score_group(modules_of(model, group), [job(name, scales)])()
        assert found is not None
        assert not isinstance(found[0], NotFinite)
        np.testing.assert_allclose(
            yardstick.measure(quants_of(model, group, name, scales)).kl, found[0]["small"].sample_scores, rtol=1e-5
        )


def test_the_loss_change_is_the_difference_of_two_cross_entropies(model: Any) -> None:
    recipe = recipe_of(model, [format_of("int4_block"), None, format_of("int8_static")], covered="language_model")
    quants = calibrated_model(model, list(PLAN.batches("small")), recipe)
    measured = Validator(model, list(PLAN.batches("small"))).measure(quants)
    base = sample_logits(model, PLAN)  # in the batches that were measured: in others an input may round the other way
    with applied(model, quants):
        changed = sample_logits(model, PLAN)
    expected_loss, expected_kl = np.zeros((2, 16))
    for index, (sample, *rows) in enumerate(zip(random_samples(16), base, changed, strict=True)):
        old, new = (logits[:-1].double() for logits in rows)
        ids = torch.from_numpy(sample.token_ids[1:])
        losses = [F.cross_entropy(logits, ids, reduction="sum").item() for logits in (old, new)]
        expected_loss[index] = losses[1] - losses[0]
        expected_kl[index] = F.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="sum").item()
    np.testing.assert_allclose(measured.loss_change, expected_loss, atol=1e-4)
    np.testing.assert_allclose(measured.kl, expected_kl, rtol=1e-4)


def test_a_model_of_an_unknown_type_is_measured_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_model("llama")
    plan = make_plan(random_samples(16), packed=False)
    recipe = recipe_of(network, [format_of("int8_static")])
    quants = calibrated_model(network, list(plan.batches("small")), recipe)
    known = Validator(network, list(plan.batches("small"))).measure(quants)
    monkeypatch.setattr(network.config, "model_type", "other")
    unknown = Validator(network, list(plan.batches("small"))).measure(quants)
    np.testing.assert_allclose(unknown.kl, known.kl, rtol=1e-4)
    np.testing.assert_allclose(unknown.loss_change, known.loss_change, atol=1e-4)


def test_the_model_is_itself_again_whatever_happens_inside(model: Any) -> None:
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids, use_cache=False).logits
    quants = quants_of(model, GROUPS[2], "int4_block")
    changed: list[torch.Tensor] = []

    def fail() -> None:
        with applied(model, quants):
            changed.append(model(input_ids=ids, use_cache=False).logits)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.equal(changed[0], before)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_gradients_pass_straight_through_the_quantizer_of_the_inputs() -> None:
    """DLoss/dx = s * g Q(W'), where s is the scale that smoothing moved to the inputs."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=False)
    quant = LinearQuant(
        weight=Quantizer({"num_bits": 8, "axis": 0}),
        inputs=Quantizer({"num_bits": 8, "axis": None}),
        weight_amax=linear.weight.detach().abs().amax(1, keepdim=True) * 2,
        input_amax=torch.tensor(3.0),
        pre_quant_scale=torch.rand(64) + 0.5,
    )
    x, g = torch.randn(5, 64, requires_grad=True), torch.randn(5, 8)
    with applied(nn.ModuleDict({"linear": linear}), {"linear": quant}):
        y = linear(x)
        y.backward(g)
    quantized_OI = fake_quantized(quant, linear.weight.detach())
    assert quant.pre_quant_scale is not None
    assert torch.equal(y, F.linear(quantized_inputs(quant, x.detach()), quantized_OI))
    torch.testing.assert_close(x.grad, (g @ quantized_OI) * quant.pre_quant_scale)


def test_windows_calibrate_as_one_pass_does(model: Any) -> None:
    recipe = recipe_of(
        model,
        [format_of("int8_static"), format_of("int4_block"), format_of("fp8", "smoothquant", "fused")],
        covered="language_model.layers",
    )
    whole, windows = (calibrated_model(model, list(PLAN.batches("small")), recipe, room) for room in (1e9, 1.0))
    assert whole.keys() == windows.keys()
    for name, quant in whole.items():
        other = windows[name]
        for one, same in (
            (quant.weight_amax, other.weight_amax),
            (quant.input_amax, other.input_amax),
            (quant.pre_quant_scale, other.pre_quant_scale),
        ):
            assert one is same is None or torch.equal(one, same)  # pyright: ignore[reportArgumentType]


def test_a_format_whose_range_no_sample_sets_is_refused(model: Any) -> None:
    with pytest.raises(SweepError, match=r"No calibration sample reaches model\.visual"):
        calibrated_model(
            model, list(PLAN.batches("small")), recipe_of(model, [format_of("int8_static")], covered="visual")
        )


def test_an_embedding_that_shares_the_heads_weight_keeps_it() -> None:
    """Of a tied model only the logits change, and as the KL engine measures."""
    network = random_model("qwen3", tie_word_embeddings=True)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    ids = torch.arange(5, 15)[None]
    before = network.model(input_ids=ids, use_cache=False)[0]
    quants = quants_of(network, "lm_head", "int4_block")
    with applied(network, quants):
        assert torch.equal(network.model(input_ids=ids, use_cache=False)[0], before)
    found = KlEngine(network, PLAN.segments, ["lm_head"]).score_group(["lm_head"], [job("int4_block")])()
    assert found is not None
    assert not isinstance(found[0], NotFinite)
    measured = Validator(network, list(PLAN.batches("small"))).measure(quants)
    np.testing.assert_allclose(measured.kl, found[0]["small"].sample_scores, rtol=1e-4)
