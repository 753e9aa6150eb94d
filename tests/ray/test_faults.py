"""A real sweep that loses its driver, cluster or disk: it ends in time, says what to do, and is whole in the end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from ray._common.utils import get_default_ray_temp_dir

from tests.bench.faults import ROOT, cells, processes, target

GRID = [
    "-m",
    "quant_pair=wfp8_afp8,wint8_aint8",
    "quant_granularity=default,w_group64",
    "dataset.size=medium",
    "cluster.workers=1",
]
SECRET = "hf_tokenThatMustNotBeWritten"
# Variables that Ray Tune takes from a driver's environment, and others in which people keep secrets.
SECRETS = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "NCCL_RAS_ADDR",
    "HF_TOKEN",
    "DB_PASSWORD",
]

# Found by every Python process of the run: while a file is there, the disk is full.
FULL_DISK = """
import errno, os
fsync = os.fsync
def full(handle):
    if os.path.exists(os.environ["DISK_IS_FULL"]):
        raise OSError(errno.ENOSPC, "No space left on device")
    fsync(handle)
os.fsync = full
"""


def start(store: Path, mark: str, *overrides: str, **environment: str) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "sweep",
        "run",
        *GRID,
        f"store.uri={store}",
        f"output_layout.root={store}-published",
        *overrides,
    ]
    env = os.environ | {"SWEEP_FAULTS": mark, "HF_TOKEN": SECRET} | environment
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=env
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended too early: {end(process)}")
        time.sleep(0.02)


def gone(mark: str, process: "subprocess.Popen[str]") -> bool:
    """Whether every process of the run ends within ten seconds."""
    deadline = time.monotonic() + 10
    while (left := processes(mark, process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def has_begun(store: Path) -> bool:
    return bool(cells(store)) or any(store.glob("parts/*/*.parquet"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The store of an undisturbed run, and the directory of Ray's session."""
    store = tmp_path_factory.mktemp("faults") / "whole"
    process = start(store, "whole", **dict.fromkeys(SECRETS, SECRET))
    code, output = end(process)
    assert code == 0, output
    (session,) = Path(get_default_ray_temp_dir()).glob(f"session_*_{process.pid}")
    return store, session


@pytest.fixture(scope="module")
def whole(undisturbed: tuple[Path, Path]) -> Path:
    """The store of an undisturbed run."""
    return undisturbed[0]


def test_a_secret_of_the_environment_is_written_nowhere(undisturbed: tuple[Path, Path]) -> None:
    """Neither by the run, below its store, its reports and its cache, nor by Ray."""
    store, session = undisturbed
    places = [store.parent, session, Path(os.environ["SWEEP_CACHE_DIR"])]
    for place, n_at_least in zip(places, (21, 11, 2), strict=True):
        written = [path for path in place.rglob("*") if path.is_file()]
        assert len(written) >= n_at_least
        assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_what_ray_logs_is_for_nobody_else_to_read(undisturbed: tuple[Path, Path]) -> None:
    assert undisturbed[1].stat().st_mode & 0o777 == 0o700


def test_a_sweep_that_loses_its_cluster_its_driver_and_its_disk_is_whole_in_the_end(
    whole: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    for kind, what in (("raylet", "Ray's raylet has died"), ("gcs", "Ray"), ("driver", None)):
        process = start(store, kind)
        wait_for(lambda kind=kind, process=process: target(kind, process.pid, kind, Random(0)), process)
        if kind != "gcs":  # which dies while Ray starts
            wait_for(lambda: has_begun(store), process)
        pid = target(kind, process.pid, kind, Random(0))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        code, output = end(process)
        assert gone(kind, process)
        if what is not None:
            assert (
                code,
                what in output,
                "Type the same command again to resume." in output,
                "Traceback" in output,
            ) == (75, True, True, False), output
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    full = tmp_path / "full"
    process = start(store, "disk", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}", DISK_IS_FULL=str(full))
    n_parts = len(list(store.glob("parts/*/*.parquet"))) + 100 * len(cells(store))
    wait_for(lambda: len(list(store.glob("parts/*/*.parquet"))) + 100 * len(cells(store)) > n_parts, process)
    full.touch()
    code, output = end(process)
    assert (code, "No space left on device" in output, "Traceback" in output) == (75, True, False), output
    code, output = end(start(store, "last"))
    assert code == 0, output
    assert cells(store) == cells(whole)
    assert not list(store.glob("parts/*"))
    done = subprocess.run(
        [sys.executable, "-m", "sweep", "doctor", "--store", "--json", f"store.uri={store}"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert [finding["subject"] for finding in json.loads(done.stdout) if finding["verdict"] == "error"] == []


def test_a_machine_short_of_memory_ends_a_run_with_one_message_and_the_next_run_completes_it(
    whole: Path, tmp_path: Path
) -> None:
    """Ray kills workers and trials from the moment that they start, as it does above a threshold of memory in use."""
    store = tmp_path / "store"
    short = {"RAY_memory_usage_threshold": "0.02", "RAY_memory_monitor_refresh_ms": "250"}
    code, output = end(start(store, "short", **short))
    assert (code, "Traceback" in output, "was killed 3 times: its machine is short of memory" in output) == (
        75,
        False,
        True,
    ), output
    code, output = end(start(store, "enough"))
    assert code == 0, output
    assert cells(store) == cells(whole)


# Found by every Python process of the run: the raylet that the driver starts first aborts.
ABORTING_RAYLET = """
import os
if "ABORTED" in os.environ:
    from ray._private import services
    os.environ.setdefault("RAYLET", services.RAYLET_EXECUTABLE)
    services.RAYLET_EXECUTABLE = os.environ["ABORTING"]
"""
ABORTING = """#!/bin/bash
if [ ! -e "$ABORTED" ]; then touch "$ABORTED"; kill -ABRT $$; fi
exec -a raylet "$RAYLET" "$@"
"""


def test_a_raylet_that_aborts_as_it_starts_is_started_once_more(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABORTING_RAYLET)
    script = tmp_path / "raylet"
    script.write_text(ABORTING)
    script.chmod(0o755)
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    aborted = {"PYTHONPATH": path, "ABORTED": str(tmp_path / "aborted"), "ABORTING": str(script)}
    process = start(tmp_path / "store", "aborting", **aborted)
    code, output = end(process)
    assert code == 0, output
    assert (tmp_path / "aborted").exists()
    assert cells(tmp_path / "store") == cells(whole)
    assert gone("aborting", process)


def two_drivers(tmp_path: Path, uri: str) -> None:
    """At once, on one store: three of the four cells, one of them wanted by both."""
    one = start(tmp_path, "one", "quant_pair=wfp8_afp8", f"store.uri={uri}", f"output_layout.root={tmp_path}/one")
    two = start(
        tmp_path, "two", "quant_granularity=w_group64", f"store.uri={uri}", f"output_layout.root={tmp_path}/two"
    )
    for process in (one, two):
        code, output = end(process)
        assert code == 0, output


def test_two_drivers_on_one_store_at_once_give_the_union_each_row_once(whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    two_drivers(tmp_path, str(store))
    expected = cells(whole)
    found = cells(store)
    assert len(found) == 3
    assert found == {cell: expected[cell] for cell in found}
    rows = Counter(
        (row["cell_id"], row["group"])
        for path in store.glob("scores/*/*.parquet")
        for row in pq.read_table(path, partitioning=None).to_pylist()
    )
    assert set(rows.values()) == {1}
    assert not list(store.glob("parts/*"))


class Bucket:
    """A store on the S3 server, as its objects."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self._objects = objects

    def names(self, kind: str) -> list[str]:
        return [
            name for name in [*self._objects] if name.startswith(f"bucket/store/{kind}/") and not name.endswith("/")
        ]  # pyarrow marks directories

    def cells(self) -> dict[str, bytes]:
        return {name.split("/")[3]: self._objects[name] for name in self.names("scores")}


def test_a_sweep_on_s3_that_loses_its_cluster_its_driver_and_a_worker_gives_the_same_bytes(
    whole: Path, tmp_path: Path, s3: tuple[dict[str, bytes], list[str]]
) -> None:
    bucket = Bucket(s3[0])
    there = ["store.uri=s3://bucket/store", f"output_layout.root={tmp_path}"]
    for kind, expected in (("raylet", 75), ("driver", -signal.SIGKILL), ("worker", 0)):
        known = {*bucket.names("parts"), *bucket.names("scores")}
        process = start(tmp_path, f"s3 {kind}", *there)
        wait_for(lambda known=known: {*bucket.names("parts"), *bucket.names("scores")} - known, process)
        wait_for(lambda kind=kind, process=process: target(kind, process.pid, f"s3 {kind}", Random(0)), process)
        pid = target(kind, process.pid, f"s3 {kind}", Random(0))
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        code, output = end(process)
        assert (code, "Traceback" in output) == (expected, False), output
        assert gone(f"s3 {kind}", process)
    assert bucket.cells() == cells(whole)
    assert bucket.names("parts") == []
    done = subprocess.run(
        [sys.executable, "-m", "sweep", "doctor", "--store", "--json", there[0]],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (finding,) = [found for found in json.loads(done.stdout) if found["subject"] == "store"]
    assert finding["text"].startswith("4 cells, 0 parts, 4 trials, 0 validations, ")


def test_two_drivers_on_s3_at_once_give_the_union(
    whole: Path, tmp_path: Path, s3: tuple[dict[str, bytes], list[str]]
) -> None:
    two_drivers(tmp_path, "s3://bucket/store")
    found = Bucket(s3[0]).cells()
    assert len(found) == 3
    assert found == {cell: cells(whole)[cell] for cell in found}
    assert Bucket(s3[0]).names("parts") == []


def test_the_cluster_of_a_run_listens_on_loopback_alone(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path / "store", "bound", "sensitivity.method=kl_div")  # which takes long enough to be looked at
    wait_for(lambda: has_begun(tmp_path / "store"), process)
    pids = [*processes("bound"), process.pid]
    sockets = {
        os.readlink(handle) for pid in pids for handle in Path(f"/proc/{pid}/fd").iterdir() if os.path.lexists(handle)
    }
    addresses: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                addresses.add(local.split(":")[0])
    asked = [sys.executable, "-m", "sweep", "status", "--cluster", "--json", f"store.uri={tmp_path / 'store'}"]
    done = subprocess.run(
        asked, cwd=ROOT, capture_output=True, text=True, check=True
    )  # from outside, with the token of whoever started it
    assert [*json.loads(done.stdout)["cluster"]["workers"].values()] == [["sweep-worker-0"]]
    process.terminate()
    assert end(process)[0] == 75
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
