"""Which file of a cell holds a module's row, and what people call a layer group."""

import pytest

from sweep.core.groups import LayerGroup, ShapedGroup, part_of, parts_of, short_group


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
        ("model.multi_modal_projector.linear_1", "model.multi_modal_projector", None),
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


def group(*modules: str) -> ShapedGroup:
    return ShapedGroup(name=modules[0], modules=modules, weight_elements=4, n_inputs=2, n_outputs=2)


@pytest.mark.parametrize(
    ("modules", "part", "layer_index", "short_name", "is_lm_head"),
    [
        (
            ["model.language_model.layers.6.mlp.gate_proj", "model.language_model.layers.6.mlp.up_proj"],
            "model.language_model.layers.6",
            6,
            "layers.6.mlp.gate/up_proj",
            False,
        ),
        (["model.visual.blocks.0.attn.qkv"], "model.visual.blocks.0", None, "visual.blocks.0.attn.qkv", False),
        (["lm_head"], "lm_head", None, "lm_head", True),
        (["thinker.lm_head"], "thinker", None, "thinker.lm_head", True),
    ],
)
def test_a_layer_groups_name_says_where_it_is(
    modules: list[str], part: str, layer_index: int | None, short_name: str, is_lm_head: bool
) -> None:
    plain = LayerGroup(name=modules[0], modules=tuple(modules), weight_elements=4)
    for found in (plain, group(*modules)):
        assert (found.part, found.layer_index, found.short_name) == (part, layer_index, short_name)
        assert found.is_lm_head == is_lm_head


def test_parts_hold_their_groups_in_the_models_order() -> None:
    groups = [group(f"layers.{layer}.mlp.{name}") for layer in (0, 1) for name in ("up", "down")]
    groups.append(group("lm_head"))
    assert [(part.name, part.groups) for part in parts_of(groups)] == [
        ("layers.0", tuple(groups[:2])),
        ("layers.1", tuple(groups[2:4])),
        ("lm_head", (groups[4],)),
    ]
