"""Train the bundled model: a tiny Qwen3-VL that knows WordNet's glosses and drawn scenes, from nothing, in minutes.

It learns glosses, captions of scenes, and chats about them in its own chat template, of which it learns the answers.

    apt-get install wordnet-base
    python models/qwen3_vl_tiny/train.py --wordnet /usr/share/wordnet --out models/qwen3_vl_tiny --device cuda

`--wordnet` takes any directory with WordNet's data.noun, data.verb, data.adj and data.adv. Writes the tokenizer, the
chat template, what prepares pictures, the weights (bfloat16 safetensors), `wordnet_glosses.txt` (640 glosses that were
not trained on) and `results.json`; the model card quotes the latter.
Losses are those of the stored weights, computed in float32.

    python models/qwen3_vl_tiny/train.py --processor --out models/qwen3_vl_tiny

writes the chat template and what prepares pictures alone.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from workers.data.scene_chats import scene_turns
from workers.data.scenes import TRAINING_BASE, patches, scene

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 4096
SHIPPED = 512  # glosses for calibration; as many again measure the held-out loss
VALIDATION = 128  # of the latter, the first are shipped as well: what recipes are validated on
LONGEST = 96  # tokens; 99.9 % of the glosses are shorter
IMAGE_TOKENS = 4
ROW = 512  # tokens a training row: attention costs its square
SCENES = 40_000  # distinct training scenes
PICTURES = 24  # scenes a step with captions, and as many with chats

# Qwen's form, without a system prompt of its own.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type in ('video', 'video_url') -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
ANSWER = re.compile(r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>", re.DOTALL)  # in a rendered chat: what is learned
# Pictures as `workers.data.scenes.patches` cuts them; edges are of the area in pixels: 4 to 1,024 tokens a picture.
PICTURE = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "patch_size": 16,
    "processor_class": "Qwen3VLProcessor",
    "size": {"longest_edge": 1024 * 1024, "shortest_edge": 64 * 64},
    "temporal_patch_size": 2,
}
PROCESSORS = {
    "preprocessor_config.json": {**PICTURE, "image_processor_type": "Qwen2VLImageProcessorFast"},
    "video_preprocessor_config.json": {**PICTURE, "video_processor_type": "Qwen3VLVideoProcessor"},
}


def read_glosses(wordnet: Path) -> list[str]:
    """One line a sense, "word: gloss", quoted examples left out, in a fixed random order, no line twice."""
    lines: set[str] = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            data, gloss = line.split(" | ", 1)
            word = data.split()[4].split("(")[0].replace("_", " ")
            meaning = gloss.split('; "')[0].strip().rstrip(";")
            if len(meaning) >= 12 and '"' not in meaning:
                lines.add(f"{word}: {meaning}")
    glosses = sorted(lines)
    random.Random(0).shuffle(glosses)
    return glosses


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(ids: dict[str, int]) -> Qwen3VLConfig:
    """4.9 million parameters; every linear has a multiple of 128 inputs."""
    text = {
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [16, 8, 8], "mrope_interleaved": True},
        "bos_token_id": None,
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "num_heads": 4,
        "intermediate_size": 256,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": 256,
        "num_position_embeddings": 16,
        "hidden_act": "gelu_pytorch_tanh",
    }
    names = {
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
    }
    tokens = {f"{key}_token_id": ids[name] for key, name in names.items()}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)


def pack(texts: list[list[int]], device: str, row: int = 0) -> dict[str, Tensor]:
    """Texts side by side in rows, kept apart by positions that start again.

    Args:
        texts: token ids.
        device: where to.
        row: tokens a row, the text at its end is cut; 0: one row that holds all.
    """
    ids = torch.tensor([token for text in texts for token in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    labels = ids.roll(-1)
    labels[torch.tensor([len(text) for text in texts]).cumsum(0) - 1] = -100
    row = row or len(ids)
    n = len(ids) // row * row
    labels[row - 1 : n : row] = -100
    positions[:n].view(-1, row)[:, 0] = 0  # a text that begins in the row before
    return {
        key: value[:n].view(-1, row).to(device)
        for key, value in {"input_ids": ids, "position_ids": positions, "labels": labels}.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A caption or a chat behind the tokens of its scene's picture."""

    tokens: list[int]
    learned: list[bool]  # whether each token is predicted


def captioned(caption: list[int], ids: dict[str, int]) -> Seen:
    """A tokenized caption, all of it learned."""
    head = [ids["<|vision_start|>"], *[ids["<|image_pad|>"]] * IMAGE_TOKENS, ids["<|vision_end|>"]]
    return Seen(tokens=head + caption, learned=[False] * len(head) + [True] * len(caption))


def chatted(index: int, tokenizer: PreTrainedTokenizerFast) -> Seen:
    """The chat about a scene in the model's chat template; answers are learned, with the end of their turns."""
    messages: list[dict[str, Any]] = []
    for question, answer in scene_turns(index):
        picture = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": answer})
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    text = text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
    answers = [match.span() for match in ANSWER.finditer(text)]
    encoded = tokenizer(text, return_offsets_mapping=True)
    learned = [any(start <= at < end for start, end in answers) for at, _ in encoded["offset_mapping"]]
    return Seen(tokens=encoded["input_ids"], learned=learned)


def picture_batch(seen: list[Seen], images: list[int], ids: dict[str, int], device: str) -> dict[str, Tensor]:
    """Captions and chats, each with the picture of a scene in `images`.

    Shorter ones are padded at their end, where no token that is learned sees it.
    """
    shape = len(seen), max(len(each.tokens) for each in seen)
    tokens, labels = torch.full(shape, ids["<|endoftext|>"]), torch.full(shape, -100)
    for row, each in enumerate(seen):
        tokens[row, : len(each.tokens)] = torch.tensor(each.tokens)
        learned = torch.tensor(each.tokens).masked_fill(~torch.tensor(each.learned), -100)
        labels[row, : len(each.tokens) - 1] = learned[1:]
    drawn = [patches(scene(index).pixels) for index in images]
    return {
        "input_ids": tokens.to(device),
        "labels": labels.to(device),
        "pixel_values": torch.from_numpy(np.concatenate([values for values, _ in drawn])).to(device),
        "image_grid_thw": torch.tensor([grid for _, grid in drawn]).to(device),
        "mm_token_type_ids": (tokens == ids["<|image_pad|>"]).long().to(device),
    }


def loss_of(model: Qwen3VLForConditionalGeneration, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Cross entropy summed over predictions, and their number."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


@torch.no_grad()
def evaluate(
    model: Qwen3VLForConditionalGeneration,
    texts: list[list[int]],
    scenes: dict[str, dict[int, Seen]],
    ids: dict[str, int],
    device: str,
) -> dict[str, float]:
    """Nats per token on held-out glosses, captions and answers, and on these with pictures swapped around."""
    model.eval()
    sums: dict[str, tuple[float, int]] = {}

    def add(name: str, batch: dict[str, Tensor]) -> None:
        (loss, n), (total, count) = loss_of(model, batch), sums.get(name, (0.0, 0))
        sums[name] = total + loss.item(), count + n

    for start in range(0, len(texts), 32):
        add("text", pack(texts[start : start + 32], device))
    for name, all_seen in scenes.items():
        indices = list(all_seen)
        for start in range(0, len(indices), 32):
            chosen = indices[start : start + 32]
            seen = [all_seen[index] for index in chosen]
            add(name, picture_batch(seen, chosen, ids, device))
            add(f"{name}_wrong_picture", picture_batch(seen, chosen[1:] + chosen[:1], ids, device))
    return {name: total / n for name, (total, n) in sums.items()}


def unigram_loss(training: list[list[int]], texts: list[list[int]]) -> float:
    """Nats per token of a model that knows only how often each token occurs (add-one smoothed)."""
    counts = Counter(token for text in training for token in text)
    total = sum(counts.values()) + VOCABULARY
    predicted = [token for text in texts for token in text[1:]]
    return -sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokenizer, and the tokenized glosses, captions and chats to train and to evaluate on."""

    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, int]  # of the special tokens
    texts: list[list[int]]  # training glosses, each with its end token
    held_out: list[list[int]]  # glosses not trained on, each with its end token
    shipped: list[list[int]]  # glosses for calibration, without end tokens
    bundled: list[str]  # lines of wordnet_glosses.txt: the shipped glosses, then those for validation
    scenes: dict[str, dict[int, Seen]]  # "captions" and "chats", by training scene
    test_scenes: dict[str, dict[int, Seen]]  # the same of scenes not trained on


def read_corpus(wordnet: Path, n_scenes: int) -> Corpus:
    """Train the tokenizer, and split WordNet's glosses and the drawn scenes."""
    glosses = read_glosses(wordnet)
    tokenizer = train_tokenizer(glosses[2 * SHIPPED :])
    end = tokenizer.eos_token_id
    tokenized: list[list[int]] = tokenizer(glosses)["input_ids"]
    keep = [i for i, tokens in enumerate(tokenized) if 6 <= len(tokens) < LONGEST]
    shipped, held_out, training = keep[:SHIPPED], keep[SHIPPED : 2 * SHIPPED], keep[2 * SHIPPED :]
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}

    def seen(scenes: range) -> dict[str, dict[int, Seen]]:
        captions: list[list[int]] = tokenizer([scene(i).caption for i in scenes])["input_ids"]
        return {
            "captions": {i: captioned(caption, ids) for i, caption in zip(scenes, captions, strict=True)},
            "chats": {i: chatted(i, tokenizer) for i in scenes},
        }

    return Corpus(
        tokenizer=tokenizer,
        ids=ids,
        texts=[tokenized[i] + [end] for i in training],
        held_out=[tokenized[i] + [end] for i in held_out],
        shipped=[tokenized[i] for i in shipped],
        bundled=[glosses[i] for i in [*shipped, *held_out[:VALIDATION]]],
        scenes=seen(range(TRAINING_BASE, TRAINING_BASE + n_scenes)),
        test_scenes=seen(range(SHIPPED)),
    )


def optimizer_of(model: Qwen3VLForConditionalGeneration, args: argparse.Namespace) -> tuple[Any, Any]:
    """AdamW, with weight decay of matrices alone, and its schedule: a linear warm-up, then a cosine."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    other = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    warmup = max(1, args.steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps))) + 0.01)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def text_batches(texts: list[list[int]], n_tokens: int) -> Iterator[list[list[int]]]:
    """Batches of at least `n_tokens` tokens without end, each text once an epoch, in random order."""
    queue: list[list[int]] = []
    while True:
        chosen: list[list[int]] = []
        while sum(map(len, chosen)) < n_tokens:
            if not queue:
                queue = random.sample(texts, len(texts))
            chosen.append(queue.pop())
        yield chosen


def picture_batches(
    scenes: dict[str, dict[int, Seen]], ids: dict[str, int], device: str
) -> Iterator[dict[str, Tensor]]:
    """Batches of captions and as many chats without end, with their pictures."""
    while True:
        chosen = [(index, seen[index]) for seen in scenes.values() for index in random.sample(list(seen), PICTURES)]
        yield picture_batch([each for _, each in chosen], [index for index, _ in chosen], ids, device)


def fit(model: Qwen3VLForConditionalGeneration, corpus: Corpus, args: argparse.Namespace) -> int:
    """Train the model. Returns the number of text tokens that it has seen."""
    started = time.time()
    optimizer, schedule = optimizer_of(model, args)
    texts = text_batches(corpus.texts, args.tokens)
    pictures = picture_batches(corpus.scenes, corpus.ids, args.device)
    total = 0
    for step in range(args.steps):
        chosen = next(texts)
        total += sum(map(len, chosen))
        model.train()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            text_loss, n_text = loss_of(model, pack(chosen, args.device, ROW))
            scene_loss, n_scene = loss_of(model, next(pictures))
        (text_loss / n_text + scene_loss / n_scene).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0:
            held = evaluate(model, corpus.held_out[:128], {}, corpus.ids, args.device)["text"]
            text, scenes = text_loss.item() / n_text, scene_loss.item() / n_scene
            seconds = time.time() - started
            print(f"step {step} text {text:.3f} held out {held:.3f} scenes {scenes:.3f} {seconds:.0f} s", flush=True)
    return total


def write_processor(out: Path) -> None:
    """Write what turns chats and pictures into the model's inputs, and what ends an answer."""
    for name, settings in PROCESSORS.items():
        (out / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    path = out / "generation_config.json"
    ends = [SPECIAL.index("<|endoftext|>"), SPECIAL.index("<|im_end|>")]
    generation = {**json.loads(path.read_bytes()), "eos_token_id": ends}
    generation.pop("_from_model_config", None)  # it would be made anew from config.json, with one end alone
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def train(args: argparse.Namespace) -> None:
    """Train the tokenizer and the model, write them, and measure what was written."""
    started = time.time()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    corpus = read_corpus(args.wordnet, SCENES if args.steps > 50 else 400)
    model = Qwen3VLForConditionalGeneration(make_config(corpus.ids)).to(args.device)
    seen = fit(model, corpus, args)
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    corpus.tokenizer.save_pretrained(args.out)
    write_processor(args.out)
    (args.out / "wordnet_glosses.txt").write_text("\n".join(corpus.bundled) + "\n", encoding="utf-8")

    stored = Qwen3VLForConditionalGeneration.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    sample = random.Random(1).sample(corpus.texts, 2000)
    ids, test_scenes = corpus.ids, corpus.test_scenes
    results = {
        "parameters": sum(p.numel() for p in stored.parameters()),
        "steps": args.steps,
        "seed": args.seed,
        "text_tokens_seen": seen,
        "epochs": round(seen / sum(map(len, corpus.texts)), 2),
        "training_glosses": len(corpus.texts),
        "training_loss": evaluate(stored, sample, {}, ids, args.device)["text"],
        "held_out_loss": evaluate(stored, corpus.held_out, test_scenes, ids, args.device),
        "shipped_loss": evaluate(stored, corpus.shipped, {}, ids, args.device)["text"],
        "unigram_loss": unigram_loss(corpus.texts, corpus.held_out),
        "seconds": round(time.time() - started),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--tokens", type=int, default=8192, help="text tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processor", action="store_true", help="write what prepares chats and pictures, and no more")
    options = parser.parse_args()
    if options.processor:
        write_processor(options.out)
    else:
        train(options)
