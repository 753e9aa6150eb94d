"""Our engine against stock `mtq.auto_quantize`, in one process, on the same samples.

    python -m tests.bench.engine --device cpu --model tiny
    python -m tests.bench.engine --device cuda --model qwen3_vl_4b_shape

`speedup` is per distinct cell: the whole grid of distinct recipes in one visit, against the reference's best batch size
at one format a call. `floor_seconds` is the time of one recipe's GEMMs in the model's precision. The reference's slow
batch sizes are measured on a part of the samples and scaled.
"""

# pyright: basic

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tests.bench.reference import auto_quantize, padded_batches
from tests.bench.setup import Subject, job, peak_gb, report, seconds, subject
from workers.quant.modelopt import auto_quantize_scores
from workers.scoring.capture import Rows, capture
from workers.scoring.gradient import Engine, Job, Scores
from workers.task import Task

_ALONE = "wint8_aint8/default"
_CHECKED = (
    "wfp8_afp8/default",
    "wint8_aint8/default",
    "wint4_afp16/default",
    "wint8_aint8/a_per_token_dynamic",
    "wint4_aint8/w_group64",
)
_AHEAD = 6  # layer groups
_EIGHT = (*_CHECKED, "wfp8_afp16/default", "wint8_afp16/default", "wint4_afp8/default")


def score(
    bench: Subject, engine: Engine, rows: dict[str, Rows], tasks: Sequence[Task], *sizes: str
) -> dict[str, list[Scores] | None]:
    """Score every layer group under the tasks' recipes, waiting for one once the next few are started, as a worker."""
    jobs: list[Job] = [job(task, *sizes) for task in tasks]
    waiting: deque[tuple[str, Callable[[], list[Scores] | None]]] = deque()
    found: dict[str, list[Scores] | None] = {}
    for group in tasks[0].groups:
        weights = {name: bench.model.get_submodule(name).weight for name in group.modules}
        waiting.append((group.name, engine.score_group(weights, rows, jobs)))
        if len(waiting) > _AHEAD:
            name, wait = waiting.popleft()
            found[name] = wait()
    return found | {name: wait() for name, wait in waiting}


def floor(bench: Subject, rows: dict[str, Rows]) -> float:
    """Seconds of one recipe's GEMMs: every linear once, all tokens in one piece."""

    def multiply() -> None:
        for name, seen in rows.items():
            seen.x_TI.matmul(bench.model.get_submodule(name).weight.T)

    multiply()
    return seconds(multiply, bench.device, repeats=3)


def references(bench: Subject, sizes: Sequence[int]) -> dict[str, float]:
    """Seconds a format of stock auto_quantize: one format a call at each batch size, and eight a call at the best."""
    entries = {task.label: task.quant_cfg for task in bench.tasks}
    found: dict[str, float] = {}
    full = padded_batches(bench.samples, max(sizes), bench.device)
    auto_quantize(bench.model, [entries[_ALONE]], full[:1])  # warm
    for size in sizes:
        batches = padded_batches(bench.samples, size, bench.device)
        step = max(1, len(batches) // 8) if bench.device.type == "cuda" else 1
        found[f"batch_{size}"] = step * seconds(
            partial(auto_quantize, bench.model, [entries[_ALONE]], batches[::step]), bench.device
        )
    best = min(sizes, key=lambda size: found[f"batch_{size}"])
    batches = padded_batches(bench.samples, best, bench.device)
    found["eight_a_call"] = seconds(
        partial(auto_quantize, bench.model, [entries[name] for name in _EIGHT], batches), bench.device
    ) / len(_EIGHT)
    return found


def differences(bench: Subject, engine: Engine, rows: dict[str, Rows], checked: Sequence[str]) -> float:
    """Largest relative difference to single-format auto_quantize on the canonical batches, over groups and recipes."""
    worst = 0.0
    for task in bench.tasks:
        if task.label in checked:
            covered = [name for group in task.groups for name in group.modules]
            theirs = auto_quantize_scores(
                bench.model, task.quant_cfg, task.format.algorithm, list(bench.plan.batches("large")), covered
            )
            for name, found in score(bench, engine, rows, [task], "large").items():
                assert found is not None
                ours = found[0]["large"].score  # type: ignore[index]
                worst = max(worst, abs(ours / theirs[name] - 1))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--batch-sizes", default="8,32,128", help="of the reference")
    args = parser.parse_args()
    bench = subject(args.model, args.device)
    engine = Engine(bench.device)
    modules = [name for group in bench.tasks[0].groups for name in group.modules]
    segments = bench.plan.segments
    with peak_gb(bench.device) as memory:
        capture(bench.model, segments[:1], modules)  # warm
        capture_seconds = seconds(lambda: capture(bench.model, segments, modules), bench.device)
        rows = capture(bench.model, segments, modules)
        alone = next(task for task in bench.tasks if task.label == _ALONE)
        score(
            bench, engine, rows, bench.tasks if args.device == "cuda" else [alone], "large"
        )  # warm: kernels, quantizers, ranges
        figures: dict[str, Any] = {
            "model": args.model,
            "tokens": bench.plan.n_predictions("large") + len(bench.samples),
            "groups": len(alone.groups),
            "cells": len(bench.tasks),
            "capture_seconds": capture_seconds,
            "floor_seconds": floor(bench, rows),
            "alone_seconds": seconds(lambda: score(bench, engine, rows, [alone], "large"), bench.device),
            "seconds_per_trial": seconds(lambda: score(bench, engine, rows, bench.tasks, "large"), bench.device)
            / len(bench.tasks),
        }
    if bench.device.type == "cpu":
        figures["worst_relative_difference"] = differences(bench, engine, rows, _CHECKED)
    else:
        from tests.bench.accuracy import worst_against_fp32

        figures |= worst_against_fp32(bench, engine, rows)
    rows.clear()  # the reference needs the memory
    print(json.dumps(figures | memory), file=sys.stderr)
    found = references(bench, [int(size) for size in args.batch_sizes.split(",")])
    one = min(value for name, value in found.items() if name.startswith("batch_"))
    figures |= {
        "reference_seconds_per_trial": one,
        "reference_by_batch": {name: round(value, 3) for name, value in found.items()},
        "speedup": one / figures["seconds_per_trial"],
        "speedup_alone": one / figures["alone_seconds"],
        "speedup_against_eight_a_call": found["eight_a_call"] / figures["seconds_per_trial"],
        "times_floor": figures["seconds_per_trial"] / figures["floor_seconds"],
        **memory,
    }
    report("engine", bench.device, figures)


if __name__ == "__main__":
    main()
