"""Scores of chats with pictures, against plain hooks on the model of transformers with inputs that are not ours."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.formats import job_of
from tests.vision import OTHERS, chat, picture, save_vision
from workers.data.batches import make_plan
from workers.data.conversations import Conversation
from workers.model.loading import load
from workers.model.processing import Processor
from workers.quant.modelopt import layer_groups
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine

INT4 = {"num_bits": 4, "axis": 0}
CHATS = [
    chat("What is it?", "A cat.", "Why?", "It meows.", n_pictures=1),
    chat("Which of them is red?", "The second one.", n_pictures=2),
    chat("And without a picture?", "It is a text.", "Then?", "So."),
]
PICTURES = [[picture(seed=1)], [picture(seed=2), picture(80, 140, seed=3)], []]


def reference_inputs(
    checkpoint: Path, conversation: Conversation, images: list[Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the model by its tokenizer and image processor, placeholders written out here; and labels."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    messages = [
        {
            "role": message.role,
            "content": [{"type": "image"}] * len(message.pictures) + [{"type": "text", "text": message.text}],
        }
        for message in conversation.messages
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if config.model_type in OTHERS:
        whole = transformers.AutoProcessor.from_pretrained(checkpoint)
        whole.image_processor = processor
        inputs = dict(whole(text=[text], images=images or None, return_tensors="pt"))
        del inputs["attention_mask"]
        return inputs, answer_labels(inputs["input_ids"], tokenizer)
    mark = tokenizer.convert_ids_to_tokens(config.image_token_id)
    pieces, pixels, grids = text.split(mark), [], []
    text = pieces[0]
    for image, piece in zip(images, pieces[1:], strict=True):
        options = {"crop_to_patches": True} if config.model_type == "internvl" else {}
        found = processor(images=[image], return_tensors="pt", **options)
        pixels.append(found["pixel_values"])
        if config.model_type == "internvl":
            text += "<img>" + mark * 4 * len(found["pixel_values"]) + "</img>" + piece
        elif config.model_type == "llava":
            text += mark * 16 + piece
        else:
            grids.append(found["image_grid_thw"])
            text += mark * (int(grids[-1].prod()) // 4) + piece
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if grids:
        inputs |= {"image_grid_thw": torch.cat(grids), "mm_token_type_ids": (ids == config.image_token_id).long()}
    return inputs, answer_labels(ids, tokenizer)


def answer_labels(ids: Tensor, tokenizer: Any) -> Tensor:
    """The next token where it is the assistant's, by the tokens that open and end its turns; else -100."""
    opening = tokenizer("<|im_start|>assistant\n")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens, labels, is_answer = ids[0].tolist(), torch.full_like(ids, -100), False
    for index, token in enumerate(tokens):
        if is_answer:
            labels[0, index - 1] = token
            is_answer = token != end
        elif tokens[: index + 1][-len(opening) :] == opening:
            is_answer = True
    return labels


def hooked_scores(model: Any, checkpoint: Path, groups: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Sum of (g dy)^2 of each group under INT4 weights a channel, in float64."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            output.retain_grad()
            kept[name].append((args[0].detach(), output))

        return hook

    names = [name for modules in groups.values() for name in modules]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    for conversation, images in zip(CHATS, PICTURES, strict=True):
        inputs, labels = reference_inputs(checkpoint, conversation, images)
        with torch.enable_grad():
            logits = model(**inputs, use_cache=False).logits
            F.cross_entropy(logits[0].double(), labels[0], ignore_index=-100, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    scores: dict[str, float] = {}
    for first, modules in groups.items():
        scores[first] = 0.0
        for name in modules:
            weight = model.get_submodule(name).weight.double()
            scale = weight.abs().amax(dim=1, keepdim=True) / 7
            change = (weight / scale).round() * scale - weight
            for x, output in kept[name]:
                assert output.grad is not None
                scores[first] += float(((x.double() @ change.T * output.grad.double()) ** 2).sum())
    return scores


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "internvl", "llava", *OTHERS])
def test_scores_of_chats_are_those_of_hooks_on_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    checkpoint = save_vision(tmp_path / "model", kind)
    model = load(checkpoint, dtype=torch.float32, device="cpu")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model.layers" in name
    }
    groups = dict(layer_groups(linears))
    expected = hooked_scores(model, checkpoint, groups)

    processor = Processor(checkpoint, None)
    samples = [
        processor.sample(each, [processor.prepare(image) for image in images], loss="answers", max_tokens=512)
        for each, images in zip(CHATS, PICTURES, strict=True)
    ]
    plan = make_plan(samples, packed=True)
    assert len(plan.segments[0]) == (1 if kind == "qwen3_vl" else 3)  # in one row, or each in its own batch
    rows = capture(model, plan.segments, list(linears))
    engine, job = Engine(torch.device("cpu")), job_of("int4", INT4, None, {"small": 1})
    assert len(groups) == (4 if kind == "qwen3_vl_moe" else 8)  # its experts are no linears
    for first, modules in groups.items():
        weights = {name: linears[name].weight for name in modules}
        found = engine.score_group(weights, rows, [job])()
        assert found is not None
        assert isinstance(found[0], dict)
        assert found[0]["small"].score == pytest.approx(expected[first], rel=1e-5), first
