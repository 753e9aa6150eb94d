"""A model's own processor: pictures prepared as it prepares them, conversations as its chat template writes them.

Pictures go through the image processor of transformers on its PIL backend, on every machine, whether torchvision is
installed or not: ids and pixels are then the same everywhere. The text is that of the chat template, in which each
picture's mark is written out as the model reads it, one placeholder a picture feature, before it is tokenized.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoImageProcessor

from sweep.core.batches import ANSWER, IMAGE, PROMPT, BoolArray, FloatArray, KindArray, Picture, Sample
from sweep.core.errors import SweepError
from workers.data.conversations import Conversation, Message
from workers.data.pictures import picture_file, write_picture_file
from workers.model.forward import valued
from workers.model.loading import UNREADABLE, first_line, read_config, read_tokenizer
from workers.model.readers import FAMILIES, QWEN_TYPES, Arrays, Reader, reader_of, reads_pictures

if TYPE_CHECKING:
    from PIL import Image

_CHANNELS: Final = 3
# Model types that keep samples with pictures apart in one row, by positions that start again at 0; each has a test.
_PACKABLE_PICTURES: Final = frozenset({"qwen3_vl"})
_MARKER: Final = "QJXZ answer ZXJQ"  # stands for an answer where the template shows what it writes around it
# Llama's templates write today's date, and samples would be others tomorrow; this is the date that they fall back to.
_NO_CLOCK: Final = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

Span = tuple[int, int]  # characters of a text: first, and one after the last


class Processor:
    """The tokenizer, chat template and image processor of a checkpoint."""

    def __init__(self, path: Path, max_pixels: int | None) -> None:
        """Read them; no weight is read.

        Args:
            path: checkpoint directory.
            max_pixels: of a picture, which is scaled down to them; None: as the model's processor has it.

        Raises: SweepError: the checkpoint has no tokenizer that loads.
        """
        self._path, self._max_pixels = path, max_pixels
        self._config = read_config(path)
        self._tokenizer = read_tokenizer(path)
        if not self._tokenizer.is_fast:
            raise SweepError(
                f"The tokenizer of {path} does not tell where its tokens stand in a text, so answers cannot be found. "
                "Save it with a tokenizer.json (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or type "
                "dataset=text."
            )

    # Pictures

    def prepare(self, image: "Image.Image") -> Picture:
        """A picture as the vision tower takes it; its values are kept in their file on this machine. Thread-safe.

        Args:
            image: RGB.

        Raises: SweepError: the model reads no pictures, or not this one; or the file cannot be written.
        """
        arrays, text, levels = self._arrays(image)
        values, n_frames = arrays["pixel_values"], self._reader.n_frames
        shape = (len(values), values.shape[1] * n_frames) if n_frames > 1 else values.shape
        sha = hashlib.sha256(f"{shape}{values.dtype.str}".encode())
        for array in (values, np.zeros(0) if levels is None else levels):
            sha.update(np.ascontiguousarray(array).data)
        content = sha.hexdigest()[:32]
        by_channel = levels is not None or n_frames > 1
        file = io.BytesIO()
        np.save(file, values.reshape(len(values), _CHANNELS if by_channel else 1, -1))
        write_picture_file(picture_file(content), file.getvalue())
        return Picture(
            content=content,
            shape=shape,
            n_rows=self._reader.n_rows(shape),
            tensors={name: array.astype(np.int64) for name, array in arrays.items() if name != "pixel_values"},
            levels=levels,
            text=text,
        )

    def _arrays(self, image: "Image.Image") -> tuple[Arrays, str, FloatArray | None]:
        """A picture's arrays, the text for it, and the value of each number of its pixels if they are whole."""
        reader, options, processor = self._reader, dict[str, Any](), self._image_processor
        size: Mapping[str, int | None] = processor.size
        if self._max_pixels is not None and size.get("longest_edge") and reader.types == QWEN_TYPES:
            most = min(self._max_pixels, size["longest_edge"] or 0)
            options["size"] = {"shortest_edge": min(size["shortest_edge"] or most, most), "longest_edge": most}
        elif self._max_pixels is not None:
            image = _scaled_down(image, self._max_pixels)
        levels: FloatArray | None = None
        try:
            arrays, text = reader.arrays(processor, image, do_rescale=False, do_normalize=False, **options)
            self._check(arrays, image)
            values = arrays["pixel_values"]
            whole = values.astype(np.uint8)
            if (values == whole).all() and values[0].size % _CHANNELS == 0:
                levels, arrays = self._levels, {**arrays, "pixel_values": whole}
            if levels is None or reader.processor is not None:
                scaled, text = reader.arrays(processor, image, **options)
                values = scaled["pixel_values"].astype(np.float32)
                if levels is None or not _are_levels(whole, levels, values):
                    levels, arrays = None, {**scaled, "pixel_values": values}
        except (ValueError, ZeroDivisionError) as error:
            raise SweepError(
                f"The model's image processor refuses a picture of {image.width} x {image.height} pixels: "
                f"{first_line(error)}. Take it out of the data set, or cut it."
            ) from error
        return arrays, text, levels

    def _check(self, arrays: Arrays, image: "Image.Image") -> None:
        """Raises: SweepError: arrays of a picture that the model would not take beside those of others."""
        reader = self._reader
        shape = arrays["pixel_values"].shape
        if reader.tail is not None and shape[1:] != reader.tail:
            raise SweepError(
                f"The image processor of {self._path} makes an array of {shape} of a picture of {image.width} x "
                f"{image.height} pixels, and of others {('n', *reader.tail)}: they cannot share a batch. Make all "
                "pictures of one shape, or type a data set without pictures."
            )
        if unknown := sorted(arrays.keys() - reader.passed - {"pixel_values"}):
            raise SweepError(
                f"The image processor of {self._path} gives {', '.join(unknown)} beside pixel_values; only "
                f"{', '.join(('pixel_values', *sorted(reader.passed)))} are passed to models. "
                "Type a data set without pictures."
            )

    @cached_property
    def _levels(self) -> FloatArray:
        """The value of each whole number, by the image processor's own arithmetic: [channels, 256]."""
        processor = self._image_processor
        ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if processor.do_rescale:
            ramp = processor.rescale(ramp, processor.rescale_factor)
        if processor.do_normalize:
            ramp = processor.normalize(ramp, processor.image_mean, processor.image_std)
        return np.asarray(ramp, dtype=np.float32).reshape(3, 256)

    @cached_property
    def _image_processor(self) -> Any:
        try:
            processor = AutoImageProcessor.from_pretrained(self._path, backend="pil", trust_remote_code=False)
        except (*UNREADABLE, ImportError) as error:
            raise SweepError(
                f"{self._path} has no image processor that loads: {first_line(error)} "
                "Copy the model's preprocessor_config.json there, or type a data set without pictures."
            ) from error
        if self._config.model_type in FAMILIES and self._reader.patchify is not None:
            processor.patchify = self._reader.patchify
        return processor

    @cached_property
    def _reader(self) -> Reader:
        return reader_of(self._path, self._config, self._tokenizer, lambda: self._image_processor)

    # Samples

    def sample(
        self,
        conversation: Conversation,
        pictures: Sequence[Picture],
        *,
        loss: Literal["answers", "all"],
        max_tokens: int,
        is_cut: bool = False,
    ) -> Sample:
        """A conversation as the model reads it.

        Args:
            conversation: the text.
            pictures: its pictures, prepared, in order.
            loss: "answers": tokens of the assistant are predicted, with the one that ends its turn; "all": every token
                but pictures' features, which no model ever predicts.
            max_tokens: a longer sample is cut.
            is_cut: its last answer was not written to its end: the sample ends with it, and no end is predicted.

        Raises: SweepError: no chat template, or one that does not show its answers; or a sample that would be cut
            inside or before a picture, or before all of its answers.
        """
        text = self._rendered(conversation)
        answers = self._answers(conversation, text, is_cut=is_cut)
        if loss == "answers" and not answers:
            raise SweepError(
                f"{conversation.origin} has no turn of the assistant to predict. "
                "Type dataset.loss=all, or dataset.answers=model, or give it one."
            )
        end = answers[-1][1] if is_cut else len(text)
        return self._sampled(text[:end], answers, pictures, loss, max_tokens, conversation.origin)

    def captioned(self, picture: Picture, caption: str, *, max_tokens: int) -> Sample:
        """A picture and then its caption, without a chat template. Raises: SweepError: as `sample`."""
        return self._sampled(self._reader.text + caption, [], [picture], "all", max_tokens, f"Caption {caption[:40]!r}")

    def prompt(self, conversation: Conversation, pictures: Sequence[Picture], *, max_tokens: int) -> Sample:
        """A conversation up to where its next answer begins.

        Raises: SweepError: no chat template, or a conversation of more than `max_tokens` tokens.
        """
        text = self._rendered(conversation, add_generation_prompt=True)
        sample = self._sampled(text, [], pictures, "all", None, conversation.origin)
        if len(sample.token_ids) >= max_tokens:
            raise SweepError(
                f"{conversation.origin} has {len(sample.token_ids)} tokens before its answer, which leaves none of "
                f"dataset.max_tokens={max_tokens} for it. Type a larger dataset.max_tokens."
            )
        return sample

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens that the model wrote, without special tokens."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _sampled(
        self,
        text: str,
        answers: Sequence[Span],
        pictures: Sequence[Picture],
        loss: Literal["answers", "all"],
        max_tokens: int | None,
        origin: str,
    ) -> Sample:
        text, answers = self._written_out(text, answers, pictures, origin)
        begins = self._tokenizer.bos_token is not None and text.startswith(self._tokenizer.bos_token)
        # As processors of transformers do with a rendered chat; tokenizers of text models add none to one.
        adds_special = self._has_pictures and not begins
        encoded = self._tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
        token_ids = np.array(encoded["input_ids"], dtype=np.int64)
        kinds = self._kinds(token_ids, encoded["offset_mapping"], answers)
        n_features = sum(self._n_features(picture) for picture in pictures)
        if (found := int((kinds == IMAGE).sum())) != n_features:
            raise SweepError(
                f"The tokenizer in {self._path} makes {found} picture tokens of {n_features} in {origin}: it is "
                "another model's. Copy the model's own tokenizer files there."
            )
        predicts = np.zeros(len(token_ids), dtype=np.bool_)
        predicts[:-1] = kinds[1:] == ANSWER if loss == "answers" else kinds[1:] != IMAGE
        kept = slice(max_tokens)
        _check_cut(kinds, predicts, max_tokens, origin)
        predicts = predicts[kept].copy()
        predicts[-1] = False
        types = self._reader.types if pictures else None
        return Sample(
            token_ids=token_ids[kept],
            kinds=kinds[kept],
            predicts=predicts,
            arrays={} if types is None else {types: (kinds[kept] == IMAGE).astype(np.int64)},
            pictures=tuple(pictures),
            positions=self._positions(kinds[kept], pictures),
        )

    def _positions(self, kinds: KindArray, pictures: Sequence[Picture]) -> npt.NDArray[np.int64] | None:
        """See `Sample.positions`; None: rows of this model type cannot hold several samples with pictures."""
        if self._config.model_type not in _PACKABLE_PICTURES:
            return None
        merge = self._config.vision_config.spatial_merge_size
        grids = [picture.tensors["image_grid_thw"][0] // [1, merge, merge] for picture in pictures]
        return np.concatenate([np.arange(len(kinds))[None], rope_positions(kinds == IMAGE, grids)])

    def _kinds(self, token_ids: npt.NDArray[np.int64], offsets: Sequence[Span], answers: Sequence[Span]) -> KindArray:
        """The kind of each token. One that begins before an answer and reaches into it, as "▁A" does, belongs to it."""
        kinds = np.full(len(token_ids), PROMPT, dtype=np.uint8)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        for first, last in answers:
            kinds[(starts < last) & (ends > first)] = ANSWER
        if self._has_pictures:
            kinds[token_ids == self._config.image_token_id] = IMAGE
        return kinds

    @property
    def _has_pictures(self) -> bool:
        """Whether the model reads pictures."""
        return reads_pictures(self._config)

    def _n_features(self, picture: Picture) -> int:
        return self._reader.written(picture).count(self._reader.feature)

    def _written_out(
        self, text: str, answers: Sequence[Span], pictures: Sequence[Picture], origin: str
    ) -> tuple[str, list[Span]]:
        """A text with all that stands for its pictures in place of their marks, and the answers' places in it."""
        if not pictures and self._config.model_type not in FAMILIES:
            return text, list(answers)
        marks = [match.start() for match in re.finditer(re.escape(self._reader.mark), text)]
        if len(marks) != len(pictures):
            raise SweepError(
                f"{origin} has {len(pictures)} pictures, and its text as the chat template of {self._path} writes it "
                f"has {len(marks)} marks ({self._reader.mark}) for them. Take such marks out of its texts, or give a "
                "checkpoint whose chat template knows pictures."
            )
        written = [self._reader.written(picture) for picture in pictures]
        pieces, at = list[str](), 0
        for mark, instead in zip(marks, written, strict=True):
            pieces += text[at:mark], instead
            at = mark + len(self._reader.mark)

        def moved(place: int) -> int:
            longer = (len(new) for mark, new in zip(marks, written, strict=True) if mark < place)
            return place + sum(n - len(self._reader.mark) for n in longer)

        return "".join([*pieces, text[at:]]), [(moved(first), moved(last)) for first, last in answers]

    # The chat template

    @cached_property
    def _template(self) -> str:
        """The processor's chat template, else the tokenizer's. Raises: SweepError: there is none."""
        legacy = self._path / "chat_template.json"  # of processors, before chat_template.jinja
        if legacy.is_file() and not (self._path / "chat_template.jinja").is_file():
            found = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
        else:
            found = self._tokenizer.chat_template
            found = found.get("default") if isinstance(found, dict) else found
        if not found:
            raise SweepError(
                f"{self._path} has no chat template, so it is no model for conversations. Copy its "
                "chat_template.jinja there, give the model that was tuned on chats, or type dataset=text."
            )
        return f"{_NO_CLOCK}{found}" if "strftime_now" in found else found

    def _rendered(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """A conversation as the chat template writes it. Raises: SweepError: the template refuses it."""
        messages = [
            {"role": message.role, "content": _parts(message) if self._has_pictures else message.text}
            for message in conversation.messages
        ]
        if conversation.pictures and not self._has_pictures:
            _ = self._reader  # says why
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise SweepError(
                f"The chat template of {self._path} refuses {conversation.origin}: {first_line(error)}. "
                "Give conversations that the model takes: many take no system message."
            ) from error

    def _answers(self, conversation: Conversation, text: str, *, is_cut: bool) -> list[Span]:
        """Where the assistant's answers stand in the rendered text, with the tokens that end its turns.

        A conversation with a marker in place of an answer shows what the template writes before and after it. Where
        that depends on the answer, as with thoughts that go elsewhere, the answer is all that differs.
        """
        found: list[Span] = []
        ends = self._turn_ends(conversation)
        for index, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            messages = list(conversation.messages)
            messages[index] = Message(role=message.role, parts=(_MARKER,))
            before, *after = self._rendered(Conversation(messages=tuple(messages), origin="")).split(_MARKER)
            first = _n_shared(text, before)
            last = len(text) - _n_shared(text[::-1], after[0][::-1]) if after else -1
            said = message.text.rpartition("</think>")[2].strip()  # many templates drop or move thoughts
            if len(after) != 1 or last < first or said[-20:] not in text[first:last]:
                raise SweepError(
                    f"The chat template of {self._path} does not show where the assistant's answer {len(found) + 1} in "
                    f"{conversation.origin} begins and ends. Give another chat_template.jinja, or type dataset=text."
                )
            if not (is_cut and index == len(messages) - 1):
                rest = text[last:].lstrip()
                end = next((token for token in ends if rest.startswith(token)), None)
                last = last if end is None else len(text) - len(rest) + len(end)
            found.append((first, last))
        return found

    def _turn_ends(self, conversation: Conversation) -> list[str]:
        """Special tokens that may end a turn of the assistant: all but those that open one."""
        before = conversation.messages[: [*(m.role for m in conversation.messages), "assistant"].index("assistant")]
        asked = Conversation(messages=before, origin=conversation.origin)
        closed, opened = self._rendered(asked), self._rendered(asked, add_generation_prompt=True)
        opening = opened.removeprefix(closed)
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        openers = {token for token in special if token in opening} | {self._tokenizer.bos_token}
        return sorted({*special, self._tokenizer.eos_token} - openers - {None}, key=len, reverse=True)


def _n_shared(text: str, other: str) -> int:
    """Leading characters that two texts share."""
    pairs = zip(text, other, strict=False)
    return next((index for index, (one, two) in enumerate(pairs) if one != two), min(len(text), len(other)))


def _parts(message: Message) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts]


def _check_cut(kinds: KindArray, predicts: BoolArray, max_tokens: int | None, origin: str) -> None:
    """Raises: SweepError: a sample that is cut at `max_tokens` loses a picture, or all that is predicted."""
    if max_tokens is None or len(kinds) <= max_tokens:
        return
    features = np.flatnonzero(kinds == IMAGE)
    if len(features) and features[-1] >= max_tokens:
        raise SweepError(
            f"{origin} has {len(kinds)} tokens, and dataset.max_tokens={max_tokens} would cut its pictures off, which "
            f"end with token {features[-1] + 1}. Type dataset.max_tokens={len(kinds)}, or a smaller dataset.max_pixels."
        )
    predicted = np.flatnonzero(predicts)
    if not len(predicted) or predicted[0] >= max_tokens - 1:
        raise SweepError(
            f"{origin} has {len(kinds)} tokens, and dataset.max_tokens={max_tokens} would leave no answer: the first "
            f"begins with token {predicted[0] + 2}. Type dataset.max_tokens={len(kinds)}."
        )


def rope_positions(is_image: BoolArray, grids: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Where the tokens of a sample stand in time, height and width: [3, tokens].

    Text advances by one on all three axes. A picture's tokens have the axes of their place in it, counted from where
    the picture begins, and text goes on after the largest of them.

    Args:
        is_image: [tokens], which stand for features of pictures.
        grids: of each picture, its features in time, height and width.

    Source: `get_rope_index` of transformers' Qwen3-VL, which tests compare with.
    """
    positions, at, n_seen = np.zeros((3, len(is_image)), dtype=np.int64), 0, 0
    left = iter(grids)
    while n_seen < len(is_image):
        if is_image[n_seen]:
            found = np.indices(next(left).tolist()).reshape(3, -1)
        else:
            later = np.flatnonzero(is_image[n_seen:])
            found = np.tile(np.arange(later[0] if len(later) else len(is_image) - n_seen), (3, 1))
        positions[:, n_seen : n_seen + found.shape[1]] = at + found
        n_seen += found.shape[1]
        at += int(found.max()) + 1
    return positions


def _scaled_down(image: "Image.Image", max_pixels: int) -> "Image.Image":
    """A picture of at most so many pixels, of about its shape."""
    n_pixels = image.width * image.height
    if n_pixels <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / n_pixels)
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def _are_levels(whole: npt.NDArray[np.uint8], levels: FloatArray, values: FloatArray) -> bool:
    """Whether whole numbers and their values by channel are a picture's values, to the bit."""
    stored = torch.from_numpy(whole.reshape(len(whole), _CHANNELS, -1))
    return np.array_equal(valued(stored, levels, values.shape).numpy(), values)
