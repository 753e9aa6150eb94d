"""Recipes of `sweep solve` against those of other programs, at equal sizes, measured on the same held-out samples.

Needs a store with finished cells of one model in one size, of method=fisher and of method=gradient, of the formats:

    sweep run -m dataset.size=medium sensitivity.method=fisher,gradient store.uri=STORE quant_pair=...
    python -m tests.bench.mixes --store STORE [--formats inputs] [--bits 4.5,5,6] [--ways ours,...] [--device cuda] \
        [--auto-round DIR [--auto-round-python PYTHON]] [--layers N] [--overrides dataset.size=medium ...]

prints a JSON line for each budget and way, whose recipes are all measured as `sweep validate` measures. Ways:

ours                  `sweep solve` on the scores of method=fisher
linear                the same with --linear: without the interactions of layer groups
gradient              `sweep solve` on those of method=gradient
uniform               the best of the recipes of one format that fit the budget, by measured KL
modelopt              `mtq.auto_quantize`, all formats in one call, with our sizes of formats
modelopt_sizes        the same with its own sizes, by which scales of blocks weigh nothing: may exceed the budget
modelopt_apart        the same, one format a call, solved by its linear program, with our sizes
modelopt_kl_div       `mtq.auto_quantize(method="kl_div")`, all formats in one call, with our sizes
auto_round            auto-round's AutoScheme, scored with our samples, without tuning
auto_round_defaults   the same with its default number of tokens

ModelOpt calibrates and scores on the store's samples, in our batches, with the loss summed. Every way's recipe is
compared with ours at the budget (`over_ours`) and with ours at the size that it really has (`over_ours_alike`): the
ratio of both KLs and their difference, each with a 90 % interval by a bootstrap that draws the same samples for both.
Ranges of inputs and all other arithmetic are ours in every recipe.
"""

# pyright: basic

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sweep.formats.quantizer import UNQUANTIZED_BITS
from sweep.mixed_precision.candidates import Candidates, read_candidates
from sweep.mixed_precision.measured import measured_samples
from sweep.mixed_precision.recipe import SIXTEEN, Budget, Rules, problem_of, recipe_of_choice, solved
from sweep.mixed_precision.recipe_context import RecipeContext, config_of, context_of, load_model
from sweep.report.analysis import FloatArray, IntArray, bootstrap_interval
from sweep.store.store import Store
from tests.bench import peers
from tests.bench.setup import report
from workers.quant.block_formats import register

WAYS = (
    "ours",
    "linear",
    "gradient",
    "uniform",
    "modelopt",
    "modelopt_sizes",
    "modelopt_apart",
    "modelopt_kl_div",
    "auto_round",
    "auto_round_defaults",
)


class Bench:
    """Makes the recipes of each way, and measures each recipe once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        self.bits = [float(each) for each in args.bits.split(",")]
        self.typed = [f"store.uri={args.store}", *args.overrides]
        # What selects trials of method=fisher is no part of the configuration of a recipe of either.
        self.shared = [each for each in self.typed if not each.startswith("sensitivity.draws=")]
        self.stored = {method: self._read(method) for method in ("fisher", "gradient")}
        self.stored["linear"] = replace(self.stored["fisher"], interaction_weight=None)
        self.groups = self.stored["fisher"].groups
        layers = [group.layer_index for group in self.groups]
        is_free = [args.layers is None or (layer is not None and layer < args.layers) for layer in layers]
        self.free = [group for group, free in zip(self.groups, is_free, strict=True) if free]
        self.rules = Rules(
            pins={}, excludes=[group.name for group, free in zip(self.groups, is_free, strict=True) if not free]
        )
        nothing = self.recipe(np.full(len(self.groups), len(self.stored["fisher"].formats)), "16 bits")
        self.context: RecipeContext = context_of(
            nothing, config_of(nothing, [*self.shared, f"cluster.device={self.device}"])
        )
        self._tables: dict[tuple[int, ...], list[tuple[str, pa.Table]]] = {}

    def _read(self, method: str) -> Candidates:
        """The store's cells of a method, in the order of the formats' labels."""
        typed = self.typed if method == "fisher" else self.shared
        found = read_candidates(Store(self.args.store), [*typed, f"sensitivity.method={method}"])
        by_label = {each.format.label: each for each in found.formats}
        return replace(found, formats=tuple(by_label[label] for label in peers.labelled(self.args.formats)))

    def recipe(self, choice: IntArray, name: str) -> Any:
        """A choice as a recipe, with KLs that method=fisher predicts."""
        return recipe_of_choice(self.stored["fisher"], choice, name, None)

    def budget(self, bits: float) -> Budget:
        """Mean bits of the groups that have a choice, as `solved` takes them: of all groups."""
        weights = sum(group.weight_elements for group in self.groups)
        free = sum(group.weight_elements for group in self.free)
        return Budget(bits=UNQUANTIZED_BITS - (UNQUANTIZED_BITS - bits) * free / weights)

    def free_bits(self, choice: IntArray) -> float:
        """Mean bits of the groups that have a choice."""
        sizes = [*(each.format.effective_bits for each in self.stored["fisher"].formats), UNQUANTIZED_BITS]
        is_free = [group in self.free for group in self.groups]
        weights = np.array([group.weight_elements for group in self.groups]) * is_free
        return float(np.array(sizes)[choice] @ weights / weights.sum())

    def solve(self, bits: float, method: str = "fisher") -> IntArray:
        """What `sweep solve` chooses."""
        stored = self.stored[method]
        return solved(stored, problem_of(stored, self.rules), self.budget(bits), self.rules)

    def measured(self, choices: Sequence[IntArray]) -> list[list[tuple[str, pa.Table]]]:
        """For each choice the names of the data sets and what was measured on them, sample by sample."""
        keys = [tuple(choice.tolist()) for choice in choices]
        new = {key: choice for key, choice in zip(keys, choices, strict=True) if key not in self._tables}
        if new:
            recipes = [self.recipe(choice, "mix") for choice in new.values()]
            found = measured_samples(self.context, recipes, self.device)
            for number, key in enumerate(new):
                self._tables[key] = [(held.name, tables[number]) for held, tables in found]
        return [self._tables[key] for key in keys]


def subject(bench: Bench) -> peers.Subject:
    """What ModelOpt chooses among, with the model loaded."""
    register()
    context = bench.context
    return peers.Subject(
        model=load_model(context, bench.device),
        batches=list(context.plan.batches(context.config.dataset.size)),
        groups=bench.groups,
        free=bench.free,
        formats=[each.format for each in bench.stored["fisher"].formats],
    )


def own(bench: Bench, method: str) -> peers.Choices:
    """Ours."""
    started = time.perf_counter()
    found = {bits: bench.solve(bits, method) for bits in bench.bits}
    return peers.Choices(by_bits=found, seconds=time.perf_counter() - started, notes={})


def uniform(bench: Bench) -> peers.Choices:
    """The best of one format for all groups that have a choice."""
    started, n_formats = time.perf_counter(), len(bench.stored["fisher"].formats)
    is_free = np.array([group in bench.free for group in bench.groups])
    choices = [np.where(is_free, number, n_formats) for number in range(n_formats + 1)]
    kl = [mean_kl(tables[0][1]) for tables in bench.measured(choices)]
    found: dict[float, IntArray] = {}
    for bits in bench.bits:
        fitting = [number for number, choice in enumerate(choices) if bench.free_bits(choice) <= bits + 1e-9]
        if fitting:
            found[bits] = choices[min(fitting, key=kl.__getitem__)]
    return peers.Choices(by_bits=found, seconds=time.perf_counter() - started, notes={})


def auto_round(bench: Bench, way: str) -> peers.Choices:
    """AutoScheme's, from its file or its process."""
    assert bench.args.auto_round is not None, "--auto-round DIR is where its choices are"
    chosen, config = subject(bench), bench.context.config
    task = peers.auto_round_tasks(bench.context.model, config, chosen.free, chosen.formats, bench.bits)[way]
    answer = peers.auto_round_answer(bench.context.model, task, bench.args.auto_round, bench.args.auto_round_python)
    return peers.auto_round(chosen, answer, bench.bits)


def choices(bench: Bench, way: str) -> peers.Choices:
    """What a way chooses at each budget."""
    problem = problem_of(bench.stored["fisher"], bench.rules)
    ways: Mapping[str, Callable[[], peers.Choices]] = {
        "ours": partial(own, bench, "fisher"),
        "linear": partial(own, bench, "linear"),
        "gradient": partial(own, bench, "gradient"),
        "uniform": partial(uniform, bench),
        "modelopt": lambda: peers.auto_quantize(subject(bench), bench.bits),
        "modelopt_sizes": lambda: peers.auto_quantize(subject(bench), bench.bits, own_sizes=True),
        "modelopt_apart": lambda: peers.auto_quantize_apart(subject(bench), problem, bench.bits),
        "modelopt_kl_div": lambda: peers.auto_quantize(subject(bench), bench.bits, method="kl_div"),
        "auto_round": lambda: auto_round(bench, "auto_round"),
        "auto_round_defaults": lambda: auto_round(bench, "auto_round_defaults"),
    }
    return ways[way]()


def column(table: pa.Table, name: str) -> FloatArray:
    return table[name].to_numpy().astype(np.float64)


def mean_kl(table: pa.Table) -> float:
    """Nats per prediction."""
    return float(column(table, "kl").sum() / column(table, "n_predictions").sum())


def compared(table: pa.Table, ours: pa.Table, prefix: str) -> dict[str, float]:
    """One recipe's measured KL over another's, and their difference, with intervals over the same resampled samples."""
    kl, other, counts = column(table, "kl"), column(ours, "kl"), column(table, "n_predictions")
    seed = table["held_out"][0].as_py()
    low, high = bootstrap_interval(kl[None], other, seed)[:, 0]  # a ratio of sums, as KL per prediction is one
    least, most = bootstrap_interval((kl - other)[None], counts, seed)[:, 0]
    return {
        f"{prefix}": float(kl.sum() / other.sum()),
        f"{prefix}_low": float(low),
        f"{prefix}_high": float(high),
        f"{prefix}_difference": float((kl - other).sum() / counts.sum()),
        f"{prefix}_difference_low": float(least),
        f"{prefix}_difference_high": float(most),
    }


def lines(bench: Bench, way: str, made: peers.Choices) -> None:
    """Measure a way's recipes beside ours, and print a line for each."""
    stored = bench.stored["fisher"]
    labels = [*(each.format.label for each in stored.formats), SIXTEEN]
    trial = stored.trial
    for bits, choice in made.by_bits.items():
        real = bench.free_bits(choice)
        all_three = [choice, bench.solve(bits), bench.solve(real + 1e-9)]
        ours = all_three[1]
        for (held, table), (_, at_budget), (_, alike) in zip(*bench.measured(all_three), strict=True):
            kl, counts = column(table, "kl"), column(table, "n_predictions")
            low, high = bootstrap_interval(kl[None], counts, table["held_out"][0].as_py())[:, 0]
            figures = {
                "model": trial.model,
                "scored_on": f"{trial.dataset}/{trial.size}",
                "measured_on": held,
                "samples": len(kl),
                "formats": bench.args.formats,
                "budget": bits,
                "way": way,
                "bits": real,
                "predicted_kl": bench.recipe(choice, way).predicted_kl,
                "interaction_weight": stored.interaction_weight,
                "kl": mean_kl(table),
                "kl_low": float(low),
                "kl_high": float(high),
                **compared(table, at_budget, "over_ours"),
                **compared(table, alike, "over_ours_alike"),
                "groups_that_differ": int((choice != ours).sum()),
                "groups": dict(Counter(labels[number] for number in choice.tolist())),
                "seconds": made.seconds,
                **made.notes,
            }
            report("mixes", torch.device(bench.device), figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--formats", default="inputs", help=f"{', '.join(peers.FORMATS)}, or labels with commas")
    parser.add_argument("--bits", default="4.5,5,6")
    parser.add_argument("--ways", default=",".join(WAYS[:-2]))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, help="choose in so many decoder layers only, the others stay in 16 bits")
    parser.add_argument("--auto-round", type=Path, help="directory of auto-round's choices (tests.bench.peers)")
    parser.add_argument("--auto-round-python", help="a Python that has auto-round, to make them if they aren't there")
    parser.add_argument("--overrides", nargs="*", default=[], help="which of the store's trials, and validation.*")
    args = parser.parse_args()
    bench = Bench(args)
    for way in args.ways.split(","):
        lines(bench, way, choices(bench, way))


if __name__ == "__main__":
    main()
