"""The loss's gradient through the head by pieces of rows, against autograd on all logits at once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sweep.core.batches import Sample
from sweep.core.errors import SweepError
from tests.models import random_model, random_samples
from workers.data.batches import make_plan
from workers.model.forward import batch_to, labels_of, summed_loss
from workers.scoring.capture import Recorder, capture
from workers.scoring.labels import Targets


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return random_model("llama")


def hidden_and_labels(model: Any) -> tuple[Tensor, Tensor]:
    batch = make_plan(random_samples(128), packed=True).segments[1][0]
    with torch.no_grad():
        hidden = model.model(**batch_to(batch, torch.device("cpu"), torch.float32), use_cache=False)[0]
    assert hidden.shape[1] > 1024  # three pieces, the last one short
    return hidden, labels_of(batch)


def pieces_through_head(hidden: Tensor, head: nn.Module, labels: Tensor) -> None:
    recorder = Recorder([], torch.device("cpu"), None)
    recorder.backward(hidden, recorder.head_gradients(hidden, head, Targets(labels.flatten(), None)))


def test_the_gradient_is_that_of_all_logits_at_once(model: Any) -> None:
    hidden, labels = hidden_and_labels(model)
    whole, pieces = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    summed_loss(model.lm_head(whole), labels).backward()
    pieces_through_head(pieces, model.lm_head, labels)
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-5, atol=1e-6)


def test_no_more_than_512_rows_of_logits_are_held(model: Any) -> None:
    hidden, labels = hidden_and_labels(model)
    n_rows: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _module, _args, output: n_rows.append(len(output)))
    pieces_through_head(hidden.requires_grad_(), model.lm_head, labels)
    handle.remove()
    assert n_rows == [512] * (hidden.shape[1] // 512) + [hidden.shape[1] % 512]


def test_the_head_is_captured_like_any_linear(model: Any) -> None:
    """Its g is softmax - onehot at predictions, and 0 where nothing is predicted."""
    segments = make_plan(random_samples(128), packed=True).segments
    rows = capture(model, segments, ["lm_head"])["lm_head"]
    labels = torch.cat([labels_of(batch).flatten() for batches in segments for batch in batches])
    expected = (rows.x_TI @ model.lm_head.weight.T).softmax(-1)
    expected -= nn.functional.one_hot(labels.clamp(min=0), expected.shape[1])
    expected[labels == -100] = 0
    torch.testing.assert_close(rows.g_TO, expected, rtol=1e-4, atol=1e-6)


def test_modules_that_no_batch_calls_are_absent() -> None:
    """Texts call nothing of a vision tower; that is no error."""
    vision_model = random_model("qwen3_vl")
    segments = make_plan([Sample(token_ids=sample.token_ids) for sample in random_samples(16)], packed=True).segments
    assert (
        capture(
            vision_model,
            segments,
            [
                name
                for name, module in vision_model.named_modules()
                if isinstance(module, nn.Linear) and "visual" in name
            ],
        )
        == {}
    )


class InPlace(nn.Module):
    """A model that changes the output of its first linear in place, as Gemma 3n does."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.embedding, self.first, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, **_arguments: Any) -> Any:
        hidden = self.first(self.embedding(input_ids))
        if self.in_place:
            hidden *= 3.0
        else:
            hidden = hidden * 3.0
        return SimpleNamespace(logits=self.head(hidden))


def test_an_output_may_be_changed_in_place() -> None:
    segments = make_plan([Sample(token_ids=np.arange(10))], packed=False).segments
    found: list[Any] = []
    for in_place in (True, False):
        torch.manual_seed(0)
        found.append(capture(InPlace(in_place=in_place), segments, ["first"])["first"])
    assert found[0].g_TO.abs().sum() > 0
    assert torch.equal(found[0].g_TO, found[1].g_TO)
    np.testing.assert_array_equal(found[0].y_square_sums, found[1].y_square_sums)


class Routed(nn.Module):
    """A model with a linear, `expert`, that is called on the tokens before a number, and an ordinary one."""

    def __init__(self, n_called: int) -> None:
        super().__init__()
        self.n_called = n_called
        self.embedding, self.expert, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, **_arguments: Any) -> Any:
        hidden = self.embedding(input_ids)
        expert = self.expert(hidden.flatten(0, 1)[: self.n_called])
        rest = hidden.flatten(0, 1)[self.n_called :]
        return SimpleNamespace(logits=self.head(torch.cat([expert, rest]).view_as(hidden)))


def test_a_linear_that_is_called_on_some_of_the_rows_is_refused() -> None:
    """Which samples they are of is not known, so no score of a sample or of a kind of token would be right."""
    segments = make_plan([Sample(token_ids=np.arange(10)), Sample(token_ids=np.arange(10))], packed=False).segments
    assert capture(Routed(20), segments, ["expert"])["expert"].x_TI.shape == (20, 8)
    with pytest.raises(SweepError, match="expert is called on 7 rows where the batch has 20: it cannot be scored"):
        capture(Routed(7), segments, ["expert"])
