"""method=fisher beside method=gradient, in one process: seconds of a trial over the grid, captures included; memory.

    python -m tests.bench.fisher --device cpu --model tiny --recipes 4
    python -m tests.bench.fisher --device cuda --model qwen3_vl_4b_shape

Both capture in as many windows of decoder layers as `memory_gb` needs, as a worker does. `times_gradient` is a whole
trial of fisher in trials of gradient; `times_scoring` without the captures. How well both predict: tests.bench.chat.
"""

# pyright: basic

import argparse
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from sweep.core.groups import parts_of
from tests.bench.setup import Subject, job, peak_gb, report, subject, sync
from workers.model import memory
from workers.scoring.gradient import Engine, Scores
from workers.scoring.windows import captures

_AHEAD = 6  # layer groups


def trials(bench: Subject, draws: int | None, memory_gb: float) -> dict[str, Any]:
    """Score all of the bench's recipes once, in windows."""
    tasks = bench.tasks
    parameters = list(bench.model.parameters())
    work = memory.workload(
        bench.plan,
        len(bench.plan.segments),
        n_inputs=len(frozenset().union(*(task.inputs for task in tasks))),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        model_bytes=sum(each.numel() * each.element_size() for each in parameters),
        vocabulary=bench.model.config.get_text_config().vocab_size,
        draws=draws,
    )
    windows = memory.part_windows(parts_of(tasks[0].groups), work, memory_gb * 1e9)
    modules = [[name for part in window for group in part.groups for name in group.modules] for window in windows]
    engine, jobs = Engine(bench.device), [job(task, "large") for task in tasks]
    waiting: deque[Callable[[], list[Scores] | None]] = deque()
    scoring, started = 0.0, time.perf_counter()
    for index, rows in captures(bench.model, bench.plan.segments, modules, draws):
        sync(bench.device)
        before = time.perf_counter()
        for group in (group for part in windows[index] for group in part.groups):
            weights = {name: bench.model.get_parameter(f"{name}.weight").detach() for name in group.modules}
            waiting.append(engine.score_group(weights, rows, jobs))
            if len(waiting) > _AHEAD:
                waiting.popleft()()
        while waiting:
            waiting.popleft()()
        scoring += time.perf_counter() - before
    whole = time.perf_counter() - started
    return {"windows": len(windows), "seconds": whole / len(tasks), "scoring": scoring / len(tasks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--recipes", type=int, default=None, help="of the grid; all")
    parser.add_argument("--memory-gb", type=float, default=70.0, help="1e9 bytes, of a GPU or of the machine")
    args = parser.parse_args()
    bench = subject(args.model, args.device)
    if args.recipes is not None:
        del bench.tasks[args.recipes :]
    for draws in (None, args.draws) if args.device == "cuda" else ():  # warm: kernels, quantizers, ranges
        trials(bench, draws, args.memory_gb)
    figures: dict[str, Any] = {"model": args.model, "draws": args.draws, "cells": len(bench.tasks)}
    for method, draws in (("gradient", None), ("fisher", args.draws)):
        with peak_gb(bench.device) as peak:
            found = trials(bench, draws, args.memory_gb)
        figures |= {f"{method}_{name}": value for name, value in {**found, **peak}.items()}
    figures["times_gradient"] = figures["fisher_seconds"] / figures["gradient_seconds"]
    figures["times_scoring"] = figures["fisher_scoring"] / figures["gradient_scoring"]
    report("fisher", bench.device, figures)


if __name__ == "__main__":
    main()
