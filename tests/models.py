"""Small models with random weights, built in a moment: for tests that need an architecture, not a trained model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sweep.core.batches import Sample

VOCABULARY = 512
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}  # of qwen3_moe

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
}
_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 128,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "deepstack_visual_indexes": [0, 1],
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}


def random_model(kind: str, **text: Any) -> Any:
    """A random model of `kind` (qwen3_vl, qwen2, qwen3, qwen3_moe, llama, mistral, gpt2).

    It is in evaluation mode, without gradients, its weights from a fixed seed.
    """
    classes: dict[str, tuple[Any, Any]] = {
        "gpt2": (GPT2Config, GPT2LMHeadModel),
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    }
    torch.manual_seed(0)
    if kind == "qwen3_vl":
        rope = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
        ids = {"vision_start_token_id": 1, "vision_end_token_id": 2, "image_token_id": 3, "video_token_id": 4}
        config = Qwen3VLConfig(
            text_config=_TEXT | {"rope_scaling": rope, "rope_theta": 1e4} | text, vision_config=_VISION, **ids
        )
        model = Qwen3VLForConditionalGeneration(config)
    else:
        config_class, model_class = classes[kind]
        model = model_class(config_class(**(_TEXT | text)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return model.eval().requires_grad_(False)


def random_samples(n: int, seed: int = 0, longest: int = 24) -> list[Sample]:
    """Samples of 2 to `longest` random tokens."""
    generator = np.random.default_rng(seed)
    return [
        Sample(token_ids=generator.integers(5, VOCABULARY, size=generator.integers(2, longest + 1))) for _ in range(n)
    ]


def save_checkpoint(directory: Path, kind: str, **text: Any) -> Path:
    """A checkpoint directory of a random model with a word-level tokenizer, as a user might have one.

    In bfloat16: float32 weights would be used where the file is mapped, 8 bytes off a cache line, and MKL sums them in
    another order than it sums the aligned copies that stock ModelOpt works on (here in products of one row).
    """
    random_model(kind, **text).to(torch.bfloat16).save_pretrained(directory)
    words = ["<unk>", "<s>"] + [f"w{i}" for i in range(VOCABULARY - 2)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
    return directory


def write_captions(path: Path, n: int) -> Path:
    """A captions file of `n` lines of random words that save_checkpoint's tokenizer knows."""
    generator = np.random.default_rng(1)
    lines: list[str] = []
    for _ in range(n):
        words = generator.integers(0, VOCABULARY - 2, size=generator.integers(3, 20))
        lines.append(" ".join(f"w{word}" for word in words))
    path.write_text("\n".join(lines) + "\n")
    return path


def place_at(path: Path, kind: str = "qwen3_vl", *, n_captions: int = 128, **text: Any) -> Path:
    """A directory with a random checkpoint, and captions that its tokenizer knows: one token a word."""
    save_checkpoint(path / "model", kind, **text)
    write_captions(path / "captions.txt", n_captions)
    return path


def overrides_of(place: Path) -> list[str]:
    """Overrides of a place's model and captions, as a user types them."""
    return [
        "model=hf_causal_lm",
        f"model.path={place / 'model'}",
        "dataset=coco2017_captions",
        f"dataset.captions_path={place / 'captions.txt'}",
    ]
