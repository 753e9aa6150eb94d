"""A whole `sweep run -m` by the command line, and what its records say of it."""

# pyright: basic

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_SHOWN_STAGES = 8


def sweep_command(grid: Sequence[str], model: Path, captions: Path, device: str, out: Path) -> list[str]:
    """The command of a sweep of a checkpoint over captions; store and reports go into `out`."""
    command = [
        sys.executable,
        "-m",
        "sweep",
        "run",
        "-m",
        *grid,
        "model=hf_causal_lm",
        f"model.path={model}",
        "model.name=bench",
    ]
    command += ["dataset=coco2017_captions", f"dataset.captions_path={captions}", f"cluster.device={device}"]
    return [*command, f"store.uri={out}/store", "output_layout=publish", f"output_layout.root={out}/models"]


def run_sweep(
    command: Sequence[str],
    out: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run it to its end.

    Args:
        command: of `sweep_command`.
        out: as there.
        environment: beside this process' own.
        on_line: called with every line that it prints.

    Returns: figures of the run; times in seconds.
    """
    started = time.perf_counter()
    stages: list[tuple[float, str]] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            stages.append((round(time.perf_counter() - started, 1), line.rstrip()))
            on_line(line)
    seconds = time.perf_counter() - started
    run = json.loads(next((out / "store" / "runs").glob("*.json")).read_text()) if process.returncode in (0, 3) else {}
    first = re.search(r"First result after ([\d.]+) s", "\n".join(line for _, line in stages))
    return {
        "exit_code": process.returncode,
        "trials": run.get("trials"),
        "seconds": seconds,
        "first_result_seconds": float(first[1]) if first else None,
        "scoring_seconds": run.get("scoring_seconds"),
        "layer_groups": run.get("groups_done"),
        "workers": run.get("worker_info"),
        "stages": [
            (at, line[:120]) for at, line in (stages[:_SHOWN_STAGES] if process.returncode == 0 else stages[-20:])
        ],
    }
