"""Imports between packages go downward only; each heavy library has one home; what needs none starts without them."""

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
        "workers/export/modelopt_layout.py",
    },
    "compressed_tensors": {f"workers/export/{name}.py" for name in ("schemes", "weights", "compressed")},
    "transformers": {f"workers/model/{name}.py" for name in ("loading", "processing", "readers", "answers")},
    "huggingface_hub": {"workers/model/loading.py"},
    "datasets": {"workers/data/samples.py", "workers/data/rows.py"},
    "matplotlib": {"sweep/report/plots.py"},
    "scipy": {"sweep/mixed_precision/knapsack.py"},
    "hydra": {"sweep/config/compose.py"},
    "omegaconf": {"sweep/config/compose.py"},
    "ray": {f"sweep/run/{name}.py" for name in ("cluster", "driver", "worker_pool", "ray_worker")}
    | {"workers/service/actor.py", "workers/service/metrics.py"},
}
# All that lies directly in sweep/ and workers/, from the bottom up. Neighbours in one line do not know each other,
# and what reports see lies below all of workers.
FLOORS = (
    ("sweep.core",),
    ("sweep.formats", "sweep.store"),
    ("sweep.config",),
    ("sweep.report",),
    ("workers.data", "workers.task"),
    ("workers.model",),
    ("workers.quant",),
    ("workers.scoring", "workers.export"),
    ("workers.service",),
    ("sweep.plan",),
    ("sweep.run",),
    ("sweep.mixed_precision",),
    ("sweep.commands",),
    ("sweep.cli",),
    ("sweep.__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
SEEN_BY_WORKERS = {"sweep.core", "sweep.formats", "sweep.store"}
HEAVY = ("ray", "torch", "transformers", "modelopt", "datasets")


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def imported_things(tree: ast.AST) -> Iterator[str]:
    """Packages of sweep/ and workers/, and files beside them, that a file imports, types too: ``sweep.core``."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import, which this test does not follow: write the package's name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (".".join(name.split(".")[:2]) for name in names if name.split(".")[0] in ("sweep", "workers"))


def breaches(thing: str, tree: ast.AST) -> list[str]:
    """Imports that a file of a package, or a file beside the packages, must not have."""
    found: list[str] = []
    for other in sorted({*imported_things(tree)} - {thing}):
        if other not in FLOOR_OF:
            found.append(f"{thing} imports {other}, which is no package")
        elif FLOOR_OF[other] >= FLOOR_OF[thing]:
            found.append(f"{thing} imports {other}, which is not below it")
        elif thing.startswith("workers.") and other.startswith("sweep.") and other not in SEEN_BY_WORKERS:
            found.append(f"{thing} imports {other}; workers see of sweep only {', '.join(sorted(SEEN_BY_WORKERS))}")
    return found


def thing_of(path: Path) -> str:
    """The package that a file is in, or the file itself if it lies beside the packages."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts[:2])


def product() -> Iterator[Path]:
    """Every file of the two packages but their own __init__.py, which import nothing."""
    for room in ("sweep", "workers"):
        yield from (path for path in (ROOT / room).rglob("*.py") if path != ROOT / room / "__init__.py")


def test_every_package_has_a_floor() -> None:
    assert {thing_of(path) for path in product()} == set(FLOOR_OF)


def test_imports_go_downward_only() -> None:
    """So there is no circle between packages, either."""
    found: list[str] = []
    for path in product():
        found += [
            f"{path}: {breach}" for breach in breaches(thing_of(path), ast.parse(path.read_text(encoding="utf-8")))
        ]
    assert found == []


@pytest.mark.parametrize("room", ["sweep", "workers"])
def test_the_packages_that_hold_packages_import_nothing(room: str) -> None:
    assert [*imported(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))] == []


@pytest.mark.parametrize(
    ("thing", "source", "words"),
    [
        ("sweep.plan", "from sweep.run.session import Session", "not below it"),
        ("sweep.run", "def join():\n    from sweep import cli", "not below it"),
        ("workers.quant", "import workers.scoring.capture as capture", "not below it"),
        ("workers.scoring", "if TYPE_CHECKING:\n    from workers.export.folding import Linears", "not below it"),
        ("sweep.store", "from sweep.formats.mixed import MixedRecipe", "not below it"),
        ("workers.service", "from sweep.config.schema import SweepConfig", "workers see of sweep only"),
        ("workers.data", "from sweep.report import analysis", "workers see of sweep only"),
        ("sweep.report", "from workers.data.batches import make_plan", "not below it"),
        ("sweep.cli", "from sweep.wizard import Request", "no package"),
    ],
)
def test_an_import_that_must_not_be_is_named(thing: str, source: str, words: str) -> None:
    (breach,) = breaches(thing, ast.parse(source))
    assert words in breach


@pytest.mark.parametrize(
    ("thing", "source"),
    [
        (
            "workers.scoring",
            "from sweep.formats.mixed import MixedRecipe\nfrom workers.scoring.capture import capture\nimport torch",
        ),
        ("sweep.commands", "def run():\n    from sweep.run import driver\n    from workers import task"),
    ],
)
def test_imports_of_what_lies_below_may_stand_anywhere(thing: str, source: str) -> None:
    assert breaches(thing, ast.parse(source)) == []


def test_imports_are_found_wherever_they_stand() -> None:
    source = (
        "import ray.tune as t\nfrom hydra.core import x\nfrom . import torch\n"
        "def f():\n    if t:\n        import modelopt.torch, numpy\n"
    )
    assert sorted(imported(ast.parse(source))) == ["hydra", "modelopt", "numpy", "ray"]


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    files = [path for room in ("sweep", "workers") for path in (ROOT / room).rglob("*.py")]
    users = {
        str(path.relative_to(ROOT))
        for path in files
        if library in imported(ast.parse(path.read_text(encoding="utf-8")))
    }
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
        "sweep.commands.cfg",
        "sweep.commands.status",
        "sweep.commands.run",
        "sweep.commands.publish",
        "sweep.commands.doctor",
        "sweep.commands.export",
        "sweep.commands.solve",
        "sweep.commands.validate",
        "sweep.commands.recommend",
        "sweep.plan.trials",
        "sweep.store.store",
        "sweep.config.targets",
        "workers.data.own",
        "workers.data.samples",
        "workers.model.checkpoint",
        "workers.task",
    ],
)
def test_what_plans_and_lists_imports_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}") == []


def test_doctor_loads_nothing_heavy_to_say_that_there_is_no_model() -> None:
    assert loaded_after("from sweep.cli import main\nassert main(['doctor', 'model.path=/nowhere/model']) == 2") == []


def test_exporting_imports_without_a_word() -> None:
    """ModelOpt warns of this transformers where it is imported first."""
    done = subprocess.run(
        [sys.executable, "-c", "import workers.export.checkpoint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
