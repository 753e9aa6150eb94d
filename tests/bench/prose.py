"""Texts that a model writes itself at temperature 1 from short beginnings, for benchmarks: JSON lines of one text each.

    python -m tests.bench.prose MODEL_DIR OUT.jsonl [--texts 256] [--device cuda]

The same command writes the same texts on the same machine. Half of them are there to score, the others to measure on:
`dataset=text dataset.path=OUT.jsonl dataset.size=medium`.
"""

# pyright: basic

import argparse
import json
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sweep.core.machine import n_cores
from tests.bench.chat import ROWS, continued, until_end
from workers.model import loading

BEGINNINGS = (
    "In the early years of",
    "The history of",
    "Scientists who study",
    "When she arrived at",
    "A short introduction to",
    "The most important part of",
    "Last summer, the people of",
    "To understand",
    "Nobody had expected",
    "The report describes",
    "Many students learn about",
    "He opened the door and",
    "One way to think about",
    "The city council decided",
    "During the winter,",
    "This chapter explains",
)
SUBJECTS = ("", " a", " the", " our", " how", " water", " music", " children")
TEXT_TOKENS = 64  # that the model writes at most
LEAST_TOKENS = 16  # of a text that is kept


def prose(model: Any, tokenizer: Any, n_texts: int) -> list[str]:
    """Texts of the model's own, no two of them equal."""
    torch.manual_seed(0)
    beginnings = cycle("".join(words) for words in product(BEGINNINGS, SUBJECTS))
    found: dict[str, None] = {}
    while len(found) < n_texts:
        prompts = [torch.tensor(tokenizer(each).input_ids) for each in islice(beginnings, ROWS)]
        for prompt, written in zip(prompts, continued(model, prompts, TEXT_TOKENS), strict=True):
            tokens, _ = until_end(model, written)
            if len(tokens) >= LEAST_TOKENS:
                found[tokenizer.decode([*prompt.tolist(), *tokens], skip_special_tokens=True).strip()] = None
    return list(found)[:n_texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(n_cores())
    model = loading.load(args.model, dtype=torch.float32, device=args.device)
    texts = prose(model, AutoTokenizer.from_pretrained(args.model), args.texts)
    args.out.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts), encoding="utf-8")


if __name__ == "__main__":
    main()
