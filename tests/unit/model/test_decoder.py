"""Decoder layers run again from a kept hidden state: the same bits as the model's own forward."""

from typing import Any

import pytest
import torch

from sweep.core.batches import Batch, Sample
from tests.models import random_model, random_samples
from workers.data.batches import make_plan
from workers.data.samples import with_scenes
from workers.model.decoder import Decoder, decoder_of
from workers.model.forward import batch_to

N_LAYERS = 4
KINDS = pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2", "qwen3", "llama", "mistral"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def batches(kind: str) -> list[Batch]:
    """Packed texts, and for a vision-language model a batch with images."""
    texts = random_samples(16)
    found = [make_plan(texts, packed=True).segments[0][0]]
    if kind == "qwen3_vl":
        captions = [Sample(token_ids=sample.token_ids[:5]) for sample in texts]
        found.append(
            make_plan(
                with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2), packed=True
            ).segments[0][0]
        )
    return found


def parts(kind: str, dtype: torch.dtype) -> tuple[Any, Decoder]:
    torch.set_num_threads(1)
    model = random_model(kind, num_hidden_layers=N_LAYERS).to(dtype)
    decoder = decoder_of(model)
    assert decoder is not None
    return model, decoder


@KINDS
@DTYPES
@torch.no_grad()
def test_every_range_of_layers_gives_the_hidden_states_of_the_ordinary_forward(kind: str, dtype: torch.dtype) -> None:
    model, decoder = parts(kind, dtype)
    for batch in batches(kind):
        inputs = batch_to(batch, torch.device("cpu"), dtype)
        trace, output = decoder.record(inputs, range(N_LAYERS + 1))
        assert torch.equal(decoder.head(output), model(**inputs, use_cache=False).logits)
        for start in range(N_LAYERS):
            for stop in range(start, N_LAYERS + 1):
                assert torch.equal(decoder.run(trace, trace.hidden[start], start, stop), trace.hidden[stop])
        assert torch.equal(decoder.norm(trace.hidden[N_LAYERS]), output)


@DTYPES
def test_gradients_of_a_range_are_those_of_the_model(dtype: torch.dtype) -> None:
    """Through deepstack's additions too, which follow layers 0 and 1."""
    model, decoder = parts("qwen3_vl", dtype)
    for batch in batches("qwen3_vl"):
        inputs = batch_to(batch, torch.device("cpu"), dtype)
        seen: list[torch.Tensor] = []
        handle = decoder.layers[0].register_forward_pre_hook(
            lambda _module, args, seen=seen: seen.append(args[0].requires_grad_())
        )
        decoder.output(inputs).square().sum().backward()
        handle.remove()
        trace, _ = decoder.record(inputs, [0])
        hidden = trace.hidden[0].requires_grad_()
        decoder.norm(decoder.run(trace, hidden, 0, N_LAYERS)).square().sum().backward()
        assert hidden.grad is not None
        assert torch.equal(hidden.grad, seen[0].grad)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_deepstack_is_put_back_after_the_layers_that_have_it() -> None:
    _, decoder = parts("qwen3_vl", torch.float32)
    text, images = (
        decoder.record(batch_to(batch, torch.device("cpu"), torch.float32), ())[0] for batch in batches("qwen3_vl")
    )
    assert not text.features
    assert list(images.features) == [0, 1]


def test_a_change_between_layers_that_is_not_known_is_refused() -> None:
    _, decoder = parts("llama", torch.float32)
    decoder.layers[2].register_forward_pre_hook(lambda _module, args: (args[0] * 2,), prepend=True)
    with pytest.raises(RuntimeError, match="between decoder layers 1 and 2"):
        decoder.record(batch_to(batches("llama")[0], torch.device("cpu"), torch.float32), ())


def test_modules_belong_to_layers_by_name() -> None:
    _, decoder = parts("qwen3_vl", torch.float32)
    assert decoder.layer_of("model.language_model.layers.3.mlp.up_proj") == 3
    assert decoder.layer_of("model.visual.blocks.1.mlp.linear_fc1") is None
    assert decoder.layer_of("lm_head") is None
    assert decoder.head_name == "lm_head"
