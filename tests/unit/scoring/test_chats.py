"""Scores of chats with pictures, against plain hooks on the model of transformers with inputs that are not ours."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from sweep.core.batches import IMAGE, Sample
from sweep.core.groups import is_vision
from tests.formats import job_of
from tests.vision import FAMILIES, OTHERS, chat, picture, save_vision
from workers.data.batches import make_plan
from workers.data.conversations import Conversation
from workers.model.loading import load
from workers.model.processing import Processor
from workers.quant.modelopt import layer_groups
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine
from workers.scoring.kl import KlEngine
from workers.scoring.windows import captures

INT4 = {"num_bits": 4, "axis": 0}
# Layer groups of tower and projector: blocks of four groups, mergers, projectors.
N_VISION = {
    "qwen3_vl": 2 * 4 + 3 * 2,
    "qwen3_vl_moe": 2 * 4 + 3 * 2,
    "qwen2_5_vl": 2 * 4 + 2,
    "internvl": 2 * 4 + 2,
    "llava": 3 * 4 + 2,
    "gemma3": 2 * 4,
    "aya_vision": 2 * 4 + 2,
    "ovis2": 2 * 4 + 1,
}
CHATS = [
    chat("What is it?", "A cat.", "Why?", "It meows.", n_pictures=1),
    chat("Which of them is red?", "The second one.", n_pictures=2),
    chat("And without a picture?", "It is a text.", "Then?", "So."),
    chat("What is it?", "A cat.", "Why?", "It meows.", n_pictures=1),  # shares a batch with the first
]
PICTURES = [[picture(seed=1)], [picture(seed=2), picture(80, 140, seed=3)], [], [picture(seed=4)]]


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
    if config.model_type == "gemma3":
        text = text.replace("<start_of_image>", mark)
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
        elif config.model_type == "gemma3":
            text += "\n\n<start_of_image>" + mark * 4 + "<end_of_image>\n\n" + piece
        else:
            grids.append(found["image_grid_thw"])
            text += mark * (int(grids[-1].prod()) // 4) + piece
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels)
    if grids:
        inputs |= {"image_grid_thw": torch.cat(grids), "mm_token_type_ids": (ids == config.image_token_id).long()}
    if config.model_type == "gemma3" and pixels:
        inputs["token_type_ids"] = (ids == config.image_token_id).long()
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


def hooked_scores(model: Any, checkpoint: Path, groups: dict[str, tuple[str, ...]]) -> dict[str, list[float]]:
    """Sum of (g dy)^2 of each group and conversation under INT4 weights a channel, in float64."""
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
    scores: dict[str, list[float]] = {first: [] for first in groups}
    for conversation, images in zip(CHATS, PICTURES, strict=True):
        inputs, labels = reference_inputs(checkpoint, conversation, images)
        with torch.enable_grad():
            logits = model(**inputs, use_cache=False).logits
            F.cross_entropy(logits[0].double(), labels[0], ignore_index=-100, reduction="sum").backward()
        for first, modules in groups.items():
            scores[first].append(sum(squares(model.get_submodule(name).weight, kept[name]) for name in modules))
        kept.clear()
    for handle in handles:
        handle.remove()
    return scores


def squares(weight: Tensor, kept: list[tuple[Tensor, Tensor]]) -> float:
    """Sum of (g dy)^2 of one linear's calls."""
    weight = weight.double()
    scale = weight.abs().amax(dim=1, keepdim=True) / 7
    change = (weight / scale).round() * scale - weight
    gradients = [(x, output.grad) for x, output in kept if output.grad is not None]  # None: no loss depends on it
    return sum(float(((x.double() @ change.T * gradient.double()) ** 2).sum()) for x, gradient in gradients)


def as_read(checkpoint: Path, times: int) -> list[Sample]:
    """The chats, several times over, as the model of a checkpoint reads them."""
    processor = Processor(checkpoint, None)
    return [
        processor.sample(each, [processor.prepare(image) for image in images], loss="answers", max_tokens=512)
        for each, images in zip(CHATS * times, PICTURES * times, strict=True)
    ]


@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_scores_of_chats_are_those_of_hooks_on_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every linear but the head, vision tower and projector included, in every sample."""
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    checkpoint = save_vision(tmp_path / "model", kind)
    model = load(checkpoint, dtype=torch.float32, device="cpu")
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    groups = dict(layer_groups(linears))
    expected = hooked_scores(model, checkpoint, groups)

    samples = as_read(checkpoint, 1)
    plan = make_plan(samples, packed=True)
    assert len(plan.segments[0]) == (1 if kind == "qwen3_vl" else 3)  # all in one row, or two of one length in a batch
    rows = capture(model, plan.segments, list(linears))
    engine, job = Engine(torch.device("cpu")), job_of("int4", INT4, None, {"small": len(CHATS)})
    for first, modules in groups.items():
        weights = {name: linears[name].weight for name in modules}
        outcome = engine.score_group(weights, rows, [job])()
        assert outcome is not None, first
        assert isinstance(outcome[0], dict)
        found = outcome[0]["small"]
        assert found.score == pytest.approx(sum(expected[first]), rel=1e-5), first
        np.testing.assert_allclose(found.sample_scores, expected[first], rtol=1e-5)
        if is_vision(first):
            assert found.kind_scores[IMAGE].sum() == pytest.approx(found.score, rel=1e-12)
            assert expected[first][2] == 0
    assert sum(map(is_vision, groups)) == N_VISION[kind]
    assert len(groups) - N_VISION[kind] == (4 if kind == "qwen3_vl_moe" else 8)  # its experts are no linears


@pytest.fixture
def qwen_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Sample]]:
    """A model of Qwen3-VL's kind, and chats as it reads them."""
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    checkpoint = save_vision(tmp_path / "model", "qwen3_vl")
    return load(checkpoint, dtype=torch.float32, device="cpu"), as_read(checkpoint, 2)


def test_windows_of_chats_that_share_a_row_are_bit_equal_to_one_capture(qwen_chats: tuple[Any, list[Sample]]) -> None:
    model, samples = qwen_chats
    plan = make_plan(samples, packed=True)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    whole = capture(model, plan.segments, names)
    layers = [[name for name in names if f".layers.{layer}." in name] for layer in range(2)]
    seen = 0
    for index, rows in captures(model, plan.segments, layers):
        assert rows.keys() == {*layers[index]}
        for name, found in rows.items():
            assert torch.equal(found.x_TI, whole[name].x_TI)
            assert torch.equal(found.g_TO, whole[name].g_TO)
            seen += 1
    assert seen == len(names)


def test_divergences_of_chats_that_share_a_row_are_those_of_each_alone(qwen_chats: tuple[Any, list[Sample]]) -> None:
    model, samples = qwen_chats
    alone = [replace(sample, positions=None) for sample in samples]
    job, name = job_of("int4", INT4, None, ["6"]), "model.language_model.layers.1.mlp.down_proj"
    found: list[list[float]] = []
    for each in (samples, alone):
        plan = make_plan(each, packed=True)
        scores = KlEngine(model, plan.segments, [name], [6]).score_group([name], [job])()
        assert scores is not None
        assert isinstance(scores[0], dict)
        found.append(scores[0]["6"].sample_scores.tolist())
    assert len(make_plan(samples, packed=True).segments[0]) < len(make_plan(alone, packed=True).segments[0])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
