"""Conversations and pictures as a checkpoint's own processor makes them: ids, kinds of tokens, pixels, refusals."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sweep.core.batches import ANSWER, IMAGE, Batch, Sample
from sweep.core.errors import SweepError
from tests.models import save_checkpoint
from tests.vision import FAMILIES, OTHERS, chat, picture, save_tokenizer, save_vision, template
from workers.data.batches import make_plan
from workers.data.conversations import Conversation, Message
from workers.data.pictures import picture_file
from workers.data.scenes import patches, scene
from workers.model.forward import batch_to, pixel_values
from workers.model.loading import load, structure
from workers.model.processing import Processor

CHAT = chat("What is it?", "A cat.", "Why?", "It meows.", n_pictures=1)


@pytest.fixture(scope="module", params=(*FAMILIES, *OTHERS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("qwen"), "qwen3_vl")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))


def with_template(checkpoint: Path, directory: Path, text: str, **tokens: str) -> Processor:
    """The processor of a copy of a checkpoint's settings with another chat template."""
    for file in checkpoint.glob("*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = text
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(directory)
    return Processor(directory, None)


def answers(processor: Processor, sample: Sample) -> list[str]:
    """The texts of a sample's runs of answer tokens."""
    kinds = sample.token_kinds
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kinds == ANSWER, [0]])))
    runs = [sample.token_ids[start:stop] for start, stop in edges.reshape(-1, 2)]
    return [processor._tokenizer.decode(run) for run in runs]


def whole_processor(checkpoint: Path, image_processor: Any) -> Any:
    """The family's processor of transformers with this image processor, for which video needs torchvision."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    if config.model_type in OTHERS:
        processor = transformers.AutoProcessor.from_pretrained(checkpoint)
        processor.image_processor = image_processor
        return processor
    if config.model_type == "llava":
        return transformers.LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        )
    if config.model_type == "gemma3":
        return transformers.Gemma3Processor(
            image_processor, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4
        )
    pytest.importorskip("torchvision", reason="its video processor needs torchvision", exc_type=ImportError)
    kind = {"internvl": "InternVL", "qwen2_5_vl": "Qwen2_5_VL"}.get(config.model_type, "Qwen3VL")
    if kind == "InternVL":
        video = transformers.InternVLVideoProcessor()
        return transformers.InternVLProcessor(
            image_processor, tokenizer, video, image_seq_length=4, chat_template=tokenizer.chat_template
        )
    video = transformers.Qwen3VLVideoProcessor() if kind == "Qwen3VL" else transformers.Qwen2VLVideoProcessor()
    processor = getattr(transformers, f"{kind}Processor")
    return processor(image_processor, tokenizer, video, chat_template=tokenizer.chat_template)


def of_transformers(checkpoint: Path, conversation: Conversation, images: list[Any], backend: str) -> dict[str, Any]:
    """Arguments of the model as transformers' own processor makes them."""
    image_processor = transformers.AutoImageProcessor.from_pretrained(checkpoint, backend=backend)
    processor = whole_processor(checkpoint, image_processor)
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts
            ],
        }
        for message in conversation.messages
    ]
    text = processor.apply_chat_template(messages)
    return dict(processor(text=[text], images=images, return_tensors="pt"))


def test_ids_and_pixels_are_those_of_transformers(checkpoint: Path) -> None:
    images = [picture(), picture(90, 200, seed=1)]
    conversation = chat("Which is older?", "The second.", n_pictures=2)
    expected = of_transformers(checkpoint, conversation, images, "pil")
    processor = Processor(checkpoint, None)
    sample = processor.sample(
        conversation, [processor.prepare(image) for image in images], loss="answers", max_tokens=1024
    )
    batch = make_plan([sample], packed=True).segments[0][0]
    found = batch_to(batch, torch.device("cpu"), torch.float32)
    expected.pop("attention_mask")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.parametrize("size", [(120, 90), (300, 260), (64, 64)])
def test_pixels_of_torchvision_are_a_rounding_away(checkpoint: Path, size: tuple[int, int]) -> None:
    """Its resizing rounds some of the 256 levels another way: at most two, in at most 1.3 % of the values measured."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    image = picture(*size)
    expected = of_transformers(checkpoint, chat("What?", "It.", n_pictures=1), [image], "torchvision")["pixel_values"]
    prepared = Processor(checkpoint, None).prepare(image)
    found = pixel_values(prepared, torch.device("cpu"), torch.float32)
    assert found.shape == expected.shape
    assert prepared.levels is not None
    level = float(np.diff(prepared.levels).max())
    difference = (found - expected).abs() / level
    assert difference.max() < 2.01
    assert (difference > 0.01).float().mean() < 0.02


def test_the_model_takes_them_and_all_rows_of_its_tower_are_counted(checkpoint: Path) -> None:
    processor = Processor(checkpoint, None)
    prepared = processor.prepare(picture())
    sample = processor.sample(CHAT, [prepared], loss="answers", max_tokens=1024)
    model = load(checkpoint, dtype=torch.float32, device="cpu")
    rows: set[int] = set()
    for name, module in model.named_modules():
        if ("vision" in name or "visual" in name) and name.endswith(("q_proj", ".qkv")):
            module.register_forward_hook(lambda _, args, __: rows.add(args[0].flatten(0, -2).shape[0]))
    batch = make_plan([sample], packed=True).segments[0][0]
    with torch.no_grad():
        logits = model(**batch_to(batch, torch.device("cpu"), torch.float32), use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert logits.shape[1] == len(sample.token_ids)
    assert rows == {prepared.n_rows}


def test_texts_of_one_batch_do_not_see_each_other(checkpoint: Path) -> None:
    """Chats without pictures share a row only where a model keeps them apart, and else a batch of equal lengths."""
    processor = Processor(checkpoint, None)
    chats = [chat("What is it?", "A cat."), chat("What is it?", "A dog."), chat("Why is it so?", "It is a cat.")]
    samples = [processor.sample(each, [], loss="answers", max_tokens=512) for each in chats]
    assert len(samples[0].token_ids) == len(samples[1].token_ids) != len(samples[2].token_ids)
    is_packed = structure(checkpoint).packable
    model = load(checkpoint, dtype=torch.float32, device="cpu")

    def logits(*some: Sample) -> list[torch.Tensor]:
        batches = make_plan(some, packed=is_packed).segments[0]
        with torch.no_grad():
            outputs = [model(**batch_to(each, torch.device("cpu"), torch.float32), use_cache=False) for each in batches]
        rows = [rows for batch, each in zip(batches, outputs, strict=True) for rows in split(batch, each.logits)]
        order = [index for batch in batches for index in batch.order]
        return [rows[order.index(index)] for index in range(len(some))]

    def split(batch: Batch, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return values.flatten(0, 1).split(list(batch.lengths))

    assert len(make_plan(samples, packed=is_packed).segments[0]) == (1 if is_packed else 2)
    for found, sample in zip(logits(*samples), samples, strict=True):
        torch.testing.assert_close(found, *logits(sample), rtol=1e-4, atol=1e-5)


def test_kinds_and_predictions(checkpoint: Path) -> None:
    processor = Processor(checkpoint, None)
    prepared = processor.prepare(picture())
    sample = processor.sample(CHAT, [prepared], loss="answers", max_tokens=1024)
    assert answers(processor, sample) == ["A cat.<|im_end|>", "It meows.<|im_end|>"]
    assert sample.predictions[:-1].tolist() == (sample.token_kinds[1:] == ANSWER).tolist()
    n_features = processor._n_features(prepared)
    assert (sample.token_kinds == IMAGE).sum() == n_features
    everything = processor.sample(CHAT, [prepared], loss="all", max_tokens=1024)
    assert everything.predictions[:-1].tolist() == (sample.token_kinds[1:] != IMAGE).tolist()
    assert not everything.predictions[-1]
    assert everything.predictions.sum() == len(sample.token_ids) - 1 - n_features


def test_a_caption_follows_its_picture(checkpoint: Path) -> None:
    processor = Processor(checkpoint, None)
    prepared = processor.prepare(picture())
    sample = processor.captioned(prepared, " a red circle", max_tokens=1024)
    text = processor._tokenizer.decode(sample.token_ids[np.flatnonzero(sample.token_kinds == IMAGE)[-1] + 1 :])
    assert text.endswith(" a red circle")
    assert "im_start" not in processor._tokenizer.decode(sample.token_ids)


def test_drawn_scenes_are_prepared_as_they_are_drawn(qwen: Path) -> None:
    from PIL import Image

    drawn = scene(3).pixels
    prepared = Processor(qwen, None).prepare(Image.fromarray(drawn))
    values, grid = patches(drawn)
    assert prepared.shape == values.shape
    assert prepared.tensors["image_grid_thw"].tolist() == [list(grid)]
    found = pixel_values(prepared, torch.device("cpu"), torch.float32)
    np.testing.assert_array_equal(found[:, 512:], values[:, 512:])  # the first channel's mean differs


def test_a_picture_is_kept_once_by_its_content_as_whole_numbers(qwen: Path) -> None:
    processor = Processor(qwen, None)
    one, other = processor.prepare(picture()), processor.prepare(picture(seed=1))
    assert one.content == processor.prepare(picture()).content != other.content
    file = picture_file(one.content)
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        picture_file(each.content).name for each in (one, other)
    )
    stored = np.load(file)
    assert stored.dtype == np.uint8
    assert stored.size * 2 == np.prod(one.shape)  # one frame of two equal ones
    # A checkpoint that scales values otherwise has other pictures.
    assert one.levels is not None
    assert one.levels.shape == (3, 256)


@pytest.mark.parametrize("max_pixels", [64 * 64, 40 * 40])
def test_max_pixels_limits_a_picture(checkpoint: Path, max_pixels: int) -> None:
    limited = Processor(checkpoint, max_pixels).prepare(picture(400, 300))
    whole = Processor(checkpoint, None).prepare(picture(400, 300))
    assert limited.content != whole.content
    if "image_grid_thw" in limited.tensors:
        side = transformers.AutoConfig.from_pretrained(checkpoint).vision_config.patch_size
        assert limited.n_rows * side**2 <= max_pixels < whole.n_rows * side**2


# Chat templates

THINKING = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- set content = message.content if message.content is string else message.content[0].text %}
{%- if message.role == 'assistant' %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in content else '' %}
{%- set said = content.split('</think>')[-1].strip() %}
{%- if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' + said }}{% else %}{{ said }}{% endif %}
{%- else %}{{ content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
GENERATION = """{%- for message in messages %}{{ message.role.upper() + ': ' }}
{%- for part in message.content %}{% if message.role == 'assistant' %}
{%- generation %}{{ part.text + ' ' }}{% endgeneration %}{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
SPACED = """{%- for message in messages %}{% if message.role == 'user' %}
{{- '[INST] ' + message.content[0].text + ' [/INST]' }}
{%- else %}{{ ' ' + message.content[0].text | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("name", "turns", "expected"),
    [
        (
            "thinking",
            ("Why?", "<think>so</think>No.", "And?", "<think>hm</think>Yes."),
            ["No.<|im_end|>", "hm\n</think>\n\nYes.<|im_end|>"],
        ),
        ("thinking", ("Why?", "No.", "And?", "  Yes.\n"), ["No.<|im_end|>", "Yes.<|im_end|>"]),
        ("generation", ("Why?", "No.", "And?", "Yes."), [" No.", " Yes."]),
        ("spaced", ("Why?", " No. ", "And?", "Yes."), [" No. <|im_end|>", " Yes. <|im_end|>"]),
    ],
)
def test_answers_are_found_in_every_template(
    qwen: Path, tmp_path: Path, name: str, turns: tuple[str, ...], expected: list[str]
) -> None:
    processor = with_template(qwen, tmp_path, {"thinking": THINKING, "generation": GENERATION, "spaced": SPACED}[name])
    assert answers(processor, processor.sample(chat(*turns), [], loss="answers", max_tokens=512)) == expected


def test_equal_answers_are_told_apart(qwen: Path) -> None:
    processor = Processor(qwen, None)
    sample = processor.sample(chat("No.", "No.", "No.", "No."), [], loss="answers", max_tokens=512)
    assert answers(processor, sample) == ["No.<|im_end|>", "No.<|im_end|>"]
    assert (sample.token_kinds == ANSWER).sum() == 2 * len(processor._tokenizer("No.<|im_end|>")["input_ids"])


def test_a_template_that_hides_answers_is_refused(qwen: Path, tmp_path: Path) -> None:
    processor = with_template(qwen, tmp_path, template("qwen3_vl").replace("part['text']", "part['text'] | upper"))
    with pytest.raises(SweepError, match=r"does not show where the assistant's answer 1.*chat_template.jinja"):
        processor.sample(chat("Why?", "No."), [], loss="answers", max_tokens=512)


def test_a_template_that_refuses_roles_is_named(qwen: Path, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    processor = with_template(qwen, tmp_path, refusing + template("qwen3_vl"))
    messages = (Message(role="system", parts=("Be brief.",)), *chat("Why?", "No.").messages)
    with pytest.raises(SweepError, match=r"refuses line 1 of chats.jsonl: .*no system here"):
        processor.sample(Conversation(messages=messages, origin="line 1 of chats.jsonl"), [], loss="all", max_tokens=9)


def test_the_date_of_today_is_in_no_sample(qwen: Path, tmp_path: Path) -> None:
    processor = with_template(qwen, tmp_path, "{{ strftime_now('%d %b %Y') }}" + template("qwen3_vl"))
    sample = processor.sample(chat("Why?", "No."), [], loss="answers", max_tokens=512)
    assert processor._tokenizer.decode(sample.token_ids).startswith("26 Jul 2024")


def test_the_template_of_an_older_processor_is_read(qwen: Path, tmp_path: Path) -> None:
    with_template(qwen, tmp_path, template("qwen3_vl"))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SweepError, match="has no chat template"):
        Processor(tmp_path, None).sample(CHAT, [], loss="answers", max_tokens=512)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{% for m in messages %}{{ m.role }}{% endfor %}"}')
    assert Processor(tmp_path, None)._rendered(chat("Why?")) == "user"


# Cuts


def test_a_long_sample_is_cut_at_its_end(qwen: Path) -> None:
    processor = Processor(qwen, None)
    prepared = processor.prepare(picture())
    whole = processor.sample(CHAT, [prepared], loss="answers", max_tokens=512)
    cut = processor.sample(CHAT, [prepared], loss="answers", max_tokens=len(whole.token_ids) - 6)
    assert cut.token_ids.tolist() == whole.token_ids[:-6].tolist()
    assert cut.predictions.tolist() == [*whole.predictions[: len(cut.token_ids) - 1].tolist(), False]
    assert len(cut.arrays["mm_token_type_ids"]) == len(cut.token_ids)


def test_a_cut_through_a_picture_or_before_all_answers_is_refused(qwen: Path) -> None:
    processor = Processor(qwen, None)
    prepared = processor.prepare(picture())
    with pytest.raises(SweepError, match=r"line 1 of chats.jsonl has 58 tokens, .*max_tokens=10 .*dataset.max_pixels"):
        processor.sample(CHAT, [prepared], loss="answers", max_tokens=10)
    first = int(np.flatnonzero(processor.sample(CHAT, [prepared], loss="answers", max_tokens=512).predictions)[0])
    with pytest.raises(SweepError, match=r"would leave no answer.*dataset.max_tokens=58"):
        processor.sample(CHAT, [prepared], loss="answers", max_tokens=first + 1)
    kept = processor.sample(CHAT, [prepared], loss="answers", max_tokens=first + 2)
    assert kept.predictions.sum() == 1


def test_an_answer_that_was_cut_short_predicts_no_end(qwen: Path) -> None:
    processor = Processor(qwen, None)
    sample = processor.sample(chat("Why?", "No"), [], loss="answers", max_tokens=512, is_cut=True)
    assert answers(processor, sample) == ["No"]
    assert sample.token_kinds[-1] == ANSWER


# Refusals


def test_a_text_model_reads_conversations_but_no_pictures(tmp_path: Path) -> None:
    directory = save_checkpoint(tmp_path / "model", "llama")
    save_tokenizer(directory, "llama")
    processor = Processor(directory, None)
    sample = processor.sample(chat("Why?", "No."), [], loss="answers", max_tokens=512)
    assert answers(processor, sample) == ["No.<|im_end|>"]
    assert not sample.arrays
    with pytest.raises(SweepError, match="model type llama, which reads no pictures"):
        processor.prepare(picture())
    with pytest.raises(SweepError, match="model type llama, which reads no pictures"):
        processor.sample(CHAT, [], loss="answers", max_tokens=512)


def test_marks_in_a_text_are_refused(qwen: Path) -> None:
    with pytest.raises(SweepError, match=r"has 0 pictures, .* has 1 marks"):
        Processor(qwen, None).sample(chat("<|image_pad|>?", "No."), [], loss="answers", max_tokens=512)


def test_a_conversation_without_an_answer_is_refused(qwen: Path) -> None:
    with pytest.raises(SweepError, match=r"no turn of the assistant.*dataset.answers=model"):
        Processor(qwen, None).sample(chat("Why?"), [], loss="answers", max_tokens=512)


class Odd:
    """A processor of transformers' kind that answers as `arrays` has it, a row of one token a picture."""

    image_token = "<image>"
    tokenizer = image_processor = None

    def __init__(self, arrays: Callable[[int], dict[str, Any]], written: str = "<IMG_ATOM>") -> None:
        self.arrays, self.written = arrays, written

    def __call__(self, text: list[str], images: list[Any], **_options: Any) -> dict[str, Any]:
        tokenizer = Odd.tokenizer
        assert tokenizer is not None
        ids = tokenizer(text[0].replace("<image>", self.written))["input_ids"]
        spans = [{"replacement": "<IMG_ATOM>"}] * len(images)
        return {"input_ids": [ids], "text_replacement_offsets": [spans], **self.arrays(len(images))}


@pytest.mark.parametrize(
    ("arrays", "written", "said"),
    [
        (lambda n: {"pixel_values": np.zeros((1, n, 3, 8, 8))}, "<IMG_ATOM>", r"pads pictures or nests them \(pixel"),
        (lambda n: {"pixel_values": np.zeros((n, 3, 8 * n, 8))}, "<IMG_ATOM>", r"pads pictures or nests them \(pixel"),
        (lambda n: {"pixel_values": np.zeros((n, 2, 3, 8, 8))}, "<IMG_ATOM>", "nests pictures"),
        (lambda n: {"pixel_values": np.zeros((n, 3, 8, 8))}, "<IMG_ATOM> ", "writes other text around pictures"),
        (
            lambda n: {"pixel_values": np.zeros((n, 3)), "aspect": np.ones(n)},
            "<IMG_ATOM>",
            "aspect .* no whole numbers",
        ),
        (lambda n: {"pixel_values": np.zeros((n, 3)), "sizes": np.ones((1, n), int)}, "<IMG_ATOM>", "sizes of two"),
    ],
)
def test_a_processor_whose_pictures_cannot_share_a_batch_is_refused(
    arrays: Any, written: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save_vision(tmp_path / "model", "ovis2")
    monkeypatch.setattr(Odd, "tokenizer", transformers.AutoTokenizer.from_pretrained(checkpoint))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: Odd(arrays, written))
    with pytest.raises(SweepError, match=rf"model type ovis2\).*{said}.*Type a data set without pictures"):
        Processor(checkpoint, None).prepare(picture())


def configured(directory: Path, config: Any, image_processor: Any, processor: str) -> Path:
    """A checkpoint's settings without weights."""
    tokenizer = save_tokenizer(directory, "ovis2")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)
    image_processor.save_pretrained(directory)
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": processor}))
    settings = {"processor_class": processor, "patch_size": 14, "vision_feature_select_strategy": "default"}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    return directory


def test_families_of_transformers_that_pad_or_nest_pictures_are_refused(tmp_path: Path) -> None:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    siglip = SiglipImageProcessorPil()
    siglip.image_seq_length = 4
    named = {"image_token_index": 4099}
    cases = [
        (transformers.LlavaNextConfig(**named), LlavaNextImageProcessorPil(), "LlavaNextProcessor", "nests pictures"),
        (transformers.Idefics3Config(image_token_id=4099), Idefics3ImageProcessorPil(), "Idefics3Processor", "other"),
        (transformers.PaliGemmaConfig(**named), siglip, "PaliGemmaProcessor", "other text around"),
    ]
    for config, image_processor, processor, said in cases:
        checkpoint = configured(tmp_path / processor, config, image_processor, processor)
        with pytest.raises(SweepError, match=rf"{config.model_type}\).*{said}.*Type a data set without pictures"):
            Processor(checkpoint, None).prepare(picture())


def test_a_processor_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("it is there")
    smolvlm, mistral = transformers.SmolVLMConfig(image_token_id=4099), transformers.Mistral3Config(image_token_index=9)
    cases = [
        (smolvlm, SmolVLMImageProcessorPil(), "SmolVLMProcessor"),
        (mistral, PixtralImageProcessorPil(), "PixtralProcessor"),
    ]
    for config, image_processor, processor in cases:
        checkpoint = configured(tmp_path / processor, config, image_processor, processor)
        with pytest.raises(SweepError, match=rf"{config.model_type}\) needs torchvision. Install it"):
            Processor(checkpoint, None).prepare(picture())


def test_a_missing_image_processor_is_named(qwen: Path, tmp_path: Path) -> None:
    with_template(qwen, tmp_path, template("qwen3_vl"))
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(SweepError, match="no image processor that loads"):
        Processor(tmp_path, None).prepare(picture())


def test_arrays_that_no_model_is_given_are_named(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(qwen, None)
    whole = processor._image_processor

    class Other:
        size = whole.size

        def __call__(self, **kwargs: Any) -> dict[str, Any]:
            return {**whole(**kwargs), "image_sizes": np.zeros((1, 2))}

    vars(processor)["_image_processor"] = Other()
    with pytest.raises(SweepError, match=r"gives image_sizes beside pixel_values"):
        processor.prepare(picture())


def test_a_picture_that_the_processor_refuses_is_named(qwen: Path) -> None:
    with pytest.raises(SweepError, match=r"refuses a picture of 2 x 900 pixels: .*aspect ratio"):
        Processor(qwen, None).prepare(picture(2, 900))


def test_a_cache_that_cannot_be_written_is_named(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor(qwen, None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SweepError, match="Set SWEEP_CACHE_DIR"):
        processor.prepare(picture())


def test_places_of_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    """Two pictures of unlike sizes between texts, and a chat without any."""
    checkpoint = save_vision(tmp_path, "qwen3_vl")
    processor, model = Processor(checkpoint, None), load(checkpoint, dtype=torch.float32, device="cpu")
    pictures = [processor.prepare(picture(80, 140, seed=3)), processor.prepare(picture(160, 64))]
    for n, chosen in ((2, pictures), (1, pictures[:1]), (0, [])):
        sample = processor.sample(
            chat("Which?", "That.", "Why?", "So.", n_pictures=n), chosen, loss="all", max_tokens=512
        )
        assert sample.positions is not None
        np.testing.assert_array_equal(sample.positions[0], np.arange(len(sample.token_ids)))
        ids = torch.from_numpy(sample.token_ids)[None]
        types = (ids == model.config.image_token_id).long()
        grids = [torch.from_numpy(each.tensors["image_grid_thw"]) for each in chosen]
        found: Any = model.model.get_rope_index(ids, types, torch.cat(grids) if grids else None)  # pyright: ignore[reportCallIssue]
        np.testing.assert_array_equal(sample.positions[1:], found[0][:, 0].numpy())
