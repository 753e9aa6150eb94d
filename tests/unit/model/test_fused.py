"""Fused decoder layers against transformers' own; those that are another function are left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.llama import modeling_llama

from sweep.core.batches import Batch, Sample
from tests.models import random_model, random_samples
from workers.data.batches import in_rows, joined, make_plan
from workers.data.samples import with_scenes
from workers.model.decoder import decoder_of
from workers.model.forward import batch_to
from workers.model.fused import FusedDecoder, FusedLayer, Norm, attention, fused_decoder, starts_of

CPU = torch.device("cpu")
TEXTS = make_plan(random_samples(16), packed=True).segments[0][0]


def scenes() -> Batch:
    captions = [Sample(token_ids=sample.token_ids[:5]) for sample in random_samples(16)]
    samples = with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2)
    return make_plan(samples, packed=True).segments[0][0]


def fused(model: Any, batch: Batch = TEXTS, longest: int = 0) -> FusedDecoder | None:
    torch.set_num_threads(1)
    decoder = decoder_of(model)
    assert decoder is not None
    dtype = next(model.parameters()).dtype
    return fused_decoder(decoder, batch_to(batch, CPU, dtype), batch.lengths, longest or max(batch.lengths))


@torch.no_grad()
def outputs(model: Any, made: FusedDecoder | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states of the fused decoder and of the model."""
    assert made is not None
    inputs = batch_to(batch, CPU, next(model.parameters()).dtype)
    with made.running(starts_of(batch.lengths, CPU)):
        found = model.model(**inputs, use_cache=False)[0]
    return found, model.model(**inputs, use_cache=False)[0]


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2", "qwen3", "llama", "mistral"])
def test_hidden_states_are_those_of_the_model(kind: str) -> None:
    for batch in [TEXTS, scenes()] if kind == "qwen3_vl" else [TEXTS]:
        model = random_model(kind, num_hidden_layers=3)
        found, expected = outputs(model, fused(model, batch), batch)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        found, expected = outputs(model.bfloat16(), fused(model, batch), batch)
        apart = (found - expected).float().norm() / expected.float().norm()
        assert apart < 0.01, apart  # two roundings to 8 bits


def test_the_model_runs_its_own_layers_afterwards() -> None:
    model = random_model("qwen3")
    made = fused(model)
    assert made is not None
    with pytest.raises(RuntimeError, match="inside"), made.running(starts_of(TEXTS.lengths, CPU)):
        raise RuntimeError("inside")
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_linears_are_called_as_modules() -> None:
    """Hooks see their inputs, and one input is one tensor for all that read it."""
    model, seen = random_model("llama", num_hidden_layers=1), dict[str, Tensor]()
    layer = model.model.layers[0]
    made = fused(model)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name.split(".")[1]: args[0]}))
    outputs(model, made, TEXTS)
    assert len(seen) == 7
    own = dict(seen)
    assert made is not None
    with made.running(starts_of(TEXTS.lengths, CPU)), torch.no_grad():
        model(**batch_to(TEXTS, CPU, torch.float32), use_cache=False)
    assert seen["q_proj"] is seen["k_proj"] is seen["v_proj"]
    assert seen["gate_proj"] is seen["up_proj"]
    for name, x in own.items():
        torch.testing.assert_close(seen[name], x.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_batches_joined_in_a_row_keep_their_samples_apart() -> None:
    model = random_model("qwen3_vl")
    batches = [make_plan(random_samples(9, seed=seed), packed=True).segments[0][0] for seed in range(3)]
    (row,) = in_rows(batches, 10**6)
    found, _ = outputs(model, fused(model), joined(row))
    expected = torch.cat([outputs(model, fused(model), batch)[1] for batch in batches], 1)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_rows_hold_neighbours_that_fit_and_are_alike() -> None:
    batches = [make_plan(random_samples(8, seed=seed), packed=True).segments[0][0] for seed in range(4)]
    n_tokens = sum(batches[0].lengths) + sum(batches[1].lengths)
    assert in_rows(batches[:3], n_tokens)[0] == batches[:2]
    assert in_rows(batches, 0) == [[batch] for batch in batches]
    unpacked = list(make_plan(random_samples(8), packed=False).segments[0])
    assert [each for each in in_rows(unpacked, 10**6) if len(each) > 1 and any(len(b.order) > 1 for b in each)] == []
    pictures = scenes()
    assert in_rows([*batches[:2], pictures], 10**6) == [batches[:2], [pictures]]
    both = joined(batches[:2])
    assert both.n_predictions == (*batches[0].n_predictions, *batches[1].n_predictions)
    assert both.tensors["position_ids"].shape == (1, n_tokens)
    assert joined(batches[:1]) is batches[0]


def llama(change: Callable[[pytest.MonkeyPatch], None], **text: Any) -> Any:
    def made(patch: pytest.MonkeyPatch) -> Any:
        change(patch)
        return random_model("llama", **text)

    return made


def one_more(patch: pytest.MonkeyPatch) -> None:
    """Gemma's norm: 1 + weight."""
    own = modeling_llama.LlamaRMSNorm.forward
    patch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: own(self, x) + own(self, x) / self.weight)


def interleaved(patch: pytest.MonkeyPatch) -> None:
    """Neighbouring entries turned together, as GLM and Cohere have it."""

    def rotate(x: Tensor) -> Tensor:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    patch.setattr(modeling_llama, "rotate_half", rotate)


def partial(patch: pytest.MonkeyPatch) -> None:
    """The first half of a head turned, as GPT-NeoX and Phi have it."""
    embed, turn = modeling_llama.LlamaRotaryEmbedding.forward, modeling_llama.apply_rotary_pos_emb

    def turn_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        turned = turn(*(each[..., : cos.shape[-1]] for each in (q, k)), cos, sin)
        return tuple(torch.cat([one, each[..., cos.shape[-1] :]], -1) for one, each in zip(turned, (q, k), strict=True))

    def embed_half(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(each[..., : each.shape[-1] // 2] for each in embed(self, x, position_ids))

    patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", embed_half)
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", turn_half)


OTHERS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "norm": llama(one_more),
    "interleaved rotary": llama(interleaved),
    "partial rotary": llama(partial),
    "activation": llama(lambda _: None, hidden_act="gelu"),
    "experts": lambda _: random_model("qwen3_moe"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_function_is_left_alone(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.model.decoder.PACKABLE", {"llama", "qwen3_moe"})
    assert fused(OTHERS[other](monkeypatch)) is None


def test_windows_shorter_than_a_sample_are_left_alone() -> None:
    """The batch that is compared may hold no sample that long."""
    model = random_model("mistral", sliding_window=64)
    assert fused(model, longest=64) is not None
    assert fused(model, longest=65) is None


def test_layers_of_other_parts_are_left_alone() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    gemma = Gemma3DecoderLayer(Gemma3TextConfig(**sizes, head_dim=16, num_hidden_layers=1), 0)
    assert FusedLayer.of(gemma, 1) is None
    assert Norm.of(gemma.input_layernorm) is None
    assert Norm.of(nn.LayerNorm(8)) is None


def test_a_sample_that_is_not_finite_leaves_the_model_as_it_is() -> None:
    model = random_model("llama")
    model.model.embed_tokens.weight[int(TEXTS.tensors["input_ids"][0, 0])] = torch.inf
    assert fused(model) is None


def test_attention_sees_a_sample_up_to_the_row_itself() -> None:
    """By hand: equal keys, so a row's result is the mean of the values from its sample's start."""
    starts = starts_of([2, 3], CPU)
    assert starts.tolist() == [0, 0, 2, 2, 2]
    values = torch.arange(5.0)[:, None].expand(5, 4)
    found = attention(torch.ones(5, 8), torch.ones(5, 4), values, starts, 4, 1.0)  # two heads, one of keys
    assert found.shape == (5, 8)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 0.5, 2.0, 2.5, 3.0]))
