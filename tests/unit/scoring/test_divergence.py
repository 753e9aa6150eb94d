"""KL from the change of logits, against log-softmaxes in float64."""

import pytest
import torch
from torch import Tensor

from workers.scoring.divergence import divergence

N_WORDS = 20_000  # several blocks, the last one short


def reference(base_logits: Tensor, change: Tensor) -> Tensor:
    base, changed = base_logits.double().log_softmax(-1), (base_logits.double() + change.double()).log_softmax(-1)
    return torch.nn.functional.kl_div(changed, base, log_target=True, reduction="none").sum(-1)


def logits(n_rows: int = 6, spread: float = 4.0) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(n_rows, N_WORDS) * spread


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 3.0, 20.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_small_and_large_changes(scale: float, shift: float) -> None:
    base = logits()
    change = torch.randn_like(base) * scale + shift
    tolerance = 1e-5 if not shift or scale > 1e-3 else 1e-2  # 5.0001 - 5 has lost 4 digits already
    torch.testing.assert_close(
        divergence(base.log_softmax(-1), change), reference(base, change), rtol=tolerance, atol=0.0
    )


def test_no_change_is_exactly_zero() -> None:
    base = logits().log_softmax(-1)
    assert torch.equal(divergence(base, torch.zeros_like(base)), torch.zeros(len(base), dtype=torch.float64))


def test_probabilities_in_bfloat16_cost_little() -> None:
    base = logits(n_rows=64)
    change = torch.randn_like(base) * 0.1
    found = divergence(base.log_softmax(-1).bfloat16(), change)
    assert found.sum() == pytest.approx(reference(base, change).sum().item(), rel=5e-3)


def test_a_word_that_the_base_rules_out() -> None:
    """A change by hundreds neither overflows nor gives 0 * inf; the divergence of such a row is cut at 80 nats."""
    base = torch.tensor([[0.0, -200.0, -150.0]]).log_softmax(-1)
    small = torch.tensor([[0.0, 210.0, 0.0]])
    torch.testing.assert_close(divergence(base, small), reference(base, small), rtol=1e-5, atol=0.0)
    assert divergence(base, torch.tensor([[0.0, 400.0, 0.0]])).item() == pytest.approx(80.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    base = logits().log_softmax(-1)
    change = torch.zeros_like(base)
    change[2, 17] = bad
    assert torch.isfinite(divergence(base, change)).tolist() == [True, True, False, True, True, True]
