"""Fused decoder layers on a GPU: kernels against PyTorch's arithmetic, layers against transformers', and no noise."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sweep.core.batches import Sample
from tests.formats import job_of
from tests.models import random_model, random_samples
from workers.data.batches import in_rows, joined, make_plan
from workers.data.samples import with_scenes
from workers.model.decoder import decoder_of
from workers.model.forward import batch_to
from workers.model.fused import Norm, add_norm, attention, fused_decoder, rotated, silu_product, starts_of
from workers.quant.modelopt import layer_groups
from workers.scoring.divergence import divergence
from workers.scoring.kl import KlEngine
from workers.scoring.scores import NotFinite

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
KINDS = ["qwen3_vl", "qwen2", "qwen3", "llama", "mistral"]


def check(found: Tensor, expected: Tensor, n_steps: float = 1.0) -> None:
    """Within steps of the dtype, beside the largest value of a row: a rounding may go the other way."""
    assert found.dtype == expected.dtype
    apart, largest = (found.cpu().double() - expected.double()).abs(), expected.double().abs().amax(-1, keepdim=True)
    assert (apart <= n_steps * torch.finfo(found.dtype).eps * largest).all(), (apart / largest).max()


def on_gpu(norm: Norm) -> Norm:
    return Norm(norm.weight.cuda(), norm.eps)


@DTYPES
@pytest.mark.parametrize("n", [96, 2560, 5120])
def test_norms(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, added = (torch.randn(70, n).to(dtype) for _ in range(2))
    norm = Norm(torch.randn(n).to(dtype), 1e-6)
    for other in (None, added):
        for found, expected in zip(
            add_norm(x.cuda(), None if other is None else other.cuda(), on_gpu(norm)),
            add_norm(x, other, norm),
            strict=True,
        ):
            check(found, expected, 4.0 if dtype == torch.float32 else 2.0)
            if dtype != torch.float32:
                assert (found.cpu() == expected).float().mean() > 0.99


@DTYPES
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(32, 8, 128), (6, 2, 80), (4, 4, 64), (3, 1, 32)])
def test_rotary_embedding(heads: int, key_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(33, n * head_dim).to(dtype) for n in (heads, key_heads))
    angles = torch.randn(33, head_dim) * 100
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = tuple(Norm(torch.randn(head_dim).to(dtype), 1e-6) for _ in range(2))
    for given in (None, (norms[0], norms[1])):
        moved = None if given is None else (on_gpu(given[0]), on_gpu(given[1]))
        for found, expected in zip(
            rotated(q.cuda(), k.cuda(), moved, cos.cuda(), sin.cuda()), rotated(q, k, given, cos, sin), strict=True
        ):
            check(found, expected, 4.0 if dtype == torch.float32 else 2.0)


@DTYPES
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(32, 8, 128), (6, 2, 80), (4, 4, 64), (2, 1, 256)])
def test_attention(heads: int, key_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Samples shorter and longer than a block, in rows that do not fill one."""
    torch.manual_seed(0)
    lengths = [1, 14, 9, 300, 64, 63, 2, 65]
    starts = starts_of(lengths, CPU)
    q, k, v = (torch.randn(sum(lengths), n * head_dim).to(dtype) for n in (heads, key_heads, key_heads))
    found = attention(q.cuda(), k.cuda(), v.cuda(), starts.cuda(), head_dim, head_dim**-0.5)
    expected = attention(q.double(), k.double(), v.double(), starts, head_dim, head_dim**-0.5)
    apart = (found.cpu().double() - expected).norm() / expected.norm()
    assert apart < max(torch.finfo(dtype).eps, 3e-6), apart


@DTYPES
def test_silu_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 9728).to(dtype) * 4 for _ in range(2))
    found, expected = silu_product(gate.cuda(), up.cuda()), silu_product(gate, up)
    torch.testing.assert_close(found.cpu(), expected, rtol=max(2 * torch.finfo(dtype).eps, 5e-6), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_layers_are_transformers_on_rows_of_several_batches(kind: str, dtype: torch.dtype) -> None:
    model = random_model(kind, num_hidden_layers=3).to("cuda", dtype)
    decoder, batches = decoder_of(model), make_plan(random_samples(128), packed=True).segments[1]
    assert decoder is not None
    first = batches[0]
    made = fused_decoder(decoder, batch_to(first, GPU, dtype), first.lengths, 24)
    assert made is not None
    ((*row,),) = in_rows(batches, 10**5)
    batch = joined(row)
    with made.running(starts_of(batch.lengths, GPU)):
        found = decoder.output(batch_to(batch, GPU, dtype))
    expected = torch.cat([decoder.output(batch_to(each, GPU, dtype)) for each in batches], 1)
    apart = (found.float() - expected.float()).norm() / expected.float().norm()
    assert apart < max(2 * torch.finfo(dtype).eps, 1e-5), apart


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_an_unquantized_group_has_no_divergence(images: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in graphs, in whole passes (of the vision tower's groups), and in the head."""
    monkeypatch.setattr("workers.data.batches.MAX_BATCH_TOKENS", 300)
    model: Any = random_model("qwen3_vl", num_hidden_layers=3).to("cuda", torch.bfloat16)
    samples = random_samples(128)
    if images:
        captions = [Sample(token_ids=sample.token_ids[:9]) for sample in samples]
        samples = with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2)
    segments = make_plan(samples, packed=True).segments
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    engine = KlEngine(model, segments, linears)
    assert engine._base._fused is not None
    assert (len(engine.shapes) < sum(map(len, segments))) != images
    for group, modules in layer_groups([name for name in linears if name != "lm_head"]).items():
        found = engine.score_group(modules, [job_of("none", None, None, ["small", "medium"])])()
        if found is not None:
            assert not isinstance(found[0], NotFinite)
            assert not np.any(found[0]["medium"].sample_scores), group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.3, 3.0, 20.0])
@pytest.mark.parametrize("off", [0.0, 0.01, 1.0])
def test_divergence_in_one_pass_is_that_of_two(off: float, scale: float, dtype: torch.dtype) -> None:
    """However near the given mean is: within its rounding, or a whole spread away. Changes differ from 0, too."""
    torch.manual_seed(0)
    log_probs = (torch.randn(6, 20_001) * 4).log_softmax(-1).to(dtype)
    change = (torch.randn(6, 20_001) * scale + torch.arange(6.0)[:, None] * scale).to(dtype)
    mean = (log_probs.double().exp() * change.double()).sum(1) + off * scale
    found = divergence(log_probs.cuda(), change.cuda(), mean.float().cuda()).cpu()
    torch.testing.assert_close(found, divergence(log_probs, change), rtol=1e-5, atol=0.0)
