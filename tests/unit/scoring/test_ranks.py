"""Inputs on several ranks have a range a token and rank: every score against hooks on the whole model, in float64."""

from dataclasses import replace
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import random_model, random_samples
from tests.recipes import format_of, recipe_of
from workers.data.batches import make_plan
from workers.model.forward import batch_to, labels_of, summed_loss
from workers.quant.applied import calibrated_model
from workers.quant.modelopt import layer_groups
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.kl import KlEngine
from workers.scoring.recapture import recaptured_scores
from workers.scoring.scores import Scores
from workers.scoring.validation import Validator

PLAN: Final = make_plan(random_samples(16), packed=True)
CPU: Final = torch.device("cpu")
WHOLE: Final = format_of("int8_per_token")
SPLIT: Final = WHOLE.on_ranks(2)
# Layer groups, with the parts of a token's inputs that have a range each on two ranks.
GROUPS: Final = {"model.layers.1.self_attn.q_proj": 1, "model.layers.1.self_attn.o_proj": 2}
GROUPS["model.layers.1.mlp.down_proj"] = 2


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return random_model("qwen3")


@pytest.fixture(scope="module")
def exact() -> Any:
    return random_model("qwen3").double()


def modules_of(model: nn.Module, group: str) -> tuple[str, ...]:
    return layer_groups(name for name, module in model.named_modules() if isinstance(module, nn.Linear))[group]


def in_int8(values: Tensor, n_parts: int) -> Tensor:
    """Rounded under a range a part of each row."""
    parts = values.unflatten(-1, (n_parts, -1))
    step = parts.abs().amax(-1, keepdim=True) / 127
    return ((parts / step).round() * step).flatten(-2)


def score_by_hooks(exact: Any, group: str, n_parts: int) -> float:
    """Sum of (g dy)^2 over the linears of a group in INT8, from one forward and backward of the unquantized model."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def keep(linear: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((linear, args[0].detach(), output))
        output.retain_grad()

    handles = [exact.get_submodule(name).register_forward_hook(keep) for name in modules_of(exact, group)]
    for batch in PLAN.batches("small"):
        inputs = batch_to(batch, CPU, torch.float64)
        embedded = exact.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
        summed_loss(exact(**inputs, inputs_embeds=embedded, use_cache=False).logits, labels_of(batch)).backward()
    for handle in handles:
        handle.remove()
    total = 0.0
    for linear, x, y in seen:
        assert y.grad is not None
        error = F.linear(in_int8(x, n_parts), in_int8(linear.weight, 1)) - F.linear(x, linear.weight)
        total += float((y.grad * error).square().sum())
    return total


@torch.no_grad()
def kl_by_hooks(exact: Any, group: str, n_parts: int) -> float:
    """KL(unquantized || one group in INT8), summed over predictions."""

    def quantized(linear: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        return F.linear(in_int8(args[0], n_parts), in_int8(linear.weight, 1))

    def log_probabilities() -> Tensor:
        found: list[Tensor] = []
        for batch in PLAN.batches("small"):
            logits = exact(**batch_to(batch, CPU, torch.float64), use_cache=False).logits
            found.append(logits[labels_of(batch) != -100].log_softmax(-1))
        return torch.cat(found)

    base = log_probabilities()
    handles = [exact.get_submodule(name).register_forward_hook(quantized) for name in modules_of(exact, group)]
    changed = log_probabilities()
    for handle in handles:
        handle.remove()
    return F.kl_div(changed, base, log_target=True, reduction="sum").item()


def score_of(scores: Scores) -> float:
    assert isinstance(scores, dict)
    return scores["small"].score


JOBS: Final = [Job(name="int8", format=each, sizes={"small": 16}) for each in (WHOLE, SPLIT)]


@pytest.mark.parametrize(("group", "n_parts"), GROUPS.items())
def test_a_score_has_the_ranges_that_ranks_find(model: Any, exact: Any, group: str, n_parts: int) -> None:
    names = modules_of(model, group)
    weights = {name: model.get_submodule(name).weight for name in names}
    found = Engine(CPU).score_group(weights, capture(model, PLAN.segments, names), JOBS)()
    assert found is not None
    whole, split = map(score_of, found)
    assert split == pytest.approx(score_by_hooks(exact, group, n_parts), rel=1e-3)
    assert (split == whole) == (n_parts == 1)
    (row,) = recaptured_scores(model, recipe_of(model, [None], covered="layers"), {group: [SPLIT]}, PLAN)
    assert row.score == pytest.approx(split, rel=1e-5)


@pytest.mark.parametrize(("group", "n_parts"), GROUPS.items())
def test_a_divergence_and_a_validation_have_them_too(model: Any, exact: Any, group: str, n_parts: int) -> None:
    expected = kl_by_hooks(exact, group, n_parts)
    names = modules_of(model, group)
    found = KlEngine(model, PLAN.segments, names).score_group(names, JOBS)()
    assert found is not None
    whole, split = map(score_of, found)
    assert split == pytest.approx(expected, rel=1e-2)
    assert (split == whole) == (n_parts == 1)
    recipe, batches = recipe_of(model, [SPLIT], covered="layers"), list(PLAN.batches("small"))
    alone = replace(recipe, groups=tuple(choice for choice in recipe.groups if choice.group.name == group))
    measured = Validator(model, batches).measure(calibrated_model(model, batches, alone))
    assert measured.kl.sum() == pytest.approx(split, rel=1e-4)
