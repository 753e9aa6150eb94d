"""Small random checkpoints of many families in bfloat16, in shapes that vLLM's kernels take, for tests of whole sweeps.

Widths are multiples of 128, so that every format with groups of 128 divides them; each has two decoder layers but where
a family needs more to show what is its own.
"""

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.vision import TEXT, save_tokenizer, save_vision

_TEXT: dict[str, Any] = TEXT | {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": False}
_MIXED = ["linear_attention", "full_attention"]
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": _MIXED,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
}
_LATENT: dict[str, Any] = {  # multi-head latent attention: low-rank queries, keys and values
    "num_key_value_heads": 4,
    "head_dim": None,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 2,  # no layer has experts
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
# The upper half of the layers takes keys and values from below; layers of full attention take keys for values.
_SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 128,
    "vocab_size_per_layer_input": 4112,
    "tie_word_embeddings": True,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 2,
}

_CONVOLUTIONS: dict[str, Any] = {  # under the names that vLLM reads, too
    "conv_dim": 128,
    "block_dim": 128,
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": True,
}

# Model type of transformers, and what its configuration has beside `_TEXT`.
_TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),  # q/k/v have biases
    "qwen3": ("qwen3", {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", {}),  # one matrix for q/k/v, one for gate/up
    "qwen3_5": ("qwen3_5_text", _LINEAR_ATTENTION),
    "qwen3_next": ("qwen3_next", _LINEAR_ATTENTION | _EXPERTS | {"mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], **_CONVOLUTIONS}),
    "gemma4": ("gemma4_text", _SHARED),
}
_VISION_MODELS: Final = {"qwen2_5_vl": "qwen2_5_vl", "gemma3_vlm": "gemma3", "llava": "llava", "internvl": "internvl"}
FAMILIES: Final = (*_TEXT_MODELS, *_VISION_MODELS)
WITH_EXPERTS: Final = ("qwen3_moe", "qwen3_next")
# Tensors that multiply nothing, which readers leave: keys and values of layers that have those of a layer below.
UNUSED: Final = {"gemma4": r"layers\.[23]\.self_attn\.[kv]_"}
# What published checkpoints call a tower that transformers 5.24 saves under a shorter name.
_HUB_NAMES: Final = {family: ("vision_tower.", "vision_tower.vision_model.") for family in ("gemma3_vlm", "llava")}


def save_family(directory: Path, family: str) -> Path:
    """A checkpoint directory of one of FAMILIES with the bundled model's tokenizer, and names as a hub has them."""
    if (kind := _VISION_MODELS.get(family)) is not None:
        save_vision(directory, kind, hidden_size=128, intermediate_size=256)
        _publish(directory, *_HUB_NAMES.get(family, ("", "")))
        return directory
    model_type, fields = _TEXT_MODELS[family]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **_TEXT | fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith(".bias"):
            parameter.data.normal_(0, 0.08)
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory, family)
    if fields.get("num_kv_shared_layers"):
        _add_unused(directory, config)
    return directory


def _add_unused(directory: Path, config: transformers.PreTrainedConfig) -> None:
    """Add keys and values of the layers that take those of a layer below: published checkpoints hold them unused."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    for layer in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
        below = layer - config.num_kv_shared_layers  # of the same kind
        names = [f"model.layers.{below}.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
        weights |= {
            name.replace(f".{below}.", f".{layer}."): weights[name].clone() for name in names if name in weights
        }
    save_file(weights, file, metadata={"format": "pt"})


def _publish(directory: Path, prefix: str, published: str) -> None:
    """Put a checkpoint's weights into bfloat16, with another prefix."""
    file, config = directory / "model.safetensors", directory / "config.json"
    weights = {name.replace(prefix, published, 1): tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
