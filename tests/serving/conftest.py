"""vLLM's environment, and exports of the bundled model in every format that a vLLM target lists."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sweep.config.compose import expand
from sweep.config.targets import all_targets
from sweep.core.batches import Sample
from sweep.core.errors import InvalidRecipe
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision import candidates
from sweep.plan.model import Model
from tests.exports import recipe_of
from workers.export.calibrated import calibrated
from workers.export.checkpoint import write_checkpoint
from workers.export.readback import check_export
from workers.model.loading import load
from workers.quant.linear import LinearQuant

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / ".venv-serving" / "bin"
READER = Path(__file__).with_name("reader.py")
SOURCE = bundled_model_dir()
N_CALIBRATION = 16  # glosses, dataset.size=small
CAPABILITIES = {"vllm_sm90": 90, "vllm_sm100": 100, "vllm_sm120": 120}
# Under each algorithm the files are alike; those that leave a scale of inputs behind are tried beside `max`.
ALGORITHMS = ("max", "smoothquant", "awq_lite")

Point = tuple[str, str, str]  # pair, granularity, algorithm
MIXED: Sequence[Point | None] = (
    ("wfp4_afp16", "default", "max"),
    ("wint4_afp16", "w_group64", "max"),
    None,
    ("wfp8_afp8", "recipe_match_channel_token", "max"),
    ("wint8_afp16", "default", "max"),
    ("wint8_aint8", "a_per_token_dynamic", "max"),
)


def exported_points() -> list[Point]:
    """Every recipe of a vLLM target that is written as compressed-tensors, with the algorithms that apply to it."""
    found: dict[Point, None] = {}
    for target in all_targets():
        for recipe in target.recipes:
            if target.name in CAPABILITIES and "compressed_tensors" in recipe.export:
                for algorithm in ALGORITHMS:
                    point = recipe.quant_pair, recipe.quant_granularity, algorithm
                    with suppress(InvalidRecipe):
                        if algorithm in recipe.algorithms:
                            format_of(point)
                            found[point] = None
    return list(found)


def name_of(point: Point) -> str:
    """Of its directory."""
    return "-".join(point)


def format_of(point: Point) -> GroupFormat:
    """The format as it is served: scales shared inside fused groups."""
    pair, granularity, algorithm = point
    words = [f"quant_pair={pair}", f"quant_granularity={granularity}", f"sensitivity.quant_algorithm={algorithm}"]
    return candidates.format_of(expand([*words, "sensitivity.scales=fused"], multirun=False).points[0])


@dataclass(frozen=True)
class Export:
    """An export of the bundled model with what it was made from."""

    directory: Path
    recipe: MixedRecipe
    quants: Mapping[str, LinearQuant]


@pytest.fixture(scope="session")
def programs() -> Path:
    """Where vLLM's environment has its programs: `python`, `vllm`."""
    if not (PROGRAMS / "python").exists():
        missing = "vLLM's environment is missing. Type tests/serving/install.sh"
        if os.environ.get("SWEEP_REQUIRE_SERVING"):
            pytest.fail(missing)
        pytest.skip(missing)
    return PROGRAMS


@pytest.fixture(scope="session")
def vllm(programs: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs reader.py in vLLM's environment. Returns: its answers, one a directory."""

    def run(verb: str, argument: object, directories: Sequence[Path]) -> list[dict[str, Any]]:
        command = [programs / "python", READER, verb, str(argument), *directories]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)
        answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(answers) == len(directories), done.stderr[-3000:]
        return answers

    return run


@pytest.fixture(scope="session")
def base(vllm: object) -> Any:
    """The bundled model, unquantized, in float32."""
    del vllm  # without it nothing here is needed
    torch.set_num_threads(1)
    return load(SOURCE, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def glosses() -> list[Any]:
    """Token ids of held-out glosses: to calibrate on, then to compare logits on."""
    texts = (SOURCE / "wordnet_glosses.txt").read_text().splitlines()
    return Model(SOURCE).tokenize("tests/serving", texts)


@pytest.fixture(scope="session")
def export(base: Any, glosses: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Export]:
    """Makes an export, checked as `sweep export` does, once a recipe."""
    root, made_before, model = tmp_path_factory.mktemp("exports"), dict[str, Export](), Model(SOURCE)
    batches = list(model.plan([Sample(token_ids=ids) for ids in glosses[:N_CALIBRATION]]).batches("small"))

    def make(name: str, points: Sequence[Point | None]) -> Export:
        if name not in made_before:
            recipe, directory = recipe_of([point and format_of(point) for point in points]), root / name
            directory.mkdir()
            linears = model.structure.linears
            quants = calibrated(base, recipe, linears, batches)
            write_checkpoint(SOURCE, directory, recipe, quants, linears)
            check_export(directory, SOURCE, recipe, quants, linears)
            made_before[name] = Export(directory=directory, recipe=recipe, quants=quants)
        return made_before[name]

    return make


@pytest.fixture(scope="session")
def exports(export: Callable[..., Export]) -> dict[str, Export]:
    """One export a point, and a mixed one."""
    found: dict[str, Export] = {}
    for point in exported_points():
        pair, granularity, _ = point
        plain = (pair, granularity, "max")  # of o_proj and down_proj, before which no norm takes a scale of inputs
        found[name_of(point)] = export(name_of(point), [point, plain, point, plain])
    return {**found, "mixed": export("mixed", MIXED)}
