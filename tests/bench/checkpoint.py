"""A checkpoint directory of the real size, and captions for it, as a user has them on disk."""

# pyright: basic

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from sweep.core.paths import bundled_model_dir
from tests.bench.setup import random_4b
from workers.data.samples import read_captions
from workers.model import loading

_BUNDLED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
_TOKENS_A_CAPTION = 14  # as COCO's have with Qwen's tokenizer
_LONG_TOKENS = 520  # cut at dataset.max_tokens, 512


def make_checkpoint(directory: Path, model: str, device: str) -> Path:
    """The bundled model, or the 4B shape in bf16 shards with tied embeddings; with the bundled tokenizer."""
    if model == "tiny":
        return bundled_model_dir()
    if not (directory / "model.safetensors.index.json").is_file():
        random_4b(device).save_pretrained(directory, max_shard_size="3GB")
        for name in _BUNDLED_FILES:
            shutil.copyfile(bundled_model_dir() / name, directory / name)
        config = json.loads((directory / "config.json").read_text())
        bundled = json.loads((bundled_model_dir() / "config.json").read_text())
        config |= {key: value for key, value in bundled.items() if key.endswith("token_id")}
        (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def write_chats(directory: Path, n: int, side: int) -> Path:
    """Chats with a JPEG each, as noisy as photographs are, about 2 bits a pixel; about 100 tokens beside it."""
    random = np.random.default_rng(0)
    words = " ".join(read_captions(bundled_model_dir() / "wordnet_glosses.txt", 512)).split()
    directory.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for i in range(n):
        coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        noise = random.integers(-12, 13, (side, side, 3))
        pixels = np.clip(np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) + noise, 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{i}.jpg", quality=85)
        question, answer = (said(words, place) for place in (i * 50, i * 50 + 25))
        parts = [{"type": "image", "image": f"{i}.jpg"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    path = directory / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def said(words: list[str], start: int) -> str:
    """25 words from a place on; after the last comes the first."""
    return " ".join(words[place % len(words)] for place in range(start, start + 25))


def write_captions(path: Path, *, long: bool) -> Path:
    """512 captions of about 14 tokens, or 128 of at least 512; words of the bundled glosses."""
    words = " ".join(read_captions(bundled_model_dir() / "wordnet_glosses.txt", 512)).split()
    n_tokens = sum(len(ids) for ids in loading.tokenize(bundled_model_dir(), [" ".join(words)]))
    n_words = round((_LONG_TOKENS * 1.1 if long else _TOKENS_A_CAPTION) * len(words) / n_tokens)

    def caption(start: int) -> str:
        return " ".join(words[place % len(words)] for place in range(start, start + n_words))

    lines = [caption(start) for start in range(0, n_words * (128 if long else 512), n_words)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
