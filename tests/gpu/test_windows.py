"""Restarted layers on a GPU: the attention kernels with and without gradients must give the same bits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sweep.core.batches import Sample
from tests.models import random_model, random_samples
from workers.data.batches import make_plan
from workers.data.samples import with_scenes
from workers.scoring.capture import capture
from workers.scoring.windows import captures

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("images", [False, True])
def test_windows_are_bit_equal_to_one_capture(images: bool, dtype: torch.dtype) -> None:
    model: Any = random_model("qwen3_vl", num_hidden_layers=4).to("cuda", dtype)
    samples = random_samples(128)
    if images:
        captions = [Sample(token_ids=sample.token_ids[:9]) for sample in samples]
        samples = with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2)
    segments = make_plan(samples, packed=True).segments
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = [f"language_model.layers.{number}." for number in range(4)]
    windows: list[list[str]] = [[], [], [], []]
    for layer, window in zip(layers, windows, strict=True):
        window += [name for name in linears if layer in name]
    windows[-1].append("lm_head")
    expected = capture(model, segments, linears)
    for index, rows in captures(model, segments, windows):
        assert set(rows) == set(windows[index])
        for name, found in rows.items():
            assert torch.equal(found.x_TI, expected[name].x_TI), name
            assert torch.equal(found.g_TO, expected[name].g_TO), name
            assert np.array_equal(found.y_square_sums, expected[name].y_square_sums)
