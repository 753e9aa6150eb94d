"""Capture by windows: bit for bit what one capture of everything gives."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sweep.core.batches import Sample
from tests.models import random_model, random_samples
from workers.data.batches import make_plan
from workers.data.samples import with_scenes
from workers.scoring.capture import Rows, capture
from workers.scoring.layout import Segments
from workers.scoring.windows import captures

N_LAYERS = 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
DATA = pytest.mark.parametrize(("kind", "images"), [("llama", False), ("qwen3_vl", False), ("qwen3_vl", True)])


def model_of(kind: str, dtype: torch.dtype) -> Any:
    torch.set_num_threads(1)
    return random_model(kind, num_hidden_layers=N_LAYERS).to(dtype)


def segments_of(*, images: bool) -> Segments:
    samples = random_samples(20 if images else 128)
    if images:
        captions = [Sample(token_ids=sample.token_ids[:4]) for sample in samples]
        samples = with_scenes(captions, vision_start=1, vision_end=2, image_token=3, merge=2)
    return make_plan(samples, packed=True).segments


def linears(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def layer(model: Any, *numbers: int) -> list[str]:
    return [name for name in linears(model) for number in numbers if f"layers.{number}." in name]


def assert_equal(found: dict[str, Rows], expected: dict[str, Rows], modules: Sequence[str]) -> None:
    assert set(found) == set(modules) & set(expected)
    for name, rows in found.items():
        assert rows.g_TO.any()
        assert torch.equal(rows.x_TI, expected[name].x_TI), name
        assert torch.equal(rows.g_TO, expected[name].g_TO), name
        assert np.array_equal(rows.y_square_sums, expected[name].y_square_sums)
        assert np.array_equal(rows.input_amaxes, expected[name].input_amaxes)
        assert rows.layout.samples == expected[name].layout.samples
        assert torch.equal(rows.layout.lengths, expected[name].layout.lengths)


@DTYPES
@DATA
@pytest.mark.parametrize("n_windows", [1, 2, N_LAYERS])
def test_windows_are_bit_equal_to_one_capture(kind: str, images: bool, dtype: torch.dtype, n_windows: int) -> None:
    model, segments = model_of(kind, dtype), segments_of(images=images)
    each = N_LAYERS // n_windows
    windows = [layer(model, *range(start, start + each)) for start in range(0, N_LAYERS, each)]
    windows[0] += [name for name in linears(model) if "visual" in name]
    windows[-1].append("lm_head")
    expected = capture(model, segments, linears(model))
    indices: list[int] = []
    for index, rows in captures(model, segments, windows):
        indices.append(index)
        assert_equal(rows, expected, windows[index])
    assert indices == list(range(n_windows))[::-1]


@DATA
def test_layers_left_out_the_head_alone_and_the_vision_tower_alone(kind: str, images: bool) -> None:
    model, segments = model_of(kind, torch.float32), segments_of(images=images)
    vision = [name for name in linears(model) if "visual" in name]
    windows = [vision, layer(model, 1)[:3], layer(model, 3), ["lm_head"]]
    expected = capture(model, segments, linears(model))
    indices: list[int] = []
    for index, rows in captures(model, segments, windows):
        indices.append(index)
        assert_equal(rows, expected, windows[index])
    assert indices == [3, 2, 1, 0]


def test_the_head_may_be_in_any_window() -> None:
    model, segments = model_of("llama", torch.float32), segments_of(images=False)
    windows = [[*layer(model, 0), "lm_head"], layer(model, 2, 3)]
    expected = capture(model, segments, linears(model))
    for index, rows in captures(model, segments, windows):
        assert_equal(rows, expected, windows[index])


def test_an_unknown_model_type_is_captured_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model, segments = model_of("llama", torch.float32), segments_of(images=False)
    monkeypatch.setattr(model.config, "model_type", "other")
    windows = [layer(model, 0, 1), [*layer(model, 2, 3), "lm_head"]]
    expected = capture(model, segments, linears(model))
    assert [index for index, _ in captures(model, segments, windows)] == [0, 1]
    for index, rows in captures(model, segments, windows):
        assert_equal(rows, expected, windows[index])


def test_windows_cost_one_forward_more_than_one_capture() -> None:
    model, segments = model_of("llama", torch.float32), segments_of(images=False)
    calls = [0] * N_LAYERS
    for index in range(N_LAYERS):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        model.model.layers[index].register_forward_hook(count)
    n_batches = sum(map(len, segments))
    for _ in captures(model, segments, [layer(model, number) for number in range(N_LAYERS)]):
        pass
    assert calls == [2 * n_batches] * N_LAYERS


def test_windows_that_reach_into_each_other_are_refused() -> None:
    model, segments = model_of("llama", torch.float32), segments_of(images=False)
    with pytest.raises(ValueError, match="not apart"):
        list(captures(model, segments, [layer(model, 0, 2), layer(model, 1, 3)]))


def test_a_window_is_released_before_the_next_is_captured() -> None:
    """Although the loop still holds the last one's dictionary."""
    model, segments = model_of("llama", torch.float32), segments_of(images=False)
    watched: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *_: alive.extend(watch() is not None for watch in watched))
    for _, rows in captures(model, segments, [layer(model, 0), layer(model, 1, 2, 3)]):
        watched += [weakref.ref(tensor) for row in rows.values() for tensor in (row.x_TI, row.g_TO)]
    assert alive
    assert not any(alive)
