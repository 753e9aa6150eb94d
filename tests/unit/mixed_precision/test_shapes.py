"""Formats that kernels do not take on several ranks are no candidates, for Qwen3-VL-4B's language model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sweep.cli import main
from sweep.config.targets import Target, target_called
from sweep.core.errors import SweepError
from sweep.core.groups import LayerGroup, Linear
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.candidates import Candidate, Candidates, read_candidates
from sweep.mixed_precision.recipe import Budget, Rules, problem_of, recipe_of_choice, rules_of, solved
from sweep.mixed_precision.shapes import check_shapes, misfit_lines, misfits
from sweep.plan.model import Model
from tests.exports import recipe_of
from tests.scored import store_at
from tests.unit.formats.test_recipe import made

# Inputs and outputs of a decoder layer's linears; eight key-value heads.
SHAPES = {
    "self_attn.q_proj": (2560, 4096),
    "self_attn.k_proj": (2560, 1024),
    "self_attn.v_proj": (2560, 1024),
    "self_attn.o_proj": (4096, 2560),
    "mlp.gate_proj": (2560, 9728),
    "mlp.up_proj": (2560, 9728),
    "mlp.down_proj": (9728, 2560),
}
FUSED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)]
FUSED += [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
KV_HEADS, N_LAYERS = 8, 2
BLOCKS, INT4, INT4_64 = "wfp8_afp8/w_block128x128_a_group128", "wint4_afp16/default", "wint4_afp16/w_group64"
NVFP4, FP8, W4A8 = "wfp4_afp16/default", "wfp8_afp8/recipe_match_channel_token", "wint4_afp8/a_per_token_dynamic"


def linear(layer: int, name: str) -> Linear:
    n_inputs, n_outputs = SHAPES[name]
    return Linear(name=f"model.language_model.layers.{layer}.{name}", n_inputs=n_inputs, n_outputs=n_outputs)


LINEARS = {each.name: each for layer in range(N_LAYERS) for name in SHAPES for each in [linear(layer, name)]}


def groups() -> list[LayerGroup]:
    found: list[LayerGroup] = []
    for layer in range(N_LAYERS):
        for names in FUSED:
            linears = [linear(layer, name) for name in names]
            found.append(
                LayerGroup(
                    name=linears[0].name,
                    modules=tuple(each.name for each in linears),
                    weight_elements=sum(each.n_inputs * each.n_outputs for each in linears),
                )
            )
    return found


def format_called(label: str) -> GroupFormat:
    pair, granularity = label.split("/")
    found = made(pair, granularity).format
    return GroupFormat(
        quant_pair=pair,
        quant_granularity=granularity,
        weight=found.weight,
        inputs=found.inputs,
        algorithm="max",
        scales="fused",
    )


def target(tp: int, name: str = "vllm_sm90") -> Target:
    found = target_called(f"{name} tp={tp}")
    assert found is not None
    return found


def left_out(tp: int, *labels: str, name: str = "vllm_sm90") -> set[tuple[str, str]]:
    """Label of the format, and end of the group's name."""
    found = misfits(target(tp, name), map(format_called, labels), groups(), LINEARS, KV_HEADS)
    return {(each.label, each.group.name.rpartition(".")[2]) for each in found}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_up_to_four_ranks_every_format_has_its_kernel(tp: int) -> None:
    assert left_out(tp, BLOCKS, INT4, INT4_64, NVFP4, FP8, W4A8) == set()


def test_on_eight_ranks_1216_inputs_are_no_multiple_of_128() -> None:
    """9,728 / 8 = 1,216 = 9.5 * 128 = 19 * 64; W4A8 takes gate and up as one matrix of 2,432 = 19 * 128 outputs."""
    assert left_out(8, BLOCKS, INT4, INT4_64, NVFP4, FP8, W4A8) == {
        (BLOCKS, "down_proj"),
        (BLOCKS, "gate_proj"),
        (INT4, "down_proj"),
        (W4A8, "down_proj"),
    }


def test_tensorrt_llm_has_rules_of_its_own() -> None:
    assert left_out(8, INT4, INT4_64, name="trtllm_sm100") == {(INT4, "down_proj")}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Candidates:
    """Of this shape, with a predicted KL of 2^-bits for each format."""
    path = tmp_path_factory.mktemp("store")
    other = read_candidates(store_at(path), [f"store.uri={path}"])
    formats = [format_called(label) for label in (BLOCKS, INT4, INT4_64, NVFP4, FP8)]
    n = len(groups())
    return replace(
        other,
        groups=tuple(groups()),
        formats=tuple(
            Candidate(
                format=each, cell_id=each.label, predicted_kl=np.full(n, 2.0**-each.effective_bits), sample_kl=None
            )
            for each in formats
        ),
        elements=None,
    )


def recipe_on(tp: int, bits: float, scored: Candidates, pins: Sequence[str] = ()) -> MixedRecipe:
    own = target(tp)
    rules = rules_of(pins, (), False, own, scored)
    found = misfits(own, [each.format for each in scored.formats], scored.groups, LINEARS, KV_HEADS)
    rules = replace(rules, refused={(each.label, each.group.name): each.reason for each in found})
    budget = Budget(bits=bits)
    choice = solved(scored, problem_of(scored, rules), budget, rules)
    return recipe_of_choice(scored, choice, "n", own.label)


def test_solve_still_gives_a_recipe_and_its_groups_fit(scored: Candidates) -> None:
    alone, split = recipe_on(1, 4.125, scored), recipe_on(8, 4.25, scored)
    assert {choice.format for choice in alone.groups} == {INT4}
    assert split.target == "vllm_sm90 tp=8"
    assert {choice.format for choice in split.groups if choice.group.name.endswith("down_proj")} == {INT4_64}
    assert split.effective_bits <= 4.25


def test_a_budget_that_fits_one_rank_alone_says_that_the_target_keeps_it(scored: Candidates) -> None:
    with pytest.raises(SweepError, match=r"--bits 4\.125 is too little.*--bits 4\.125 without the target"):
        recipe_on(8, 4.125, scored)


def test_a_pin_that_does_not_fit_says_why(scored: Candidates) -> None:
    with pytest.raises(SweepError, match=r"down_proj cannot be .*: 1216 inputs a rank, no multiple of 128"):
        recipe_on(8, 4.3, scored, [f"down_proj={INT4}"])


def test_a_line_a_kernel_says_how_many_and_why() -> None:
    found = misfits(target(8), map(format_called, [BLOCKS, INT4]), groups(), LINEARS, KV_HEADS)
    lines = [*misfit_lines(target(8), found)]
    assert len(lines) == 2
    assert lines[0].startswith(
        f"no {BLOCKS} for 4 layer groups (layers.0.mlp.gate/up_proj: 1216 outputs a rank, no multiple of 128); "
        "inputs a multiple of 128, outputs of each sub-projection of 128: vllm-project/vllm"
    )
    assert lines[1].startswith(f"no {INT4} for 2 layer groups (layers.0.mlp.down_proj: 1216 inputs a rank")


def test_a_recipe_that_does_not_fit_is_refused_for_its_target() -> None:
    """The bundled model: down_proj has 384 inputs, 192 on each of two ranks."""
    model, recipe = Model(bundled_model_dir()), recipe_of([format_called(INT4)])
    check_shapes(recipe, target(1), model)
    with pytest.raises(SweepError) as caught:
        check_shapes(recipe, target(2), model)
    message = str(caught.value)
    assert "vllm_sm90 tp=2 cannot run model.language_model.layers.0.mlp.down_proj in wint4_afp16/default" in message
    assert "192 inputs a rank, no multiple of 128 (inputs a multiple of 128: " in message
    assert message.endswith("Solve again with target=vllm_sm90 target.tp=2.")


def test_ranks_that_cannot_share_the_model_are_refused_whatever_the_format() -> None:
    with pytest.raises(SweepError, match=r"target\.tp=3: 3 do not divide"):
        misfits(target(3), [format_called(FP8)], groups(), LINEARS, KV_HEADS)


def test_solve_for_several_ranks_needs_the_checkpoint_that_was_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_at(tmp_path / "store")
    assert main(["solve", "--bits", "5", f"store.uri={store.uri}", "target.tp=2"]) == 2
    assert (
        "is not the checkpoint that was scored (revision r1). Give that one: model.path=DIR." in capsys.readouterr().err
    )


def test_no_rank_is_no_number_of_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_at(tmp_path / "store")
    assert main(["solve", "--bits", "5", f"store.uri={store.uri}", "target.tp=0"]) == 2
    assert "target.tp=0 is no number of ranks. Type 1, 2, 4 or 8." in capsys.readouterr().err


def test_rules_without_shapes_refuse_nothing() -> None:
    assert Rules(pins={}).refused == {}
