"""`sweep status` from a store's tables alone: counts, reasons, and whether anybody is still at work."""

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from sweep.cli import main
from sweep.commands.status import read_status
from sweep.store.records import RunRecord
from sweep.store.store import Store
from tests.scored import FP8, INT8, PREDICTED_KL, add
from tests.unit.store.test_store import trial

REASON = "Layer group layers.3.mlp.down_proj under wint8_aint8/default: [/x] of shape [out, in] is NaN"


def store_with(directory: Path, seconds_ago: float, **run: Any) -> Store:
    """One trial in each state, and a run whose last heartbeat was `seconds_ago`."""
    store = Store(str(directory))
    states = ("planned", "running", "running", "done", "failed", "skipped")
    rows = [trial(f"t{i}", state=state, reason=REASON if state == "failed" else None) for i, state in enumerate(states)]
    store.write_trials("r", rows)
    beat = (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="seconds")
    record = RunRecord(run_id="r", host="h", workers=2, heartbeat_at=beat, groups_done=3, groups_total=8)
    store.write_run("r", structs.replace(record, groups_per_second=2.0, eta_seconds=65.0, **run))
    return store


@pytest.mark.parametrize(
    ("seconds_ago", "run", "running"),
    [(1, {}, True), (3600, {}, False), (1, {"ended_at": "2026-01-01T00:00:00+00:00", "exit_code": 75}, False)],
    ids=["alive", "gone", "ended"],
)
def test_trials_run_only_as_long_as_their_driver_lives(
    seconds_ago: float, run: dict[str, Any], running: bool, tmp_path: Path
) -> None:
    found = read_status(store_with(tmp_path, seconds_ago, **run))
    counts = {
        "total": 6,
        "planned": 1 if running else 3,
        "running": 2 if running else 0,
        "done": 1,
        "failed": 1,
        "skipped": 1,
    }
    assert (found.running, found.trials) == (running, counts)
    assert found.failures == [{"trial": "t4", "reason": REASON}]


@pytest.mark.parametrize(
    ("seconds_ago", "run", "line"),
    [
        (1, {}, "Running: 3 of 8 layer groups, 2 workers on h, 2/s, about 1 min 05 s left"),
        (3600, {}, "no sign of life since"),
        (
            1,
            {"ended_at": "2026-01-01T00:00:00+00:00", "exit_code": 75},
            "ended 2026-01-01T00:00:00+00:00 with exit code 75",
        ),
    ],
)
def test_a_person_reads_counts_reasons_and_what_to_type(
    seconds_ago: float, run: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store_with(tmp_path, seconds_ago, **run)
    assert main(["status", f"store.uri={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"1 of 6 trials done ({tmp_path})" in lines
    assert f"failed: t4: {REASON}" in lines
    assert sum(line in printed for printed in lines) == 1
    assert ("Interrupted: type the same `sweep run` command again to resume." in lines) == ("Running" not in line)


def test_json_is_what_the_store_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = store_with(tmp_path, 3600)
    assert main(["status", "--json", f"store.uri={tmp_path}"]) == 0
    assert json.loads(capsys.readouterr().out) == msgspec.to_builtins(read_status(store))


def test_an_empty_store_has_no_trials_and_no_run(tmp_path: Path) -> None:
    found = read_status(Store(str(tmp_path / "nothing")))
    assert (found.trials["total"], found.failures, found.running, found.last_run) == (0, [], False, None)
    assert list(tmp_path.iterdir()) == []


def test_watching_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        store_with(tmp_path, 1, ended_at="2026-01-01T00:00:00+00:00", exit_code=0)

    store_with(tmp_path, 1)
    monkeypatch.setattr("sweep.commands.status.time.sleep", sleep)
    assert main(["status", "--watch", f"store.uri={tmp_path}"]) == 0
    output = capsys.readouterr().out
    assert (len(naps), output.count("Running: 3 of 8"), output.count("with exit code 0")) == (1, 1, 1)


def test_asked_for_it_the_runs_cluster_says_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweep.run import cluster

    asked: list[tuple[str, bool]] = []

    def look(address: str, *, on_loopback: bool) -> dict[str, Any]:
        asked.append((address, on_loopback))
        nodes = [{"host": "a", "cpus": 8.0, "gpus": 2.0}, {"host": "b", "cpus": 8.0, "gpus": 2.0}]
        return {
            "address": address,
            "nodes": nodes,
            "gpus": 4.0,
            "gpus_free": 1.0,
            "workers": {"sweep-1": ["sweep-worker-0", "sweep-worker-1", "sweep-worker-2"]},
        }

    monkeypatch.setattr(cluster, "look", look)
    store_with(tmp_path, 1, ray_address="10.0.0.1:6379", dashboard_url="http://10.0.0.1:8265")
    assert main(["status", "--cluster", f"store.uri={tmp_path}"]) == 0
    assert main(["status", "--cluster", f"store.uri={tmp_path}", "cluster.address=other:6379"]) == 0
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    store_with(tmp_path, 2, ray_address="127.0.0.1:44097")  # one that the run has started
    assert main(["status", "--cluster", f"store.uri={tmp_path}"]) == 0
    assert os.environ.pop("RAY_AUTH_MODE") == "token"
    assert asked == [("10.0.0.1:6379", False), ("other:6379", False), ("127.0.0.1:44097", True)]
    assert "Ray at 10.0.0.1:6379: 2 nodes, 3 of 4 GPUs in use, 3 workers of sweep-1" in lines
    assert "Ray dashboard: http://10.0.0.1:8265" in lines


def test_without_a_run_there_is_no_cluster_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--cluster", f"store.uri={tmp_path / 'nothing'}"]) == 2
    assert "Type cluster.address=HOST:6379" in capsys.readouterr().err
    store_with(tmp_path, 3600, ray_address="10.0.0.1:6379")
    assert main(["status", "--cluster", f"store.uri={tmp_path}"]) == 0
    assert "Ray at" not in capsys.readouterr().out


def of_three_algorithms(directory: Path) -> Path:
    """A store with one recipe under three calibration algorithms, and a long granularity."""
    store = Store(str(directory))
    for minute, algorithm in enumerate(("max", "awq_lite", "mse")):
        add(store, FP8, PREDICTED_KL[FP8], f"sensitivity.quant_algorithm={algorithm}", minute=minute)
    add(store, INT8, PREDICTED_KL[INT8], minute=3)
    return directory


def test_status_and_publish_tell_algorithms_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = of_three_algorithms(tmp_path / "store")
    assert main(["status", f"store.uri={store}"]) == 0
    status = capsys.readouterr().out.splitlines()
    assert main(["publish", f"store.uri={store}", f"output_layout.root={tmp_path / 'published'}"]) == 0
    published = capsys.readouterr().out.splitlines()
    heading = ["pair", "granularity", "algorithm", "scales", "dtype"]
    for lines, word in ((status, "done"), (published, "written")):
        table = [line.split() for line in lines]
        assert [*heading, word] in table
        for algorithm in ("max", "awq_lite", "mse"):
            assert table.count(["wfp8_afp8", "default", algorithm, "private", "float32", "1"]) == 1


@pytest.mark.parametrize("width", [30, 80, 120])
def test_on_a_narrow_screen_no_word_is_cut_and_no_value_is_lost(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = of_three_algorithms(tmp_path / "store")
    verbs = (["status"], ["publish", f"output_layout.root={tmp_path / 'published'}"])
    monkeypatch.delenv("COLUMNS", raising=False)
    words: list[set[str]] = []
    for columns in (None, width):
        if columns:
            monkeypatch.setenv("COLUMNS", str(columns))
        for verb in verbs:
            assert main([*verb, f"store.uri={store}"]) == 0
        printed = capsys.readouterr().out
        words.append({word.strip(",:-") for word in printed.replace("unchanged", "written").split()})
    assert words[0] - words[1] <= {str(n) for n in range(10)}  # a sentence has the same words in another order
    too_long = [line for line in printed.splitlines() if len(line.rstrip()) > width]
    assert all(len(word) > width - 3 for line in too_long for word in [max(line.split(), key=len)])  # a path
