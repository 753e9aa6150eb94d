"""Predicted against measured KL: one layer group at a time, and random mixes.

Every group of the bundled model under recipes from mild to harsh, on the samples that scored it; predicted_kl from the
gradient engine, one-group KL from the KL engine, in nats per prediction. Then random mixes of the same recipes, with
all of their groups quantized at once, on those samples and on others.

python -m tests.bench.validate --device cpu
"""

# pyright: basic

import argparse

import numpy as np
import torch
from torch import Tensor

from sweep.core.batches import Plan
from sweep.core.groups import ShapedGroup
from sweep.core.paths import bundled_model_dir
from tests.bench.setup import Subject, job, report, spearman, subject
from workers.data.batches import make_plan
from workers.data.samples import read_captions, text_samples
from workers.model import loading
from workers.quant.applied import calibrated_groups
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine
from workers.scoring.kl import KlEngine
from workers.scoring.scores import NotFinite, Scores
from workers.scoring.validation import Validator
from workers.task import Task

_RECIPES = (
    "wfp8_afp8/default",
    "wfp8_afp8/recipe_match_channel_token",
    "wint8_aint8/default",
    "wint8_aint8/a_per_token_dynamic",
    "wint4_afp16/default",
    "wint4_afp16/w_group64",
    "wint4_aint8/default",
    "wfp4_afp16/default",
    "wfp4_afp8/default",
)
_HELD_OUT = 128
_MIXES = 20


def one_group(
    bench: Subject, tasks: list[Task], groups: tuple[ShapedGroup, ...], size: str
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured KL of each group under each recipe: [groups, recipes] each, nats per prediction."""
    n_predictions = bench.plan.n_predictions(size)
    segments = bench.plan.segments[: bench.plan.segments_of(size)]
    modules = [name for group in groups for name in group.modules]
    jobs = [job(task, size) for task in tasks]
    rows, scorer, measurer = (
        capture(bench.model, segments, modules),
        Engine(bench.device),
        KlEngine(bench.model, segments, modules),
    )

    def scores(found: list[Scores] | None) -> list[float]:
        assert found is not None
        return [one[size].score for one in found if not isinstance(one, NotFinite)]

    def weights_of(group: ShapedGroup) -> dict[str, Tensor]:
        return {name: bench.model.get_submodule(name).weight for name in group.modules}

    predicted = [scores(scorer.score_group(weights_of(group), rows, jobs)()) for group in groups]
    measured = [scores(measurer.score_group(group.modules, jobs)()) for group in groups]
    return np.array(predicted) / (2 * n_predictions), np.array(measured) / n_predictions


def mixes(
    bench: Subject, tasks: list[Task], groups: tuple[ShapedGroup, ...], size: str, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted KL of random mixes, and measured on the samples that scored and on held-out ones: [mixes] each."""
    formats = [task.format for task in tasks]
    quants = calibrated_groups(
        bench.model, list(bench.plan.batches(size)), groups, {group.name: formats for group in groups}
    )
    texts = read_captions(bundled_model_dir() / "wordnet_glosses.txt", 512 + _HELD_OUT)[512:]
    others: Plan = make_plan(text_samples(loading.tokenize(bundled_model_dir(), texts), 512), packed=True)
    validators = [
        Validator(bench.model, list(plan.batches(name))) for plan, name in ((bench.plan, size), (others, "medium"))
    ]
    rng = np.random.default_rng(0)
    sums: list[float] = []
    measured: list[list[float]] = []
    for _ in range(_MIXES):
        chosen = rng.integers(0, len(formats) + 1, len(groups))  # the last stands for 16 bits
        picked = [(index, number) for index, number in enumerate(chosen.tolist()) if number < len(formats)]
        sums.append(float(sum(predicted[index, number] for index, number in picked)))
        applied = {
            name: quant for index, number in picked for name, quant in quants[groups[index].name][number].items()
        }
        measured.append([validator.measure(applied).mean_kl for validator in validators])
    same, other = np.array(measured).T
    return np.array(sums), same, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["small", "medium", "large"], default="large")
    args = parser.parse_args()
    bench = subject("tiny", args.device)
    by_label = {task.label: task for task in reversed(bench.tasks)}
    tasks = [by_label[label] for label in _RECIPES]
    groups = tasks[0].groups
    predicted, measured = one_group(bench, tasks, groups, args.size)
    for index, task in enumerate(tasks):
        ratios = predicted[:, index] / measured[:, index]
        rank = spearman(predicted[:, index], measured[:, index])
        figures = {
            "spearman": rank,
            "median_ratio": float(np.median(ratios)),
            "least_ratio": float(ratios.min()),
            "largest_ratio": float(ratios.max()),
        }
        report(
            "one_group_kl",
            bench.device,
            {"recipe": task.label, "groups": len(groups), **figures, "summed_kl": float(measured[:, index].sum())},
        )
    ratios = predicted / measured
    overall = {
        "groups_x_recipes": int(ratios.size),
        "spearman": spearman(predicted.ravel(), measured.ravel()),
        "median_ratio": float(np.median(ratios)),
        "ratio_5_percent": float(np.quantile(ratios, 0.05)),
        "ratio_95_percent": float(np.quantile(ratios, 0.95)),
    }
    report("one_group_kl_overall", bench.device, {"size": args.size, **overall})
    sums, same, other = mixes(bench, tasks, groups, args.size, predicted)
    for where, found in (("samples that scored", same), ("held-out samples", other)):
        ratios = sums / found
        figures = {
            "median_ratio": float(np.median(ratios)),
            "least_ratio": float(ratios.min()),
            "largest_ratio": float(ratios.max()),
            "spearman": spearman(sums, found),
            "least_kl": float(found.min()),
            "largest_kl": float(found.max()),
        }
        report("random_mixes", bench.device, {"mixes": _MIXES, "on": where, **figures})


if __name__ == "__main__":
    with torch.no_grad():
        main()
