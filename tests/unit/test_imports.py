"""Each heavy library has one home, and what needs none of them starts without them."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOMES = {
    "modelopt": {
        "workers/quant/modelopt.py",
        "workers/quant/calibration.py",
        "workers/quant/block_formats.py",
        "workers/quant/tensor_formats.py",
        "workers/export/modelopt_recipe.py",
    },
    "compressed_tensors": {f"workers/export/{name}.py" for name in ("schemes", "weights", "checkpoint", "readback")},
    "transformers": {"workers/model/loading.py"},
    "huggingface_hub": {"workers/model/loading.py"},
    "datasets": {"workers/data/samples.py"},
    "matplotlib": {"sweep/report/plots.py"},
    "scipy": {"sweep/mixed_precision/knapsack.py"},
    "hydra": {"sweep/config/compose.py"},
    "omegaconf": {"sweep/config/compose.py"},
    "ray": {"sweep/run/cluster.py", "sweep/run/driver.py", "workers/service/actor.py", "workers/service/metrics.py"},
}
HEAVY = ("ray", "torch", "transformers", "modelopt", "datasets")


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import ray.tune as t\nfrom hydra.core import x\nfrom . import torch\ndef f():\n    if t:\n        import modelopt.torch, numpy\n"
    assert sorted(imported(ast.parse(source))) == ["hydra", "modelopt", "numpy", "ray"]


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    files = [path for room in ("sweep", "workers") for path in (ROOT / room).rglob("*.py")]
    users = {str(path.relative_to(ROOT)) for path in files if library in imported(ast.parse(path.read_text(encoding="utf-8")))}
    assert users, f"nobody imports {library}: its line here is out of date"
    assert users <= HOMES[library]


def test_no_module_is_imported_by_a_name_in_a_string() -> None:
    """The test above would not see it."""
    for room in ("sweep", "workers"):
        for path in (ROOT / room).rglob("*.py"):
            assert not {"importlib.import_module", "__import__"} & {
                ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
            }


def loaded_after(code: str) -> list[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_heavy_import_would_be_seen() -> None:
    assert loaded_after("import torch") == ["torch"]


@pytest.mark.parametrize(
    "module",
    [
        "sweep.cli",
        "sweep.commands.status",
        "sweep.commands.run",
        "sweep.commands.publish",
        "sweep.commands.doctor",
        "sweep.commands.export",
        "sweep.commands.solve",
        "sweep.plan.trials",
        "sweep.store.store",
        "sweep.config.targets",
        "workers.data.samples",
        "workers.model.checkpoint",
        "workers.task",
    ],
)
def test_what_plans_and_lists_imports_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}") == []


def test_exporting_imports_without_a_word() -> None:
    """ModelOpt warns of this transformers where it is imported first."""
    done = subprocess.run([sys.executable, "-c", "import workers.export.checkpoint"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
