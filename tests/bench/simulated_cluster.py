"""Efficiency of a simulated cluster: several Ray nodes on one machine, fake GPUs, workers that sleep to score.

All else is real: the driver, Tune, named actors on every node. Efficiency is the time that the sleeping alone would
take, without any waiting, over the time that the sweep takes from the moment that all workers are ready.

python -m tests.bench.simulated_cluster
"""

# pyright: basic

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweep.core.machine import Hardware
from sweep.run.worker_pool import Worker
from tests.tasks import GROUP, TASK
from workers.task import Progress, Task

_LAYERS = 36
_FAMILIES, _RECIPES = 8, 16  # e.g. eight models under sixteen recipes each
_GPUS_A_NODE = 8
_FOLDER = "SWEEP_BENCH_FOLDER"


class SleepingWorker(Worker):
    """A worker that sleeps for each part, and leaves a line about it."""

    def __init__(self, *arguments: Any) -> None:
        import ray

        self._parts = {}
        self._folder = Path(os.environ[_FOLDER])
        self._node = ray.get_runtime_context().get_node_id()
        self._step_seconds = float((self._folder / "step_seconds").read_text())

    def load(self, task: Task, mark: str | None) -> None:
        """Wait until so many workers have come that nobody's start is counted."""
        (self._folder / f"here-{os.getpid()}").touch()
        while len(list(self._folder.glob("here-*"))) < int((self._folder / "n_workers").read_text()):
            time.sleep(0.05)

    def info(self) -> dict[str, Any]:
        return {"node": self._node}

    def hardware(self) -> Hardware:
        return Hardware(host=self._node)

    def _score(
        self, tasks: Sequence[Task], plan: Any, assignment: int, names: Iterator[str]
    ) -> Iterator[list[Progress]]:
        for done, name in enumerate(names, 1):
            time.sleep(self._step_seconds * len(tasks))
            with (self._folder / f"scored-{self._node}").open(
                "a"
            ) as file:  # one write: workers of a node do not tear each other's lines
                file.write("".join(f"{task.task_id} {name}\n" for task in tasks))
            yield [Progress(task_id=task.task_id, done=done, found=0, assignment=assignment) for task in tasks]


def grid() -> dict[str, Task]:
    """Tasks of several models, by id."""
    groups = tuple(replace(GROUP, name=f"layers.{i}.a", modules=(f"layers.{i}.a",)) for i in range(_LAYERS))
    names = [(family, f"model{family}-recipe{recipe}") for family in range(_FAMILIES) for recipe in range(_RECIPES)]
    return {
        name: replace(
            TASK,
            task_id=name,
            label=name,
            groups=groups,
            model=replace(TASK.model, revision=f"model{family}"),
            cells={"small": name},
        )
        for family, name in names
    }


def drive(address: str, n_workers: int, elastic: bool, folder: Path) -> None:
    """The sweep's side, in a process of its own; prints what came out."""
    from sweep.core.machine import Workers
    from tests.bench.bare import run_bare

    workers = Workers(device="cuda", count=n_workers, gpus_each=1.0, address=address, elastic=elastic)
    failures, infos, seconds, _ = run_bare(
        SleepingWorker, grid(), workers, str(folder / "store"), (folder / "ready").touch
    )
    print(json.dumps({"seconds": seconds, "failures": failures, "workers": len(infos)}))


def start_driver(
    address: str, n_workers: int, folder: Path, ideal_seconds: float, *, elastic: bool = False
) -> "subprocess.Popen[str]":
    """Begin a sweep that would take so many seconds if all of the workers slept all the time."""
    (folder / "n_workers").write_text(str(n_workers))
    (folder / "step_seconds").write_text(str(ideal_seconds * n_workers / (_FAMILIES * _RECIPES * _LAYERS)))
    command = [
        sys.executable,
        "-m",
        "tests.bench.simulated_cluster",
        "--drive",
        address,
        "--workers",
        str(n_workers),
        *(["--elastic"] if elastic else []),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, _FOLDER: str(folder)})


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def check_complete(folder: Path, result: dict[str, Any]) -> int:
    """Make sure that every recipe has every layer. Returns how many were scored more than once."""
    lines = [line for file in folder.glob("scored-*") for line in file.read_text().splitlines()]
    assert not result["failures"], result
    assert len(set(lines)) == _FAMILIES * _RECIPES * _LAYERS
    return len(lines) - len(set(lines))


def wait_until(condition: Any) -> None:
    while not condition():
        time.sleep(0.1)


def clean(folder: Path) -> None:
    for file in folder.glob("*-*"):
        file.unlink()
    (folder / "ready").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--drive", metavar="ADDRESS")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--elastic", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each sweep, at least")
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.workers[0], options.elastic, Path(os.environ[_FOLDER]))
        return
    with tempfile.TemporaryDirectory() as place:
        os.environ[_FOLDER] = place
        bench(options.workers, options.seconds, Path(place))


def bench(counts: Sequence[int], seconds: float, folder: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    address = str(cluster.address)
    try:
        figures: dict[str, Any] = {}
        n_gpus = 0
        for count in counts:
            while n_gpus < count:
                node_gpus = min(_GPUS_A_NODE, max(counts) - n_gpus)
                cluster.add_node(num_cpus=node_gpus, num_gpus=node_gpus)
                n_gpus += node_gpus
            clean(folder)
            result = finish(start_driver(address, count, folder, seconds))
            check_complete(folder, result)
            figures[f"efficiency_{count}"] = seconds / result["seconds"]
            print(json.dumps(figures), flush=True)
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node)
        lost = cluster.add_node(num_cpus=2, num_gpus=2)
        cluster.add_node(num_cpus=2, num_gpus=2)
        clean(folder)
        sweep = start_driver(address, 4, folder, seconds, elastic=True)
        wait_until((folder / "ready").exists)
        time.sleep(seconds / 6)
        cluster.remove_node(lost, allow_graceful=False)
        time.sleep(seconds / 6)
        before, added = set(folder.glob("scored-*")), time.perf_counter()
        cluster.add_node(num_cpus=3, num_gpus=3)
        wait_until(lambda: set(folder.glob("scored-*")) - before)
        figures["seconds_until_a_new_node_has_scored"] = time.perf_counter() - added
        result = finish(sweep)
        figures["scored_twice_after_a_node_was_lost"] = check_complete(folder, result)
        figures["workers_at_the_end"] = result["workers"]
        print(json.dumps({"bench": "simulated_cluster", **figures}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
