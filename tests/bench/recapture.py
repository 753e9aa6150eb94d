"""KL of recipes solved on the sweep's scores, and again on scores around the recipe before, on held-out samples.

Needs a store with finished cells of the bundled model, all of one kind: `sweep run -m grid=demo store.uri=DIR`.

python -m tests.bench.recapture --store DIR [--bits 4.25,4.5,5,6] [--rounds 2] \
    [--overrides quant_pair=wfp4_afp4,wfp8_afp8]
"""

# pyright: basic

import argparse
import time

import torch

from sweep.config.compose import expand
from sweep.mixed_precision.candidates import read_candidates
from sweep.mixed_precision.measured import uniform_recipes, validate
from sweep.mixed_precision.recapture import recaptured_kl
from sweep.mixed_precision.recipe import Budget, Rules, problem_of, recipe_of_choice, solved
from sweep.mixed_precision.recipe_context import config_of, context_of
from sweep.report.analysis import FloatArray
from sweep.store.store import Store
from tests.bench.setup import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--bits", default="4.25,4.5,5,6")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="which of its trials, e.g. quant_pair=wfp4_afp4,wfp8_afp8"
    )
    args = parser.parse_args()
    typed = [f"store.uri={args.store}", "dataset.size=large", *args.overrides]
    device = torch.device("cpu")
    candidates = read_candidates(Store(expand(typed, multirun=True).points[0].store.uri), typed)
    rules, uniform = Rules(pins={}), uniform_recipes(candidates)
    for bits in map(float, args.bits.split(",")):
        kl: FloatArray | None = None
        for round_ in range(args.rounds + 1):
            started = time.perf_counter()
            problem = problem_of(candidates, rules, kl)
            made = recipe_of_choice(
                candidates,
                solved(candidates, problem, Budget(bits=bits), rules),
                f"{bits:g} bits, round {round_}",
                None,
                kl,
            )
            context = context_of(made, config_of(made, [f"store.uri={args.store}", "cluster.device=cpu"]))
            asked = [
                ("recipe", made),
                *(("uniform", each) for each in uniform if each.effective_bits <= bits and not round_),
            ]
            found, *others = validate(context, asked, "cpu")
            figures: dict[str, object] = {
                "bits": bits,
                "round": round_,
                "predicted_kl": found.predicted_kl,
                "held_out_kl": found.measured_kl,
            }
            if others:
                best = min(others, key=lambda row: row.measured_kl)
                figures |= {"best_uniform": best.name, "best_uniform_kl": best.measured_kl}
            if round_ < args.rounds:
                kl = recaptured_kl(context, made, candidates, "cpu")
            report("recapture", device, figures | {"seconds": time.perf_counter() - started})


if __name__ == "__main__":
    main()
