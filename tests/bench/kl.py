"""method=kl_div: one trial of ours against `mtq.auto_quantize(method="kl_div")`.

Of the latter one batch of 64 samples is measured and scaled. `seconds_per_trial` is a trial on an engine that has run
one before; `first_trial_seconds` holds the unquantized model's pass and the recording of CUDA graphs, too.
`gemm_floor_seconds` are the products alone that a trial needs, with the same weights and shapes: of every group, the
linears of its layer and all later ones, and the head. `--plain` runs transformers' own layers on batches of the plan.

python -m tests.bench.kl --device cuda --model qwen3_vl_4b_shape
"""

# pyright: basic

import argparse
from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

from tests.bench.reference import auto_quantize, padded_batches
from tests.bench.setup import Subject, job, peak_gb, report, seconds, spearman, subject
from workers.model.decoder import decoder_of
from workers.scoring.baseline import Baseline
from workers.scoring.gradient import Scores
from workers.scoring.kl import KlEngine

_ALONE = "wint8_aint8/default"
_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print the kernels of twelve groups in the middle")
    args = parser.parse_args()
    if args.plain:
        patch.object(Baseline, "_fused_decoder", lambda *_: None).start()
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
    names = [group.name for group in task.groups]
    products(bench, engines[0], names[-8:])  # cuBLAS chooses its kernels
    floor = seconds(partial(products, bench, engines[0], names), bench.device)
    if args.profile:
        middle = task.groups[len(task.groups) // 2 - 6 : len(task.groups) // 2 + 6]
        with torch.profiler.profile() as profiler:
            for wait in [engines[0].score_group(group.modules, jobs) for group in middle]:
                wait()
        kernels = sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total)
        for each in kernels[:30]:
            print(f"{each.self_device_time_total / 1e6:8.4f} s {each.count:6} {each.key[:90]}")
    figures: dict[str, object] = {
        "model": args.model,
        "groups": len(task.groups),
        "seconds_per_trial": ours,
        "first_trial_seconds": first,
        "gemm_floor_seconds": floor,
        "times_floor": ours / floor,
        "rows_at_once": str([rows for rows, _ in engines[0].shapes]),
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


@torch.no_grad()
def products(bench: Subject, engine: KlEngine, groups: Sequence[str]) -> None:
    """Every product of a trial over these groups, on random values."""
    decoder = decoder_of(bench.model)
    assert decoder is not None
    by_layer = [[each.weight for each in layer.modules() if isinstance(each, nn.Linear)] for layer in decoder.layers]
    weights = [decoder.head.weight, *by_layer[0]]
    most = max(max(rows, *parts) for rows, parts in engine.shapes)
    most_predictions = max(max(parts) for _, parts in engine.shapes)
    inputs = {n: weights[0].new_empty(most, n).normal_() for n in {weight.shape[1] for weight in weights}}
    results = {n: weights[0].new_empty(most, n) for n in {weight.shape[0] for weight in by_layer[0]}}
    results[len(weights[0])] = weights[0].new_empty(most_predictions, len(weights[0]))

    def product(weight: torch.Tensor, rows: int) -> None:
        n_outputs, n_inputs = weight.shape
        torch.mm(inputs[n_inputs][:rows], weight.T, out=results[n_outputs][:rows])

    for group in groups:
        for rows, parts in engine.shapes:
            for each in by_layer[decoder.layer_of(group) :]:
                for weight in each:
                    product(weight, rows)
            for predictions in parts:
                product(weights[0], predictions)


if __name__ == "__main__":
    main()
