"""`sweep doctor` says before hours are spent what would stop or surprise a run, and leaves no trace."""

import json
from pathlib import Path

import pytest

from sweep.cli import main
from sweep.core import machine
from sweep.run import resources
from tests.own import write_chats


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def findings(capsys: pytest.CaptureFixture[str], *overrides: str, code: int) -> dict[str, tuple[str, str]]:
    """Verdict and text by subject."""
    assert main(["doctor", "-m", "--json", *overrides]) == code
    found = json.loads(capsys.readouterr().out)
    assert list(Path.cwd().iterdir()) == []
    return {finding["subject"]: (finding["verdict"], finding["text"]) for finding in found}


def test_the_bundled_model_on_this_machine_is_fine(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(
        capsys, "quant_pair=wint8_aint8,wint8_afp16", "dataset.size=small,medium", "cluster.workers=2", code=0
    )
    assert {subject: found[subject][0] for subject in ("python", "workers", "store", "model", "grid")} == dict.fromkeys(
        ("python", "workers", "store", "model", "grid"), "ok"
    )
    assert found["workers"][1].startswith("2 on cpu")
    assert "4 trials, 4 distinct cells, 0 in the store already" in found["grid"][1]
    assert "qwen3_vl_tiny" in found["model"][1]


def test_the_sweep_is_estimated_for_people_and_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["quant_pair=wint8_aint8", "dataset.size=small", f"store.uri={tmp_path}/store"]
    assert main(["doctor", "--json", *overrides]) == 0
    by_subject = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    estimate = by_subject["estimate"]
    assert estimate["text"].startswith("about ")
    figures = estimate["figures"]
    parts = ("start", "load", "capture", "scoring", "end")
    assert figures["seconds"] == pytest.approx(sum(figures[part] for part in parts))
    assert min(figures[name] for name in (*parts, "worker_gb", "driver_gb", "store_mb")) > 0
    assert "figures" not in by_subject["grid"]


def test_workers_that_need_more_memory_than_there_is_are_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_gb", lambda: 1.0)
    found = findings(capsys, "quant_pair=wint8_aint8", "dataset.size=small", "cluster.workers=2", code=0)
    assert found["estimate"][0] == "warning"
    assert "1.0 GB are available: type cluster.workers=N" in found["estimate"][1]


def test_weights_that_alone_need_more_memory_get_other_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less than the driver needs there is no room for any."""
    overrides = ["quant_pair=wint8_aint8", "dataset.size=small", "cluster.workers=1"]
    estimate = findings(capsys, *overrides, code=0)["estimate"][1]
    driver_gb = float(estimate.partition(" GB the driver")[0].rpartition(" ")[2])
    monkeypatch.setattr(machine, "memory_gb", lambda: driver_gb - 0.1)
    text = findings(capsys, *overrides, code=0)["estimate"][1]
    assert "the weights alone are 0.0 GB in float32: use machines with more memory, or GPUs" in text
    assert "cluster.workers=N" not in text


def test_a_gpu_that_pytorch_cannot_use_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "n_gpus", lambda: 1)
    found = findings(capsys, "quant_pair=wint8_aint8", "dataset.size=small", "cluster.device=cuda", code=2)
    assert "cannot use the NVIDIA GPU that is here" in found["estimate"][1]


def test_data_are_read_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chats(tmp_path / "chats", 20)
    found = findings(capsys, "dataset=chat", f"dataset.path={path}", "dataset.size=small", code=0)
    assert found["data"][0] == "ok"
    assert found["data"][1].startswith("16 samples, 16 pictures, ")


def test_data_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chats(tmp_path / "chats", 20)
    (path.parent / "7.png").write_bytes(b"no picture")
    found = findings(capsys, "dataset=chat", f"dataset.path={path}", "dataset.size=small", code=2)
    assert "(line 8 of chats.jsonl) is no picture" in found["grid"][1]
    assert "data" not in found


def test_everything_that_would_stop_a_run_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    found = findings(capsys, "model.path=/nowhere", f"store.uri={tmp_path}/file/store", "cluster.device=cuda", code=2)
    assert {subject for subject, (verdict, _) in found.items() if verdict == "error"} == {
        "workers",
        "store",
        "model",
    }
    assert "cluster.device=cpu" in found["workers"][1]
    assert "store.uri=DIR" in found["store"][1]
    assert "model.path=DIR" in found["model"][1]
    assert "estimate" not in found


def test_skipped_points_are_a_warning_with_their_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = findings(capsys, "quant_pair=wfp4_afp16", "quant_granularity=default,w_per_tensor", code=0)
    assert found["grid"][0] == "warning"
    assert "1 skipped: FP4 weights need blocks" in found["grid"][1]


def test_a_person_reads_a_table_that_keeps_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "[red]").touch()
    assert main(["doctor", f"store.uri='{tmp_path}/[red]/x'"]) == 2
    assert f"Cannot write to {tmp_path}/[red]/x: Not a directory" in capsys.readouterr().out
