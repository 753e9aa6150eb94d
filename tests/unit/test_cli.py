"""The command line in this process: exit codes; wrong input as one message that says what to type, nothing written."""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from sweep.cli import main
from sweep.config import compose
from sweep.config.compose import expand
from sweep.core.errors import StoreFailed
from sweep.core.paths import conf_dir
from sweep.plan.trials import plan_sweep
from sweep.store.store import Store
from tests import scored
from tests.models import save_checkpoint, write_captions

BOTH = """\
name: own
quant_cfg_overrides:
  "*weight_quantizer": {axis: 0, block_sizes: {-1: 64}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("cli") / "model", "qwen3", hidden_size=96)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, beside a place for input files."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must exit with 2; gives its one message, having checked that nothing was written."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith(f"sweep {arguments[0]}: ")
        assert "Traceback" not in err
        assert err.endswith("\n")
        assert list(here.iterdir()) == []
        return err

    return run


@pytest.mark.parametrize(
    ("overrides", "found", "advice"),
    [
        (["quant_pair=wfp8_afp7"], "'wfp8_afp7'", "Did you mean 'wfp8_afp8'?"),
        (["quant_granularity=w_group6"], "'w_group6'", "Did you mean 'w_group64'?"),
        (["dataset.szie=small"], "'dataset.szie'", "Did you mean 'dataset.size'?"),
        (["dataset.size=huge"], "'huge'", "small, medium, large"),
        (["modle=hf_causal_lm"], "'modle'", "Did you mean 'model'?"),
        (["quant_pair=../x"], "'../x'", "wint8_aint8"),
        (["model.name=a/b"], "'a/b'", "lower-case letters, digits and _"),
        (["dataset.name=.."], "'..'", "lower-case letters, digits and _"),
        (["model.path=/nowhere"], "/nowhere is no directory", "model.path=DIR"),
        (["model.path=~/nowhere-at-all"], str(Path.home() / "nowhere-at-all"), "model.path=DIR"),
        (["model.path=no/hub_model"], "'no/hub_model'", "model.path=DIR"),
        (["dataset.captions_path=/nowhere.txt"], "/nowhere.txt", "dataset.captions_path=FILE"),
        (["dataset.captions_path=a(1).txt"], "(1).txt", "goes in quotes"),
        (["cluster.workers=0"], "cluster.workers=0", "at least 1"),
        (["cluster.device=cuda"], "no NVIDIA GPU", "cluster.device=cpu"),
        (["cluster.gpus_per_worker=NaN"], "nan", "a fraction up to 1, or a whole number"),
        (["sensitivity.quant_algorithm=svdquant"], "svdquant", "Choose one of: max, mse, awq_lite, smoothquant."),
        (["quant_pair=wfp4_afp16", "quant_granularity=w_per_tensor"], "FP4 weights need blocks", "block_sizes"),
        (["dataset.size=small,medium"], "several values", "sweep run -m dataset.size=small,medium"),
        (["-m", "sensitivity.lm_head=true,false"], "one report folder", "output_layout.root=DIR"),
    ],
)
def test_wrong_input_is_one_message_and_nothing_written(
    overrides: list[str], found: str, advice: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    message = refused("run", *overrides)
    assert found in message
    assert advice in message


@pytest.mark.parametrize("verb", ["status", "publish", "doctor"])
def test_every_verb_refuses_wrong_overrides(verb: str, refused: Callable[..., str]) -> None:
    assert "Did you mean 'store.uri'?" in refused(verb, "store.url=x")


@pytest.mark.parametrize("key", ["store.uri", "output_layout.root"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_scored(
    key: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    message = refused("run", f"{key}={tmp_path / 'file' / 'x'}")
    assert f"Cannot write to {tmp_path / 'file' / 'x'}: Not a directory. Choose a writable place: {key}=DIR." in message


def in_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled weights": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        "holds pickled weights (pytorch_model.bin)",
    ),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), "no *.safetensors"),
    "a shard that is not there": (
        lambda model: (model / "model.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "model-2.safetensors"}}'
        ),
        "lacks model-2.safetensors",
    ),
    "weights cut short": (
        lambda model: in_half(model / "model.safetensors"),
        "model.safetensors is cut short or damaged. Download it again",
    ),
    "an empty weight file": (
        lambda model: os.truncate(model / "model.safetensors", 0),
        "model.safetensors is cut short or damaged",
    ),
    "config.json cut short": (lambda model: in_half(model / "config.json"), "config.json is no model"),
    "config.json that is no mapping": (
        lambda model: (model / "config.json").write_text("[]"),
        "config.json is no model",
    ),
    "config.json of an unknown model": (lambda model: in_text(model / "config.json", '"qwen3"', '"qwen99"'), "qwen99"),
    "config.json with text for a number": (
        lambda model: in_text(model / "config.json", '"hidden_size": 96', '"hidden_size": "96"'),
        "hidden_size",
    ),
    "config.json with a size below 0": (
        lambda model: in_text(model / "config.json", '"hidden_size": 96', '"hidden_size": -96'),
        "config.json is no model",
    ),
    "a tokenizer cut short": (lambda model: in_half(model / "tokenizer.json"), "has no tokenizer that loads"),
    "no tokenizer": (lambda model: [path.unlink() for path in model.glob("tok*")], "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_naming_the_file(
    damage: str, checkpoint: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    act, expected = DAMAGES[damage]
    act(model)
    captions = write_captions(tmp_path / "captions.txt", 16)
    message = refused(
        "run",
        "model=hf_causal_lm",
        f"model.path={model}",
        "dataset=coco2017_captions",
        f"dataset.captions_path={captions}",
    )
    assert expected in message
    assert str(model) in message


@pytest.mark.parametrize(
    ("lines", "size", "expected"),
    [
        ([], "small", "holds 0 captions; 16 are needed. Give more captions."),
        (["w1 w2"] * 20, "medium", "holds 20 captions; 128 are needed. Type dataset.size=small or dataset.size=20"),
        ([*["w1 w2"] * 5, "w3", *["w1 w2"] * 20], "small", "Sample 6 has 1 token(s); at least 2 are needed"),
        ([*["w1 w2"] * 5, " ", *["w1 w2"] * 20], "small", "Caption 6 of the captions file"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(
    lines: Sequence[str], size: str, expected: str, checkpoint: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    own = [
        "model=hf_causal_lm",
        f"model.path={checkpoint}",
        "dataset=coco2017_captions",
        f"dataset.captions_path={tmp_path / 'captions.txt'}",
    ]
    assert expected in refused("run", *own, f"dataset.size={size}")


def test_groups_that_do_not_divide_a_layers_inputs_are_refused(
    checkpoint: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    captions = write_captions(tmp_path / "captions.txt", 16)
    own = [
        "model=hf_causal_lm",
        f"model.path={checkpoint}",
        "dataset=coco2017_captions",
        f"dataset.captions_path={captions}",
    ]
    message = refused("run", *own, "quant_granularity=w_group64")
    assert "Groups of 64 do not divide the 96 inputs of model.layers.0.self_attn.q_proj" in message
    assert "16, 32" in message


def test_an_overlay_with_axis_and_blocks_is_refused(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Path(shutil.copytree(conf_dir(), tmp_path / "conf"))
    (tree / "quant_granularity" / "own.yaml").write_text(BOTH)
    monkeypatch.setattr(compose, "conf_dir", lambda: tree)
    monkeypatch.setattr(compose, "_tree_key", lambda: str(tree))
    assert "has both axis and block_sizes, which exclude each other. Keep one of them." in refused(
        "run", "quant_granularity=own"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["rnu"],
        ["run", "--nope"],
        ["run", "quant_pair=wfp8_afp8", "-x"],
        ["run", "--cfg", "hydra"],
        ["status", "--multirun"],
    ],
)
def test_an_unknown_verb_or_option_exits_with_2(
    arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: sweep" in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("verb", ["run", "status", "publish", "doctor"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: sweep {verb}" in capsys.readouterr().out


def test_cfg_job_prints_the_composed_config_and_stops(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quant_pair=wfp8_afp8", "--cfg", "job", "dataset.size=medium"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["quant_pair"]["format_name"], config["dataset"]["size"]) == ("FP8_DEFAULT_CFG", "medium")
    assert main(["run", "-m", "--cfg", "job", "dataset.size=small,large"]) == 0
    assert [config["dataset"]["size"] for config in yaml.safe_load_all(capsys.readouterr().out)] == ["small", "large"]
    assert list(here.iterdir()) == []


def test_an_empty_store_says_what_to_type(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert "Type: sweep run" in capsys.readouterr().out
    assert main(["publish"]) == 2
    assert "Type `sweep run` first, or store.uri=DIR." in capsys.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("verb", "within"), [("run", "sweep.commands.run.plan_sweep"), ("status", "sweep.commands.status.print_status")]
)
def test_an_interrupted_command_is_no_traceback(
    verb: str, within: str, number: int, monkeypatch: pytest.MonkeyPatch, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(within, lambda *_, **__: signal.raise_signal(number))
    assert main([verb]) == 75
    assert capsys.readouterr().err == f"sweep {verb}: interrupted\n"
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("failing", "why"),
    [
        (
            "sweep.report.publish._swap_folder",
            "Cannot publish into {root}: No space left on device. Make room, or mend what is wrong with it. Stopped",
        ),
        (
            "sweep.run.session.Session.end",
            "Cannot write to the store {store}: No space left on device. "
            "Make room, or mend what is wrong with it. Stopped",
        ),
    ],
)
def test_a_disk_that_is_full_when_reports_are_made_leaves_a_run_to_resume(
    failing: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grid whose cells are all there, without a report yet."""
    overrides = [
        "dataset.size=small",
        f"store.uri={tmp_path / 'store'}",
        f"output_layout.root={tmp_path / 'published'}",
    ]
    (trial,) = plan_sweep(expand(overrides, multirun=False).points, "cpu").trials
    assert trial.cell_id is not None
    store = Store(str(tmp_path / "store"))
    store.write_part(trial.cell_id, "m", scored.scores(trial.cell_id, scored.PREDICTED_KL[scored.FP8]))
    store.complete(trial.cell_id, {"m": None})

    def fail(*_: object, **__: object) -> None:
        if "publish" in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise StoreFailed(f"Cannot write to the store {store.uri}: No space left on device.")

    with monkeypatch.context() as patch:
        patch.setattr(failing, fail)
        assert main(["run", *overrides]) == 75
    said = capsys.readouterr().out
    assert why.format(root=tmp_path / "published", store=tmp_path / "store") in said
    assert "Type the same command again to resume." in said
    assert main(["run", *overrides]) == 0
    assert len(list(tmp_path.glob("published/*/layer-analysis/*/*/*/quant-manifest.json"))) == 1


def test_a_store_of_a_newer_program_is_refused_and_kept(
    here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The last check before anything is written."""
    from tests.unit.store.test_store import TRIALS_SCHEMA, TRIALS_VERSION, of_version

    newer = of_version(TRIALS_VERSION + 1, TRIALS_SCHEMA)
    store = Store(str(tmp_path / "store"))
    store.files.write("trials/run-r.parquet", newer)
    assert main(["run", f"store.uri={store.uri}"]) == 2
    assert "Use the program that wrote it, or another store.uri." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["run-r.parquet"]
    assert store.files.read("trials/run-r.parquet") == newer
