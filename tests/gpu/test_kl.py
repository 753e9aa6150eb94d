"""KL divergence on a GPU: its kernel against PyTorch on the CPU, and a model in float32 against the CPU's scores."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.floors import floor
from tests.formats import job_of
from tests.models import random_model, random_samples
from workers.data.batches import make_plan
from workers.quant.modelopt import layer_groups
from workers.scoring.divergence import divergence
from workers.scoring.gradient import Job
from workers.scoring.kl import KlEngine
from workers.scoring.scores import NotFinite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

INT8 = {"num_bits": 8, "axis": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 3.0, 20.0])
def test_the_kernel_is_the_cpu_s_arithmetic(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    log_probs = (torch.randn(6, 20_001) * 4).log_softmax(-1).to(dtype)
    change = (torch.randn(6, 20_001) * scale).to(dtype)
    torch.testing.assert_close(
        divergence(log_probs.cuda(), change.cuda()).cpu(), divergence(log_probs, change), rtol=1e-5, atol=0.0
    )


def test_the_kernel_keeps_what_is_not_finite_and_cuts_what_is_too_large() -> None:
    log_probs = torch.tensor([[0.0, -200.0, -150.0]]).log_softmax(-1).expand(3, 3)
    change = torch.tensor([[0.0, 400.0, 0.0], [0.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]])
    found = divergence(log_probs.cuda(), change.cuda()).cpu()
    assert found[0].item() == pytest.approx(80.0)
    assert not torch.isfinite(found[1:]).any()


Scores = dict[str, dict[str, Any]]  # of each sample, by group and size


def scores(model: Any, recipe: Job, *sizes: str) -> Scores:
    segments = make_plan(random_samples(128), packed=True).segments
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "visual" not in name]
    engine = KlEngine(model, segments, linears)
    found: Scores = {}
    for group, modules in layer_groups(linears).items():
        result = engine.score_group(modules, [recipe])()
        assert result is not None
        assert not isinstance(result[0], NotFinite)
        found[group] = {size: result[0][size].sample_scores for size in sizes}
    return found


def apart(found: Scores, expected: Scores) -> float:
    """The largest difference of a group's score, relative."""
    pairs = [(found[group][size], samples) for group, by_size in expected.items() for size, samples in by_size.items()]
    return max(abs(one.sum() / other.sum() - 1) for one, other in pairs)


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "axis": None}], ids=["weight_only", "static"])
def test_scores_in_float32_are_the_cpu_s(inputs: dict[str, Any] | None) -> None:
    """To 1e-5; where inputs round, to twice what the CPU's own scores move by with the last bit of its embeddings."""
    recipe = job_of("int8", INT8, inputs, ["small", "medium"])
    model = random_model("qwen3_vl")
    expected = scores(model, recipe, "small", "medium")
    tolerance = 1e-5
    if inputs is not None:  # 1.4e-3; with sums of the CPU in another order 11 seeds gave 1.5e-4 to 7.2e-4
        tolerance = 2 * floor(model, lambda: scores(model, recipe, "small", "medium"), apart)
    assert apart(scores(model.to("cuda"), recipe, "small", "medium"), expected) <= tolerance


def test_bfloat16_rows_repeat_bit_for_bit() -> None:
    model = random_model("qwen3_vl").to("cuda", torch.bfloat16)
    both, small = ["small", "medium"], ["small"]
    first, second = (scores(model, job_of("int8", INT8, None, sizes), "small") for sizes in (both, small))
    for group, by_size in first.items():
        assert np.array_equal(by_size["small"], second[group]["small"])
