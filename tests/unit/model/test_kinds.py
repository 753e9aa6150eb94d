"""Weights are counted by kind on a model without weights: by hand, from its configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import EXPERTS, save_checkpoint
from tests.vision import FAMILIES, save_vision
from workers.model import loading

# Hidden size 128, two layers, 4 heads of 32 values, 2 of them for keys and values, a vocabulary of 512.
ATTENTION = 2 * (2 * 128 * 128 + 2 * 128 * 64)
EMBEDDINGS = 512 * 128
NORMS = 2 * (2 * 128 + 2 * 32) + 128


@pytest.mark.parametrize(
    ("kind", "text", "elements"),
    [
        ("qwen3", {}, {"linears": ATTENTION + 2 * 3 * 128 * 256, "lm_head": EMBEDDINGS, "vectors": NORMS}),
        (
            "qwen3",
            {"tie_word_embeddings": True},
            {"linears": ATTENTION + 2 * 3 * 128 * 256, "lm_head": 0, "vectors": NORMS},
        ),
        (
            "qwen3_moe",
            EXPERTS,
            {
                "linears": ATTENTION,
                "lm_head": EMBEDDINGS,
                "experts": 2 * 4 * 3 * 128 * 32,
                "routers": 2 * 4 * 128,
                "vectors": NORMS,
            },
        ),
        (
            "gpt2",
            {},
            {
                "lm_head": 0,  # tied
                "conv1d": 2 * (128 * 3 * 128 + 128 * 128 + 2 * 128 * 512),
                "other_embeddings": 1024 * 128,
                "vectors": 2 * (2 * 2 * 128 + 3 * 128 + 128 + 512 + 128) + 2 * 128,
            },
        ),
    ],
)
def test_language_models(kind: str, text: dict[str, Any], elements: dict[str, int], tmp_path: Path) -> None:
    found = loading.structure(save_checkpoint(tmp_path / "model", kind, **text))
    assert found.elements == elements | {"embeddings": EMBEDDINGS}
    assert found.parameters == sum(elements.values()) + EMBEDDINGS


def test_a_vision_language_model_with_experts(tmp_path: Path) -> None:
    """Hidden size 64 in both halves; three mergers read 4 patches of 64 values at once."""
    found = loading.structure(save_vision(tmp_path / "model", "qwen3_vl_moe"))
    vision = 2 * (64 * 192 + 3 * 64 * 64) + 3 * (256 * 256 + 256 * 64)
    assert {kind: n for kind, n in found.elements.items() if kind != "vectors"} == {
        "embeddings": 4112 * 64,
        "lm_head": 4112 * 64,
        "linears": 2 * 2 * (64 * 128 + 64 * 64),
        "experts": 2 * 4 * 3 * 64 * 32,
        "routers": 2 * 4 * 64,
        "vision_linears": vision,
        "convolutions": 3 * 2 * 16 * 16 * 64,
        "other_embeddings": 16 * 64,
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_weight_is_counted_once(kind: str, tmp_path: Path) -> None:
    path = save_vision(tmp_path / "model", kind)
    model = loading.load(path, dtype=torch.float32, device="cpu")
    found = loading.structure(path)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters == sum(found.elements.values())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (found.elements["lm_head"] == 0) == tied
