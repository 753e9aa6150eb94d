"""What vLLM computes with our exports, and how fast: KL beside what `sweep validate` measures, and tokens a second.

Every format that the target lists is exported from the bundled model; vLLM reads it, and the KL of what it serves from
the unquantized model stands beside the measured one, over held-out glosses, with 90 % intervals of their ratio. The
noise is the KL between the unquantized model in vLLM, in bfloat16, and in float32 here. Speeds are of the 4B shape with
vLLM's dummy weights, decoding from CUDA graphs without Inductor, best of three.

python -m tests.bench.serving --device cuda --python "env PYTHONPATH=/path/to/vllm python3" --out DIR --kl --speed
python -m tests.bench.serving --device cuda --out DIR --export    seconds of `sweep export`, 4B shape, from the command
"""

# pyright: basic

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers import Qwen3VLConfig

from sweep.config.compose import expand
from sweep.config.targets import all_targets
from sweep.core.batches import Sample
from sweep.core.groups import LayerGroup
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import GroupChoice, MixedRecipe
from sweep.mixed_precision import candidates
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.bench.setup import TEXT_4B, VISION_4B, random_4b, report, seconds
from workers.export.calibrated import calibrated
from workers.export.checkpoint import write_checkpoint
from workers.export.compressed import quantization_config
from workers.export.compute import Compute
from workers.export.readback import check_export
from workers.model.loading import load
from workers.quant.applied import applied

READER = Path(__file__).resolve().parents[1] / "serving" / "reader.py"
SOURCE = bundled_model_dir()
CALIBRATION, HELD_OUT = slice(0, 16), slice(512, 640)  # glosses
N_BOOTSTRAP = 2000
# One of each kernel, by the recipes of the target.
SPEEDS = (
    "wfp8_afp8/recipe_match_channel_token",
    "wfp8_afp8/w_block128x128_a_group128_e8m0",
    "wint8_aint8/a_per_token_dynamic",
    "wint4_afp16/default",
    "wfp4_afp16/default",
    "wint8_afp16/default",
    "wint4_afp8/a_per_token_dynamic",
    "wfp8_afp16/mx",
    "wfp4_afp16/mx",
)
CHUNK = 4  # checkpoints that one process loads: the engine does not give all of its memory back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--python", default="python3", help="command that starts Python in vLLM's environment")
    parser.add_argument("--target", default="vllm_sm90")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kl", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--only", help="recipes whose name holds this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (target,) = (each for each in all_targets() if each.name == args.target)
    names = [
        recipe.name
        for recipe in target.recipes
        if "compressed_tensors" in recipe.export and (args.only or "") in recipe.name
    ]
    if args.kl:
        kl_table(names, args)
    if args.speed:
        speed_table([name for name in SPEEDS if name in names], args)
    if args.export:
        export_seconds(args)


def format_of(name: str) -> GroupFormat:
    """A recipe of the target as it is served: scales shared inside fused groups."""
    pair, granularity = name.split("/")
    words = [f"quant_pair={pair}", f"quant_granularity={granularity}", "sensitivity.scales=fused"]
    return candidates.format_of(expand(words, multirun=False).points[0])


def uniform(model: Model, name: str) -> MixedRecipe:
    """A recipe that gives every group of the language model one format."""
    chosen = format_of(name)
    groups = [group for group in model.groups.values() if "language_model" in group.name]
    return MixedRecipe(
        name=name,
        model="bench",
        model_revision="bench",
        model_path=None,
        dataset="wordnet_glosses",
        dataset_revision="bench",
        size="small",
        coverage="lm_only",
        target=None,
        formats={chosen.label: chosen},
        groups=tuple(
            GroupChoice(
                group=LayerGroup(name=group.name, modules=group.modules, weight_elements=group.weight_elements),
                format=chosen.label,
                cell_id="bench",
                predicted_kl=0.0,
            )
            for group in groups
        ),
    )


def ask(args: argparse.Namespace, verb: str, settings: dict[str, Any], places: Sequence[Path]) -> list[dict[str, Any]]:
    """The answers of tests/serving/reader.py in vLLM's environment, one a directory."""
    path = args.out / f"{verb}.json"
    path.write_text(json.dumps(settings))
    command = [*shlex.split(args.python), str(READER), verb, str(path), *map(str, places)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(answers) != len(places):
        sys.exit(f"{len(answers)} answers for {len(places)} checkpoints")
    return answers


def kl_table(names: Sequence[str], args: argparse.Namespace) -> None:
    """KL of what is served over what is measured, for every recipe."""
    model = Model(SOURCE)
    glosses = model.tokenize("bench/serving", (SOURCE / "wordnet_glosses.txt").read_text().splitlines())
    network = load(SOURCE, dtype=torch.float32, device=args.device)
    linears, compute = model.structure.linears, Compute.of(network)
    batches = list(model.plan([Sample(token_ids=np.asarray(ids)) for ids in glosses[CALIBRATION]]).batches("small"))
    held_out = [torch.tensor(ids, device=args.device)[None] for ids in glosses[HELD_OUT]]
    base = log_probabilities(network, held_out)
    plain = args.out / "plain"
    shutil.copytree(SOURCE, plain, dirs_exist_ok=True, ignore=shutil.ignore_patterns("layer-analysis"))
    places, measured = {"plain": plain}, {}
    for name in names:
        directory = args.out / name.replace("/", "-")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        recipe = uniform(model, name)
        quants = calibrated(network, recipe, linears, batches)
        write_checkpoint(SOURCE, directory, recipe, quants, linears, compute)
        check_export(directory, SOURCE, recipe, quants, linears, compute)
        with applied(network, quants):
            measured[name] = kl_rows(base, log_probabilities(network, held_out))
        places[name] = directory
    prompts = {"dtype": "bfloat16", "prompts": [ids[0].tolist() for ids in held_out]}
    owners = np.repeat(np.arange(len(held_out)), [ids.shape[1] - 1 for ids in held_out])
    answers = dict(zip(places, ask(args, "logits", prompts, [*places.values()]), strict=True))
    if error := answers["plain"].get("error"):
        sys.exit(f"the unquantized model: {error}")
    noise = kl_rows(base, served(places["plain"], args.device))
    report("serving noise", torch.device(args.device), {"kl": noise.mean(), "tokens": len(noise)})
    for name in names:
        if error := answers[name].get("error"):
            report(f"serving {name}", torch.device(args.device), {"measured": measured[name].mean(), "error": error})
            continue
        found = kl_rows(base, served(places[name], args.device))
        low, high = ratio_interval(found, measured[name], owners)
        figures = {
            "kernels": answers[name].get("kernels"),
            "measured": measured[name].mean(),
            "served": found.mean(),
            "ratio": found.mean() / measured[name].mean(),
            "ratio_low": low,
            "ratio_high": high,
            "apart_over_noise": abs(found.mean() - measured[name].mean()) / noise.mean(),
        }
        report(f"serving {name}", torch.device(args.device), figures)


@torch.no_grad()
def log_probabilities(network: Any, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """[tokens, vocabulary], of the prompts one after another, each without its last token."""
    rows = [network(input_ids=ids, use_cache=False).logits[0, :-1] for ids in prompts]
    return log_softmax(torch.cat(rows).float(), -1)


def served(directory: Path, device: str) -> torch.Tensor:
    """The same by vLLM."""
    return log_softmax(torch.from_numpy(np.load(directory / "served_logits.npy")).to(device), -1)


def kl_rows(p: torch.Tensor, q: torch.Tensor) -> np.ndarray:
    """KL(p || q) of each token, nats."""
    return (p.exp() * (p - q)).sum(-1).double().cpu().numpy()


def ratio_interval(found: np.ndarray, measured: np.ndarray, owners: np.ndarray) -> tuple[float, float]:
    """90 % bootstrap interval of the ratio of two means; samples are drawn, with all of their tokens."""
    sums = np.stack([np.bincount(owners, weights=rows) for rows in (found, measured)])
    drawn = np.random.default_rng(0).integers(0, sums.shape[1], (N_BOOTSTRAP, sums.shape[1]))
    low, high = np.quantile(sums[0][drawn].sum(1) / sums[1][drawn].sum(1), [0.05, 0.95])
    return float(low), float(high)


def speed_table(names: Sequence[str], args: argparse.Namespace) -> None:
    """Tokens a second and GB of the 4B shape, unquantized and under every recipe."""
    config = Qwen3VLConfig(text_config=TEXT_4B, vision_config=VISION_4B, tie_word_embeddings=True)
    shape = args.out / "shape"
    document = {**config.to_dict(), "architectures": ["Qwen3VLForConditionalGeneration"], "dtype": "bfloat16"}
    places = {}
    for name in ["plain", *names]:
        directory = places[name] = shape / name.replace("/", "-")
        directory.mkdir(parents=True, exist_ok=True)
        own = dict(document)
        (directory / "config.json").write_text(json.dumps(own))
        if name != "plain":
            model = Model(directory)
            own["quantization_config"] = quantization_config(uniform(model, name), model.structure.linears)
            (directory / "config.json").write_text(json.dumps(own))
    for start in range(0, len(places), CHUNK):
        some = [*places][start : start + CHUNK]
        for name, answer in zip(some, ask(args, "speed", {}, [places[name] for name in some]), strict=True):
            answer.pop("directory")
            report(f"serving speed {name}", torch.device(args.device), answer)


def export_seconds(args: argparse.Namespace) -> None:
    """Seconds of `sweep export` from the command: formats of the 4B shape with random weights, in turn."""
    place = args.out / "random"
    random_4b(args.device).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SOURCE / name, place / name)
    model = Model(place)
    config = expand(["dataset.size=small"], multirun=False).points[0]
    digest = model.plan(samples_of(config.dataset, model, 16)).digest("small")
    shutil.rmtree(args.out / "exported", ignore_errors=True)
    for names in (["wfp4_afp16/default"], [*SPEEDS[:4], "wfp8_afp8/default"]):
        recipes = [uniform(model, name) for name in names]
        groups = [recipes[i % len(recipes)].groups[i] for i in range(len(recipes[0].groups))]
        formats = {label: chosen for recipe in recipes for label, chosen in recipe.formats.items()}
        mix = replace(
            recipes[0],
            groups=tuple(groups),
            formats=formats,
            model_revision=model.revision,
            model_path=str(place),
            dataset_revision=digest,
        )
        path = args.out / "recipe.yaml"
        path.write_text(mix.to_yaml())
        command = [sys.executable, "-m", "sweep", "export", str(path), "--format", "compressed-tensors"]
        command += ["--out", str(args.out / "exported" / str(len(names))), f"cluster.device={args.device}"]
        command += [f"store.uri={args.out / 'store'}"]
        took = seconds(partial(subprocess.run, command, check=True), torch.device("cpu"))
        report(f"export of {len(names)} formats", torch.device(args.device), {"seconds": took})


if __name__ == "__main__":
    main()
