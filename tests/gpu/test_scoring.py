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


@pytest.mark.parametrize("n_draws", [1, 8, 11])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_projections_are_those_of_plain_pytorch(dtype: torch.dtype, n_draws: int) -> None:
    """Of rows whose outputs are no multiple of a block, with and without each term; nothing past an end is written."""
    from workers.quant import kernels

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    n_rows, n_out, ends, second_ends = 70, 2_000, [70, 33, 70], [70, 33, 0]
    first, seconds, g_DTO = random(n_rows, n_out), random(3, n_rows, n_out), random(n_draws, n_rows, n_out)
    for term, own, own_ends, own_second_ends in (
        (first, seconds, ends, second_ends),
        (None, seconds, ends, [70, 33, 70]),
        (first, seconds[:, :0], ends, [0, 0, 0]),
    ):
        found, expected = [
            (torch.full((3, n_draws, n_rows), 7.0, device="cuda"), torch.full((3, n_rows), 7.0, device="cuda"))
            for _ in range(2)
        ]
        kernels.project_rows(term, own, g_DTO, own_ends, own_second_ends, *found)
        kernels.project_rows_plain(term, own, g_DTO, own_ends, own_second_ends, *expected)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5 * n_out**0.5)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
        assert (found[0][1, :, 33:] == 7).all()
        alone = torch.zeros(1, n_draws, n_rows, device="cuda"), torch.zeros(1, n_rows, device="cuda")
        kernels.project_rows(term, own[:1], g_DTO, own_ends[:1], own_second_ends[:1], *alone)
        assert torch.equal(alone[0][0], found[0][0])
        fewer = torch.zeros(3, 1, n_rows, device="cuda"), torch.zeros(3, n_rows, device="cuda")
        kernels.project_rows(term, own, g_DTO[:1], own_ends, own_second_ends, *fewer)
        assert torch.equal(fewer[0][0, 0], found[0][0, 0])  # nor on the draws beside it


def test_a_kernels_signed_sum_keeps_six_digits() -> None:
    from workers.quant import kernels

    first, g_DTO = (torch.randn(*shape, device="cuda") for shape in ((300, 9_728), (8, 300, 9_728)))
    found, square = torch.zeros(1, 8, 300, device="cuda"), torch.zeros(1, 300, device="cuda")
    kernels.project_rows(first, first[None, :0], g_DTO, [300], [0], found, square)
    exact = (first.double() * g_DTO.double()).sum(2)
    spread = float(exact.square().mean().sqrt()) * 300**0.5
    assert float((found[0].double().sum(1) - exact.sum(1)).abs().max()) < 1e-6 * spread


@pytest.mark.parametrize("recipes", [RECIPES, RECIPES[::-1]])
def test_projections_do_not_depend_on_what_is_scored_beside(captured: Any, recipes: list[Any]) -> None:
    from workers.scoring.capture import capture

    model, rows, plan = captured
    drawn = model, capture(model, plan.segments, [name for name in rows if "mlp" in name], 3), plan
    together = scores(drawn, recipes, "small", "medium")
    for index, recipe in enumerate(recipes):
        (alone,) = scores(drawn, [recipe], "small")
        assert (alone["small"].projections == together[index]["small"].projections).all(), recipe


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
