"""No checkpoint of plain weights: `doctor` and `run` end with one message, before anything heavy is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.weights import PLAIN, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
CODE = """\
import json, sys
from sweep.cli import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in ("ray", "torch", "transformers", "modelopt") if name in sys.modules]]))
"""


def marked(path: Path) -> Path:
    return write_checkpoint(path, {"text_config": {"quantization_config": {"quant_method": "gptq"}}})


def packed(path: Path) -> Path:
    return write_checkpoint(path, tensors={**PLAIN, "model.layers.0.up_proj.weight_packed": ("I32", [4, 1])})


def gguf(path: Path) -> Path:
    path.mkdir()
    (path / "model.gguf").touch()
    return path / "model.gguf"


def adapter(path: Path) -> Path:
    (write_checkpoint(path) / "adapter_config.json").write_text("{}")
    return path


SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "marked": (marked, "is marked as quantized (gptq, by quantization_config of text_config of config.json)"),
    "packed": (packed, "(compressed-tensors, by tensor model.layers.0.up_proj.weight_packed, I32)"),
    "gguf": (gguf, "is a file. It holds GGUF weights"),
    "adapter": (adapter, "holds an adapter (adapter_config.json) beside a model's weights"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_is_named_before_anything_heavy_is_loaded(kind: str, tmp_path: Path) -> None:
    make, said = SOURCES[kind]
    path = make(tmp_path / "model")

    def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CODE, *arguments, "model=hf_causal_lm", f"model.path={path}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)

    run = sweep("run")
    assert run.stderr.startswith("sweep run: ")
    assert said in run.stderr
    assert run.stderr.count("\n") == 1
    assert json.loads(run.stdout) == [2, []]
    assert [*tmp_path.iterdir()] == [tmp_path / "model"]

    doctor = sweep("doctor", "--json")
    findings, _, end = doctor.stdout.rstrip().rpartition("\n")
    (text,) = [each["text"] for each in json.loads(findings) if each["subject"] == "model"]
    assert f"sweep run: {text}\n" == run.stderr
    assert doctor.stderr == ""
    assert json.loads(end) == [2, []]
