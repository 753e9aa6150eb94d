"""Pairs and granularities become the recipes that ModelOpt would run.

Checked by hand-worked overlays, ModelOpt's own rules, and the grid's counts.
"""

import copy
import functools
import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import yaml
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.conversion import replace_quant_module, set_quantizer_by_cfg
from torch import nn

from sweep.core.errors import InvalidRecipe, SweepError
from sweep.core.pairs import GranularityConfig, PairConfig
from sweep.core.paths import conf_dir
from sweep.formats.quantizer import ATTRIBUTE_DEFAULTS, COST_HINT, Attributes, Quantizer
from sweep.formats.recipe import Entry, Recipe, quantizer_for, resolve
from workers.quant.modelopt import Quantizers, preset

WEIGHT, INPUT = "*weight_quantizer", "*input_quantizer"
PAIRS = [
    f"w{weight}_a{inputs}" for weight in ("fp4", "fp8", "int4", "int8") for inputs in ("fp16", "fp8", "int8", "int4")
]
GRANULARITIES = ["default", "w_per_tensor", "w_per_out_channel", "w_per_in_channel", "w_group64", "w_group128"]
GRANULARITIES += ["a_per_tensor_static", "a_per_token_dynamic", "recipe_match_channel_token"]
UNBLOCKED = ["w_per_tensor", "w_per_out_channel", "w_per_in_channel", "recipe_match_channel_token"]


@functools.cache
def stored_preset(name: str) -> dict[str, Any]:
    return preset(name)


def pair_of(name: str) -> PairConfig:
    return PairConfig.from_node("quant_pair", yaml.safe_load((conf_dir() / "quant_pair" / f"{name}.yaml").read_text()))


def granularity_of(name: str) -> GranularityConfig:
    return GranularityConfig.from_node(
        "quant_granularity", yaml.safe_load((conf_dir() / "quant_granularity" / f"{name}.yaml").read_text())
    )


def overlay(**quantizers: dict[str, Any]) -> GranularityConfig:
    return GranularityConfig(
        name="own", quant_cfg_overrides={f"*{name}_quantizer": fields for name, fields in quantizers.items()}
    )


def made(
    pair: PairConfig | str,
    granularity: GranularityConfig | str = "default",
    coverage: str = "lm_only",
    lm_head: bool = False,
) -> Recipe:
    pair = pair_of(pair) if isinstance(pair, str) else pair
    granularity = granularity_of(granularity) if isinstance(granularity, str) else granularity
    return resolve(
        pair, granularity, stored_preset(pair.format_name), coverage=coverage, lm_head=lm_head, algorithm="max"
    )


def own_pair(format_name: str, weight: Any, activation: Any, /, **quantizers: dict[str, Any]) -> PairConfig:
    overrides = {f"*{name}_quantizer": fields for name, fields in quantizers.items()}
    return PairConfig(
        name="own", weight=weight, activation=activation, format_name=format_name, quant_cfg_overrides=overrides
    )


def cfg_of(recipe: Recipe, quantizer: str) -> Attributes | None:
    (entry,) = [entry for entry in recipe.quant_cfg if entry.quantizer_name == quantizer]
    return entry.cfg


@functools.cache
def origin_grid() -> dict[tuple[str, str], Recipe | None]:
    """Every point of the origin's grid; None where there is no valid recipe."""
    found: dict[tuple[str, str], Recipe | None] = {}
    for pair in PAIRS:
        for granularity in GRANULARITIES:
            try:
                found[pair, granularity] = made(pair, granularity)
            except InvalidRecipe:
                found[pair, granularity] = None
    return found


def valid() -> dict[tuple[str, str], Recipe]:
    return {point: recipe for point, recipe in origin_grid().items() if recipe is not None}


def n_distinct(recipes: Iterable[Recipe]) -> int:
    return len({recipe.id for recipe in recipes})


def test_of_144_points_16_are_no_recipe_and_the_others_are_90_distinct_ones() -> None:
    invalid = {point for point, recipe in origin_grid().items() if recipe is None}
    assert len(origin_grid()) == 144
    assert invalid == {(pair, granularity) for pair in PAIRS if pair.startswith("wfp4") for granularity in UNBLOCKED}
    assert (len(invalid), len(valid()), n_distinct(valid().values())) == (16, 128, 90)


def test_of_the_108_points_without_fp4_75_are_distinct() -> None:
    without_fp4 = [recipe for (pair, _), recipe in valid().items() if "fp4" not in pair]
    assert (len(without_fp4), n_distinct(without_fp4)) == (108, 75)
    assert not any(recipe.format.has_dynamic_blocks for recipe in without_fp4)


def test_modelopt_accepts_the_attributes_of_every_valid_point() -> None:
    for recipe in valid().values():
        for quantizer in recipe.format.quantizers:
            assert QuantizerAttributeConfig(**quantizer.attributes).enable


def test_modelopt_quantizes_with_every_distinct_recipe() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(64, 256), torch.randn(32, 256)
    quantizers = Quantizers()
    for found in {recipe.id: recipe.format for recipe in valid().values()}.values():
        if found.weight is not None:
            error = (quantizers.weight("w", found.weight, weight)(weight) - weight).norm() / weight.norm()
            assert 0 < error < 0.3
        if found.inputs is not None:
            error = (
                quantizers.inputs(found.inputs, inputs, [inputs.abs().max().item()])(inputs) - inputs
            ).norm() / inputs.norm()
            assert 0 < error < 0.3


FP8, INT8 = {"num_bits": (4, 3)}, {"num_bits": 8}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
PER_TOKEN = {"type": "dynamic", "block_sizes": {-1: None}}


@pytest.mark.parametrize(
    ("pair", "granularity", "weight", "inputs"),
    [
        ("wfp8_afp8", "default", FP8 | {"axis": None}, FP8 | {"axis": None}),
        ("wfp8_afp8", "w_per_out_channel", FP8 | {"axis": 0}, FP8 | {"axis": None}),
        ("wfp8_afp8", "w_group64", FP8 | {"block_sizes": {-1: 64}}, FP8 | {"axis": None}),
        ("wfp8_aint8", "recipe_match_channel_token", FP8 | {"axis": 0}, INT8 | PER_TOKEN),
        ("wint8_aint8", "w_per_in_channel", INT8 | {"axis": 1}, INT8 | {"axis": None}),
        ("wint8_aint8", "a_per_tensor_static", INT8 | {"axis": 0}, INT8 | {"axis": None, "type": "static"}),
        (
            "wint4_aint4",
            "w_group64",
            {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}},
            {"num_bits": 4, "axis": None},
        ),
        ("wint4_afp16", "w_per_tensor", {"num_bits": 4, "axis": None}, None),
        ("wint4_afp16", "recipe_match_channel_token", {"num_bits": 4, "axis": 0}, None),
        (
            "wfp4_afp8",
            "w_group128",
            {"num_bits": (2, 1), "block_sizes": {-1: 128, "type": "dynamic", "scale_bits": (4, 3)}},
            FP8 | {"axis": None},
        ),
        ("wfp4_aint8", "a_per_token_dynamic", NVFP4 | {COST_HINT: 4.5}, INT8 | PER_TOKEN),
        ("wfp4_afp4", "default", NVFP4 | {COST_HINT: 4.5}, NVFP4 | {COST_HINT: 4.5}),
    ],
)
def test_an_overlay_is_merged_field_by_field(
    pair: str, granularity: str, weight: dict[str, Any], inputs: dict[str, Any] | None
) -> None:
    recipe = made(pair, granularity)
    assert (cfg_of(recipe, WEIGHT), cfg_of(recipe, INPUT)) == (weight, inputs)


def test_an_overlay_stays_in_place_ahead_of_the_entries_that_disable() -> None:
    before, after = made("wfp8_afp8").quant_cfg, made("wfp8_afp8", "recipe_match_channel_token").quant_cfg
    assert [entry.quantizer_name for entry in after] == [entry.quantizer_name for entry in before]
    assert [entry.quantizer_name for entry in after[:3]] == ["*", WEIGHT, INPUT]
    assert all(entry.enable is False for entry in after[3:])


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.endswith("afp16")])
@pytest.mark.parametrize("granularity", ["a_per_token_dynamic", "a_per_tensor_static"])
def test_an_overlay_never_enables_a_quantizer_that_is_off(pair: str, granularity: str) -> None:
    recipe = made(pair, granularity)
    assert recipe.format.inputs is None
    assert recipe.id == made(pair).id


def test_the_preset_is_left_as_it_was() -> None:
    before = copy.deepcopy(stored_preset("NVFP4_DEFAULT_CFG"))
    made("wfp4_aint8", "w_group64", coverage="all_layers")
    assert stored_preset("NVFP4_DEFAULT_CFG") == before


def test_coverage_and_lm_head_drop_the_entries_that_disable_them_and_no_other() -> None:
    def patterns(recipe: Recipe) -> set[str]:
        return {entry.quantizer_name for entry in recipe.quant_cfg}

    full = patterns(made("wint8_aint8"))
    vision = {"*visual*", "*vision_tower*", "*vision_model*", "*embed_vision*", "*multi_modal_projector*"}
    assert full - patterns(made("wint8_aint8", coverage="all_layers")) == vision
    assert full - patterns(made("wint8_aint8", lm_head=True)) == {"*lm_head*", "*output_layer*"}


class Toy(nn.Module):
    """Names that the presets' patterns meet in a vision-language model."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.ModuleDict({"merger": nn.Linear(16, 16), "patch": nn.Conv2d(1, 1, 1)})
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(16, 16), "router": nn.Linear(16, 4)})])
        self.lm_head = nn.Linear(16, 16)


@pytest.mark.parametrize("pair", ["wfp8_afp8", "wint4_aint8", "wint8_afp16", "wfp4_aint4"])
@pytest.mark.parametrize("granularity", ["default", "w_group64", "a_per_token_dynamic"])
@pytest.mark.parametrize(("coverage", "lm_head"), [("lm_only", False), ("all_layers", False), ("lm_only", True)])
def test_which_attributes_a_module_gets_is_what_modelopt_does(
    pair: str, granularity: str, coverage: str, lm_head: bool
) -> None:
    recipe = made(pair, granularity, coverage, lm_head)
    model = Toy()
    replace_quant_module(model)
    set_quantizer_by_cfg(model, [entry.to_modelopt() for entry in recipe.quant_cfg])
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 4
    for module in linears:
        for quantizer in ("weight_quantizer", "input_quantizer"):
            found: Any = model.get_submodule(f"{module}.{quantizer}")
            ours = quantizer_for(recipe.quant_cfg, module, quantizer, "nn.Linear")
            assert found.is_enabled == (ours is not None)
            if ours is not None:
                full = {**ATTRIBUTE_DEFAULTS, **ours.attributes}
                theirs = (found.num_bits, found.axis, found.block_sizes, found._dynamic)
                assert theirs == (full["num_bits"], full["axis"], full["block_sizes"], full["type"] == "dynamic")


def test_an_entry_for_one_class_spares_the_others() -> None:
    entries = [Entry("*", enable=False), Entry(WEIGHT, {"num_bits": 4})]
    entries.append(Entry("*", parent_class="nn.Embedding", enable=False))
    assert quantizer_for(entries, "layers.0.q_proj", "weight_quantizer", "nn.Linear") == Quantizer({"num_bits": 4})
    assert quantizer_for(entries, "embed", "weight_quantizer", "nn.Embedding") is None


def test_defaults_are_those_of_the_installed_modelopt() -> None:
    theirs = {name: field.default for name, field in QuantizerAttributeConfig.model_fields.items()}
    assert theirs == {**ATTRIBUTE_DEFAULTS, "enable": True, COST_HINT: None}


@pytest.mark.parametrize(
    ("pair", "granularity", "same"),
    [
        ("wint8_aint8", "a_per_tensor_static", "default"),
        ("wint4_afp16", "w_group128", "default"),
        ("wint8_aint8", overlay(weight={"axis": 0, "narrow_range": False}), "default"),
        ("wfp8_aint8", overlay(weight={"axis": 0, "type": "static"}), "w_per_out_channel"),
        ("wfp4_afp16", overlay(weight={"block_sizes": {-1: 16}}), "default"),  # without ModelOpt's cost hint
        ("wint8_aint8", overlay(weight={"block_sizes": {-1: 64, "type": "static"}}), "w_group64"),
    ],
)
def test_what_changes_no_number_changes_no_identity(pair: str, granularity: GranularityConfig | str, same: str) -> None:
    assert made(pair, granularity).id == made(pair, same).id


def test_identity_tells_apart_what_is_covered_and_how_it_is_quantized() -> None:
    recipes = [
        made("wint8_aint8"),
        made("wint8_aint8", coverage="all_layers"),
        made("wint8_aint8", lm_head=True),
        made("wint8_aint4"),
        made("wint8_afp8"),
    ]
    assert n_distinct(recipes) == len(recipes)


def test_identity_is_json_in_which_block_axes_stay_numbers() -> None:
    _, weight, inputs, _ = json.loads(made("wint4_afp16").id)
    assert dict(weight)["block_sizes"] == [[-1, 128]]
    assert inputs is None


@pytest.mark.parametrize(
    ("pair", "granularity", "bits"),
    [
        ("wfp8_afp8", "default", 8.0),
        ("wint8_aint8", "w_per_tensor", 8.0),
        ("wint4_afp16", "default", 4 + 16 / 128),
        ("wint4_afp16", "w_group64", 4 + 16 / 64),
        ("wint4_afp16", "w_per_out_channel", 4.0),
        ("wfp4_afp16", "default", 4 + 8 / 16),
        ("wfp4_afp8", "default", 4 + 8 / 32),
        ("wfp4_afp16", "w_group64", 4 + 8 / 64),
    ],
)
def test_effective_bits_count_the_scales_of_blocks(pair: str, granularity: str, bits: float) -> None:
    assert made(pair, granularity).format.effective_bits == bits


def test_weights_left_alone_keep_16_bits() -> None:
    found = made(own_pair("INT8_DEFAULT_CFG", "fp16", "int8", weight={"enable": False})).format
    assert (found.weight, found.effective_bits, found.block_lengths) == (None, 16.0, ())


def test_a_square_block_shares_one_scale() -> None:
    pair = own_pair("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8", "fp16")
    assert made(pair).format.effective_bits == 8 + 16 / (128 * 128)
    assert made(pair, "w_group64").format.block_lengths == (64,)


@pytest.mark.parametrize(
    ("pair", "granularity", "calibrates", "has_dynamic_blocks"),
    [
        ("wint8_aint8", "default", True, False),
        ("wint8_aint8", "a_per_token_dynamic", False, False),
        ("wint8_afp16", "default", False, False),
        ("wfp4_afp16", "default", False, True),
        ("wfp4_afp4", "default", True, True),  # dynamic blocks under a second scale that calibration sets
    ],
)
def test_scores_depend_on_the_calibration_size_only_if_a_range_of_inputs_is_calibrated(
    pair: str, granularity: str, calibrates: bool, has_dynamic_blocks: bool
) -> None:
    found = made(pair, granularity).format
    assert (found.calibrates_inputs, found.has_dynamic_blocks) == (calibrates, has_dynamic_blocks)


@pytest.mark.parametrize(
    ("pair", "granularity", "format_name"),
    [
        ("wfp8_afp8", "mx", "MXFP8_DEFAULT_CFG"),
        ("wfp4_afp4", "mx", "MXFP4_DEFAULT_CFG"),
        ("wfp4_afp8", "w_mx", "W4A8_MXFP4_FP8_CFG"),
        ("wint8_aint8", "mx", "MXINT8_DEFAULT_CFG"),
        ("wfp4_afp4", "default", "NVFP4_DEFAULT_CFG"),
        ("wfp4_afp16", "default", "W4A16_NVFP4_CFG"),
        ("wfp8_afp8", "recipe_match_channel_token", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
        ("wfp8_afp16", "w_block128x128_a_group128", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"),
    ],
)
def test_formats_that_are_served_are_modelopts_presets(pair: str, granularity: str, format_name: str) -> None:
    recipe = made(pair, granularity)
    theirs = {
        entry["quantizer_name"]: entry["cfg"] for entry in stored_preset(format_name)["quant_cfg"] if entry.get("cfg")
    }
    for quantizer, spec in ((WEIGHT, recipe.format.weight), (INPUT, recipe.format.inputs)):
        ours = spec and {**ATTRIBUTE_DEFAULTS, **spec.attributes}
        preset_cfg = theirs.get(quantizer) and {**ATTRIBUTE_DEFAULTS, **theirs[quantizer]}
        for cfg in (ours, preset_cfg):
            if cfg:
                cfg.pop(COST_HINT, None)
        assert ours == preset_cfg


def test_blocks_of_128x128_come_with_inputs_in_groups_of_a_token() -> None:
    recipe = made("wfp8_afp8", "w_block128x128_a_group128")
    assert cfg_of(recipe, WEIGHT) == FP8 | {"block_sizes": {-1: 128, -2: 128}}
    assert cfg_of(recipe, INPUT) == FP8 | {"type": "dynamic", "block_sizes": {-1: 128}}
    found = recipe.format
    assert (found.block_lengths, found.block_rows, found.calibrates_inputs, found.has_dynamic_blocks) == (
        (128, 128),
        128,
        False,
        False,
    )
    assert found.effective_bits == 8 + 16 / 128**2  # 8.001


def test_power_of_two_scales_of_blocks_make_another_recipe_of_the_same_size() -> None:
    recipe, plain = (made("wfp8_afp8", f"w_block128x128_a_group128{end}") for end in ("_e8m0", ""))
    assert cfg_of(recipe, WEIGHT) == FP8 | {"block_sizes": {-1: 128, -2: 128, "scale_bits": (8, 0)}}
    assert cfg_of(recipe, INPUT) == FP8 | {"type": "dynamic", "block_sizes": {-1: 128, "scale_bits": (8, 0)}}
    found = recipe.format
    assert recipe.id != plain.id
    assert (found.weight_id != plain.format.weight_id, found.input_id != plain.format.input_id) == (True, True)
    assert found.effective_bits == plain.format.effective_bits  # both are stored in float32
    assert (found.block_lengths, found.block_rows, found.calibrates_inputs, found.has_dynamic_blocks) == (
        (128, 128),
        128,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("pair", "bits", "activation"),
    [("wfp8_afp8", 8.25, (4, 3)), ("wfp4_afp16", 4.25, None), ("wfp4_afp8", 4.25, (4, 3)), ("wfp4_afp4", 4.25, (2, 1))],
)
def test_mx_has_a_power_of_two_for_32_values_of_weights_and_of_quantized_inputs(
    pair: str, bits: float, activation: tuple[int, int] | None
) -> None:
    found = made(pair, "mx").format
    blocks = {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}
    assert found.weight is not None
    assert found.weight.block_sizes == blocks
    assert found.inputs is None if activation is None else found.inputs and found.inputs.block_sizes == blocks
    assert (found.inputs and found.inputs.num_bits) == activation
    assert (found.effective_bits, found.calibrates_inputs, found.has_dynamic_blocks, found.block_rows) == (
        bits,
        False,
        True,
        None,
    )


def test_mx_formats_calibrate_nothing() -> None:
    found = made(own_pair("MXFP8_DEFAULT_CFG", "fp8", "fp8")).format
    assert (found.calibrates_inputs, found.has_dynamic_blocks, found.effective_bits) == (False, True, 8.25)


def test_a_pair_may_quantize_inputs_that_its_preset_does_not_mention() -> None:
    recipe = made(own_pair("W4A16_NVFP4_CFG", "fp4", "int8", input={"num_bits": 8, "axis": None}))
    assert recipe.format.inputs is not None
    assert recipe.id == made("wfp4_aint8").id


def test_saying_enable_true_of_a_replaced_quantizer_changes_nothing() -> None:
    pair = own_pair("INT8_DEFAULT_CFG", "int8", "int4", input={"enable": True, "num_bits": 4})
    assert made(pair).id == made("wint8_aint4").id


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (overlay(weight={"axis": 0, "block_sizes": {-1: 64}}), "both axis and block_sizes"),
        (overlay(output={"axis": 0}), "Unknown quantizer"),
        (overlay(weight={"axes": 0}), "Did you mean 'axis'"),
        (overlay(weight={"enable": True}), "Unknown field"),
        (overlay(weight={"calibrator": "histogram"}), "Unknown field"),
        (overlay(weight={"axis": "zero"}), "Type null"),
        (overlay(weight={"num_bits": True}), "Type a whole number"),
        (overlay(input={"type": "statik"}), "Type static or dynamic"),
        (overlay(weight={"block_sizes": 64}), "Type a mapping"),
        (overlay(weight={"block_sizes": {-1: 0}}), "Type a mapping"),
        (overlay(weight={"block_sizes": {"-1": 64}}), "Type a mapping"),
        (overlay(weight={"block_sizes": {1: 64}}), "Type a mapping"),
        (overlay(weight={"block_sizes": {-1: 64.0}}), "Type a mapping"),
    ],
)
def test_an_overlay_that_means_nothing_is_refused_whatever_the_pair(
    granularity: GranularityConfig, message: str
) -> None:
    with pytest.raises(SweepError, match=message) as caught:
        made("wint4_afp16", granularity)
    assert not isinstance(caught.value, InvalidRecipe)


@pytest.mark.parametrize(
    ("pair", "granularity", "message"),
    [
        ("wfp4_afp8", "w_per_tensor", "FP4 weights need blocks"),
        ("wfp4_afp4", "a_per_token_dynamic", "FP4 activations need blocks"),
        ("wint8_aint8", overlay(input={"block_sizes": {-1: 64}}), "Static blocks of activations"),
        ("wint8_aint8", overlay(input={"axis": 0}), "Rows of activations are tokens"),
        ("wint8_aint8", overlay(weight={"num_bits": 4}), "says weight: int8"),
        ("wfp4_afp16", overlay(weight={"block_sizes": {-2: 16}}), "Dynamic blocks of weights"),
        ("wfp4_afp4", "w_block128x128_a_group128", "Dynamic blocks of weights"),
        (
            "wint8_afp8",
            "w_block128x128_a_group128_e8m0",
            r"Blocks of weights .* have scale_bits \[8, 0\] if they are FP8",
        ),
        ("wfp8_aint8", "w_block128x128_a_group128_e8m0", r"Blocks of activations .* if they are FP8"),
        ("wfp4_afp8", "w_block128x128_a_group128_e8m0", "no blocks of 16384"),
        ("wfp8_afp8", overlay(weight={"block_sizes": {-1: 16, "scale_bits": (4, 3)}}), "if they are FP8"),
        ("wfp8_afp8", overlay(weight={"block_sizes": {-1: None, "scale_bits": (8, 0)}}), "if they are FP8"),
        ("wint4_afp16", "mx", "no 4-bit integers"),
        ("wfp8_aint4", "mx", "no 4-bit integers"),
        ("wfp8_afp8", overlay(input={"type": "dynamic", "block_sizes": {-1: 128, -2: 128}}), "would mix tokens"),
        (own_pair("MXFP8_DEFAULT_CFG", "fp8", "fp8"), "a_per_token_dynamic", "Dynamic blocks of activations"),
        (own_pair("MXFP6_DEFAULT_CFG", "fp8", "fp8"), "w_per_tensor", "in dynamic blocks only"),
        (own_pair("INT8_DEFAULT_CFG", "int8", "fp16"), "default", "says activation: fp16"),
        (
            own_pair("INT8_DEFAULT_CFG", "fp16", "fp16", weight={"enable": False}, input={"enable": False}),
            "default",
            "nothing to score",
        ),
        (own_pair("INT8_SMOOTHQUANT_CFG", "int8", "int8"), "default", "calibrates with 'smoothquant'"),
        (own_pair("NVFP4_MLP_ONLY_CFG", "fp4", "fp4"), "default", "more than one format"),
    ],
)
def test_a_combination_that_modelopt_cannot_run_is_no_recipe(
    pair: PairConfig | str, granularity: GranularityConfig | str, message: str
) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        made(pair, granularity)


def test_a_typing_error_in_a_pair_is_refused() -> None:
    with pytest.raises(SweepError, match="Did you mean 'num_bits'"):
        made(own_pair("INT8_DEFAULT_CFG", "int8", "int4", input={"num_bit": 4}))


def test_an_algorithm_without_a_parity_test_is_refused_by_name() -> None:
    pair = pair_of("wint8_aint8")
    with pytest.raises(SweepError, match=r"svdquant has no parity test .* max, mse, awq_lite, smoothquant"):
        resolve(
            pair,
            granularity_of("default"),
            stored_preset(pair.format_name),
            coverage="lm_only",
            lm_head=False,
            algorithm="svdquant",
        )


@pytest.mark.parametrize(
    ("preset", "algorithm"),
    [("INT4_AWQ_CFG", "awq_lite"), ("INT8_SMOOTHQUANT_CFG", "smoothquant"), ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "mse")],
)
def test_a_preset_goes_with_its_own_algorithm_and_one_of_max_with_any(preset: str, algorithm: str) -> None:
    labels = ("int8", "int8") if preset.startswith("INT8") else ("int4", "fp16")
    pair = own_pair(preset, *labels)
    found = resolve(
        pair, granularity_of("default"), stored_preset(preset), coverage="lm_only", lm_head=False, algorithm=algorithm
    )
    assert found.format.algorithm == algorithm


def test_an_algorithm_with_other_settings_than_its_defaults_is_refused() -> None:
    """Only the defaults are run."""
    pair = own_pair("INT4_AWQ_CFG", "int4", "fp16")
    coarse = {**stored_preset("INT4_AWQ_CFG"), "algorithm": {"method": "awq_lite", "alpha_step": 0.5}}
    with pytest.raises(InvalidRecipe, match="alpha_step"):
        resolve(pair, granularity_of("default"), coarse, coverage="lm_only", lm_head=False, algorithm="awq_lite")
