"""vLLM's own ModelOpt loader reads what is exported: its configuration classes, methods and weight loaders."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sweep.core.paths import bundled_model_dir
from sweep.plan.model import Model
from tests.exports import quants_of, recipe_of
from tests.unit.export.test_modelopt_layout import FORMATS, format_called
from workers.export.checkpoint import write_checkpoint
from workers.export.modelopt_layout import ModelOptLayout
from workers.model.loading import load

SOURCE = bundled_model_dir()
LINEARS = Model(SOURCE).structure.linears
# By ModelOpt's name of a format: vLLM 0.32's class, and keys of weights and inputs, shortened (modelopt.py, resolve).
READ = {
    "fp8": ("ModelOptFp8Config", "f8e4m3fn static per_tensor", "f8e4m3fn static per_tensor"),
    "fp8_pc_pt": ("ModelOptFp8Config", "f8e4m3fn static per_token", "f8e4m3fn dynamic per_token"),
    "fp8_pb_wo": ("ModelOptFp8Config", "f8e4m3fn static 128x128", "f8e4m3fn dynamic 1x128"),
    "mxfp8": ("ModelOptMxFp8Config", "f8e4m3fn static 1x32", "f8e4m3fn dynamic 1x32"),
    "nvfp4": ("ModelOptNvFp4Config", "u8 static 1x16", "u8 dynamic 1x16"),
    "w4a16_nvfp4": ("ModelOptNvFp4Config", "u8 static 1x16", "None"),
}
MIXED = ["nvfp4", "fp8_pc_pt", "fp8", None, "mxfp8", "w4a16_nvfp4", "fp8_pb_wo"]
EXPORTS: dict[str, list[str | None]] = {**{name: [name] for name in READ}, "mixed": MIXED}


@pytest.fixture(scope="module")
def found(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What vLLM says of each export, by its name; one process reads them all."""
    place = tmp_path_factory.mktemp("modelopt")
    base, token_ids = load(SOURCE, dtype=torch.float32, device="cpu"), torch.arange(64)[None]
    for name, formats in EXPORTS.items():
        recipe = recipe_of([each and format_called(each) for each in formats])
        (place / name).mkdir()
        with torch.no_grad():
            quants = quants_of(recipe, base, token_ids)
        write_checkpoint(SOURCE, place / name, recipe, quants, LINEARS, layout=ModelOptLayout())
    damaged = place / "without a scale"
    damaged.mkdir()
    write_without_scale(place / "fp8", damaged)
    command = [
        programs / "python",
        Path(__file__).with_name("modelopt_loader.py"),
        *(place / name for name in EXPORTS),
        damaged,
    ]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    ran = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = [json.loads(line.removeprefix("FOUND ")) for line in ran.stdout.splitlines() if line.startswith("FOUND ")]
    return dict(zip([*EXPORTS, damaged.name], lines, strict=True))


def write_without_scale(source: Path, directory: Path) -> None:
    """The export with one scale left out."""
    from safetensors.torch import load_file, save_file

    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.language_model.layers.2.mlp.down_proj.weight_scale"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def shortened(key: str) -> str:
    """``QuantKey(f8e4m3fn,scale(f32,static,GroupShape(row=1, col=128)),symmetric)`` as ``f8e4m3fn static 1x128``."""
    if key == "None":
        return key
    dtype, _, kind, *shape = key.removeprefix("QuantKey(").split(",")
    sizes = [word.partition("=")[2].rstrip(")") for word in shape[:2] if "=" in word]
    return f"{dtype} {kind} {'x'.join(sizes) or shape[0].rstrip(')')}"


@pytest.mark.parametrize("name", EXPORTS)
def test_each_linear_gets_the_method_of_its_format(found: dict[str, dict[str, Any]], name: str) -> None:
    document = found[name]
    assert document["config"] == ("ModelOptMixedPrecisionConfig" if name == "mixed" else READ[name][0])
    recipe = recipe_of([each and format_called(each) for each in EXPORTS[name]])
    for choice in recipe.groups:
        parent, _, leaf = choice.group.name.replace("model.language_model.", "language_model.model.").rpartition(".")
        fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}.get(leaf, leaf)
        method, *keys = document["linears"][f"{parent}.{fused}"]
        if choice.format is None:
            assert (method, keys) == ("UnquantizedLinearMethod", [])
        else:
            assert method == "ModelOptLinearMethod"
            assert tuple(map(shortened, keys)) == READ[choice.format.partition("/")[0]][1:]


@pytest.mark.parametrize("name", EXPORTS)
def test_pictures_are_read_in_16_bits(found: dict[str, dict[str, Any]], name: str) -> None:
    methods = [methods for linear, methods in found[name]["linears"].items() if linear.startswith("visual.")]
    assert methods
    assert all(each == ["UnquantizedLinearMethod"] for each in methods)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_loader_fills_every_parameter(found: dict[str, dict[str, Any]], name: str) -> None:
    """But for input scales of weights alone, which earlier ModelOpt wrote and vLLM makes room for, and drops."""
    linears = found[name]["linears"]
    dropped = {f"{linear}.input_scale" for linear, (_, *keys) in linears.items() if "None" in keys}
    assert set(found[name]["unfilled"]) == dropped


def test_a_scale_that_is_missing_is_seen(found: dict[str, dict[str, Any]]) -> None:
    missing = "language_model.model.layers.2.mlp.down_proj.weight_scale"
    assert found["without a scale"]["unfilled"] == [missing]


def test_every_format_that_vllm_reads_is_one_that_is_exported() -> None:
    assert set(READ) < set(FORMATS)
