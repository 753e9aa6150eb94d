"""Every weight has one kind, and what layer groups leave out is named with its share and its reason."""

from collections.abc import Mapping

import pytest

from sweep.core.coverage import Holder, ModelCoverage, coverage_of, linear_kind, number, percent, weight_kind

LAYER = "model.layers.3"
# A mixture of experts: 20,000 weights, of which linears are 4,000.
MOE = {
    "parameters": 20_000,
    "embeddings": 2_000,
    "lm_head": 2_000,
    "linears": 4_000,
    "experts": 11_000,
    "routers": 600,
    "vectors": 400,
}
GROUPS = {f"{LAYER}.self_attn.q_proj": 3_000, f"{LAYER}.self_attn.o_proj": 1_000}


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (f"{LAYER}.self_attn.q_proj", "linears"),
        (f"{LAYER}.mlp.gate_proj", "linears"),
        (f"{LAYER}.mlp.shared_experts.gate_proj", "linears"),
        (f"{LAYER}.mlp.experts.7.up_proj", "experts"),
        (f"{LAYER}.mlp.gate", "routers"),
        (f"{LAYER}.block_sparse_moe.gate", "routers"),
        (f"{LAYER}.block_sparse_moe.router.layer", "routers"),
        (f"{LAYER}.mlp.shared_expert_gate", "gates"),
        (f"{LAYER}.linear_attn.in_proj_a", "gates"),
        (f"{LAYER}.linear_attn.in_proj_ba", "gates"),
        (f"{LAYER}.linear_attn.in_proj_qkv", "linears"),
        ("model.visual.blocks.0.mlp.linear_fc1", "vision_linears"),
        ("model.multi_modal_projector.linear_1", "vision_linears"),
        ("lm_head", "lm_head"),
    ],
)
def test_a_linear_is_known_by_its_name(module: str, kind: str) -> None:
    assert linear_kind(module) == kind
    assert weight_kind(f"{module}.weight", (64, 32), "linear") == kind
    assert weight_kind(f"{module}.bias", (64,), "linear") == "vectors"


@pytest.mark.parametrize(
    ("name", "shape", "holder", "kind"),
    [
        (f"{LAYER}.mlp.experts.gate_up_proj", (4, 64, 32), "other", "experts"),
        (f"{LAYER}.mlp.experts.gate_up_proj_bias", (4, 64), "other", "vectors"),
        (f"{LAYER}.block_sparse_moe.input_linear.weight", (4, 64, 32), "other", "experts"),
        (f"{LAYER}.mlp.gate.weight", (4, 32), "other", "routers"),
        (f"{LAYER}.attn.c_attn.weight", (32, 96), "conv1d", "conv1d"),
        (f"{LAYER}.linear_attn.conv1d.weight", (64, 1, 4), "convolution", "convolutions"),
        ("model.visual.patch_embed.proj.weight", (64, 3, 2, 16, 16), "convolution", "convolutions"),
        ("model.visual.pos_embed.weight", (16, 64), "embedding", "other_embeddings"),
        ("model.vision_tower.embeddings.position_embeddings", (1, 16, 64), "other", "other_embeddings"),
        ("model.vision_tower.embeddings.cls_token", (1, 1, 64), "other", "vectors"),
        (f"{LAYER}.mixer.A_log", (64, 16), "other", "matrix.A_log"),
        (f"{LAYER}.mixing.weight", (64, 16), "other", "matrix.mixing"),
        ("model.multi_modal_projector.mm_weight", (64, 16), "other", "vision_matrix.mm_weight"),
        (f"{LAYER}.linear_attn.A_log", (64,), "other", "vectors"),
        (f"{LAYER}.input_layernorm.weight", (64,), "other", "vectors"),
    ],
)
def test_every_other_weight_is_known_by_its_shape_and_holder(
    name: str, shape: tuple[int, ...], holder: Holder, kind: str
) -> None:
    assert weight_kind(name, shape, holder) == kind


def found(groups: Mapping[str, int] = GROUPS, option: str = "lm_only", **changed: int) -> ModelCoverage:
    return coverage_of(MOE | changed, groups, option)


def left(coverage: ModelCoverage) -> dict[str, int]:
    return {each.kind: each.elements for each in coverage.not_covered}


def test_what_is_left_out_is_named_largest_first() -> None:
    coverage = found()
    assert coverage.text == (
        "covers 20.0 % of 20,000 parameters; not covered: experts 55.0 % (they are not scored yet), "
        "embeddings 10.0 % (a table that is looked up), lm_head 10.0 % (sensitivity.lm_head=true covers it), "
        "routers 3.0 % (runtimes keep them in 16 bits), norms and biases 2.0 %"
    )
    assert coverage.warning == "not looked at: experts, 55.0 % of all weights (they are not scored yet)"
    assert coverage.covered + sum(left(coverage).values()) == coverage.parameters


def test_an_lm_head_of_its_own_is_covered_as_part_of_the_model() -> None:
    coverage = found(GROUPS | {"lm_head": 2_000})
    assert (coverage.parameters, coverage.covered, coverage.share) == (20_000, 6_000, 0.3)
    assert "lm_head" not in left(coverage)


def test_a_quantized_copy_of_tied_embeddings_comes_on_top() -> None:
    tied = {"parameters": 18_000, "lm_head": 0}
    assert "lm_head shares it, sensitivity.lm_head=true covers a copy" in found(**tied).text
    coverage = found(GROUPS | {"lm_head": 2_000}, **tied)
    assert (coverage.parameters, coverage.covered) == (20_000, 6_000)
    assert left(coverage)["embeddings"] == 2_000
    assert "embeddings 10.0 % (a table that is looked up), " in coverage.text


def test_linears_that_the_patterns_leave_out_are_a_warning() -> None:
    coverage = found({f"{LAYER}.self_attn.q_proj": 3_000}, experts=0, parameters=9_000)
    assert coverage.warning == "not looked at: linears, 11.1 % of all weights (the recipe's patterns leave them out)"
    assert found(GROUPS, experts=0, parameters=9_000).warning is None


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("lm_only", "(sensitivity.coverage=all_layers covers them)"),
        ("all_layers", "(the recipe's patterns leave them out)"),
    ],
)
def test_advice_is_given_where_it_helps(option: str, reason: str) -> None:
    text = found(GROUPS, option, vision_linears=5_000, parameters=25_000).text
    assert f"linears of the vision tower 20.0 % {reason}" in text


def test_a_matrix_is_named_by_its_own_name_and_warns_outside_the_vision_tower() -> None:
    coverage = found(experts=0, parameters=9_600, **{"matrix.A_log": 300, "vision_matrix.mm_weight": 300})
    assert "A_log 3.1 % (only linears are scored)" in coverage.text
    assert "mm_weight of the vision tower 3.1 % (only linears are scored)" in coverage.text
    assert coverage.warning == "not looked at: A_log, 3.1 % of all weights (only linears are scored)"


def test_what_an_older_program_has_not_recorded_is_not_guessed() -> None:
    old = {name: MOE[name] for name in ("parameters", "embeddings", "lm_head")}
    coverage = coverage_of(old, GROUPS, "lm_only")
    assert left(coverage) == {"unknown": 12_000, "embeddings": 2_000, "lm_head": 2_000}
    assert "other weights 60.0 % (an earlier version did not record their kinds)" in coverage.text
    assert coverage.warning is None


def test_a_model_that_is_covered_whole_has_nothing_left() -> None:
    assert coverage_of(
        {"parameters": 3_000, "linears": 3_000, "embeddings": 0, "lm_head": 0}, {"a.b": 3_000}, "x"
    ).text == ("covers 100 % of 3,000 parameters")


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (0.00001, "under 0.01 %"),
        (0.0001, "0.01 %"),
        (0.012, "1.2 %"),
        (0.941, "94.1 %"),
        (0.9996, "99.96 %"),
        (0.999999, "99.99 %"),
        (1.0, "100 %"),
    ],
)
def test_shares_are_never_rounded_to_nothing_or_all(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(25_000, "25,000"), (134_515_008, "135 M"), (999_900_000, "1 B"), (30_532_122_624, "30.5 B"), (10**12, "1 T")],
)
def test_numbers_of_weights_are_said_as_people_say_them(n: int, text: str) -> None:
    assert number(n) == text
