"""How other programs choose among our formats: `mtq.auto_quantize` in three ways, and auto-round's AutoScheme.

AutoScheme runs in a Python of its own, which need not be on the machine that measures:

    python -m tests.bench.peers --auto-round-python PYTHON --auto-round DIR [--formats inputs] [--bits 4.5,5,6] \
        --overrides model=hf_causal_lm model.path=MODEL dataset=text dataset.path=FILE dataset.size=medium

writes its choices into DIR, where `tests.bench.mixes --auto-round DIR` finds them.
"""

# pyright: basic

import argparse
import hashlib
import io
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modelopt.torch.quantization.config import QuantizeConfig
from torch import nn

from sweep.config.compose import expand
from sweep.config.schema import SweepConfig
from sweep.core.batches import Batch, Sample
from sweep.core.groups import LayerGroup
from sweep.core.sizes import n_samples_of
from sweep.formats.fields import QUANTIZERS
from sweep.formats.format import GroupFormat
from sweep.formats.quantizer import COST_HINT, UNQUANTIZED_BITS, Attributes, Quantizer
from sweep.formats.recipe import Entry
from sweep.mixed_precision.candidates import format_of
from sweep.mixed_precision.knapsack import Problem
from sweep.mixed_precision.recipe import SIXTEEN
from sweep.plan.model import Model, checkpoint_dir
from sweep.plan.samples import samples_of, samples_to_boundary
from sweep.plan.trials import plan_sweep
from sweep.report.analysis import IntArray
from tests.bench.auto_round_choices import LENGTH as TEXT_TOKENS
from tests.bench.setup import report
from tests.bench.solve import modelopt_choice
from workers.quant.modelopt import auto_quantize_scores, auto_quantize_state, with_backend

# hidden sizes of small models are no multiples of 128: INT4 in groups of 64
FORMATS = {
    "inputs": (
        "wint4_afp16/w_group64",
        "wint8_aint8/recipe_match_channel_token",
        "wfp8_afp8/default",
        "wfp4_afp4/default",
    ),
    "weights": ("wint4_afp16/w_group64", "wint8_afp16/default", "wfp8_afp16/default", "wfp4_afp16/default"),
}
# Bits over the budget that auto-round is told, since it counts a zero point for each group of symmetric integers, and a
# scale for each channel and tensor, which we don't.
ALLOWANCES = tuple(np.linspace(0, 0.09, 10).round(2).tolist())
DEFAULT_TEXTS = 16  # what AutoScheme takes if it is told nothing
SearchFormat = tuple[Sequence[Entry], str]  # entries and algorithm, as auto_quantize_state takes them


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What all choose among."""

    model: nn.Module
    batches: Sequence[Batch]  # that calibrate and score
    groups: Sequence[LayerGroup]  # all of the model that recipes cover
    free: Sequence[LayerGroup]  # those of them that formats are chosen for; the others stay in 16 bits
    formats: Sequence[GroupFormat]

    @property
    def covered(self) -> list[str]:
        """Modules that formats are chosen for."""
        return [module for group in self.free for module in group.modules]

    def choice(self, by_group: Mapping[str, int]) -> IntArray:
        """[groups], as `recipe_of_choice` takes it, from the format's number of each free group."""
        return np.array([by_group.get(group.name, len(self.formats)) for group in self.groups])


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What one way chooses."""

    by_bits: Mapping[float, IntArray]  # budget in mean bits a weight of the free groups
    seconds: float  # to score and choose for the first budget
    notes: Mapping[str, int]  # counts for the record


def labelled(formats: str) -> list[str]:
    """Labels of formats from a set's name or a list with commas, in the order in which they are compared."""
    return sorted(FORMATS.get(formats, formats.split(",")))


def auto_quantize(
    subject: Subject, bits: Sequence[float], *, own_sizes: bool = False, method: str = "gradient"
) -> Choices:
    """`mtq.auto_quantize` as it is, all formats in one call.

    Args:
        subject: chosen for.
        bits: budgets.
        own_sizes: reckon sizes as ModelOpt does, by which the scales of integer blocks weigh nothing.
        method: ModelOpt's: gradient, with its linear program, or kl_div, with its threshold.
    """
    candidates = [search_format(each, None if own_sizes else each.effective_bits) for each in subject.formats]
    said = io.StringIO()  # ModelOpt says what it registers, and how far it is
    with tempfile.TemporaryDirectory() as place, redirect_stdout(said), redirect_stderr(said):
        search = partial(
            auto_quantize_state,
            subject.model,
            candidates,
            subject.batches,
            subject.covered,
            checkpoint=str(Path(place) / "state.pt"),  # of calibration and scores, for the next budget
            method=method,
        )
        started = time.perf_counter()
        scored = search(bits=16.0)
        seconds = time.perf_counter() - started
        found = {each: chosen_numbers(search(bits=constraint(scored, each)), candidates) for each in bits}
    return Choices(
        by_bits={each: subject.choice(numbers) for each, numbers in found.items()}, seconds=seconds, notes={}
    )


def auto_quantize_apart(subject: Subject, problem: Problem, bits: Sequence[float]) -> Choices:
    """`mtq.auto_quantize`, one format a call, solved by its linear program; sizes as in `problem`."""
    started = time.perf_counter()
    scores: list[dict[str, float]] = []
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        for each in subject.formats:
            entries, algorithm = search_format(each, None)
            scores.append(auto_quantize_scores(subject.model, entries, algorithm, subject.batches, subject.covered))
    names = [group.name for group in subject.groups]
    free = [names.index(group.name) for group in subject.free]
    own = Problem(
        predicted_kl=np.array([[*(each[group.name] for each in scores), 0.0] for group in subject.free]),
        cost=problem.cost[free],
        together=problem.together[free],
    )
    weights = own.cost[:, -1].sum() / 16
    found: dict[float, IntArray] = {}
    for each in bits:
        picks = modelopt_choice(own, each * weights).tolist()
        found[each] = subject.choice({group.name: pick for group, pick in zip(subject.free, picks, strict=True)})
    return Choices(by_bits=found, seconds=time.perf_counter() - started, notes={})


def auto_round(subject: Subject, answer: Mapping[str, Any], bits: Sequence[float]) -> Choices:
    """AutoScheme's choices, from what its process wrote.

    A group that it splits has the largest of its modules' formats; `notes` counts them. Of its targets the highest
    whose choice fits the budget, as we count, counts: by its own scores that is the best.

    Args:
        subject: chosen for.
        answer: of `auto_round_answer`.
        bits: budgets.
    """
    labels = [*(each.label for each in subject.formats), SIXTEEN]
    sizes = [*(each.effective_bits for each in subject.formats), UNQUANTIZED_BITS]
    weights = np.array([group.weight_elements for group in subject.free])
    found: dict[float, IntArray] = {}
    n_split = 0
    for run in sorted(answer["choices"], key=itemgetter("target")):
        numbers: dict[str, int] = {}
        for group in subject.free:
            own = {labels.index(run["formats"][module]) for module in group.modules}
            n_split += len(own) > 1
            numbers[group.name] = max(own, key=sizes.__getitem__)
        mean = float(np.array([sizes[each] for each in numbers.values()]) @ weights / weights.sum())
        for budget in bits:
            if mean <= budget + 1e-9:
                found[budget] = subject.choice(numbers)
    notes = {"split_groups": n_split, "texts": answer["texts"], "tokens": answer["tokens"]}
    return Choices(by_bits=found, seconds=answer["seconds"], notes=notes)


def auto_round_answer(model: Model, task: Mapping[str, Any], place: Path, python: str | None) -> Mapping[str, Any]:
    """What AutoScheme chose in a task: from its file, or from its own process.

    Args:
        model: the checkpoint.
        task: of `auto_round_task`.
        place: directory of files.
        python: that has auto-round; None: the file must be there.
    """
    text = json.dumps([model.revision, task])
    file = place / f"auto-round-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if not file.exists():
        if python is None:
            raise SystemExit(f"{file} is not there. Type --auto-round-python PYTHON, or copy it from where that ran.")
        place.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("auto_round_choices.py")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as given:
            json.dump({"model": str(model.path.absolute()), **task}, given)
            given.flush()
            # its solver takes the layers in the order of a set
            environment = {**os.environ, "PYTHONHASHSEED": "0", "AR_LOG_LEVEL": "WARNING"}
            subprocess.run([python, "-P", str(script), given.name, str(file)], check=True, env=environment)
    return json.loads(file.read_text(encoding="utf-8"))


def auto_round_task(
    groups: Sequence[LayerGroup],
    formats: Sequence[GroupFormat],
    samples: Sequence[Sample],
    bits: Sequence[float],
    *,
    most_texts: int | None,
) -> dict[str, Any]:
    """What AutoScheme is to choose.

    Args:
        groups: chosen for.
        formats: that it chooses among.
        samples: that it scores with.
        bits: budgets.
        most_texts: of the joined samples; None: all.
    """
    return {
        "groups": [list(group.modules) for group in groups],
        "formats": {each.label: scheme(each) for each in formats},
        "samples": [sample.token_ids.tolist() for sample in samples],
        "most_texts": most_texts,
        "targets": [round(budget + more, 4) for budget in bits for more in ALLOWANCES],
    }


def auto_round_tasks(
    model: Model,
    config: SweepConfig,
    groups: Sequence[LayerGroup],
    formats: Sequence[GroupFormat],
    bits: Sequence[float],
) -> dict[str, dict[str, Any]]:
    """The task at equal tokens, all of the samples that score, and that at AutoScheme's defaults, by way.

    Where the samples that score are fewer tokens than the defaults take, more of the data set are added, after those
    that recipes are measured on.
    """
    n_scored = n_samples_of(config.dataset.size)
    n_seen = n_scored + config.validation.n_samples
    scored = samples_to_boundary(config.dataset, model, n_scored)[:n_scored]
    more = scored
    if sum(len(sample.token_ids) for sample in scored) < DEFAULT_TEXTS * TEXT_TOKENS:
        more = [*scored, *samples_of(config.dataset, model, n_seen + n_scored)[n_seen:]]
    task = partial(auto_round_task, groups, formats, bits=bits)
    return {
        "auto_round": task(scored, most_texts=None),
        "auto_round_defaults": task(more, most_texts=DEFAULT_TEXTS),
    }


def scheme(chosen: GroupFormat) -> dict[str, Any]:
    """A format as auto-round's QuantizationScheme: fields by name; where its preset differs, ours."""
    assert chosen.weight is not None
    bits, data_type, group = _number(chosen.weight)
    fields = {"bits": bits, "sym": True, "group_size": group, "data_type": data_type, "act_bits": 16}
    if chosen.inputs is None:
        return fields
    bits, data_type, group = _number(chosen.inputs)
    return fields | {
        "act_bits": bits,
        "act_group_size": group,
        "act_sym": True,
        "act_data_type": "nv_fp4_with_static_gs" if data_type == "nv_fp" else data_type,
        "act_dynamic": chosen.inputs.is_dynamic or chosen.inputs.has_dynamic_blocks,
    }


def _number(quantizer: Quantizer) -> tuple[int, str, int]:
    """Bits, auto-round's name of the kind of number, and its group size: -1 a channel or token, 0 a tensor."""
    kinds = {4: (4, "int"), 8: (8, "int"), (4, 3): (8, "fp"), (2, 1): (4, "nv_fp")}
    bits, data_type = kinds[quantizer.num_bits]
    assert quantizer.is_nvfp4 or not quantizer.has_dynamic_blocks
    per_tensor = quantizer.axis is None and not quantizer.block_lengths
    return bits, data_type, 0 if per_tensor else quantizer.block_lengths.get(-1) or -1


def search_format(chosen: GroupFormat, effective_bits: float | None) -> SearchFormat:
    """One of our formats as one of ModelOpt's candidates.

    Args:
        chosen: the format.
        effective_bits: its size; None: as ModelOpt reckons it.
    """
    size: Attributes = {} if effective_bits is None else {COST_HINT: effective_bits}  # ModelOpt takes the least of them
    entries = [Entry("*", enable=False)]
    for name, quantizer in zip(QUANTIZERS, (chosen.weight, chosen.inputs), strict=True):
        if quantizer is not None:
            entries.append(Entry(name, {**with_backend(quantizer), **size}))
    return entries, chosen.algorithm


def searched(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """ModelOpt's layer groups that had a choice; disabled ones have that of 16 bits alone."""
    return {name: stats for name, stats in state["candidate_stats"].items() if len(stats["scores"]) > 1}


def constraint(state: Mapping[str, Any], bits: float) -> float:
    """ModelOpt's `effective_bits` for `bits` of the groups that have a choice: it counts disabled ones too, with 16."""
    total = sum(stats["uncompressed_cost"] for stats in state["candidate_stats"].values())
    covered = sum(stats["uncompressed_cost"] for stats in searched(state).values())
    return 16 - (16 - bits) * covered / total


def chosen_numbers(state: Mapping[str, Any], candidates: Sequence[SearchFormat]) -> dict[str, int]:
    """Index of the chosen candidate by first module of the layer group; `len(candidates)` for 16 bits."""
    nodes = [{"quant_cfg": list(map(Entry.to_modelopt, entries))} for entries, _ in candidates]
    entries = [config.quant_cfg for config in map(QuantizeConfig.model_validate, nodes)]
    numbers: dict[str, int] = {}
    for name in searched(state):
        own = state["best"]["recipe"][name].config.quant_cfg[:-1]  # the last is ModelOpt's own, on output_quantizer
        numbers[name.removesuffix(".quant_recipe")] = entries.index(own) if own in entries else len(candidates)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auto-round-python", required=True, help="a Python that has auto-round 0.16.1")
    parser.add_argument("--auto-round", type=Path, required=True, help="directory for its choices")
    parser.add_argument("--formats", default="inputs", help=f"{', '.join(FORMATS)}, or labels with commas")
    parser.add_argument("--bits", default="4.5,5,6")
    parser.add_argument("--overrides", nargs="*", default=[], help="the model and the data set, as for `sweep run`")
    args = parser.parse_args()
    pairs = [label.split("/")[:2] for label in labelled(args.formats)]
    points = [
        expand([*args.overrides, f"quant_pair={pair}", f"quant_granularity={granularity}"], multirun=False).points[0]
        for pair, granularity in pairs
    ]
    groups = next(iter(plan_sweep(points, "cpu").tasks.values())).groups
    model = Model(checkpoint_dir(points[0].model))
    bits = [float(each) for each in args.bits.split(",")]
    tasks = auto_round_tasks(model, points[0], groups, list(map(format_of, points)), bits)
    for way, task in tasks.items():
        answer = auto_round_answer(model, task, args.auto_round, args.auto_round_python)
        figures = {key: value for key, value in answer.items() if key != "choices"}
        report(way, torch.device("cpu"), {"model": str(model.path), "formats": args.formats, **figures})


if __name__ == "__main__":
    main()
