"""The part of a linear that a rank has, by hand, for the shapes of Qwen3-VL-4B."""

import pytest

from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.core.parallel import RankPart, is_row_parallel, parts_fit, rank_part

TEXT, VISION = "model.language_model.layers.0", "model.visual.blocks.0"


@pytest.mark.parametrize(
    ("name", "n_inputs", "n_outputs", "tp", "expected"),
    [
        (f"{TEXT}.self_attn.q_proj", 2560, 4096, 8, RankPart(2560, (512,))),
        (f"{TEXT}.self_attn.k_proj", 2560, 1024, 8, RankPart(2560, (128,))),
        (f"{TEXT}.self_attn.v_proj", 2560, 1024, 16, RankPart(2560, (128,))),  # eight heads: two ranks have the same
        (f"{TEXT}.self_attn.o_proj", 4096, 2560, 8, RankPart(512, (2560,))),
        (f"{TEXT}.mlp.gate_proj", 2560, 9728, 8, RankPart(2560, (1216,))),
        (f"{TEXT}.mlp.down_proj", 9728, 2560, 8, RankPart(1216, (2560,))),
        (f"{VISION}.attn.qkv", 1024, 3072, 8, RankPart(1024, (128, 128, 128))),
        (f"{VISION}.attn.proj", 1024, 1024, 8, RankPart(128, (1024,))),
        (f"{VISION}.mlp.linear_fc1", 1024, 4096, 8, RankPart(1024, (512,))),
        (f"{VISION}.mlp.linear_fc2", 4096, 1024, 8, RankPart(512, (1024,))),
        ("model.router", 2560, 100, 8, RankPart(2560, (100,))),  # each rank has the whole
        ("lm_head", 2560, 151936, 1, RankPart(2560, (151936,))),
    ],
)
def test_a_rank_has_its_part(name: str, n_inputs: int, n_outputs: int, tp: int, expected: RankPart) -> None:
    assert rank_part(Linear(name=name, n_inputs=n_inputs, n_outputs=n_outputs), tp, 8) == expected


@pytest.mark.parametrize(
    ("name", "tp", "message"),
    [
        ("a.q_proj", 3, "3 do not divide the 64 outputs of a.q_proj"),
        ("a.down_proj", 3, "3 do not divide the 64 inputs of a.down_proj"),
        ("a.k_proj", 12, "target.tp=12: 8 do not divide the 12 ranks among the key-value heads"),
    ],
)
def test_ranks_that_cannot_share_a_linear_are_refused(name: str, tp: int, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        rank_part(Linear(name=name, n_inputs=64, n_outputs=64), tp, 8)


def test_outputs_are_those_of_each_sub_projection_or_of_all() -> None:
    parts = [RankPart(128, (64,)), RankPart(128, (64,))]
    assert parts_fit(parts, 128, 128, each=False) is None
    assert parts_fit(parts, 128, 128, each=True) == "64 outputs a rank, no multiple of 128"
    assert parts_fit([RankPart(96, (64,))], 64, 1, each=False) == "96 inputs a rank, no multiple of 64"


def test_whose_inputs_are_split() -> None:
    assert [
        name for name in ("q_proj", "o_proj", "attn.proj", "merger.proj", "fc1", "fc2") if is_row_parallel(f"a.{name}")
    ] == [
        "o_proj",
        "attn.proj",
        "fc2",
    ]
