"""Which file of a cell holds a module's row; what a task needs of the machine."""

from dataclasses import replace
from typing import Any

import pytest

from tests.tasks import TASK
from workers.task import part_of


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


INT8 = replace(TASK, weight_attributes={"num_bits": 8, "axis": 0})


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, set()),
        ({"weight_attributes": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}}, set()),  # Triton has it
        ({"input_attributes": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}}, {"mx"}),
        ({"engine": "modelopt"}, {"integers", "fp8"}),
    ],
)
def test_only_what_has_no_kernel_elsewhere_needs_modelopts_extensions(changes: dict[str, Any], needed: set[str]) -> None:
    assert replace(INT8, **changes).extensions == needed
