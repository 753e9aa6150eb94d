"""Texts are drawn from the model's own distribution, and their tokens' scores are those of plain forward passes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sweep.core.batches import Sample
from sweep.core.paths import bundled_model_dir
from tests.exports import FORMATS, apply, recipe_of
from tests.formats import group_format
from tests.models import save_checkpoint
from workers.data.batches import make_plan
from workers.model.loading import PreTrainedModel, load
from workers.quant.applied import calibrated_model
from workers.scoring.texts import concatenated, sample_texts, score_tokens

N_TOKENS = 12


@pytest.fixture(scope="module", params=["bundled", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    path: Path = bundled_model_dir()
    if request.param != "bundled":
        path = save_checkpoint(tmp_path_factory.mktemp("texts") / "model", request.param)
    return load(path, dtype=torch.float32, device="cpu")


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, text: np.ndarray) -> Tensor:
    """[predictions, vocabulary], from one pass over the text alone."""
    return model(input_ids=torch.from_numpy(text)[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)


def test_each_token_is_where_its_number_falls_in_the_distribution_of_a_plain_forward(model: PreTrainedModel) -> None:
    rng = np.random.default_rng(0)
    prefixes, uniforms = rng.integers(1, 90, (70, 3)), rng.random((70, N_TOKENS))
    texts = sample_texts(model, prefixes, uniforms)
    assert texts.shape == (70, 3 + N_TOKENS)
    np.testing.assert_array_equal(texts[:, :3], prefixes)
    for text, numbers in list(zip(texts, uniforms, strict=True))[::7]:
        cumulative = log_probabilities(model, text)[2:].exp().cumsum(1)
        for token, number, row in zip(text[3:], numbers, cumulative, strict=True):
            assert (row[token - 1] if token else 0.0) - 1e-5 <= number <= row[token] + 1e-5
    np.testing.assert_array_equal(sample_texts(model, prefixes[:2], uniforms[:2]), texts[:2])


def test_scores_are_those_of_two_plain_forwards_text_after_text() -> None:
    model = load(bundled_model_dir(), dtype=torch.float32, device="cpu")
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, 4096, n) for n in (9, 4, 17, 2, 9)]
    listed = rng.integers(0, 4096, (sum(map(len, texts)) - len(texts), 3))
    recipe = recipe_of([group_format("int4", *FORMATS["int4_groups_weight_only"])])
    batches = list(make_plan([Sample(token_ids=text) for text in texts], packed=True).batches("small"))
    quants = calibrated_model(model, batches, recipe)
    scores = score_tokens(model, quants, batches, listed)
    base = torch.cat([log_probabilities(model, text) for text in texts])
    apply(model, quants)
    changed = torch.cat([log_probabilities(model, text) for text in texts])
    next_ids = torch.from_numpy(np.concatenate([text[1:] for text in texts]))[:, None]
    for found, of_all in ((scores.unquantized, base), (scores.quantized, changed)):
        np.testing.assert_allclose(found, of_all.gather(1, next_ids)[:, 0], atol=1e-4)
    for found, p, q in ((scores.kl, base, changed), (scores.reverse_kl, changed, base)):
        np.testing.assert_allclose(found, F.kl_div(q, p, log_target=True, reduction="none").sum(1), rtol=1e-3)
    for found, of_all in ((scores.unquantized_listed, base), (scores.quantized_listed, changed)):
        np.testing.assert_allclose(found, of_all.gather(1, torch.from_numpy(listed)), atol=1e-4)
    twice = concatenated([scores, scores])
    assert twice.quantized_listed.shape == (2 * len(listed), 3)
    np.testing.assert_array_equal(twice.kl[len(listed) :], scores.kl)
