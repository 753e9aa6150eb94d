"""A whole sweep by the command line, from a cold start to published reports.

That is model load, capture, scores, store and reports.

python -m tests.bench.sweep --device cpu --model tiny
python -m tests.bench.sweep --device cuda --model qwen3_vl_4b_shape                  # the grid's valid points, 3 sizes
python -m tests.bench.sweep --device cuda --model qwen3_vl_4b_shape --memory-gb 16
python -m tests.bench.sweep --device cuda --model qwen3_vl_4b_shape --long           # 65,000 tokens, 16 recipes
python -m tests.bench.sweep --device cuda --model qwen3_vl_4b_shape --chats          # 128 pictures, 16 recipes
"""

# pyright: basic

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from sweep.config.compose import expand
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.bench.checkpoint import make_checkpoint, write_captions, write_chats
from tests.bench.commands import run_sweep, sweep_command
from tests.bench.setup import TEXT_4B, report, seconds

_LONG_GRID = [
    "quant_pair=wfp8_afp8,wfp8_aint8,wint4_afp8,wint4_aint8",
    "quant_granularity=default,w_per_out_channel,a_per_token_dynamic,recipe_match_channel_token",
    "dataset.size=medium",
]


_SIDE = 832  # pixels; 26 x 26 tokens of 32 x 32 pixels


def floor(n_rows: int, shape: dict[str, Any]) -> float:
    """Seconds of the GEMMs of one recipe in bf16: every linear of the decoder once."""
    hidden, inner, heads = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["head_dim"] * shape["num_attention_heads"],
    )
    keys = shape["head_dim"] * shape["num_key_value_heads"]
    total = 0.0
    for n_in, n_out in [
        (hidden, heads),
        (hidden, keys),
        (hidden, keys),
        (heads, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]:
        x_TI = torch.randn(n_rows, n_in, dtype=torch.bfloat16, device="cuda")
        weight_OI = torch.randn(n_out, n_in, dtype=torch.bfloat16, device="cuda")
        total += seconds(lambda x=x_TI, weight=weight_OI: x @ weight.T, x_TI.device, repeats=10)
    return total * shape["num_hidden_layers"]


def n_tokens_of(chats: Path, model: Path) -> int:
    """Tokens of the chats, those of pictures included."""
    dataset = expand(["dataset=chat", f"dataset.path={chats}", "dataset.size=medium"], multirun=False).points[0].dataset
    return sum(len(sample.token_ids) for sample in samples_of(dataset, Model(model), 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["tiny", "qwen3_vl_4b_shape"], default="tiny")
    parser.add_argument("--memory-gb", type=float)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--chats", action="store_true", help="128 chats with a picture each, 16 recipes")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint is kept between runs")
    parser.add_argument("overrides", nargs="*", help="of the sweep, instead of the whole grid")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as fresh:
        scratch = args.scratch or Path(fresh)
        model = make_checkpoint(scratch / "model", args.model, args.device)
        captions = write_captions(scratch / ("long.txt" if args.long else "captions.txt"), long=args.long)
        grid = args.overrides or (_LONG_GRID if args.long or args.chats else ["grid=origin"])
        command = sweep_command(grid, model, captions, args.device, Path(fresh))
        if args.chats:
            chats = write_chats(scratch / "chats", 128, _SIDE)
            command = [word for word in command if not word.startswith(("dataset=", "dataset.captions_path="))]
            command += ["dataset=chat", f"dataset.path={chats}"]
        command += [f"sensitivity.memory_gb={args.memory_gb}"] if args.memory_gb else []
        cache = {"SWEEP_CACHE_DIR": f"{fresh}/cache"}  # hashes and token ids are found anew, as on a first run
        figures = {
            "model": args.model,
            "grid": " ".join(grid),
            "memory_gb": args.memory_gb,
            **run_sweep(command, Path(fresh), cache),
        }
        if (args.long or args.chats) and args.device == "cuda":
            n_tokens = 128 * 512 if args.long else n_tokens_of(chats, model)
            figures |= {"tokens": n_tokens, "floor_seconds": floor(n_tokens, TEXT_4B), "recipes": 16}
            figures["times_floor"] = figures["scoring_seconds"] / (16 * figures["floor_seconds"])
        name = "sweep_chats" if args.chats else "sweep_long" if args.long else "sweep"
        report(name, torch.device(args.device), figures)


if __name__ == "__main__":
    main()
