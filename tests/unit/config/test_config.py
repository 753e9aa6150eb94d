"""The config tree composes, is read, and refuses what it does not know; overrides become a grid in a stable order."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweep.config import compose
from sweep.config.compose import dataset_of, expand, to_yaml
from sweep.config.schema import OWN_KINDS, SECTIONS, SweepConfig, from_record, to_plain, to_record
from sweep.core.errors import SweepError
from sweep.core.pairs import PairConfig
from sweep.core.paths import conf_dir

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(path for path in conf_dir().glob("*/*.yaml"))
OPTIONS = [f"{path.parent.name}={path.stem}" for path in FILES]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SWEEP_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def points(*overrides: str) -> tuple[SweepConfig, ...]:
    return expand(overrides, multirun=True).points


def point(*overrides: str) -> SweepConfig:
    (only,) = expand(overrides, multirun=False).points
    return only


def node(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_file_of_the_config_tree_composes(option: str) -> None:
    group, _, name = option.partition("=")
    own = {"model=hf_causal_lm": "model.path=/models/any"}
    own |= {f"dataset={kind}": "dataset.path=/data/any.jsonl" for kind in OWN_KINDS}
    path = [own[option]] if option in own else []
    composed = points(option, *path)
    assert composed
    if hasattr(composed[0], group) and "name" in to_plain(composed[0])[group] and not path:
        assert to_plain(composed[0])[group]["name"] == name


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name != "grid"], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_file_says_every_key_of_its_group_and_no_other(path: Path) -> None:
    section: Any = SECTIONS[path.parent.name]
    assert set(node(path)) == {field.name for field in fields(section)}


def test_no_key_is_read_by_nobody() -> None:
    code = "\n".join(
        path.read_text(encoding="utf-8") for room in ("sweep", "workers") for path in (ROOT / room).rglob("*.py")
    )
    for section, kind in SECTIONS.items():
        for field in fields(kind):  # pyright: ignore[reportArgumentType]
            if (section, field.name) == ("output_layout", "name"):
                continue  # the option's own name, for people
            assert re.search(rf"\.{field.name}\b", code), f"{section}.{field.name}"


def test_the_default_is_one_small_trial_of_the_bundled_model() -> None:
    default = point()
    assert (default.model.name, default.model.path, default.dataset.name, default.dataset.size) == (
        "qwen3_vl_tiny",
        None,
        "wordnet_glosses",
        "small",
    )
    assert (default.sensitivity.method, default.sensitivity.coverage, default.output_layout.name) == (
        "gradient",
        "lm_only",
        "tmp",
    )


def test_the_origins_grid_is_its_16_pairs_9_granularities_and_3_sizes() -> None:
    grid = expand(["grid=origin"], multirun=True)
    formats = ("fp4", "fp8", "int4", "int8")
    assert set(grid.axes["quant_pair"]) == {
        f"w{weight}_a{inputs}" for weight in formats for inputs in ("fp16", "fp8", "int8", "int4")
    }
    # Formats that are served, but were not in the origin's grid.
    added = {"mx", "w_mx", "w_block128x128_a_group128", "w_block128x128_a_group128_e8m0"}
    assert (
        set(grid.axes["quant_granularity"])
        == {path.stem for path in (conf_dir() / "quant_granularity").glob("*.yaml")} - added
    )
    assert len(grid.points) == 16 * 9 * 3
    assert len({(p.quant_pair.name, p.quant_granularity.name, p.dataset.size) for p in grid.points}) == 16 * 9 * 3


def test_the_demo_grid_runs_on_a_cpu() -> None:
    demo = points("grid=demo")
    assert len(demo) == 4 * 3 * 3
    assert not any("fp4" in (p.quant_pair.weight, p.quant_pair.activation) for p in demo)


def test_a_pairs_name_is_its_formats() -> None:
    for path in (conf_dir() / "quant_pair").glob("*.yaml"):
        pair = PairConfig.from_node("quant_pair", node(path))
        assert pair.name == path.stem == f"w{pair.weight}_a{pair.activation}"


def test_pairs_are_outermost_in_the_order_given() -> None:
    grid = points(
        "quant_pair=wint4_aint8,wfp8_afp8", "quant_granularity=w_group64,default", "dataset.size=medium,small"
    )
    pairs, granularities, sizes = ("wint4_aint8", "wfp8_afp8"), ("w_group64", "default"), ("medium", "small")
    expected = [(pair, granularity, size) for pair in pairs for granularity in granularities for size in sizes]
    assert [(p.quant_pair.name, p.quant_granularity.name, p.dataset.size) for p in grid] == expected


def test_a_group_is_put_in_before_its_keys_whatever_the_order_typed() -> None:
    typed = ["dataset.size=small,medium", "dataset=scenes,wordnet_glosses", "dataset.max_tokens=99"]
    expected = [(size, name, 99) for size in ("small", "medium") for name in ("scenes", "wordnet_glosses")]
    assert [(p.dataset.size, p.dataset.name, p.dataset.max_tokens) for p in points(*typed)] == expected


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("quant_pair=glob(wint8_*)", "quant_pair", ("wint8_afp16", "wint8_afp8", "wint8_aint4", "wint8_aint8")),
        ("quant_pair=choice(wfp8_afp8,wint8_aint8)", "quant_pair", ("wfp8_afp8", "wint8_aint8")),
        ("dataset.max_tokens=range(64,257,64)", "dataset.max_tokens", ("64", "128", "192", "256")),
        ("sensitivity.coverage=all_layers,lm_only", "sensitivity.coverage", ("all_layers", "lm_only")),
        ("dataset.size=small,medium,small", "dataset.size", ("small", "medium")),
    ],
)
def test_lists_are_hydras_and_equal_values_count_once(override: str, key: str, expected: tuple[str, ...]) -> None:
    grid = expand([override], multirun=True)
    assert grid.axes == {key: expected}
    assert len(grid.points) == len(expected)


def test_any_key_may_be_an_axis() -> None:
    grid = points("model=hf_causal_lm", "model.path=/a/First-1.5B,/b/second", "sensitivity.lm_head=true,false")
    assert [(p.model.name, p.sensitivity.lm_head) for p in grid] == [
        ("first_1_5b", True),
        ("first_1_5b", False),
        ("second", True),
        ("second", False),
    ]


def test_what_is_typed_wins_over_the_grid_file() -> None:
    grid = expand(["grid=demo", "quant_pair=wint8_afp16", "dataset.size=large,small"], multirun=True)
    assert grid.axes["quant_pair"] == ("wint8_afp16",)
    assert grid.axes["dataset.size"] == ("large", "small")
    assert len(grid.points) == 1 * 3 * 2


def test_a_grid_needs_no_lists() -> None:
    assert len(points()) == len(points("quant_pair=wfp8_afp8", "dataset.size=large")) == 1


def test_each_choice_is_composed_once_not_each_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path))
    composed: list[Sequence[str]] = []
    stock = compose.compose

    def counting(config_name: str, overrides: list[str]) -> Any:
        composed.append(overrides)
        return stock(config_name, overrides)

    monkeypatch.setattr(compose, "compose", counting)
    assert len(points("grid=origin")) == 432
    assert len(composed) <= 1 + 16 + 9 + 3


def test_a_new_pair_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = tmp_path / "conf"
    shutil.copytree(conf_dir(), tree)
    text = (
        "name: own\nweight: int8\nactivation: int4\nformat_name: INT8_DEFAULT_CFG\n"
        "quant_cfg_overrides:\n  '*input_quantizer': {num_bits: 4, axis: null}\n"
    )
    (tree / "quant_pair" / "own.yaml").write_text(text)
    monkeypatch.setattr(compose, "conf_dir", lambda: tree)
    monkeypatch.setattr(compose, "_tree_key", lambda: str(tree))
    assert point("quant_pair=own").quant_pair.quant_cfg_overrides == {"*input_quantizer": {"num_bits": 4, "axis": None}}


@pytest.mark.parametrize(
    ("overrides", "found", "advice"),
    [
        (["quant_pair=wfp8_afp9"], "'wfp8_afp9'", "Did you mean 'wfp8_afp8'"),
        (["quant_par=wfp8_afp8"], "'quant_par'", "Did you mean 'quant_pair'"),
        (["quant_granularity=w_grup64"], "'w_grup64'", "Did you mean 'w_group64'"),
        (["grid=dmo"], "'dmo'", "Did you mean 'demo'"),
        (["dataset.sizee=small"], "'dataset.sizee'", "Did you mean 'dataset.size'"),
        (["dataset.size=tiny"], "'tiny'", "small, medium, large"),
        (["dataset.max_tokens=many"], "'many'", "a whole number"),
        (["dataset.max_tokens=1"], "dataset.max_tokens=1", "at least 2"),
        (["output_layout.overwrite=yes"], "'yes'", "true or false"),
        (["cluster.workers=0"], "cluster.workers=0", "at least 1"),
        (["cluster.gpus_per_worker=1.5"], "gpus_per_worker=1.5", "a fraction up to 1, or a whole number"),
        (
            ["cluster.gpus_per_worker=2", "sensitivity.method=kl_div"],
            "method=kl_div runs the model on one GPU",
            "Type cluster.gpus_per_worker=1, or",
        ),
        (
            ["cluster.gpus_per_worker=2", "sensitivity.engine=modelopt"],
            "engine=modelopt runs the model on one GPU",
            "or sensitivity.engine=layerwise",
        ),
        (["cluster.gpus_per_worker=nan"], "nan", "a fraction up to 1, or a whole number"),
        (["cluster.gpus_per_worker=0"], "gpus_per_worker=0", "a fraction up to 1, or a whole number"),
        (["sensitivity.method=hessian"], "'hessian'", "gradient"),
        (["hydra.job.name=x"], "'hydra.job.name'", "Choose one of"),
        (["quant_pair=../quant_pair/wfp8_afp8"], "'../quant_pair/wfp8_afp8'", "Choose one of"),
        (["model.name=../../etc"], "'../../etc'", "lower-case letters"),
        (["quant_granularity.name=a/b"], "'a/b'", "lower-case letters"),
        (["model=hf_causal_lm"], "model.path has no value", "Type model.path="),
        (["+extra=1"], "'+extra=1'", "Type key=value"),
        (["~store"], "'~store'", "Type key=value"),
        (["quant_pair@other=wfp8_afp8"], "'quant_pair@other'", "quant_pair"),
        (["dataset.size=small,medium"], "several values", "sweep run -m dataset.size=small,medium"),
        (["grid=demo"], "grid=", "-m"),
        (["dataset.size"], "dataset.size", "key=value"),
        (["dataset.size=[small"], "[small", "key=value"),
    ],
)
def test_wrong_input_is_refused_with_what_was_found_and_what_to_type(
    overrides: list[str], found: str, advice: str
) -> None:
    with pytest.raises(SweepError) as caught:
        expand(overrides, multirun=False)
    assert found in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("dataset.size=small,tiny", "small, medium, large"),
        ("quant_pair=wfp8_afp8,wint88", "wint8"),
        ("dataset.max_tokens=interval(1,2)", "range()"),
    ],
)
def test_wrong_values_in_a_list_are_refused_before_anything_runs(override: str, advice: str) -> None:
    with pytest.raises(SweepError, match=re.escape(advice)):
        points(override)


def test_a_relative_store_is_made_absolute_and_a_url_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert point("store.uri=here/store").store.uri == str(tmp_path / "here" / "store")
    assert point("store.uri=s3://bucket/store").store.uri == "s3://bucket/store"


@pytest.mark.parametrize(
    ("path", "name"), [("/models/Llama-3.2_1B/", "llama_3_2_1b"), ("Qwen/Qwen3-0.6B", "qwen3_0_6b")]
)
def test_a_checkpoint_given_by_path_is_named_after_it(path: str, name: str) -> None:
    assert point("model=hf_causal_lm", f"model.path={path}").model.name == name
    assert point("model=hf_causal_lm", f"model.path={path}", "model.name=mine").model.name == "mine"


def test_the_plain_config_is_json_in_a_stable_order_and_the_yaml_says_the_same() -> None:
    config = point("quant_granularity=w_group64", "quant_pair=wint4_afp8")
    plain = to_plain(config)
    assert list(plain) == [field.name for field in fields(SweepConfig)]
    assert json.loads(json.dumps(plain)) == plain == yaml.safe_load(to_yaml(config))
    assert plain["quant_granularity"]["quant_cfg_overrides"] == {"*weight_quantizer": {"block_sizes": {"-1": 64}}}
    assert config.quant_granularity.quant_cfg_overrides == {"*weight_quantizer": {"block_sizes": {-1: 64}}}


def test_a_remembered_composition_is_the_composed_one() -> None:
    first, second = (points("quant_granularity=glob(*)", "quant_pair=wint4_afp8,wfp8_aint8") for _ in range(2))
    assert first == second


def test_an_unknown_key_in_a_file_is_refused_with_the_nearest_spelling() -> None:
    with pytest.raises(SweepError, match=r"Did you mean 'quant_pair\.format_name'"):
        PairConfig.from_node(
            "quant_pair",
            {"name": "x", "weight": "int8", "activation": "int8", "format_nam": "X", "quant_cfg_overrides": {}},
        )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["quant_pair=glob(zzz*)"], "quant_pair=... matches nothing"),
        (["store.uri=a,b"], "store.uri is one for the whole grid"),
        (["sensitivity.draws=8"], "method=gradient has none. Type sensitivity.method=fisher, or leave"),
        (
            ["sensitivity.draws=8", "sensitivity.method=kl_div"],
            "method=kl_div has none. Type sensitivity.method=fisher",
        ),
        (["sensitivity.draws=0", "sensitivity.method=fisher"], "sensitivity.draws=0 is not allowed. Type 1 to 256."),
        (["sensitivity.engine=modelopt", "sensitivity.method=fisher"], "Type sensitivity.method=gradient, or engine="),
        (["sensitivity.memory_gb=4,8"], "sensitivity.memory_gb is one for the whole grid"),
        (["grid=demo,origin"], "grid is one for the whole grid"),
        (["sensitivity.engine=modelopt", "sensitivity.scales=fused"], "Type sensitivity.scales=private"),
        (["store.uri=memory://x"], "lives in one process only"),
    ],
)
def test_what_is_no_axis_or_no_place_is_refused(overrides: list[str], text: str) -> None:
    with pytest.raises(SweepError, match=re.escape(text)):
        points(*overrides)


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize("form", ["[{}]", "{}"])
def test_lists_of_validation_are_values_and_no_grid(form: str, multirun: bool) -> None:
    typed = {"dataset": "chat,wordnet_glosses,text", "path": "~/a.jsonl,null,'b c, d'"}
    overrides = [f"validation.{key}={form.format(value)}" for key, value in typed.items()]
    (point,) = expand([*overrides, "grid=none"], multirun=multirun).points
    home = str(Path.home())
    assert point.validation.sources == [
        ("chat", f"{home}/a.jsonl"),
        ("wordnet_glosses", None),
        ("text", "b c, d"),
    ]


def test_data_sets_to_validate_on_are_options_with_their_paths() -> None:
    chats, captions = dataset_of("chat", "a/Chats-2.jsonl"), dataset_of("coco2017_captions", "own.txt")
    assert (chats.kind, chats.name, chats.path, chats.loss) == ("chat", "chats_2", "a/Chats-2.jsonl", "answers")
    assert (captions.kind, captions.captions_path, captions.path) == ("captions", "own.txt", None)
    assert dataset_of("scenes", None) == expand(["dataset=scenes"], multirun=False).points[0].dataset


def test_a_value_of_the_environment_is_no_part_of_a_config_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(SweepError, match=re.escape('let the shell put it in: key="$SECRET"')) as refused:
        points("dataset.captions_path=${oc.env:SECRET}")
    assert "hunter2" not in str(refused.value)


def test_a_path_given_to_the_bundled_models_group_is_another_model() -> None:
    assert point("model.path=/models/My-Llama.2").model.name == "my_llama_2"
    assert point().model.name == "qwen3_vl_tiny"


def test_the_record_of_an_earlier_version_is_read_as_it_was_meant() -> None:
    (point,) = expand([], multirun=False).points
    record = json.loads(json.dumps(to_record(point)))
    for section, key in (("sensitivity", "scales"), ("cluster", "address"), ("cluster", "dashboard")):
        del record[section][key]
    assert from_record(record, point.target, point.validation) == point
