"""Small vision-language checkpoints of every family with random weights, a tokenizer, a processor, a chat template."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from sweep.core.batches import Sample
from sweep.core.paths import bundled_model_dir
from workers.data.conversations import Conversation, Message, PictureSource
from workers.model import answers

# Read through transformers' own processor, by no word of ours about them.
OTHERS = ("aya_vision", "ovis2")
FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "internvl", "llava", "gemma3")
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4112,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
_SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
_SPECIAL += ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>")
_SPECIAL += ("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
_NAMED = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<|video_pad|>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "image_token": "<image_soft_token>",
        "eoi_token": "<end_of_image>",
    },
}
_MARKS = {"internvl": "<IMG_CONTEXT>\\n", "llava": "<image>\\n", "gemma3": "<start_of_image>"}
_MARKS |= {"aya_vision": "<image>", "ovis2": "<image>\\n"}
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"


def template(kind: str) -> str:
    """A chat template in ChatML, with the family's mark for pictures."""
    return (
        "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{%- if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{%- for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ '" + _MARKS.get(kind, _QWEN_MARK) + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def save_vision(directory: Path, kind: str, **text: Any) -> Path:
    """A checkpoint directory of a small random model of one of FAMILIES, in float32.

    Args:
        directory: of the checkpoint.
        kind: one of FAMILIES or OTHERS.
        text: fields of the language model's configuration instead of those of `TEXT`.
    """
    tokenizer = save_tokenizer(directory, kind)
    ids = dict(zip(_SPECIAL, tokenizer.convert_tokens_to_ids(list(_SPECIAL)), strict=True))
    torch.manual_seed(0)
    model = _MODELS[kind](ids, TEXT | text)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    model.generation_config = transformers.GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(directory)
    image_processor = _IMAGE_PROCESSORS[kind]()
    if kind in _PROCESSORS:
        _PROCESSORS[kind](image_processor, tokenizer).save_pretrained(directory)
    else:
        image_processor.save_pretrained(directory)
    return directory


def save_tokenizer(directory: Path, kind: str) -> Any:
    """The bundled model's tokenizer with the family's special tokens and chat template; also returned."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        bundled_model_dir(), extra_special_tokens=_NAMED.get(kind, {})
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template(kind)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)
    return tokenizer


def _qwen(config: Any, model: Any, patch: int, text: dict[str, Any], **vision: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    rope |= {} if "fullatt_block_indexes" in vision else {"mrope_interleaved": True}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    text = text | {"rope_parameters": rope} | (moe if "Moe" in config.__name__ else {})
    if "fullatt_block_indexes" in vision:
        text["hidden_size"] = 128  # heads of 32 values
    vision |= {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "patch_size": patch}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": text["hidden_size"]}
    tokens = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
    return model(config(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=False))


def _internvl(ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.InternVLConfig(
        vision_config=vision | {"image_size": [56, 56], "patch_size": [14, 14], "norm_type": "layer_norm"},
        text_config={"model_type": "qwen2"} | text,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _llava(ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 56}
    config = transformers.LlavaConfig(
        vision_config=vision
        | {"num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "projection_dim": 32},
        text_config={"model_type": "llama"} | text,
        image_token_index=ids["<image>"],
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3(ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Gemma3Config(
        vision_config=vision | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        text_config=text | {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _aya(ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 56}
    config = transformers.AyaVisionConfig(
        vision_config=vision
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "vision_use_head": False},
        text_config={"model_type": "cohere2"} | {key: value for key, value in text.items() if key != "head_dim"},
        image_token_index=ids["<|IMG_PATCH|>"],
        tie_word_embeddings=False,
    )
    return transformers.AyaVisionForConditionalGeneration(config)


def _ovis(ids: dict[str, int], text: dict[str, Any]) -> Any:
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Ovis2Config(
        vision_config=vision | {"image_size": 56, "patch_size": 14, "vocab_size": 96, "hidden_stride": 2},
        text_config={"model_type": "qwen2"} | text,
        image_token_id=ids["<IMG_ATOM>"],
        visual_indicator_token_ids=[ids[f"<IMG_{name}>"] for name in ("START", "GRID", "COL", "ROW", "END")],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=False,
    )
    return transformers.Ovis2ForConditionalGeneration(config)


_MODELS: dict[str, Callable[[dict[str, int], dict[str, Any]], Any]] = {
    "qwen3_vl": lambda _, text: _qwen(
        *(transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration, 16, text),
        **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    ),
    "qwen3_vl_moe": lambda _, text: _qwen(
        *(transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration, 16, text),
        **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    ),
    "qwen2_5_vl": lambda _, text: _qwen(
        *(transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration, 14, text),
        **{"fullatt_block_indexes": [1], "window_size": 56},
    ),
    "internvl": _internvl,
    "llava": _llava,
    "gemma3": _gemma3,
    "aya_vision": _aya,
    "ovis2": _ovis,
}


def _qwen_pictures(patch: int, mean: float) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
    return Qwen2VLImageProcessorPil(patch_size=patch, image_mean=[mean, 0.5, 0.5], image_std=[0.5] * 3, size=size)


def _tiles(**options: Any) -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    return GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4, **options)


def _ovis_tiles() -> Any:
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

    return Ovis2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=4, crop_to_patches=True)


def _clip() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def _siglip() -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(size={"height": 56, "width": 56})


_IMAGE_PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen3_vl": lambda: _qwen_pictures(16, 0.5),
    "qwen3_vl_moe": lambda: _qwen_pictures(16, 0.5),
    "qwen2_5_vl": lambda: _qwen_pictures(14, 0.48145466),
    "internvl": _tiles,
    "llava": _clip,
    "gemma3": _siglip,
    "aya_vision": lambda: _tiles(crop_to_patches=True),
    "ovis2": _ovis_tiles,
}
_PROCESSORS: dict[str, Callable[[Any, Any], Any]] = {
    "aya_vision": lambda pictures, tokenizer: transformers.AyaVisionProcessor(
        pictures, tokenizer, patch_size=14, img_size=56, downsample_factor=2, chat_template=tokenizer.chat_template
    ),
    "ovis2": lambda pictures, tokenizer: transformers.Ovis2Processor(
        pictures, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template
    ),
}


def picture(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    """A picture of random blocks of colour."""
    blocks = np.random.default_rng(seed).integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def chat(*turns: str, n_pictures: int = 0) -> Conversation:
    """A conversation of user and assistant by turns; its pictures come first."""
    pictures = tuple(PictureSource(origin=f"picture {index}") for index in range(n_pictures))
    messages = [
        Message(role=("user", "assistant")[index % 2], parts=(*(() if index else pictures), turn))
        for index, turn in enumerate(turns)
    ]
    return Conversation(messages=tuple(messages), origin="line 1 of chats.jsonl")


def written_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let models write answers in this process; a list that will hold the chunks that they have written."""
    written: list[str] = []

    def generated(chunks: Sequence[tuple[str, Sequence[Sample]]], author: answers.Author) -> Iterator[answers.Written]:
        for chunk_id, chunk in chunks:
            written.append(chunk_id)
            yield answers._write(author, chunk_id, chunk)

    monkeypatch.setattr(answers, "_generated", generated)
    return written
