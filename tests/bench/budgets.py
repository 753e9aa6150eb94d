"""Solved recipes against the best uniform one and `mtq.auto_quantize`'s choice, on held-out samples.

Needs a store with finished cells of the bundled model in size large:
`sweep run -m grid=deployable target=vllm_sm100 dataset.size=large store.uri=DIR`.
ModelOpt calibrates and scores on the same samples, in the same batches, with the same summed loss, all formats in one
call, and solves by itself. Formats are the same for both: those that the target runs and that ModelOpt can choose among
on texts of several lengths (no inputs in blocks, but for its kernels' own).

Twice: with its own sizes of formats, in which a block's scale often weighs nothing (ours is then solved at the size
that its choice really has), and with ours given as `effective_bits`, so that both have one budget.

python -m tests.bench.budgets --store DIR [--target vllm_sm100] [--bits 4.5,5,6] \
    [--overrides quant_pair=wint4_afp16,wint8_afp16]
"""

# pyright: basic

import argparse
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modelopt.torch.quantization.config import QuantizeConfig
from torch import nn

from sweep.config.compose import expand
from sweep.config.targets import Target
from sweep.core.batches import Batch
from sweep.formats.fields import QUANTIZERS
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import COST_HINT, Attributes
from sweep.formats.recipe import Entry
from sweep.mixed_precision.candidates import Candidates, read_candidates
from sweep.mixed_precision.measured import Measured, uniform_recipes, validate
from sweep.mixed_precision.recipe import Budget, problem_of, recipe_of_choice, rules_of, solved
from sweep.mixed_precision.recipe_context import RecipeContext, config_of, context_of, load_model
from sweep.run.resources import own_device
from sweep.store.store import Store
from tests.bench.setup import report
from workers.quant.block_formats import register
from workers.quant.modelopt import auto_quantize_state, with_backend

SearchFormat = tuple[Sequence[Entry], str]  # entries and algorithm, as auto_quantize_state takes them


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


def auto_quantize(
    model: nn.Module,
    candidates: Sequence[SearchFormat],
    batches: Sequence[Batch],
    covered: Sequence[str],
    bits: float,
    checkpoint: Path,
) -> Mapping[str, Any]:
    """The state of `mtq.auto_quantize` after its search.

    Args:
        model: unquantized; it is not touched.
        candidates: formats.
        batches: calibrated and scored on, all of them.
        covered: modules to choose for.
        bits: its `effective_bits` constraint, over all linears of the model, disabled ones too.
        checkpoint: where calibration and scores are kept for the next budget.

    Returns: its search state.
    """
    said = io.StringIO()  # ModelOpt says what it registers, and how far it is
    with redirect_stdout(said), redirect_stderr(said):
        return auto_quantize_state(model, candidates, batches, covered, bits=bits, checkpoint=str(checkpoint))


def searched(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """ModelOpt's layer groups that had a choice; disabled ones have that of 16 bits alone."""
    return {name: stats for name, stats in state["candidate_stats"].items() if len(stats["scores"]) > 1}


def constraint(state: Mapping[str, Any], bits: float) -> float:
    """ModelOpt's `effective_bits` for `bits` of the groups that have a choice: it counts disabled ones too, with 16."""
    total = sum(stats["uncompressed_cost"] for stats in state["candidate_stats"].values())
    covered = sum(stats["uncompressed_cost"] for stats in searched(state).values())
    return 16 - (16 - bits) * covered / total


def choice_of(state: Mapping[str, Any], candidates: Sequence[SearchFormat]) -> dict[str, int]:
    """Index of the chosen candidate by first module of the layer group; `len(candidates)` for 16 bits."""
    nodes = [{"quant_cfg": list(map(Entry.to_modelopt, entries))} for entries, _ in candidates]
    entries = [config.quant_cfg for config in map(QuantizeConfig.model_validate, nodes)]
    numbers: dict[str, int] = {}
    for name in searched(state):
        own = state["best"]["recipe"][name].config.quant_cfg[:-1]  # the last is ModelOpt's own, on output_quantizer
        numbers[name.removesuffix(".quant_recipe")] = entries.index(own) if own in entries else len(candidates)
    return numbers


def read(typed: Sequence[str], target: Target) -> Candidates:
    """The store's formats that the target runs as they were scored and that `mtq.auto_quantize` can run, too."""
    stored = read_candidates(Store(expand(typed, multirun=True).points[0].store.uri), typed)
    allowed = rules_of((), (), False, target, stored).allowed
    return replace(
        stored,
        formats=tuple(each for each in stored.formats if allowed(each.format) and not needs_one_shape(each.format)),
    )


def needs_one_shape(chosen: GroupFormat) -> bool:
    """Whether ModelOpt "requires a fixed input shape", which texts have not: for inputs in blocks but its kernels'."""
    inputs = chosen.inputs
    return inputs is not None and bool(inputs.block_elements) and not inputs.has_dynamic_blocks


class Comparison:
    """Measures what is compared, each recipe once."""

    def __init__(self, stored: Candidates, target: Target, typed: Sequence[str]) -> None:
        self.stored, self.rules, self._typed = stored, rules_of((), (), False, target, stored), typed
        self.problem = problem_of(stored, self.rules)
        self.uniform = self.measured([("uniform", each) for each in uniform_recipes(stored)])

    def measured(self, recipes: Sequence[tuple[str, MixedRecipe]]) -> list[Measured]:
        context = self.context(recipes[0][1])
        return validate(context, recipes, own_device(context.config.cluster))

    def context(self, made: MixedRecipe) -> RecipeContext:
        return context_of(made, config_of(made, [*self._typed, "cluster.device=cpu"]))

    def figures(self, numbers: Mapping[str, int], bits: float | None) -> dict[str, Any]:
        """Ours beside ModelOpt's choice. Args: bits: our budget; None: the size of ModelOpt's choice."""
        groups = [group.name for group in self.stored.groups]
        theirs = recipe_of_choice(
            self.stored, np.array([numbers[group] for group in groups]), "mtq.auto_quantize", None
        )
        budget = theirs.effective_bits if bits is None else bits
        ours = recipe_of_choice(
            self.stored,
            solved(self.stored, self.problem, Budget(bits=budget), self.rules),
            f"solved {budget:g}",
            None,
        )
        mine, other = self.measured([("recipe", ours), ("recipe", theirs)])
        best = min(
            (row for row in self.uniform if row.effective_bits <= budget + 1e-9), key=lambda row: row.measured_kl
        )
        low, high = mine.measured_kl_interval
        return {
            "budget_bits": budget,
            "ours_bits": mine.effective_bits,
            "ours_predicted_kl": mine.predicted_kl,
            "ours_kl": mine.measured_kl,
            "ours_kl_low": low,
            "ours_kl_high": high,
            "best_uniform": best.name.removeprefix("uniform "),
            "best_uniform_bits": best.effective_bits,
            "best_uniform_kl": best.measured_kl,
            "modelopt_bits": other.effective_bits,
            "modelopt_predicted_kl": other.predicted_kl,
            "modelopt_kl": other.measured_kl,
            "modelopt_over_ours": other.measured_kl / mine.measured_kl,
            "uniform_over_ours": best.measured_kl / mine.measured_kl,
            "groups_that_differ": sum(a.format != b.format for a, b in zip(ours.groups, theirs.groups, strict=True)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--target", default="vllm_sm100")
    parser.add_argument("--bits", default="4.5,5,6")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="which of its trials, e.g. quant_pair=wint4_afp16,wint8_afp16"
    )
    args = parser.parse_args()
    typed = [f"store.uri={args.store}", "dataset.size=large", f"target={args.target}"]
    target = Target.from_config(expand(typed, multirun=False).points[0].target)
    comparison = Comparison(read([*typed, *args.overrides], target), target, typed)
    formats = [candidate.format for candidate in comparison.stored.formats]
    context = comparison.context(uniform_recipes(comparison.stored)[0])
    register()
    model, batches = (
        load_model(context, own_device(context.config.cluster)),
        list(context.plan.batches("large")),
    )
    covered = [module for group in comparison.stored.groups for module in group.modules]
    for sizes in ("ModelOpt's", "ours"):
        candidates = [search_format(each, each.effective_bits if sizes == "ours" else None) for each in formats]
        with tempfile.TemporaryDirectory() as place:
            search = partial(auto_quantize, model, candidates, batches, covered, checkpoint=Path(place) / "state.pt")
            started = time.perf_counter()
            scored = search(bits=16.0)
            seconds = time.perf_counter() - started
            for bits in map(float, args.bits.split(",")):
                numbers = choice_of(search(bits=constraint(scored, bits)), candidates)
                figures = {"sizes": sizes, "bits": bits, "formats": len(formats), "modelopt_seconds": seconds}
                report(
                    "budgets",
                    torch.device("cpu"),
                    figures | comparison.figures(numbers, bits if sizes == "ours" else None),
                )


if __name__ == "__main__":
    main()
