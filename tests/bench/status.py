"""Seconds of `sweep status`, and of a run that finds nothing left, on a finished grid and on large made-up stores."""

# pyright: basic

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from tempfile import TemporaryDirectory

import pyarrow as pa
import torch

from sweep.config.compose import expand
from sweep.plan.trials import SweepPlan, plan_sweep
from sweep.run.session import Session
from sweep.store.records import SCORES_SCHEMA, RunRecord
from sweep.store.store import Store
from tests.bench.setup import report

ROOT = Path(__file__).resolve().parents[2]


def finished_grid(store: Store, overrides: list[str]) -> SweepPlan:
    """A store in which every cell of a grid has made-up scores, as a run would have left it."""
    grid = expand(overrides, multirun=True)
    plan = plan_sweep(grid.points, "cpu")
    for task in plan.tasks.values():
        for size, cell in task.cells.items():
            n_samples = {"small": 16, "medium": 128, "large": 512}[size]
            rows = [
                {
                    "cell_id": cell,
                    "group": group.name,
                    "modules": list(group.modules),
                    "layer_index": group.layer_index,
                    "score": 1.0,
                    "sensitivity": 0.5,
                }
                | {
                    "predicted_kl": 0.25,
                    "n_predictions": 2,
                    "n_samples": n_samples,
                    "weight_elements": group.weight_elements,
                    "effective_bits": 8.0,
                }
                | {
                    "output_rel_error": 0.1,
                    "output_sqnr_db": 20.0,
                    "weight_rel_error": 0.1,
                    "input_amax": 1.0,
                    "sample_scores": [1.0 / n_samples] * n_samples,
                }
                for group in task.groups
            ]
            store.write_part(cell, "all", pa.Table.from_pylist(rows, schema=SCORES_SCHEMA))
            store.complete(cell, {"all": None})
    session = Session(grid, plan, store)
    session.write_trials(running=False)
    session.beat()
    return plan


def many_cells(store: Store, n_cells: int, like: Store) -> None:
    """A store of so many cells and trials in 100 runs, one of them with the trials of another store."""
    (known,) = list(like.trials().values())[:1]
    started = datetime(2026, 1, 1, tzinfo=UTC)
    for run in range(100):
        rows = [
            replace(
                known,
                trial_id=f"t{cell}",
                cell_id=f"{cell:020x}",
                created_at=started + timedelta(seconds=cell),
                run_id=f"r{run:03}",
            )
            for cell in range(run, n_cells, 100)
        ]
        store.write_trials(f"r{run:03}", rows)
        store.write_run(
            f"r{run:03}",
            RunRecord(
                run_id=f"r{run:03}",
                heartbeat_at="2026-01-01T00:00:00+00:00",
                ended_at="2026-01-01T00:00:00+00:00",
            ),
        )
    for cell in range(n_cells):
        directory = Path(store.uri) / f"scores/cell={cell:020x}"
        directory.mkdir(parents=True)
        (directory / "scores.parquet").write_bytes(b"PAR1")  # listing must not open it


def seconds_of(name: str, *words: str) -> dict[str, float]:
    """Wall and processor seconds of a command, the best of three: what the machine does besides is not meant."""
    times: list[tuple[float, float]] = []
    for _ in range(3):
        started, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "sweep", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        after = getrusage(RUSAGE_CHILDREN)
        times.append(
            (time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
    return {f"{name}_seconds": min(wall for wall, _ in times), f"{name}_cpu_seconds": min(cpu for _, cpu in times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        overrides = ["grid=origin", f"store.uri={place}/grid", f"output_layout.root={place}/published"]
        grid, large = Store(f"{place}/grid"), Store(f"{place}/large")
        plan = finished_grid(grid, overrides)
        subprocess.run(
            [sys.executable, "-m", "sweep", "run", "-m", *overrides], cwd=ROOT, capture_output=True, check=False
        )  # publishes
        figures: dict[str, float] = {"trials": len(plan.trials), "cells": len(grid.files.names("scores"))}
        figures |= seconds_of("run_again", "run", "-m", *overrides)
        figures |= seconds_of("status", "status", f"store.uri={place}/grid")
        many_cells(large, options.cells, grid)
        figures |= {"large_cells": options.cells} | seconds_of("large_status", "status", f"store.uri={place}/large")
        report("status", torch.device("cpu"), json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
