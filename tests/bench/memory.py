"""Time of the whole grid in three sizes under several memory budgets, model loaded: windows against one capture.

python -m tests.bench.memory --device cpu --model tiny --budgets 0.5,4
python -m tests.bench.memory --device cuda --model qwen3_vl_4b_shape --budgets 64,32,24,16
"""

# pyright: basic

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sweep.core.batches import Plan
from sweep.core.paths import bundled_model_dir
from sweep.core.sizes import SIZES
from tests.bench.checkpoint import make_checkpoint
from tests.bench.setup import grid_tasks, peak_gb, random_4b, random_captions, report, seconds
from workers.data.batches import make_plan
from workers.data.samples import read_captions, text_samples
from workers.model import loading
from workers.service.scorer import Scorer
from workers.task import ModelSpec, Task


def measured(
    budget: float, spec: ModelSpec, tasks: Sequence[Task], plan: Plan, store: Path, device: torch.device
) -> dict[str, Any]:
    """Score the tasks in a worker with this budget."""
    scorer = Scorer(str(store), device.type, memory_gb=budget)
    scorer.load(spec)
    for task in tasks[:: max(1, len(tasks) // 8)]:  # kernels are compiled at their first use
        list(
            scorer.score(
                [replace(task, task_id="warm", groups=task.groups[:8], cells={"small": f"warm-{task.task_id}"})], plan
            )
        )
    warnings: list[str] = []

    def score() -> None:
        warnings.extend(progress.warning for progress in scorer.score(tasks, plan) if progress.warning is not None)

    before = scorer.info()["capture_seconds"] or 0.0
    with peak_gb(device) as peak:
        time = seconds(score, device)
    return {
        "budget_gb": budget,
        "seconds": time,
        "capture_seconds": (scorer.info()["capture_seconds"] or 0.0) - before,
        "warnings": warnings,
        **peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--budgets", default="0.5,4", help="GB, 1e9 bytes; the first is the reference")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is kept between runs")
    args = parser.parse_args()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as fresh:
        path = make_checkpoint((args.scratch or Path(fresh)) / "model", args.model, args.device)
        spec = ModelSpec(path=str(path), revision="bench", dtype="float32" if args.device == "cpu" else "bfloat16")
        texts = read_captions(bundled_model_dir() / "wordnet_glosses.txt", 512)
        samples = (
            text_samples(loading.tokenize(bundled_model_dir(), texts), 512)
            if args.model == "tiny"
            else random_captions(512)
        )
        plan = make_plan(samples, packed=True)
        network = loading.load(path, dtype=torch.float32, device="cpu") if args.model == "tiny" else random_4b("meta")

        def numbered(number: int, task: Task) -> Task:
            cells = {size: f"{number}-{size}" for size in SIZES}
            return replace(task, task_id=f"task-{number}", model=spec, plan_id="plan", cells=cells)

        tasks = [numbered(number, task) for number, task in enumerate(grid_tasks(network, args.device))]
        reference: float | None = None
        for budget in map(float, args.budgets.split(",")):
            figures = measured(budget, spec, tasks, plan, Path(fresh) / f"store-{budget:g}", device)
            reference = reference or figures["seconds"]
            report(
                "memory",
                device,
                {
                    "model": args.model,
                    "recipes": len(tasks),
                    **figures,
                    "times_reference": figures["seconds"] / reference,
                },
            )


if __name__ == "__main__":
    main()
