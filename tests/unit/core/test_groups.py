"""Which file of a cell holds a module's row, and what people call a layer group."""

import pytest

from sweep.core.groups import part_of, short_group


@pytest.mark.parametrize(
    ("module", "part", "layer_index"),
    [
        ("model.language_model.layers.7.mlp.gate_proj", "model.language_model.layers.7", 7),
        ("model.layers.11.self_attn.q_proj", "model.layers.11", 11),
        ("model.layers.3.mlp.experts.12.up_proj", "model.layers.3", 3),  # an expert belongs to its decoder layer
        ("transformer.h.0.attn.c_proj", "transformer.h.0", 0),
        ("model.visual.blocks.5.attn.qkv", "model.visual.blocks.5", None),  # no decoder layer
        ("model.visual.deepstack_merger_list.1.linear_fc1", "model.visual.deepstack_merger_list.1", None),
        ("model.visual.merger.linear_fc2", "model.visual.merger", None),
        ("lm_head", "lm_head", None),
    ],
)
def test_a_part_is_a_numbered_block_or_the_modules_parent(module: str, part: str, layer_index: int | None) -> None:
    assert part_of(module) == (part, layer_index)


@pytest.mark.parametrize(
    ("leaves", "short"),
    [
        (["q_proj", "k_proj", "v_proj"], "layers.3.x.q/k/v_proj"),
        (["gate_proj"], "layers.3.x.gate_proj"),
        (["w1", "w3"], "layers.3.x.w1/w3"),
    ],
)
def test_short_names(leaves: list[str], short: str) -> None:
    modules = [f"model.language_model.layers.3.x.{leaf}" for leaf in leaves]
    assert short_group(modules[0], modules) == short


def test_short_names_of_scattered_modules_count_them() -> None:
    assert short_group("model.visual.e.0.w1", ["model.visual.e.0.w1", "model.visual.e.1.w1"]) == "visual.e.0.w1 (+1)"
