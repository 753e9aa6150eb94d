"""The hot loop on a GPU: equal to plain float32 arithmetic, and the same bits whatever is scored beside it."""

from typing import Any

import pytest
import torch

from sweep.formats.quantizer import Quantizer
from tests.formats import job_of
from tests.models import random_model, random_samples

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

INT8 = {"num_bits": 8, "axis": 0}
INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
STATIC = {"num_bits": 8, "axis": None}
TOKEN = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}
RECIPES = [(weight, inputs) for weight in (INT8, INT4, NVFP4) for inputs in (None, STATIC, TOKEN)]


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def captured(request: pytest.FixtureRequest) -> Any:
    from torch import nn

    from workers.data.batches import make_plan
    from workers.scoring.capture import capture

    model = random_model("qwen3_vl").to("cuda", request.param)
    linears = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "language_model" in name
    ]
    plan = make_plan(random_samples(128), packed=True)
    return model, capture(model, plan.segments, linears), plan


def jobs(recipes: list[Any], *sizes: str) -> list[Any]:
    return [job_of("job", *recipe, sizes) for recipe in recipes]


def scores(captured: Any, recipes: list[Any], *sizes: str) -> list[Any]:
    from workers.scoring.gradient import Engine

    model, rows, _ = captured
    name = next(name for name in rows if name.endswith("gate_proj"))
    names = (name, name.replace("gate_proj", "up_proj"))
    found = Engine(torch.device("cuda")).score_group(
        {n: model.get_submodule(n).weight for n in names}, rows, jobs(recipes, *sizes)
    )()
    assert found is not None
    return found


def test_bits_do_not_depend_on_what_is_scored_beside(captured: Any) -> None:
    together = scores(captured, RECIPES, "small", "medium")
    for index, recipe in enumerate(RECIPES):
        for size in ("small", "medium"):
            (alone,) = scores(captured, [recipe], size)
            assert (alone[size].sample_scores == together[index][size].sample_scores).all(), recipe
            assert alone[size].score == together[index][size].score
    again = scores(captured, [*RECIPES[::-1], *RECIPES], "medium")
    for index in range(len(RECIPES)):
        assert again[-1 - index]["medium"].score == again[index]["medium"].score == together[-1 - index]["medium"].score


def test_scores_are_within_half_a_percent_of_float32(captured: Any) -> None:
    from workers.quant.modelopt import Quantizers, quantized

    model, rows, _ = captured
    name = next(name for name in rows if name.endswith("down_proj"))
    weight, seen, quantizers = model.get_submodule(name).weight, rows[name], Quantizers()
    from workers.scoring.gradient import Engine

    found = Engine(torch.device("cuda")).score_group({name: weight}, rows, jobs(RECIPES, "medium"))()
    assert found is not None
    w, x, g = weight.double(), seen.x_TI.double(), seen.g_TO.double()
    for (weights, inputs), score in zip(RECIPES, found, strict=True):
        wq = quantized(quantizers.weight(name, Quantizer(weights), weight), weight).double()
        xq = (
            x
            if inputs is None
            else quantized(
                quantizers.inputs(Quantizer(inputs), seen.x_TI, float(seen.input_amaxes.max())), seen.x_TI
            ).double()
        )
        exact = (g * (xq @ wq.T - x @ w.T)).square().sum().item()
        assert score["medium"].score == pytest.approx(exact, rel=5e-3)
