"""Faults at random moments of a real sweep on the bundled model, the same command again until it is complete.

`python -m tests.bench.faults --rounds N` injects N faults, of every kind in turn. All the time a reader opens every
score file that is there; at the end each store is compared with that of an undisturbed run, byte by byte. For a disk
that is full, stores lie on a small one of their own: mounting it takes root and a loop device. Where there is a GPU,
workers use it.
"""

# pyright: basic

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pyarrow.parquet as pq
import torch

from sweep.core.threads import every
from tests.bench.counted import SCORED
from tests.bench.setup import report

ROOT = Path(__file__).resolve().parents[2]
GRID = [
    "-m",
    "quant_pair=wfp8_afp8,wint8_aint8,wint4_afp16",
    "quant_granularity=default,w_group64",
    "dataset.size=small,medium",
]
# Kinds of faults, with the exit code that a run ends with if it was not finished before.
KINDS = {
    "SIGINT": 75,
    "SIGTERM": 75,
    "driver": -9,
    "worker": 0,
    "writer": 0,
    "raylet": 75,
    "gcs": 75,
    "node": 0,
    "disk": 75,
}
SECONDS = 300.0  # a run that takes longer hangs
DISK = "64M"


@dataclass
class Found:
    """Faults that were injected, and what went wrong, if anything did."""

    injected: Counter[str] = field(default_factory=Counter[str])
    ended: Counter[str] = field(default_factory=Counter[str])  # kind of fault and exit code
    unexpected: int = 0  # runs that ended with an exit code of neither their fault nor success
    torn: int = 0  # files that a reader met and could not read
    reads: int = 0
    hung: int = 0
    orphans: int = 0  # processes that outlived the driver by 10 seconds
    lost: int = 0
    duplicate: int = 0
    different: int = 0
    scored_again: list[int] = field(default_factory=list[int])  # decoder layers of one worker, by run with a fault
    slowest_end: float = 0.0  # seconds from a fault to the driver's end, for faults that end it


MORE: list[str] = []  # overrides for every run


def start(store: Path, workers: int, *overrides: str, mark: str = "", **environment: str) -> "subprocess.Popen[bytes]":
    """The command; its output goes to a file, see `log_of`."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.counted",
        "run",
        *GRID,
        f"store.uri={store}",
        f"output_layout.root={store}-published",
        f"cluster.workers={workers}",
    ]
    with log_of(store).open("ab") as log:
        env = os.environ | {"SWEEP_FAULTS": mark, SCORED: str(scored_of(store))} | environment
        return subprocess.Popen(
            [*command, *MORE, *overrides], cwd=ROOT, stdout=log, stderr=log, start_new_session=True, env=env
        )


def log_of(store: Path) -> Path:
    """Beside the store's disk, which may be full."""
    return store.parent.with_suffix(".log")


def scored_of(store: Path) -> Path:
    """A line for each layer that was scored for a recipe, see tests.bench.counted."""
    return store.parent.with_suffix(".scored")


def processes(mark: str, session: int | None = None) -> dict[int, str]:
    """Processes of one run with their names, at any depth and under any parent.

    They bear the run's mark, or are in its first process's session.
    """
    found: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, own, *_ = (path / "stat").read_text().rpartition(")")[2].split()
            marked = f"SWEEP_FAULTS={mark}".encode() in (path / "environ").read_bytes().split(
                b"\0"
            )  # Ray's agents write their titles over it
            if (marked or int(own) == session) and state != "Z":
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def target(kind: str, driver: int, mark: str, generator: random.Random) -> int | None:
    """The process that a fault hits; None: there is none yet."""
    if kind in ("SIGINT", "SIGTERM", "driver"):
        return driver
    parts = {"worker": "ray::Worker", "raylet": "raylet/raylet", "gcs": "gcs_server", "writer": "ray::score"}
    found = [
        pid
        for pid, name in processes(mark).items()
        if parts[kind] in name or (kind == "worker" and "ray::score" in name)
    ]
    return generator.choice(found) if found else None


def kill_all(mark: str, session: int | None = None) -> None:
    for pid in processes(mark, session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_nodes(mark: str) -> Iterator[tuple[list[str], dict[str, str]]]:
    """A Ray cluster of two nodes of one core, marked `mark`-head and `mark`-node.

    Yields: the overrides and the environment that join it.
    """
    folder = Path(mkdtemp(prefix="ray-"))  # short: a socket's path has 107 characters at most
    (folder / "token").write_text(secrets.token_hex(32), encoding="ascii")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", "--num-gpus=0"]
    nodes: list[tuple[str, int]] = []
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false", f"--temp-dir={folder}"]
    try:
        for name, options in (("head", head), ("node", [f"--address={address}"])):
            log = folder / f"{name}.log"
            env = os.environ | environment | {"SWEEP_FAULTS": f"{mark}-{name}"}
            with log.open("wb") as output:
                node = subprocess.Popen(
                    [*command, *options], stdout=output, stderr=output, start_new_session=True, env=env
                )
            nodes.append((f"{mark}-{name}", node.pid))
            deadline = time.monotonic() + 120
            while b"Ray runtime started" not in log.read_bytes():
                if time.monotonic() > deadline:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
        yield ["cluster=auto", f"cluster.address={address}"], environment
    finally:
        for node_mark, session in nodes:
            kill_all(node_mark, session)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of its own, in a file."""
    image = place.with_suffix(".img")
    place.mkdir()
    for command in (
        ["truncate", "-s", DISK, image],
        ["mkfs.ext4", "-q", "-m", "0", image],
        ["mount", "-o", "loop", image, place],
    ):
        subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)
        image.unlink()


def fill(ballast: Path) -> None:
    """Leave no room on a disk."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with ballast.with_suffix(".rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 10))


def kill_writer(store: Path, pid: int) -> None:
    """Kill a worker that has just begun to write a file, so that half of it is there; after 5 seconds in any case."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not any(f".{pid}-" in path.name for path in listed(store, "*/*/.*.tmp")):
        pass
    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def reading(store: Path, found: Found) -> Iterator[None]:
    """Meanwhile open whatever a reader without our code would: every Parquet file, as often as there is time for."""

    def read() -> None:
        for pattern in ("scores/*/*.parquet", "parts/*/*.parquet", "trials/*.parquet"):
            for path in listed(store, pattern):
                try:
                    pq.ParquetFile(path, page_checksum_verification=True).read(use_threads=False)
                    found.reads += 1
                except FileNotFoundError:
                    pass  # dropped since it was listed
                except Exception as error:  # noqa: BLE001 -- whatever it is, a reader would have met it
                    found.torn += 1
                    print(f"torn: {path}: {error}", file=sys.stderr)

    with every(0.05, read, "reader"):
        yield


def listed(store: Path, pattern: str) -> list[Path]:
    """Files that match; a directory may be removed while it is listed."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return list(store.glob(pattern))


def cells(store: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in listed(store, "scores/*/scores.parquet")}


class Scored:
    """Parts that workers have scored for a store, in this run and before."""

    def __init__(self, store: Path) -> None:
        self._log = scored_of(store)
        self._n_before = len(self._lines())

    def _lines(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    @property
    def has_begun(self) -> bool:
        """Whether this run has scored anything."""
        return len(self._lines()) > self._n_before

    def again(self) -> int:
        """Decoder layers of any one worker that have been scored again in this run, for whatever recipes; the most."""
        by: dict[tuple[str, str], str] = {}
        lost: set[tuple[str, str]] = set()
        for index, line in enumerate(self._lines()):
            task, part, pid = line.split()
            if index >= self._n_before and (task, part) in by:
                lost.add((by[task, part], part))
            by[task, part] = pid
        return max(Counter(pid for pid, _ in lost).values(), default=0)


def hit(kind: str, store: Path, process: "subprocess.Popen[bytes]", mark: str, generator: random.Random) -> bool:
    """Inject a fault. Returns whether there was something to hit."""
    if process.poll() is not None:
        return False
    if kind == "disk":
        fill(store.parent / "ballast")
        return True
    if kind == "node":
        kill_all(f"{mark}-node")
        return True
    pid = target(kind, process.pid, mark, generator)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            if kind == "writer":
                kill_writer(store, pid)
            else:
                os.kill(pid, {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}.get(kind, signal.SIGKILL))
    return pid is not None


def disturb(kind: str, store: Path, workers: int, seconds: float, generator: random.Random, found: Found) -> bool:
    """One run with one fault, `seconds` after it began to score (or before, if negative).

    Returns: whether the sweep is complete.
    """
    mark = f"{os.getpid()}-{time.time_ns()}"
    with two_nodes(mark) if kind == "node" else contextlib.nullcontext(([], {})) as (overrides, environment):
        process = start(store, workers, *overrides, mark=mark, **environment)
        watch_with_fault(kind, store, process, seconds, generator, found, mark)
        end_orphans(kind, mark, process.pid, found)
    return process.returncode == 0


def watch_with_fault(
    kind: str,
    store: Path,
    process: "subprocess.Popen[bytes]",
    seconds: float,
    generator: random.Random,
    found: Found,
    mark: str,
) -> None:
    """One run, just started, until it ends."""
    scored = Scored(store)
    n_logged = log_of(store).stat().st_size
    begun = time.monotonic()
    at: float | None = None
    while process.poll() is None and time.monotonic() - begun < SECONDS:
        if at is None and (scored.has_begun if seconds >= 0 else time.monotonic() - begun > -seconds):
            time.sleep(max(seconds, 0.0))
            if hit(kind, store, process, mark, generator):
                at = time.monotonic()
                found.injected[kind] += 1
        time.sleep(0.02)
    if process.poll() is None:
        found.hung += 1
        process.kill()
    code = process.wait()
    for ballast in store.parent.glob("ballast*"):
        ballast.unlink()
    if at is not None:
        found.ended[f"{kind} {code}"] += 1
        found.scored_again.append(scored.again())
        if KINDS[kind] == 75:
            found.slowest_end = max(found.slowest_end, time.monotonic() - at)
    if code not in (0, KINDS[kind]):
        found.unexpected += 1
        print(
            f"exit code {code} after {kind}:\n{log_of(store).read_bytes()[n_logged:].decode(errors='replace')}",
            file=sys.stderr,
            flush=True,
        )


def end_orphans(kind: str, mark: str, driver: int, found: Found) -> None:
    """Count what outlives its driver, and end it."""

    def left() -> dict[int, str]:
        own = processes(mark, driver)
        joined = {pid: name for pid, name in processes(f"{mark}-head").items() if name.startswith("ray::")}
        return own | {
            pid: name
            for pid, name in joined.items()
            if not name.startswith(("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"))
        }

    deadline = time.monotonic() + 10
    while (orphans := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found.orphans += len(orphans)
    for pid, name in orphans.items():
        print(f"orphan after {kind}: {name[:60]}", file=sys.stderr, flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def campaign(
    rounds: int, workers: int, seed: int, place: Path, budget: float, kinds: Sequence[str]
) -> tuple[Found, dict[str, Any]]:
    """Sweeps, each with faults until it is complete, until there were enough faults or the time is up."""
    generator, found, started = random.Random(seed), Found(), time.monotonic()
    undisturbed = place / "undisturbed" / "store"
    undisturbed.parent.mkdir()
    if start(undisturbed, workers).wait() != 0:
        raise SystemExit(log_of(undisturbed).read_text())
    expected = cells(undisturbed)
    n_sweeps = 0

    def is_over() -> bool:
        return found.injected.total() >= rounds or time.monotonic() - started > budget

    while not is_over():
        disk = place / f"disk-{n_sweeps}"
        store = disk / "store"
        with small_disk(disk) if "disk" in kinds else contextlib.nullcontext(disk.mkdir()):
            with reading(store, found):
                complete = False
                while not complete and not is_over():
                    kind = kinds[found.injected.total() % len(kinds)]
                    complete = disturb(
                        kind,
                        store,
                        workers,
                        generator.choice([-generator.uniform(3, 12), generator.uniform(0, 3)]),
                        generator,
                        found,
                    )
                    print(
                        f"{time.monotonic() - started:.0f} s, {found.injected.total()} faults: {dict(found.ended)}",
                        file=sys.stderr,
                        flush=True,
                    )
                if not complete and start(store, workers).wait() != 0:
                    raise SystemExit(log_of(store).read_text())
            compare(store, expected, found)
        n_sweeps += 1
    return found, {"sweeps": n_sweeps, "cells": len(expected), "seconds": time.monotonic() - started}


def compare(store: Path, expected: dict[str, bytes], found: Found) -> None:
    """Count what the store has less, more, or otherwise."""
    got = cells(store)
    found.lost += len(expected.keys() - got.keys())
    found.different += sum(got[cell] != data for cell, data in expected.items() if cell in got)
    rows = Counter(
        (row["cell_id"], row["group"])
        for path in listed(store, "scores/*/*.parquet")
        for row in pq.ParquetFile(path).read().to_pylist()
    )
    found.duplicate += sum(n - 1 for n in rows.values())
    if left := [*store.glob("parts/*/*"), *store.glob("quarantine/*")]:
        print(f"left: {left}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="faults to inject")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="of faults, all by default; node is for CPUs"
    )
    parser.add_argument(
        "--minutes", type=float, default=1000.0, help="stop after so many, however many faults that were"
    )
    parser.add_argument("overrides", nargs="*", help="of every run, e.g. model.path=DIR")
    options = parser.parse_intermixed_args()
    MORE.extend(options.overrides)
    with TemporaryDirectory(prefix="faults-") as place:
        found, figures = campaign(
            options.rounds, options.workers, options.seed, Path(place), 60 * options.minutes, options.kinds
        )
    again = found.scored_again
    figures |= {
        "faults": found.injected.total(),
        "kinds": dict(found.injected),
        "exit_codes": dict(sorted(found.ended.items())),
    }
    figures |= {
        "rows_lost": found.lost,
        "rows_duplicate": found.duplicate,
        "cells_different": found.different,
        "torn": found.torn,
        "reads": found.reads,
    }
    figures |= {
        "hung": found.hung,
        "ended_unexpectedly": found.unexpected,
        "orphans": found.orphans,
        "slowest_end_seconds": found.slowest_end,
    }
    figures |= {
        "layers_a_worker_again_mean": sum(again) / max(len(again), 1),
        "layers_a_worker_again_max": max(again, default=0),
    }
    report("faults", torch.device("cuda" if torch.cuda.is_available() else "cpu"), json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
