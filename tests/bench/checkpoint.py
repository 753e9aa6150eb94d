"""A checkpoint directory of the real size, and captions for it, as a user has them on disk."""

# pyright: basic

import shutil
from pathlib import Path

from sweep.core.paths import bundled_model_dir
from tests.bench.setup import random_4b
from workers.data.samples import read_captions
from workers.model import loading

_TOKENS_A_CAPTION = 14  # as COCO's have with Qwen's tokenizer
_LONG_TOKENS = 520  # cut at dataset.max_tokens, 512


def make_checkpoint(directory: Path, model: str, device: str) -> Path:
    """The bundled model, or the 4B shape in bf16 shards with tied embeddings; with the bundled tokenizer."""
    if model == "tiny":
        return bundled_model_dir()
    if not (directory / "model.safetensors.index.json").is_file():
        random_4b(device).save_pretrained(directory, max_shard_size="3GB")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(bundled_model_dir() / name, directory / name)
    return directory


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
