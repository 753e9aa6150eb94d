"""What auto-round's AutoScheme chooses, without tuning: run by a Python of its own that has auto-round 0.16.1.

    PYTHON -P auto_round_choices.py TASK.json OUT.json

`tests.bench.peers` writes the task and reads the choices. AutoScheme reads texts of one length from a file: the task's
samples are joined and cut into such texts. Scores of a format are kept between targets, as auto-round does it.
"""

# pyright: basic, reportMissingImports=false

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

LENGTH = 256  # tokens of a text: auto-round's default
SPARE = 16  # tokens more than that in the file, since text read again may be fewer tokens; auto-round cuts them off


def joined(samples: list[list[int]], tokenizer: Any, most: int | None) -> list[str]:
    """Texts of at least LENGTH tokens each, of the samples one after the other."""
    text = "\n".join(tokenizer.decode(sample, skip_special_tokens=True) for sample in samples)
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    starts = range(0, len(tokens) - LENGTH + 1, LENGTH)[:most]
    texts = [tokenizer.decode(tokens[start : start + LENGTH + SPARE]) for start in starts]
    short = [text for text in texts if len(tokenizer(text).input_ids) < LENGTH]
    assert not short, f"{len(short)} texts are shorter than {LENGTH} tokens"
    return texts


def choices(task: dict[str, Any], scores: Path) -> dict[str, Any]:
    """The format of each module at each target. Args: scores: directory for auto-round's scores and its texts."""
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(scores)
    from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
    from auto_round.schemes import QuantizationScheme, preset_name_to_scheme

    config = json.loads((Path(task["model"]) / "config.json").read_text(encoding="utf-8"))
    architecture = getattr(transformers, config["architectures"][0])
    model = architecture.from_pretrained(task["model"], dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["model"])
    texts = joined(task["samples"], tokenizer, task["most_texts"])
    file = scores / "texts.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")
    options = {label: QuantizationScheme.from_dict(fields) for label, fields in task["formats"].items()}
    options["16"] = preset_name_to_scheme("BF16")
    found: list[dict[str, Any]] = []
    seconds: list[float] = []
    for target in task["targets"]:
        scheme = AutoScheme(
            avg_bits=target,
            options=list(options.values()),
            shared_layers=task["groups"],
            nsamples=len(texts),
            seqlen=LENGTH,
            low_cpu_mem_usage=False,  # which would read each layer from the disk again
        )
        modules = [name for group in task["groups"] for name in group]
        started = time.perf_counter()
        maker = GenScheme(scheme, model, modules, {}, str(file), device_map="cpu", tokenizer=tokenizer)
        chosen = maker.get_layer_config()
        seconds.append(time.perf_counter() - started)
        labels = {
            name: next(label for label, option in options.items() if asdict(option) == chosen[name]) for name in modules
        }
        found.append({"target": target, "formats": labels})
    return {
        "choices": found,
        "seconds": seconds[0],
        "seconds_solver": sum(seconds[1:]) / max(1, len(seconds) - 1),
        "texts": len(texts),
        "tokens": len(texts) * LENGTH,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    task_path, out_path = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scores:
        found = choices(json.loads(task_path.read_text(encoding="utf-8")), Path(scores))
    out_path.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
