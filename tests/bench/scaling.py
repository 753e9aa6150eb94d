"""The valid points of the grid in three sizes on one GPU and on several of the same machine, cold and warm.

python -m tests.bench.scaling --device cuda --model qwen3_vl_4b_shape --gpus 1,2,4,8
python -m tests.bench.scaling --device cuda --model qwen3_vl_4b_shape --gpus 1 --workers-per-gpu 2
python -m tests.bench.scaling --device cuda --model qwen3_vl_4b_shape --gpus 2 --kill   # one worker, mid warm run
python -m tests.bench.scaling --device cpu --model tiny --gpus 1,2                      # workers of one core each
python -m tests.bench.scaling --plot lines.jsonl tests/bench/scaling.svg

Cold: nothing known of checkpoint and data set. Warm: their hashes and token ids are; each run has its own empty store
and loads the model. `work_seconds` is from the first worker's first task to the last row, with models loaded;
`scored_seconds` is that less a worker's capture. `efficiency` compares `scored_seconds` with the first point's,
`efficiency_with_capture` the other: every GPU captures for itself, so that part does not shrink.
"""

# pyright: basic

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sweep.core.machine import memory_gb
from sweep.core.threads import every
from tests.bench.checkpoint import make_checkpoint, write_captions
from tests.bench.commands import run_sweep, sweep_command
from tests.bench.setup import report

_SAMPLE_SECONDS = 0.25


class Watch:
    """GPU use and host memory, sampled beside a run."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.samples: list[
            tuple[float, list[float], float]
        ] = []  # seconds since 1970, percent of each GPU's time, free host memory in GB

    @contextmanager
    def watching(self, device: str) -> Generator[None]:
        """Sample until the block ends."""

        def sample() -> None:
            self.samples.append((time.time(), _utilization() if device == "cuda" else [], memory_gb()))

        self.samples.append((time.time(), [], memory_gb()))
        with every(_SAMPLE_SECONDS, sample, "watch"):
            yield

    def utilization(self, start: float, end: float) -> list[float]:
        """Mean busy share of each GPU between two times."""
        seen = [shares for at, shares, _ in self.samples if start <= at <= end and shares]
        return [round(float(share), 3) for share in np.mean(seen, axis=0) / 100] if seen else []

    def host_gb(self) -> float:
        """Host memory that the run took at most, in GB."""
        free = [sample[2] for sample in self.samples]
        return free[0] - min(free)


def _utilization() -> list[float]:
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(line) for line in asked.stdout.split()]


def kill_one_worker() -> int:
    """SIGKILL a worker that is scoring; returns its process id."""
    while True:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                title = path.read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if title.startswith(b"ray::score "):
                pid = int(path.parent.name)
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.05)


def scores_of(store: Path) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Every cell's scores by cell id, NaN where a group was never called."""
    return {
        path.parent.name: pq.read_table(path, columns=["score"]).column("score").to_numpy(zero_copy_only=False)
        for path in sorted((store / "scores").glob("*/scores.parquet"))
    }


def point(
    args: argparse.Namespace, n_gpus: int, state: str, out: Path, model: Path, captions: Path, cache: Path
) -> dict[str, Any]:
    """One run; `state` is "cold" or "warm"."""
    n_workers = n_gpus * args.workers_per_gpu
    command = sweep_command(args.overrides or ["grid=origin"], model, captions, args.device, out)
    command += [f"cluster.workers={n_workers}", f"cluster.gpus_per_worker={1 / args.workers_per_gpu:g}"]
    environment = {"SWEEP_CACHE_DIR": str(cache)}
    if args.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(n_gpus)))
    killed: list[int] = []

    def on_line(line: str) -> None:
        if args.kill and state == "warm" and line.startswith("First result"):
            time.sleep(1.0)
            killed.append(kill_one_worker())

    watch = Watch()
    with watch.watching(args.device):
        figures = run_sweep(command, out, environment, on_line)
    workers = figures.pop("workers") or []
    busy = [worker for worker in workers if worker["first_at"] is not None]
    start, end = min(worker["first_at"] for worker in busy), max(worker["last_at"] for worker in busy)
    return {
        "gpus": n_gpus,
        "workers": n_workers,
        "state": state,
        **figures,
        "work_seconds": end - start,
        "scored_seconds": end - start - max(worker["capture_seconds"] for worker in busy),
        "busy_share": [round(worker["busy_seconds"] / (end - start), 3) for worker in workers],
        "gpu_utilization": watch.utilization(start, end)[:n_gpus],
        "waiting_at_end_seconds": end - min(worker["last_at"] for worker in busy),
        "model_loads": [worker["model_loads"] for worker in workers],
        "load_seconds": [round(worker["load_seconds"], 2) for worker in workers],
        "capture_seconds": [round(worker["capture_seconds"], 2) for worker in workers],
        "peak_gb": [worker["peak_gb"] and round(worker["peak_gb"], 1) for worker in workers],
        "host_gb": watch.host_gb(),
        "killed": killed,
    }


def compared(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Rows of a store, and how far their scores are from those of the first store."""
    differing = [
        float(np.nanmax(np.abs(found[cell] / reference[cell] - 1)))
        for cell in reference
        if not np.array_equal(found[cell], reference[cell], equal_nan=True)
    ]
    return {
        "rows": sum(len(scores) for scores in found.values()),
        "cells": len(found),
        "same_cells": found.keys() == reference.keys(),
        "cells_not_bit_equal": len(differing),
        "worst_relative_difference": max(differing, default=0.0),
    }


def plot(lines: Path, picture: Path) -> None:
    """Draw the speed-up over one GPU, warm and cold, from the printed lines."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    points = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    most = max(point["gpus"] for point in points)
    axes.plot([1, most], [1, most], color="0.75", linestyle="--", label="linear")
    for state, key, label in (
        ("warm", "scored_seconds", "scoring, model and capture warm"),
        ("warm", "work_seconds", "capture and scoring"),
        ("cold", "seconds", "command to published, cold"),
    ):
        series = sorted((point["gpus"], point[key]) for point in points if point["state"] == state)
        axes.plot(
            [gpus for gpus, _ in series], [series[0][1] / seconds for _, seconds in series], marker="o", label=label
        )
    axes.set(
        xlabel="GPUs",
        ylabel="times one GPU",
        xticks=sorted({point["gpus"] for point in points}),
        title=f"{points[0]['trials']} trials on {points[0]['device']}",
    )
    axes.legend()
    figure.savefig(picture, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="qwen3_vl_4b_shape")
    parser.add_argument("--gpus", default="1,2,4,8", help="points; on a CPU, numbers of workers")
    parser.add_argument("--workers-per-gpu", type=int, default=1, help="more than one share a GPU")
    parser.add_argument(
        "--kill", action="store_true", help="kill one worker in the middle of each run; only one a point"
    )
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is kept between runs")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("LINES", "PICTURE"))
    parser.add_argument("overrides", nargs="*", help="of the sweep, instead of the whole grid")
    args = parser.parse_args(arguments)
    if args.plot:
        plot(*args.plot)
        return
    with tempfile.TemporaryDirectory() as fresh:
        scratch = args.scratch or Path(fresh)
        model = make_checkpoint(scratch / "model", args.model, args.device)
        captions = write_captions(scratch / "captions.txt", long=False)
        reference: dict[str, Any] | None = None
        first: dict[str, float] = {}
        for n_gpus in map(int, args.gpus.split(",")):
            for state in ("warm",) if args.kill else ("cold", "warm"):
                out = Path(fresh, f"{n_gpus}-{state}")
                figures = point(args, n_gpus, state, out, model, captions, Path(fresh, f"cache-{n_gpus}"))
                found = scores_of(out / "store")
                reference = found if reference is None else reference
                for name, key in (("efficiency", "scored_seconds"), ("efficiency_with_capture", "work_seconds")):
                    one = first.setdefault(f"{state} {key}", figures[key] * n_gpus)
                    figures[name] = one / (n_gpus * figures[key])
                figures["times_first_wall"] = figures["seconds"] / first.setdefault(f"{state} wall", figures["seconds"])
                report(
                    "scaling", torch.device(args.device), {"model": args.model, **figures, **compared(found, reference)}
                )


if __name__ == "__main__":
    main()
