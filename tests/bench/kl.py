"""method=kl_div: one trial of ours against `mtq.auto_quantize(method="kl_div")`.

Of the latter one batch of 64 samples is measured and scaled. `seconds_per_trial` is a trial on an engine that has run
one before; `first_trial_seconds` holds the unquantized model's pass and the recording of CUDA graphs, too.

python -m tests.bench.kl --device cuda --model qwen3_vl_4b_shape
"""

# pyright: basic

import argparse

from tests.bench.reference import auto_quantize, padded_batches
from tests.bench.setup import job, peak_gb, report, seconds, spearman, subject
from workers.scoring.gradient import Scores
from workers.scoring.kl import KlEngine

_ALONE = "wint8_aint8/default"
_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--no-reference", action="store_true")
    args = parser.parse_args()
    bench = subject(args.model, args.device)
    task = next(task for task in bench.tasks if task.label == _ALONE)
    modules = [name for group in task.groups for name in group.modules]
    jobs = [job(task, "large")]
    found: dict[str, list[Scores] | None] = {}

    def trial(engine: KlEngine) -> None:
        waiting = {group.name: engine.score_group(group.modules, jobs) for group in task.groups}
        found.update({name: wait() for name, wait in waiting.items()})

    engines: list[KlEngine] = []
    with peak_gb(bench.device) as memory:
        first = seconds(
            lambda: engines.append(KlEngine(bench.model, bench.plan.segments, modules)) or trial(engines[0]),
            bench.device,
        )
        ours = seconds(lambda: trial(engines[0]), bench.device)
    figures: dict[str, object] = {
        "model": args.model,
        "groups": len(task.groups),
        "seconds_per_trial": ours,
        "first_trial_seconds": first,
        **memory,
    }
    if not args.no_reference:
        batches = padded_batches(bench.samples, _BATCH, bench.device)
        middle = batches[len(batches) // 2 : len(batches) // 2 + 1]
        theirs: dict[str, list[float]] = {}
        one = seconds(
            lambda: theirs.update(auto_quantize(bench.model, [task.quant_cfg], middle, method="kl_div")), bench.device
        )
        ranked = [found[name][0]["large"].score for name in found]  # type: ignore[index]
        figures |= {
            "reference_seconds_per_trial": one * len(batches),
            "speedup": one * len(batches) / ours,
            "spearman_to_reference_on_an_eighth": spearman(
                ranked, [theirs[f"{name}.quant_recipe"][0] for name in found]
            ),
        }
    report("kl_div", bench.device, figures)


if __name__ == "__main__":
    main()
