"""`sweep export`: what is written comes back, and what cannot be meant is refused with exit code 2."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.recipe import load_recipe
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import workers.export.calibrated
import workers.export.checkpoint
from sweep.cli import main
from sweep.commands.export import check_held, serve_line
from sweep.config.compose import expand
from sweep.config.schema import to_record
from sweep.config.targets import target_called
from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.recipe_context import _loaded
from sweep.mixed_precision.text import check_modelopt, to_csv, to_modelopt
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from sweep.plan.trials import recipe_of as recipe_of_point
from sweep.store.records import TrialRow
from sweep.store.store import Store
from tests.exports import FORMATS, SERVED_WITH, recipe_of
from tests.foreign import PLACES, foreign, seen
from tests.formats import group_format
from workers.data.batches import make_plan
from workers.export.modelopt_recipe import read_modelopt
from workers.model.loading import load
from workers.quant.linear import LinearQuant
from workers.scoring.validation import Validator

MODEL = Model(bundled_model_dir())
NAMES = ["nvfp4", "fp8_tensor_static", "int4_groups_weight_only", None, "fp8_blocks", "int8_channel_token"]


@pytest.fixture(scope="module")
def recipe() -> MixedRecipe:
    found = recipe_of([name and group_format(name, *FORMATS[name]) for name in NAMES])
    dataset = expand(["dataset.size=small"], multirun=False).points[0].dataset
    return replace(found, dataset_revision=make_plan(samples_of(dataset, MODEL, 16), packed=True).digest("small"))


@pytest.fixture
def run(tmp_path: Path, recipe: MixedRecipe) -> Callable[..., int]:
    def export(
        file_format: str,
        out: str,
        *rest: str,
        other: MixedRecipe | None = None,
        edited: Callable[[str], str] = lambda text: text,
        typed: bool = False,
    ) -> int:
        path = tmp_path / "recipe.yaml"
        path.write_text(edited((other or recipe).to_yaml()))
        return main(
            [
                "export",
                str(path),
                "--format",
                file_format,
                "--out",
                out if typed else str(tmp_path / out),
                f"store.uri={tmp_path / 'store'}",
                *rest,
            ]
        )

    return export


NO_IMAGES = """--limit-mm-per-prompt '{"image": 0, "video": 0}'"""


def test_a_checkpoint_is_written_checked_and_told_how_to_serve(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compressed-tensors", "out") == 0
    assert f"vllm serve {tmp_path / 'out'} {SERVED_WITH}" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "sweep_recipe.yaml",
    } <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]  # nothing half-made is left


@pytest.mark.parametrize(
    ("target", "line"),
    [(None, f"vllm serve OUT {SERVED_WITH}"), ("trtllm_sm100", "trtllm-serve OUT --max_seq_len 4096")],
)
def test_a_modelopt_checkpoint_is_written_and_told_how_to_serve(
    tmp_path: Path,
    run: Callable[..., int],
    recipe: MixedRecipe,
    capsys: pytest.CaptureFixture[str],
    target: str | None,
    line: str,
) -> None:
    formats = [named("wfp4_afp4", "nvfp4"), None, named("wint4_afp16", "int4_groups_weight_only")]
    other = replace(recipe_of(formats), dataset_revision=recipe.dataset_revision, target=target)
    assert run("modelopt-checkpoint", "out", other=other) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines()[-1] == line.replace("OUT", str(out))
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "MIXED_PRECISION"
    listed = json.loads((out / "sweep_manifest.json").read_text())["files"]
    assert {"hf_quant_config.json", "config.json", "model.safetensors"} < set(listed)


def named(pair: str, name: str) -> GroupFormat:
    return replace(group_format(pair, *FORMATS[name]), quant_pair=pair)


@pytest.mark.usefixtures("calibrated_never")
def test_formats_that_the_target_reads_in_no_modelopt_checkpoint_are_refused(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = [named("wfp8_afp8", "fp8_tensor_static"), named("wint4_afp16", "int4_groups_weight_only")]
    other = replace(recipe_of(formats), dataset_revision=recipe.dataset_revision, target="vllm_sm90")
    assert run("modelopt-checkpoint", "out", other=other) == 2
    said = capsys.readouterr().err
    assert "reads no wint4_afp16/default in a ModelOpt checkpoint. Type --format compressed-tensors" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("calibrated_never")
def test_what_a_modelopt_checkpoint_has_no_name_for_is_refused(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("modelopt-checkpoint", "out") == 2
    assert "a ModelOpt checkpoint can't express inputs: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("calibrated_never")
def test_a_group_that_the_targets_kernels_do_not_take_is_refused(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = replace(named("wfp8_afp8", "fp8_blocks"), quant_granularity="w_block128x128_a_group128")
    other = replace(recipe_of([blocks]), dataset_revision=recipe.dataset_revision, target="vllm_sm90 tp=2")
    assert run("compressed-tensors", "out", other=other) == 2
    said = capsys.readouterr().err
    assert "vllm_sm90 tp=2 cannot run model.language_model.layers.0.self_attn.q_proj" in said
    assert "64 outputs a rank, no multiple of 128" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [("vllm_sm90 tp=2", "--tensor-parallel-size 2 --max-logprobs 20"), ("trtllm_sm90 tp=4", "--tp_size 4")],
)
def test_the_line_that_serves_says_the_number_of_ranks(tmp_path: Path, target: str, words: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = target_called(target)
    assert found is not None
    assert serve_line(tmp_path, found) == f"{found.server.command} {tmp_path} {words}"


@pytest.fixture
def calibrated_never(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("calibrated before it was refused")

    monkeypatch.setattr(workers.export.calibrated, "calibrated", refuse)


@pytest.mark.parametrize("scales", ["fused", "private"])
def test_scales_of_inputs_go_where_they_belong_or_nowhere(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, capsys: pytest.CaptureFixture[str], scales: Any
) -> None:
    awq = group_format("int4", *FORMATS["int4_groups_weight_only"], "awq_lite", scales)
    found = run(
        "compressed-tensors", "out", other=replace(recipe_of([awq, None]), dataset_revision=recipe.dataset_revision)
    )
    if scales == "private":
        assert found == 2
        assert "sensitivity.scales=fused" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    assert found == 0
    norm = "model.language_model.layers.0.input_layernorm.weight"
    scale = (
        load_file(tmp_path / "out" / "model.safetensors")[norm]
        / load_file(MODEL.path / "model.safetensors")[norm].float()
    )
    assert float((scale - 1).abs().max()) > 0.01


def test_what_is_there_stays_unless_told_and_what_others_put_there_stays(
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        assert run("compressed-tensors", "out", *overwrite) == 2
        assert "mine" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    for _ in range(2):
        assert run("compressed-tensors", "out", "--overwrite") == 0
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"config.json", "model.safetensors", "sweep_recipe.yaml", "sweep_manifest.json"} < names
    (tmp_path / "out" / "config.json").write_text("{}")
    assert run("compressed-tensors", "out", "--overwrite") == 2
    config = tmp_path / "out" / "config.json"
    assert "holds config.json, in the way of a checkpoint. Only files that" in (said := capsys.readouterr().err)
    assert f"Type mv -n {config} {config}.old, or give another place with --out." in said
    assert config.read_text() == "{}"


@pytest.fixture
def calibrated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers for every export of this file's recipe, which take a second each time."""

    def calibrated(*args: Any) -> Any:
        if not _calibrated:
            _calibrated.append(real(*args))
        return _calibrated[0]

    real = workers.export.calibrated.calibrated
    monkeypatch.setattr("workers.export.calibrated.calibrated", calibrated)


_calibrated: list[Any] = []


@pytest.mark.parametrize("place", PLACES)
def test_a_checkpoint_takes_nothing_of_others_away(
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    PLACES[place].make(tmp_path / "out", tmp_path / "elsewhere")
    before = seen(tmp_path)
    code = run("compressed-tensors", "out", "--overwrite")
    after = seen(tmp_path)
    del after["recipe.yaml"]
    assert (code, after) == (2, before)
    assert re.search(r"^sweep export: .*([Gg]ive (another|that) place|Type mv)", capsys.readouterr().err)


@pytest.mark.parametrize("file_format", ["csv", "modelopt"])
@pytest.mark.parametrize("place", PLACES)
def test_a_text_takes_nothing_of_others_away(
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    place: str,
    file_format: str,
) -> None:
    PLACES[place].make(tmp_path / "out", tmp_path / "elsewhere")
    before = seen(tmp_path)
    code = run(file_format, "out", "--overwrite")
    after = seen(tmp_path)
    del after["recipe.yaml"]
    if place == "an empty file":  # nothing to lose
        assert code == 0
        return
    assert (code, after) == (2, before)
    assert re.search(r"^sweep export: .*([Gg]ive |Type mv)", capsys.readouterr().err)


def test_a_text_replaces_its_own_kind_alone(tmp_path: Path, run: Callable[..., int]) -> None:
    for file_format, other in (("csv", "modelopt"), ("modelopt", "csv")):
        assert run(file_format, file_format) == 0
        assert run(file_format, file_format) == 2
        assert run(file_format, file_format, "--overwrite") == 0
        before = (tmp_path / file_format).read_bytes()
        assert run(other, file_format, "--overwrite") == 2
        assert run(other, "recipe.yaml", "--overwrite") == 2
        assert (tmp_path / file_format).read_bytes() == before


@pytest.mark.usefixtures("calibrated_once")
def test_the_working_directory_keeps_what_it_holds(
    tmp_path: Path,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = foreign(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert run("compressed-tensors", "other") == 0  # makes the recipe's file
    assert main(["export", "../recipe.yaml", "--format", "compressed-tensors", "--out", "."]) == 2
    assert main(["export", "../recipe.yaml", "--format", "compressed-tensors", "--out", ".", "--overwrite"]) == 2
    assert seen(tmp_path / "here") == others
    monkeypatch.chdir(tmp_path / "other")
    assert main(["export", "../recipe.yaml", "--format", "compressed-tensors", "--out", ".", "--overwrite"]) == 0
    assert Path.cwd() == tmp_path / "other"
    assert (tmp_path / "other" / "model.safetensors").is_file()


@pytest.mark.parametrize("file_format", ["compressed-tensors", "csv", "modelopt"])
def test_the_root_is_refused(
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file_format: str,
) -> None:
    monkeypatch.delattr("workers.export.calibrated.calibrated")
    monkeypatch.delattr("sweep.store.files.Files.write")
    assert run(file_format, "/", "--overwrite") == 2
    assert "--out" in capsys.readouterr().err


def test_the_checkpoint_itself_is_not_replaced_by_its_export(
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not by a link to it either, nor if it is an export itself."""
    shutil.copytree(MODEL.path, tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    before = seen(tmp_path / "model")
    for out in ("model", "link", "link/../model"):
        assert run("compressed-tensors", out, "--overwrite", f"model.path={tmp_path / 'model'}") == 2
        assert "is the checkpoint itself" in capsys.readouterr().err
    assert seen(tmp_path / "model") == before


def _link_to_nothing(path: Path) -> None:
    (path / "link").symlink_to("nothing")


def _link_to_empty(path: Path) -> None:
    (path / "empty").mkdir()
    (path / "link").symlink_to("empty")


def _link_to_file(path: Path) -> None:
    (path / "mine").write_text("mine")
    (path / "link").symlink_to("mine")


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("file_format", ["compressed-tensors", "modelopt", "csv"])
@pytest.mark.parametrize(
    ("out", "make", "said"),
    [
        ("link", _link_to_nothing, "is a link to nothing, which is not there"),
        ("link/below", _link_to_nothing, "is a link to nothing, which is not there"),
        ("link", _link_to_empty, "link is a link to empty. Give that place itself"),
        ("link", _link_to_file, "link is a link to mine. Give that place itself"),
        ("model", None, "is the checkpoint itself"),
        ("model/inside", None, "is inside the checkpoint"),
        (".", None, "holds the checkpoint"),
        ("a" * 300, None, "File name too long"),
        ("a" * 300 + "/below", None, "File name too long"),
        ("/".join(["a" * 200] * 25), None, "File name too long"),
        (None, None, "--out is empty"),
    ],
)
def test_a_place_that_is_wrong_is_refused_and_nothing_is_changed(
    tmp_path: Path,
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    out: str | None,
    make: Callable[[Path], None] | None,
    said: str,
    file_format: str,
    overwrite: tuple[str, ...],
) -> None:
    place, own = tmp_path / "place", []
    (place / "model").mkdir(parents=True)
    if make is None:
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL.path / file, place / "model")
        own = [f"model.path={place / 'model'}"]
    else:
        make(place)
    monkeypatch.chdir(place)
    monkeypatch.delattr("workers.export.calibrated.calibrated")
    before = seen(place)
    assert run(file_format, "" if out is None else f"place/{out}", *overwrite, *own, typed=out is None) == 2
    assert re.fullmatch(rf"sweep export: .*{re.escape(said)}.*\n", capsys.readouterr().err)
    assert seen(place) == before


@pytest.mark.usefixtures("calibrated_once")
def test_a_full_disk_is_one_message_and_leaves_nothing(
    tmp_path: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("workers.export.checkpoint.save_file", full)
    assert run("compressed-tensors", "out/deeper") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("file_format", ["modelopt", "csv"])
def test_text_is_written_whole(tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, file_format: str) -> None:
    assert run(file_format, "out.yaml") == 0
    assert (tmp_path / "out.yaml").read_text() == (to_csv(recipe) if file_format == "csv" else to_modelopt(recipe))


def scored_row(recipe: MixedRecipe, **changed: str) -> TrialRow:
    """The trial that scored the first group of a recipe."""
    text = dict.fromkeys(
        ("coverage", "method", "engine", "quant_pair", "quant_granularity", "algorithm", "scales", "dtype", "versions"),
        "x",
    )
    facts = {
        "model": recipe.model,
        "model_revision": recipe.model_revision,
        "dataset": recipe.dataset,
        "dataset_revision": recipe.dataset_revision,
        "config": "{}",
    }
    return TrialRow(
        **(text | facts | changed),
        trial_id="t",
        cell_id=recipe.groups[0].cell_id,
        size="small",
        state="done",
        reason=None,
        created_at=datetime.now(UTC),
        run_id="r",
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"model": "other", "model_revision": "1234"},
            "is of other revision 1234, the recipe's model is qwen3_vl_tiny revision",
        ),
        (
            {"dataset": "other", "dataset_revision": "1234"},
            "is of other/small revision 1234, the recipe's samples are wordnet_glosses/small revision",
        ),
    ],
)
def test_scores_of_another_model_or_other_samples_are_refused(
    tmp_path: Path,
    run: Callable[..., int],
    recipe: MixedRecipe,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, str],
    said: str,
) -> None:
    Store(str(tmp_path / "store")).write_trials("r", [scored_row(recipe, **changed)])
    assert run("csv", "out.csv") == 2
    group = recipe.groups[0]
    assert f"The score of {group.group.name} (cell {group.cell_id}) {said}" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_format_that_was_edited_after_it_was_scored_is_refused(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its predicted KL would be another format's."""
    point = expand(["quant_pair=wint8_afp16", "quant_granularity=default"], multirun=False).points[0]
    row = scored_row(recipe, config=json.dumps(to_record(point)))
    Store(str(tmp_path / "store")).write_trials("r", [row])
    chosen = recipe.formats[recipe.groups[0].format or ""]
    assert run("csv", "out.csv") == 2
    assert f"is of another format than {chosen.label!r} of the recipe, which was edited" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    as_scored = recipe_of_point(point).format
    named = replace(chosen, quant_pair="wint8_afp16")  # with the weights of another pair, and no cell that says so
    groups = tuple(
        replace(choice, format=choice.format and named.label, cell_id=None, predicted_kl=0.0)
        for choice in recipe.groups
    )
    assert run("csv", "out.csv", other=replace(recipe, formats={named.label: named}, groups=groups)) == 2
    assert f"Format {named.label!r} of the recipe was edited" in capsys.readouterr().err
    same = replace(chosen, weight=as_scored.weight, inputs=as_scored.inputs, algorithm="max")
    assert run("csv", "out.csv", other=replace(recipe, formats={**recipe.formats, chosen.label: same})) == 0


def test_a_score_on_other_ranks_than_the_recipes_is_refused(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["quant_pair=wint8_aint8", "quant_granularity=a_per_token_dynamic"]
    point = expand(typed, multirun=False).points[0]
    row = replace(scored_row(recipe, config=json.dumps(to_record(point))), tp=2)
    Store(str(tmp_path / "store")).write_trials("r", [row])
    chosen, scored = recipe.formats[recipe.groups[0].format or ""], recipe_of_point(point).format
    whole = replace(chosen, weight=scored.weight, inputs=scored.inputs, algorithm="max")
    assert run("csv", "out.csv", other=replace(recipe, formats={**recipe.formats, chosen.label: whole})) == 2
    assert f"is of another format than {chosen.label!r} of the recipe" in capsys.readouterr().err
    split = whole.on_ranks(2)
    assert run("csv", "out.csv", other=replace(recipe, formats={**recipe.formats, chosen.label: split})) == 0


@pytest.mark.parametrize(
    ("config", "files", "options"),
    [
        (
            {"vision_config": {}, "text_config": {"max_position_embeddings": 4096}},
            (),
            f"--max-model-len 4096 --max-logprobs 20 {NO_IMAGES}",
        ),
        (
            {"vision_config": {}, "text_config": {"max_position_embeddings": 262144}},
            ("preprocessor_config.json", "video_preprocessor_config.json"),
            "--max-model-len 8192 --max-logprobs 20",
        ),
        ({"max_position_embeddings": 2048}, (), "--max-model-len 2048 --max-logprobs 20"),
        (
            {"vision_config": {"depth": 1}},
            ("preprocessor_config.json",),
            f"--max-logprobs 20 {NO_IMAGES}",
        ),
    ],
)
def test_the_serve_line_says_what_the_checkpoint_lacks(
    tmp_path: Path, config: dict[str, Any], files: tuple[str, ...], options: str
) -> None:
    directory = tmp_path / "a b"
    directory.mkdir()
    for name in files:
        (directory / name).write_text("{}")
    (directory / "config.json").write_text(json.dumps(config))
    assert serve_line(directory) == f"vllm serve '{directory}' {options}"


def test_csv_has_a_row_a_group(recipe: MixedRecipe) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(recipe))))
    assert [row["group"] for row in rows] == [choice.group.name for choice in recipe.groups]
    assert [row["quant_pair"] for row in rows[:6]] == [name or "" for name in NAMES]
    assert rows[0]["effective_bits"] == "4.5"
    assert rows[0]["modules"].split() == [f"model.language_model.layers.0.self_attn.{name}_proj" for name in "qkv"]


def test_modelopt_quantizes_each_module_as_the_recipe_says(tmp_path: Path, recipe: MixedRecipe) -> None:
    """Stock mtq.quantize on the file that ModelOpt itself has read."""
    path = tmp_path / "recipe.yaml"
    path.write_text(to_modelopt(recipe))
    read: Any = load_recipe(path)
    model = load(MODEL.path, dtype=torch.float32, device="cpu")
    mtq.replace_quant_module(model)
    mtq.set_quantizer_by_cfg(model, read.quantize.quant_cfg)
    chosen = {module: recipe.format_of(choice) for choice in recipe.groups for module in choice.group.modules}
    for name in MODEL.linears:
        module: Any = model.get_submodule(name)
        wanted = chosen.get(name)
        for quantizer, attributes in (
            (module.weight_quantizer, wanted and wanted.weight and wanted.weight.attributes),
            (module.input_quantizer, wanted and wanted.inputs and wanted.inputs.attributes),
        ):
            assert quantizer.is_enabled == (attributes is not None)
            if attributes is not None:
                assert quantizer.num_bits == attributes["num_bits"]
                assert quantizer.axis == attributes.get("axis")
                assert (quantizer.block_sizes or None) == attributes.get("block_sizes")
                assert quantizer._dynamic == (attributes.get("type") == "dynamic")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("-1: 128", "-1: 64", "weight_quantizer"), ("algorithm: max", "algorithm: mse", "'max', it comes back as 'mse'")],
)
def test_a_modelopt_file_that_says_something_else_is_refused(
    tmp_path: Path, recipe: MixedRecipe, old: str, new: str, said: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_modelopt(recipe).replace(old, new))
    with pytest.raises(SweepError, match=said):
        check_modelopt(*read_modelopt(path), recipe, list(MODEL.linears))


@pytest.mark.parametrize("algorithm", ["mse", "awq_lite"])
def test_modelopt_holds_one_algorithm_for_all(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, algorithm: str
) -> None:
    alone = recipe_of([group_format("int4", *FORMATS["int4_groups_weight_only"], algorithm)])
    assert run("modelopt", "out.yaml", other=replace(alone, dataset_revision=recipe.dataset_revision)) == 0
    assert f"algorithm: {algorithm}" in (tmp_path / "out.yaml").read_text()


def test_modelopt_has_one_algorithm() -> None:
    formats = [
        group_format("a", *FORMATS["int4_groups_weight_only"]),
        group_format("b", *FORMATS["int4_groups_weight_only"], "mse"),
    ]
    with pytest.raises(SweepError, match="several calibration algorithms"):
        to_modelopt(recipe_of(formats))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("layers.1.mlp.down_proj", "layers.9.mlp.down_proj", "Unknown module"),
        ("-1: 128", "-1: 96", "Blocks of 96"),
        (
            "      block_sizes:\n        -1: 16\n        type: dynamic\n"
            "        scale_bits:\n        - 4\n        - 3\n",
            "",
            "need blocks",
        ),
        (f"model_revision: {MODEL.revision}", "model_revision: 0123456789ab", "revision 0123456789ab"),
        ("dataset_revision: ", "dataset_revision: f", "calibrated on"),
    ],
)
def test_impossible_recipes_exit_2(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    def edited(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    assert run("compressed-tensors", "out", edited=edited) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_has_the_ranges_that_validate_measured_with(
    tmp_path: Path, run: Callable[..., int], recipe: MixedRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bit for bit, from one model that is loaded once."""
    measured, exported, loads = list[Any](), list[Any](), list[Path]()
    measure, write, load_one = Validator.measure, workers.export.checkpoint.write_checkpoint, Model.load

    def measures(self: Validator, quants: Any) -> Any:
        measured.append(quants)
        return measure(self, quants)

    def writes(*args: Any) -> None:
        exported.append(args[3])
        write(*args)

    def loads_one(self: Model, dtype: str, device: str) -> Any:
        loads.append(self.path)
        return load_one(self, dtype, device)

    monkeypatch.setattr(Validator, "measure", measures)
    monkeypatch.setattr("workers.export.checkpoint.write_checkpoint", writes)
    monkeypatch.setattr(Model, "load", loads_one)
    _loaded.cache_clear()
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    store = f"store.uri={tmp_path / 'store'}"
    assert main(["validate", str(tmp_path / "recipe.yaml"), store, "validation.n_samples=2"]) == 0
    assert run("compressed-tensors", "out") == 0
    assert loads == [MODEL.path]
    (ours,), (theirs,) = exported, measured
    assert ours.keys() == theirs.keys()
    static = 0
    for name, quant in ours.items():
        for one, other in zip(ranges(quant), ranges(theirs[name]), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        static += quant.input_amax is not None
    assert static  # ranges that depend on the device, the dtype and the samples


def ranges(quant: LinearQuant) -> tuple[torch.Tensor | None, ...]:
    return quant.weight_amax, quant.input_amax, quant.pre_quant_scale


def test_a_copy_of_tied_embeddings_is_not_exported_quantized(tmp_path: Path, recipe: MixedRecipe) -> None:
    """A runtime ties the head to the embeddings, and would not see it."""
    path = tmp_path / "model"
    shutil.copytree(bundled_model_dir(), path, ignore=shutil.ignore_patterns("layer-analysis"))
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    model = Model(path)
    first = recipe.groups[0]
    head = replace(first, group=replace(first.group, name="lm_head", modules=("lm_head",)))
    with pytest.raises(
        SweepError, match=r"lm_head cannot be exported quantized: .* Solve again with --exclude lm_head"
    ):
        check_held(replace(recipe, groups=(*recipe.groups, head)), model)
    check_held(replace(recipe, groups=(*recipe.groups, replace(head, format=None))), model)
