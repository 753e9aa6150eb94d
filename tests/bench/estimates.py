"""What `sweep doctor` estimates of a sweep beforehand, and what the sweep then takes: one JSON line a case.

python -m tests.bench.estimates                                            # the bundled model, every case
python -m tests.bench.estimates --model DIR --cases one,formats
python -m tests.bench.estimates --model qwen3_vl_4b_shape --device cuda --scratch DIR    # made once, random weights
python -m tests.bench.estimates quant_pair=wfp8_afp8 dataset.size=16,128   # one case of these overrides
"""

# pyright: basic

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import torch

from tests.bench.checkpoint import make_checkpoint
from tests.bench.setup import report

_PAIRS = "quant_pair=wfp8_afp8,wint8_aint8,wint4_afp16,wint4_aint8"
_GRAINS = "quant_granularity=default,w_group64,recipe_match_channel_token"
CASES: dict[str, list[str]] = {
    "one": ["quant_pair=wint8_aint8", "dataset.size=small"],
    "default": [_PAIRS, _GRAINS, "dataset.size=small,medium,large"],
    "weights": ["quant_pair=wint4_afp16,wint8_afp16,wfp8_afp16", _GRAINS, "dataset.size=medium"],
    "inputs": ["quant_pair=wint8_aint8,wfp8_afp8", "quant_granularity=a_per_token_dynamic,a_per_tensor_static"],
    "blocks": ["quant_pair=wfp4_afp4,wfp4_afp16,wfp8_afp8", "quant_granularity=default,mx", "dataset.size=medium"],
    "origin": ["grid=origin"],
    "kl": ["sensitivity.method=kl_div", "quant_pair=wint4_afp16,wint8_aint8", "dataset.size=small"],
    "pictures": ["dataset=scenes", "sensitivity.coverage=all_layers", _PAIRS, "dataset.size=medium"],
    "windows": ["sensitivity.memory_gb=WINDOW", _PAIRS, _GRAINS, "dataset.size=large"],
    "algorithms": ["sensitivity.quant_algorithm=mse,awq_lite,smoothquant", "quant_pair=wint4_aint8"],
    "one_worker": ["cluster.workers=1", _PAIRS, "dataset.size=large"],
}


def measured(overrides: Sequence[str], out: Path) -> dict[str, Any]:
    """Estimate and run one grid, in a store of its own.

    Args:
        overrides: of the grid.
        out: where store and reports go.
    """
    own = [f"store.uri={out}/store", f"output_layout.root={out}/models"]
    command = [sys.executable, "-m", "sweep"]
    started = time.perf_counter()
    said = subprocess.run(
        [*command, "doctor", "-m", "--json", *overrides, *own], capture_output=True, text=True, check=False
    )
    figures: dict[str, Any] = {"overrides": list(overrides), "doctor_seconds": time.perf_counter() - started}
    if said.returncode:
        return figures | {"doctor": (said.stdout + said.stderr)[-1000:]}
    estimate = next((each for each in json.loads(said.stdout) if each["subject"] == "estimate"), {})
    taken = _run([*command, "run", "-m", *overrides, *own], out)
    return figures | {"load": os.getloadavg()[0], "estimated": estimate.get("figures"), **taken}


def _run(command: Sequence[str], out: Path) -> dict[str, Any]:
    """Run a sweep to its end: seconds from the command on, by part; the driver's and the workers' peak; the store."""
    started = time.time()
    watched = _Watched()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watcher = Thread(target=watched.watch, args=(process,))
        watcher.start()
        assert process.stdout is not None
        lines = list(process.stdout)
    ended = time.time()
    watcher.join()
    if process.returncode not in (0, 3):
        return {"exit_code": process.returncode, "output": "".join(lines)[-2000:]}
    store = out / "store"
    run = json.loads(max((store / "runs").glob("*.json")).read_text())
    workers = [info for info in run["worker_info"] if info["first_at"]]
    last = max(info["last_at"] for info in workers)
    load = max(info["load_seconds"] for info in workers)
    capture = max(info["capture_seconds"] for info in workers)
    return {
        "measured": {
            "seconds": ended - started,
            "start": min(info["first_at"] for info in workers) - started - load,
            "load": load,
            "capture": capture,
            "scoring": last - min(info["first_at"] for info in workers) - capture,
            "end": ended - last,
            "worker_gb": max(info["peak_gb"] or 0.0 for info in run["worker_info"]),
            "driver_gb": watched.peak_gb,
            "store_mb": sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) / 1e6,
        },
        # Processor seconds of the busiest worker between its first and its last task: with other programs on the cores
        # these are what capture and scoring take on free ones.
        "worker_cpu": max(watched.cpu(info["pid"], info["first_at"], info["last_at"]) for info in workers),
        "trials": run["trials"],
        "workers": run["workers"],
    }


class _Watched:
    """The driver's peak memory, and processor seconds of its descendants over time."""

    def __init__(self) -> None:
        self.peak_gb = 0.0  # 1e9 bytes, resident
        self._samples: dict[int, list[tuple[float, float]]] = {}  # seconds since 1970 and processor seconds, by process

    def watch(self, process: subprocess.Popen[str]) -> None:
        """Sample until the process ends."""
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                self.peak_gb = max(self.peak_gb, driver.memory_info().rss / 1e9)
                for child in driver.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        used = child.cpu_times()
                        self._samples.setdefault(child.pid, []).append((time.time(), used.user + used.system))
            time.sleep(0.1)

    def cpu(self, pid: int, start: float, end: float) -> float:
        """Processor seconds of a process between two moments."""
        times, used = zip(*self._samples[pid], strict=True)
        first, last = np.interp([start, end], times, used)
        return float(last - first)


def _ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """Estimated over measured, of what both have."""
    estimated, taken = figures.get("estimated") or {}, figures.get("measured") or {}
    found = {f"{key}_ratio": estimated[key] / taken[key] for key in estimated if taken.get(key)}
    if estimated and taken:
        found["worker_cpu_ratio"] = (estimated["capture"] + estimated["scoring"]) / figures["worker_cpu"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="one case of these, in place of the known ones")
    parser.add_argument("--model", default="tiny", help="tiny, qwen3_vl_4b_shape, or a directory")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--window", default="0.6", help="GB of a worker in the case of windows")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is kept between runs")
    args = parser.parse_args()
    cases = {"typed": args.overrides} if args.overrides else {name: CASES[name] for name in args.cases.split(",")}
    with tempfile.TemporaryDirectory() as fresh:
        known = args.model in ("tiny", "qwen3_vl_4b_shape")
        path = (
            make_checkpoint((args.scratch or Path(fresh)) / "model", args.model, args.device) if known else args.model
        )
        own = [f"cluster.device={args.device}"]
        if args.model != "tiny":
            own += ["model=hf_causal_lm", f"model.path={path}", "model.name=bench"]
        for name, overrides in cases.items():
            typed = [override.replace("WINDOW", args.window) for override in overrides]
            figures = measured([*typed, *own], Path(fresh) / name)
            report("estimates", torch.device(args.device), {"case": name, **figures, **_ratios(figures)})


if __name__ == "__main__":
    main()
