"""Targets: their files name known recipes, treat equal ones alike, and agree with facts read in the runtimes' code."""

import functools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from compressed_tensors.config import CompressionFormat

from sweep.config.compose import expand
from sweep.config.schema import TargetConfig
from sweep.config.speeds import Speed
from sweep.config.targets import Target, all_targets, served_as
from sweep.core.errors import InvalidRecipe, SweepError
from sweep.core.paths import conf_dir
from sweep.formats.recipe import Recipe
from tests.unit.formats.test_recipe import GRANULARITIES, PAIRS, made

TARGETS = {target.name: target for target in all_targets()}
NAMES = ["trtllm_sm100", "trtllm_sm90", "vllm_sm100", "vllm_sm120", "vllm_sm90"]
VLLM = ["vllm_sm90", "vllm_sm100", "vllm_sm120"]
# QUANT_ALGOS of vLLM's modelopt.py and QuantAlgo of TensorRT-LLM's mode.py, as far as ModelOpt 0.47 writes them.
MODELOPT_NAMES = {
    "vllm": {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8"},
    "trtllm": {
        "FP8",
        "FP8_PB_WO",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "W8A16",
        "W4A16_AWQ",
        "W4A8_AWQ",
        "NVFP4",
        "W4A16_NVFP4",
        "W4A8_NVFP4_FP8",
        "W4A8_MXFP4_FP8",
    },
}


@functools.cache
def resolved(pair: str, granularity: str) -> Recipe:
    return made(pair, granularity)


def status(target: str, recipe: str, algorithm: str = "max") -> str:
    pair, granularity = recipe.split("/")
    return TARGETS[target].status(pair, granularity, algorithm).words


def config_of(**recipes: dict[str, Any]) -> TargetConfig:
    nodes = {name.replace("__", "/"): {"reader_name": "R", "source": "s", **node} for name, node in recipes.items()}
    return TargetConfig(
        name="own",
        runtime="a runtime",
        scales="fused",
        checkpoint="compressed-tensors",
        serve={},
        tp=1,
        kernels={},
        speeds={},
        sources={"s": "project, version, file"},
        recipes=nodes,
    )


def test_there_is_a_target_for_each_runtime_and_hardware() -> None:
    assert list(TARGETS) == NAMES == sorted(path.stem for path in (conf_dir() / "target").glob("*.yaml"))
    assert all(target.scales == "fused" for target in TARGETS.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_of_a_target_resolves_under_each_of_its_names_to_the_same(name: str) -> None:
    for recipe in TARGETS[name].recipes:
        assert len({resolved(recipe.quant_pair, granularity).id for granularity in recipe.granularities}) == 1, (
            recipe.name
        )


@pytest.mark.parametrize("name", NAMES)
def test_equal_recipes_have_equal_statuses_whatever_they_are_called(name: str) -> None:
    found: dict[str, set[str]] = {}
    every = sorted(path.stem for path in (conf_dir() / "quant_granularity").glob("*.yaml"))
    for pair in sorted(path.stem for path in (conf_dir() / "quant_pair").glob("*.yaml")):
        for granularity in every:
            try:
                recipe = resolved(pair, granularity)
            except InvalidRecipe:
                assert status(name, f"{pair}/{granularity}") == "none"
                continue
            found.setdefault(recipe.id, set()).add(status(name, f"{pair}/{granularity}"))
    assert [sorted(words) for words in found.values() if len(words) > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_runs_as_keeps_the_bits_of_its_weights(name: str) -> None:
    for recipe in TARGETS[name].recipes:
        if recipe.runs_as is not None:
            real, kept = resolved(*recipe.runs_as.split("/")), resolved(recipe.quant_pair, recipe.quant_granularity)
            assert real.format.effective_bits == kept.format.effective_bits


@pytest.mark.parametrize("name", NAMES)
def test_exports_have_names_that_their_formats_know(name: str) -> None:
    formats = {one.value for one in CompressionFormat}
    for recipe in TARGETS[name].recipes:
        assert recipe.export.get("compressed_tensors", "dense") in formats
        assert recipe.export.get("modelopt", "FP8") in MODELOPT_NAMES[name.split("_")[0]]


@pytest.mark.parametrize("name", NAMES)
def test_a_range_is_only_chosen_where_one_is_calibrated(name: str) -> None:
    """Blocks under a power of two take it from their own values: there is nothing for `mse` to move."""
    for recipe in TARGETS[name].recipes:
        weight = resolved(recipe.quant_pair, recipe.quant_granularity).format.weight
        assert weight is not None
        chooses_range = weight.is_calibrated and not weight.has_e8m0_blocks
        assert chooses_range or recipe.algorithms == ("max",)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [  # on vLLM: SM90, SM100, SM120
        ("wfp8_afp8/default", ["native"] * 3),
        ("wfp8_afp8/recipe_match_channel_token", ["native"] * 3),
        ("wfp8_afp8/w_block128x128_a_group128_e8m0", ["native"] * 3),
        ("wfp8_afp8/w_block128x128_a_group128", ["as wfp8_afp8/w_block128x128_a_group128_e8m0"] * 3),
        ("wfp8_afp8/w_group64", ["none"] * 3),
        ("wfp8_aint8/default", ["none"] * 3),
        ("wfp8_afp8/mx", ["as wfp8_afp16/mx", "native", "native"]),
        ("wint8_aint8/a_per_token_dynamic", ["native", "none", "none"]),
        ("wint8_aint8/default", ["native", "none", "none"]),
        ("wint8_afp8/default", ["none"] * 3),
        ("wint4_afp16/w_group64", ["native"] * 3),
        ("wint4_afp8/a_per_token_dynamic", ["native", "none", "none"]),
        ("wint4_afp8/default", ["none"] * 3),
        (
            "wint4_aint8/a_per_token_dynamic",
            ["as wint4_afp16/default"] * 3,
        ),
        ("wfp4_afp4/default", ["as wfp4_afp16/default", "native", "native"]),
        ("wfp4_afp16/default", ["native"] * 3),
        ("wfp4_afp16/w_group64", ["none"] * 3),
        ("wfp4_afp8/default", ["none"] * 3),
        ("wfp4_afp16/mx", ["native", "as wfp4_afp4/mx", "as wfp4_afp4/mx"]),
        ("wfp4_afp4/mx", ["as wfp4_afp16/mx", "native", "native"]),
        ("wfp4_afp8/mx", ["as wfp4_afp16/mx", "as wfp4_afp4/mx", "as wfp4_afp4/mx"]),
    ],
)
def test_vllm_runs_what_its_code_says(recipe: str, words: list[str]) -> None:
    assert [status(name, recipe) for name in VLLM] == words


@pytest.mark.parametrize(
    ("recipe", "words"),
    [  # on TensorRT-LLM: SM90, SM100
        ("wfp8_afp8/recipe_match_channel_token", ["native", "none"]),
        ("wfp8_afp8/w_block128x128_a_group128", ["native", "native"]),
        ("wfp4_afp4/default", ["as wfp4_afp16/default", "native"]),
        ("wfp4_afp8/default", ["none", "native"]),
        ("wfp4_afp8/w_mx", ["none", "native"]),
        ("wint4_afp8/default", ["native", "native"]),
        ("wint8_aint8/default", ["none", "none"]),
    ],
)
def test_tensorrt_llm_runs_what_its_support_matrix_says(recipe: str, words: list[str]) -> None:
    assert [status(name, recipe) for name in ("trtllm_sm90", "trtllm_sm100")] == words


# By hand, SM90: wfp8_afp8 6 of 9, wfp8_afp16 6, wint8_aint8 6, wint8_afp16 7, wint4_afp16 7, wint4_afp8 1,
# wfp4_afp16 3; wint4_aint8 2 as others.
def test_of_the_origins_144_points_most_are_served_by_nothing() -> None:
    counted = {name: Counter[str]() for name in TARGETS}
    for name, target in TARGETS.items():
        counted[name].update(target.status(pair, granularity).kind for pair in PAIRS for granularity in GRANULARITIES)
    assert {name: (found["native"], found["runs_as"], found["none"]) for name, found in counted.items()} == {
        "vllm_sm90": (36, 2, 106),
        "vllm_sm100": (29, 2, 113),
        "vllm_sm120": (29, 2, 113),
        "trtllm_sm90": (20, 0, 124),
        "trtllm_sm100": (13, 0, 131),
    }


@pytest.mark.parametrize("name", VLLM)
def test_fp8_blocks_run_under_powers_of_two_unless_the_server_is_told_otherwise(name: str) -> None:
    plain = TARGETS[name].status("wfp8_afp8", "w_block128x128_a_group128")
    served = TARGETS[name].status("wfp8_afp8", "w_block128x128_a_group128_e8m0")
    assert re.search(r"VLLM_USE_DEEP_GEMM(_E8M0)?=0 serves it as scored", plain.reason or "")
    assert "outputs in multiples of 64" in (served.reason or "")
    assert served.export == {"compressed_tensors": "float-quantized"}


def test_an_algorithm_that_the_reader_cannot_hold_does_not_run_and_says_what_it_can() -> None:
    found = TARGETS["vllm_sm90"].status("wfp8_afp8", "default", "awq_lite")
    assert found.kind == "none"
    assert "it can: max, mse" in (found.reason or "")
    assert status("vllm_sm90", "wint4_afp16/default", "awq_lite") == "native"
    assert status("vllm_sm90", "wint8_aint8/default", "smoothquant") == "native"
    assert status("vllm_sm90", "wfp4_afp16/mx", "mse") == "none"


def test_a_recipe_that_nobody_lists_is_none_with_a_reason() -> None:
    found = TARGETS["trtllm_sm90"].status("own", "own")
    assert (found.kind, found.runs_as, found.reader_name, dict(found.export)) == ("none", None, None, {})
    assert found.reason == "trtllm_sm90 has nothing that runs own/own"


def test_a_status_names_reader_export_and_source() -> None:
    found = TARGETS["vllm_sm90"].status("wfp4_afp4", "default")
    assert (found.kind, found.runs_as) == ("runs_as", "wfp4_afp16/default")
    assert found.export == {"compressed_tensors": "nvfp4-pack-quantized", "modelopt": "NVFP4"}
    assert "CompressedTensorsW4A4Fp4" in (found.reader_name or "")
    assert "issue 36806" in (found.source or "")


def test_reports_list_every_target() -> None:
    found = served_as("wfp4_afp4", "default", "max")
    assert list(found) == NAMES
    assert found["vllm_sm90"] == {
        "status": "runs_as",
        "runs_as": "wfp4_afp16/default",
        "reader_name": "CompressedTensorsW4A4Fp4 on Marlin (NVFP4)",
    }
    assert found["trtllm_sm100"]["status"] == "native"


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"wfp8_afp9__default": {}}, r"'wfp8_afp9'\. Did you mean 'wfp8_afp8'"),
        ({"wfp8_afp8__w_grup64": {}}, r"'w_grup64'\. Did you mean 'w_group64'"),
        ({"wfp8_afp8__default": {"also": ["w_per_tensr"]}}, r"Did you mean 'w_per_tensor'"),
        ({"wfp8_afp8__default": {"also": "w_per_tensor"}}, "Type a list of names"),
        ({"wfp8_afp8__default": {"algorithms": ["awq_lit"]}}, "Did you mean 'awq_lite'"),
        ({"wfp8_afp8__default": {"runs_at": "x"}}, "Did you mean 'runs_as'"),
        ({"wfp8_afp8__default": {"source": "z"}}, "Unknown source"),
        ({"wfp8_afp8__default": {"export": {"gguf": "q4"}}}, "Unknown export format"),
        (
            {"wfp8_afp8__default": {"also": ["w_per_tensor"]}, "wfp8_afp8__w_per_tensor": {}},
            "lists wfp8_afp8/w_per_tensor twice",
        ),
        ({"wfp8_afp8__default": {"runs_as": "wfp8_afp16/default"}}, "Unknown recipe that"),
        ({"wfp8_afp8__default": {"runs_as": "wfp8_afp8/default"}}, "Unknown recipe that"),
    ],
)
def test_a_file_that_names_what_does_not_exist_is_refused(recipes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        Target.from_config(config_of(**recipes))


def test_a_recipe_without_a_source_is_refused() -> None:
    config = replace(config_of(), recipes={"wfp8_afp8/default": {"reader_name": "R"}})
    with pytest.raises(SweepError, match="lacks 'source'"):
        Target.from_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_source_is_named_by_a_recipe_or_a_kernel(name: str) -> None:
    node = yaml.safe_load((conf_dir() / "target" / f"{name}.yaml").read_text())
    named = [*node["recipes"].values(), *node["kernels"].values()]
    assert set(node["sources"]) == {each["source"] for each in named}


@pytest.mark.parametrize("name", NAMES)
def test_the_deployable_grid_is_what_the_target_runs_and_nothing_else(name: str) -> None:
    points = expand(["grid=deployable", f"target={name}"], multirun=True).points
    found = [(point.quant_pair.name, point.quant_granularity.name) for point in points]
    assert found == [(recipe.quant_pair, recipe.quant_granularity) for recipe in TARGETS[name].recipes]
    assert all(status(name, "/".join(point)) != "none" for point in found)
    assert {(point.sensitivity.scales, point.sensitivity.quant_algorithm, point.dataset.size) for point in points} == {
        ("fused", "max", "medium")
    }
    assert len({resolved(*point).id for point in found}) == len(found)  # each recipe once


def test_the_deployable_grid_scores_by_projections_unless_a_method_is_typed() -> None:
    for typed, method in (([], "fisher"), (["sensitivity.method=gradient"], "gradient")):
        points = expand(["grid=deployable", *typed], multirun=True).points
        assert {point.sensitivity.method for point in points} == {method}
    assert expand(["grid=origin"], multirun=True).points[0].sensitivity.method == "gradient"


def test_lists_narrow_the_deployable_grid() -> None:
    lists = [
        "quant_pair=wfp8_afp8,wfp8_aint8,wint4_afp16",
        "quant_granularity=default,w_group64,w_per_tensor",
        "dataset.size=small,large",
    ]
    points = expand(["grid=deployable", *lists], multirun=True).points
    recipes = [("wfp8_afp8", "default"), ("wint4_afp16", "default"), ("wint4_afp16", "w_group64")]
    assert [(p.quant_pair.name, p.quant_granularity.name, p.dataset.size) for p in points] == [
        (*r, size) for r in recipes for size in ("small", "large")
    ]


def test_a_recipe_with_several_names_comes_under_the_one_asked_for() -> None:
    (point,) = expand(
        ["grid=deployable", "quant_pair=wint4_afp16", "quant_granularity=a_per_token_dynamic"], multirun=True
    ).points
    assert point.quant_granularity.name == "a_per_token_dynamic"


def test_algorithms_asked_for_are_those_that_the_target_can_hold() -> None:
    points = expand(
        ["grid=deployable", "sensitivity.quant_algorithm=max,awq_lite,smoothquant", "quant_pair=glob(wint4_afp*)"],
        multirun=True,
    ).points
    assert Counter((p.quant_pair.name, p.sensitivity.quant_algorithm) for p in points) == {
        ("wint4_afp16", "max"): 3,
        ("wint4_afp16", "awq_lite"): 3,
        ("wint4_afp8", "max"): 1,
    }


def test_what_is_typed_wins_over_the_shared_scales_of_the_grid() -> None:
    points = expand(["grid=deployable", "sensitivity.scales=private", "quant_pair=wint4_afp16"], multirun=True).points
    assert {point.sensitivity.scales for point in points} == {"private"}


def test_a_target_that_runs_none_of_the_points_is_refused_by_name() -> None:
    with pytest.raises(SweepError) as caught:
        expand(["grid=deployable", "target=vllm_sm120", "quant_pair=wint8_aint8,wfp8_aint8"], multirun=True)
    for text in ("vllm_sm120", "quant_pair=wint8_aint8,wfp8_aint8", "wfp8_afp8/default", "grid=none"):
        assert text in str(caught.value)


def test_a_multirun_that_says_nothing_takes_the_default_grid() -> None:
    def n_points(*overrides: str) -> int:
        return len(expand(overrides, multirun=True, default_grid="deployable").points)

    assert n_points() == len(TARGETS["vllm_sm90"].recipes)
    assert n_points("target=trtllm_sm90", "dataset=scenes") == len(TARGETS["trtllm_sm90"].recipes)
    assert n_points("quant_pair=wfp8_aint8") == 1
    assert n_points("dataset.size=small,medium") == 2
    assert n_points("grid=none") == 1
    assert len(expand([], multirun=False, default_grid="deployable").points) == 1


def test_a_target_is_one_for_the_whole_grid() -> None:
    with pytest.raises(SweepError, match="target is one for the whole grid"):
        expand(["target=vllm_sm90,vllm_sm100"], multirun=True)


def test_the_facts_say_where_they_were_read() -> None:
    for path in sorted((conf_dir() / "target").glob("*.yaml")):
        for source in yaml.safe_load(Path(path).read_text())["sources"].values():
            assert re.match(
                r"(vllm-project/vllm|NVIDIA/TensorRT-LLM)(@[0-9a-f]{12}| (main|issue|pull request|20\d\d))", source
            ), source


SPEED = {"gb": 8, "decode_1": 200, "decode_32": 5000, "prefill": 70000}
SPEEDS: dict[str, Any] = {
    "card": "one card",
    "runtime": "a runtime 1",
    "model": "a model",
    "date": "today",
    "how": "so",
}


def with_speeds(**changed: Any) -> TargetConfig:
    recipes = {"unquantized": SPEED, "wfp8_afp8/default": {**SPEED, "gb": 4}}
    node = {name: value for name, value in {**SPEEDS, "recipes": recipes, **changed}.items() if value is not None}
    return replace(config_of(wfp8_afp8__default={"also": ["w_per_tensor"]}), speeds=node)


def test_speeds_are_read_and_found_under_every_name_of_a_recipe() -> None:
    target = Target.from_config(with_speeds())
    assert target.speeds is not None
    assert (target.speeds.card, target.speeds.runtime, target.speeds.date) == ("one card", "a runtime 1", "today")
    fp8 = Speed(gb=4, decode_1=200, decode_32=5000, prefill=70000)
    assert [target.speed("wfp8_afp8", name) for name in ("default", "w_per_tensor", "w_group64")] == [fp8, fp8, None]


def test_one_target_has_measured_speeds_of_recipes_that_it_runs_as_themselves() -> None:
    assert [name for name, target in TARGETS.items() if target.speeds is not None] == ["vllm_sm90"]
    speeds = TARGETS["vllm_sm90"].speeds
    assert speeds is not None
    assert {status("vllm_sm90", name) for name in speeds.recipes if name != "unquantized"} == {"native"}
    assert speeds.recipes["wfp4_afp16/default"] == Speed(gb=2.94, decode_1=271, decode_32=6830, prefill=37500)


def test_a_target_without_speeds_has_none_of_any_recipe() -> None:
    target = Target.from_config(config_of(wfp8_afp8__default={}))
    assert (target.speeds, target.speed("wfp8_afp8", "default")) == (None, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"recipes": {"unquantized": SPEED, "wfp8_afp8/defualt": SPEED}},
            r"recipe in speeds of target 'own' 'wfp8_afp8/defualt'\. Did you mean 'wfp8_afp8/default'",
        ),
        ({"cart": "one card"}, "Did you mean 'card'"),
        ({"recipes": {"unquantized": {**SPEED, "prefil": 1}}}, "Did you mean 'prefill'"),
        ({"recipes": {"wfp8_afp8/default": SPEED}}, "lack 'unquantized'"),
        ({"recipes": {"unquantized": {**SPEED, "decode_1": 0}}}, "numbers above 0: gb, decode_1, decode_32, prefill"),
        ({"recipes": {"unquantized": {"gb": 8}}}, "missing required field `decode_1`"),
        ({"recipes": "fast"}, "Type texts, and for each recipe numbers"),
        ({"recipes": None}, "missing required field `recipes`"),
        ({"card": None}, "missing required field `card`"),
    ],
)
def test_speeds_that_cannot_be_read_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        Target.from_config(with_speeds(**changed))
