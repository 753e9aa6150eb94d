"""Scores around a recipe: the sweep's if the recipe leaves all in 16 bits, else autograd's in the quantized model."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sweep.core.errors import SweepError
from sweep.formats.mixed import MixedRecipe
from tests.models import random_model, random_samples
from tests.recipes import FORMATS, format_of, recipe_of
from workers.data.batches import make_plan
from workers.model.forward import batch_to, labels_of, summed_loss
from workers.quant.applied import applied, calibrated_model
from workers.quant.calibration import calibrated_linears, fake_quantized, quantized_inputs
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.recapture import recaptured_scores
from workers.scoring.scores import NotFinite

PLAN = make_plan(random_samples(16), packed=True)
N_PREDICTIONS = PLAN.n_predictions("small")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return random_model("qwen3")


def covered(model: nn.Module, *formats: Any) -> MixedRecipe:
    return recipe_of(model, formats, covered="layers")


def test_around_the_unquantized_model_the_scores_are_the_sweeps(model: Any) -> None:
    recipe = covered(model, None)
    formats = [format_of(name) for name in FORMATS]
    found = recaptured_scores(model, recipe, {choice.group.name: formats for choice in recipe.groups}, PLAN)
    rows = capture(model, PLAN.segments, [name for choice in recipe.groups for name in choice.group.modules])
    assert [(row.group, row.format) for row in found] == [
        (choice.group.name, format_of(name).label) for choice in recipe.groups for name in FORMATS
    ]
    jobs = [Job(name=name, format=format_of(name), sizes={"small": 16}) for name in FORMATS]
    expected: list[Any] = []
    for choice in recipe.groups:
        scores = Engine(torch.device("cpu")).score_group(
            {name: model.get_submodule(name).weight for name in choice.group.modules}, rows, jobs
        )()
        assert scores is not None
        assert not any(isinstance(one, NotFinite) for one in scores)
        expected += [one["small"] for one in scores]  # type: ignore[index]
    for row, score in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.sample_scores, score.sample_scores, rtol=1e-4, atol=1e-6 * score.score)
        assert row.score == pytest.approx(score.score, rel=1e-5)
        assert row.predicted_kl == pytest.approx(score.score / (2 * N_PREDICTIONS), rel=1e-5)


def test_around_a_recipe_x_and_g_are_the_quantized_models_and_the_error_is_against_the_unquantized_linear(
    model: Any,
) -> None:
    recipe = covered(model, format_of("int4_block"), format_of("int8_static"))
    chosen, group = format_of("int4_block"), "model.layers.1.mlp.down_proj"
    (row,) = recaptured_scores(model, recipe, {group: [chosen]}, PLAN)
    linear = model.get_submodule(group)
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.extend((args[0].detach(), output))
        output.retain_grad()

    (quant,) = calibrated_linears({group: linear.weight}, [], chosen).values()
    total = 0.0
    with applied(model, calibrated_model(model, list(PLAN.batches("small")), recipe)):
        handle = linear.register_forward_hook(keep)
        for batch in PLAN.batches("small"):
            seen.clear()
            inputs = batch_to(batch, torch.device("cpu"), torch.float32)
            embedded = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
            summed_loss(model(**inputs, inputs_embeds=embedded, use_cache=False).logits, labels_of(batch)).backward()
            x, y = seen
            error = (
                quantized_inputs(quant, x).double() @ fake_quantized(quant, linear.weight).double().T
                - x.double() @ linear.weight.double().T
            )
            assert y.grad is not None
            total += float((y.grad.double() * error).square().sum())
        handle.remove()
    assert row.score == pytest.approx(total, rel=1e-4)
    (alone,) = recaptured_scores(model, covered(model, None), {group: [chosen]}, PLAN)
    assert row.score != pytest.approx(alone.score, rel=1e-3)


def test_a_window_of_layers_at_a_time_gives_the_same_bits(model: Any) -> None:
    recipe = covered(model, format_of("fp8"), None, format_of("nvfp4"))
    formats = {choice.group.name: [format_of("int8_static"), format_of("int4_block")] for choice in recipe.groups}
    whole, windows = (recaptured_scores(model, recipe, formats, PLAN, room) for room in (None, 1.0))
    assert [row.score for row in whole] == [row.score for row in windows]


def test_a_score_that_is_not_finite_names_the_group_and_the_format(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.full((1, 1), float("nan"))
    monkeypatch.setattr("workers.scoring.recapture.output_error", lambda quant, weight, x: broken)
    with pytest.raises(
        SweepError, match=r"model\.layers\.0\.mlp\.down_proj under fp8/default: its score in the quantized model is NaN"
    ):
        recaptured_scores(model, covered(model, None), {"model.layers.0.mlp.down_proj": [format_of("fp8")]}, PLAN)
