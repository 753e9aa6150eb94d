"""`sweep run` as a user types it, on a real Ray cluster: finished, repeated, extended, interrupted, damaged."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sweep.store.store import Store
from tests.models import overrides_of, place_at

ROOT = Path(__file__).resolve().parents[2]
PAIRS, GRANULARITIES = (
    ["wint8_aint8", "wfp8_afp8", "wint4_afp16", "wint8_afp16", "wfp8_aint8"],
    ["default", "w_group64", "recipe_match_channel_token"],
)
N_TRIALS, N_CELLS = (
    5 * 3 * 2,
    5 * 3 * 2 - 2,
)  # w8a16 is per channel already, so that the last granularity shares its cells


BROKEN = "model.layers.1.mlp.down_proj"


def grid(pairs: list[str], granularities: list[str]) -> list[str]:
    return [
        "-m",
        f"quant_pair={','.join(pairs)}",
        f"quant_granularity={','.join(granularities)}",
        "dataset.size=small,medium",
    ]


GRID = grid(PAIRS, GRANULARITIES)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of four decoder layers, with captions."""
    return place_at(tmp_path_factory.mktemp("sweep"), "qwen3", num_hidden_layers=4)


def start(verb: str, place: Path, store: Path, *overrides: str, workers: int = 1) -> "subprocess.Popen[str]":
    own = overrides_of(place)
    own += [f"store.uri={store}", f"output_layout.root={store}-published", f"cluster.workers={workers}"]
    command = [sys.executable, "-m", "sweep", verb, *own, *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def status(store: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "sweep", "status", "--json", f"store.uri={store}"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def cells(store: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in store.glob("scores/*/scores.parquet")}


def folders(store: Path) -> set[Path]:
    return {path.parent for path in Path(f"{store}-published").glob("*/layer-analysis/*/*/*/quant-manifest.json")}


def modified(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended too early: {finish(process)}")
        time.sleep(0.01)


def descendants(pid: int) -> Iterator[int]:
    """Processes under one, at any depth."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(stat.parent.name)
                yield from descendants(int(stat.parent.name))


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def at_work(pid: int) -> list[int]:
    """Workers that are scoring just now."""
    return [below for below in descendants(pid) if title(below).startswith("ray::score")]


@pytest.fixture(scope="module")
def swept(place: Path) -> Path:
    """The whole grid in one run, on two workers."""
    code, output = finish(start("run", place, place / "store", *GRID, workers=2))
    assert code == 0, output
    assert f"{N_TRIALS} of {N_TRIALS} trials done, {N_CELLS} cells scored" in output
    return place / "store"


def test_a_grid_is_scored_and_published_with_one_model_load_a_worker(swept: Path) -> None:
    assert len(cells(swept)) == N_CELLS
    assert not list(swept.glob("parts/*"))
    assert len(folders(swept)) == N_TRIALS
    (run,) = Store(str(swept)).runs().values()
    assert [worker["model_loads"] for worker in run.worker_info] == [1, 1]
    assert (run.exit_code, run.groups_done, run.groups_total) == (0, N_CELLS * 4 * 4, N_CELLS * 4 * 4)
    assert status(swept)["trials"] == {
        "total": N_TRIALS,
        "planned": 0,
        "running": 0,
        "done": N_TRIALS,
        "failed": 0,
        "skipped": 0,
    }


def test_the_same_command_again_scores_and_writes_nothing(place: Path, swept: Path) -> None:
    before = modified(place)
    code, output = finish(start("run", place, swept, *GRID, workers=2))
    assert (code, f"{N_TRIALS} of {N_TRIALS} trials done, 0 cells scored" in output, "(0 written)" in output) == (
        0,
        True,
        True,
    )
    assert "Ray" not in output
    assert f"\n  sweep publish store.uri={swept}  # puts reports into models/\n" in output
    assert modified(place) == before


def test_a_run_that_is_interrupted_and_loses_a_worker_ends_with_the_same_bits(place: Path, swept: Path) -> None:
    """Ctrl-C, SIGTERM, then the only worker killed, with trials in another order.

    It is compared with a run of two workers.
    """
    other, store = grid(PAIRS[::-1], GRANULARITIES[::-1]), place / "interrupted"
    for number in (signal.SIGINT, signal.SIGTERM):
        seen = set(store.glob("parts/*/*"))
        process = start("run", place, store, *other)
        wait_for(lambda seen=seen: set(store.glob("parts/*/*")) - seen, process)
        below = list(descendants(process.pid))
        os.killpg(process.pid, signal.SIGINT) if number == signal.SIGINT else process.terminate()
        code, output = finish(process)
        assert code == 75, output
        assert "Type the same command again to resume." in output
        assert "Traceback" not in output
        deadline = time.monotonic() + 10  # Ray has asked them to end; on a busy machine that takes a moment
        while left := [title(pid) for pid in below if title(pid)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
        assert status(store)["last_run"]["exit_code"] == 75
        assert status(store)["trials"]["done"] < N_TRIALS
    kept = cells(store)
    process = start("run", place, store, *other)
    wait_for(lambda: len(cells(store)) > len(kept), process)
    wait_for(lambda: at_work(process.pid), process)
    (worker,) = at_work(process.pid)
    os.kill(worker, signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert f"{N_TRIALS} of {N_TRIALS} trials done, {N_CELLS - len(kept)} cells scored" in output
    assert cells(store) == cells(swept)
    assert not list(store.glob("parts/*/[!.]*"))  # a killed writer may leave a hidden file that nobody reads
    published = {
        path.relative_to(f"{store}-published"): path.read_bytes()
        for path in Path(f"{store}-published").rglob("scores.parquet")
    }
    assert published == {
        path.relative_to(f"{swept}-published"): path.read_bytes()
        for path in Path(f"{swept}-published").rglob("scores.parquet")
    }


def test_an_extended_grid_scores_only_what_is_new_and_a_broken_model_fails_alone(place: Path, swept: Path) -> None:
    """One pair more, and beside it the same checkpoint with a NaN: exit code 3, the reason by name, the others done."""
    shutil.copytree(place / "model", place / "broken")
    weights = load_file(place / "broken" / "model.safetensors")
    weights[f"{BROKEN}.weight"][3, 4] = float("nan")
    save_file(weights, place / "broken" / "model.safetensors", metadata={"format": "pt"})
    before = modified(swept / "scores")
    more = ["-m", "quant_pair=wfp8_afp8,wint4_aint8", f"model.path={place / 'model'},{place / 'broken'}"]
    for again in (False, True):
        code, output = finish(start("run", place, swept, *more))
        assert code == 3, output
        assert f"2 of 4 trials done, {'0 cells' if again else '1 cell'} scored" in output
        assert output.count(BROKEN) == 2
        assert "Traceback" not in output
        assert "cluster.retry_failed=true" in output
        assert ("Ray" in output) != again  # what has failed for its own reason is not tried again
        after = modified(swept / "scores")
        assert {path: after[path] for path in before} == before
        assert len(after) == len(before) + 1
    found = status(swept)
    assert (found["trials"]["done"], found["trials"]["failed"]) == (N_TRIALS + 1, 2)
    assert all(BROKEN in failure["reason"] for failure in found["failures"])
