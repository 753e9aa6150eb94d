"""`sweep recommend` from nothing, on a real cluster: a grid, three recipes, a checkpoint and a page; and once more."""

import json
import subprocess
import sys
from pathlib import Path

from sweep.formats.mixed import MixedRecipe
from tests.exports import SERVED_WITH

ROOT = Path(__file__).resolve().parents[2]
OVERRIDES = [
    "target=vllm_sm90",
    "quant_pair=wint4_afp16,wint8_afp16",
    "dataset.size=small",
    "validation.n_samples=16",
    "cluster.workers=1",
]


def recommended(place: Path, *words: str) -> str:
    own = [
        "--bits",
        "6",
        "--out",
        str(place / "out"),
        f"store.uri={place / 'store'}",
        f"output_layout.root={place / 'reports'}",
    ]
    command = [sys.executable, "-m", "sweep", "recommend", *own, *OVERRIDES, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout


def test_from_nothing_to_files_and_again_from_what_is_there(tmp_path: Path) -> None:
    said = recommended(tmp_path)
    assert "6 of 6 trials done, 6 cells scored" in said  # three kinds of blocks each
    assert said.splitlines()[-1] == f"vllm serve {tmp_path / 'out' / 'checkpoint'} {SERVED_WITH}"
    text = (tmp_path / "out" / "balanced.yaml").read_text()
    assert (tmp_path / "out" / "checkpoint" / "sweep_recipe.yaml").read_text() == text
    assert 4 < MixedRecipe.from_yaml(text, "balanced.yaml").effective_bits <= 6
    before = {
        path: path.stat().st_mtime_ns
        for place in ("store/scores", "store/validations", "out/checkpoint")
        for path in (tmp_path / place).rglob("*")
    }
    document = json.loads(recommended(tmp_path, "--json"))
    assert [each["name"] for each in document["recipes"]] == ["compact", "balanced", "faithful"]
    assert {
        path: path.stat().st_mtime_ns
        for place in ("store/scores", "store/validations", "out/checkpoint")
        for path in (tmp_path / place).rglob("*")
    } == before
