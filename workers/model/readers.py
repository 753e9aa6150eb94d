"""How models read pictures: the text that stands for one, and what its values are to the vision tower.

Six families are written out here: theirs need no torchvision. Any other model is asked through transformers'
AutoProcessor, and two drawn pictures show whether its arrays are such that pictures may share a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import AutoProcessor, PreTrainedConfig

from sweep.core.batches import Picture
from sweep.core.errors import SweepError
from workers.model.loading import UNREADABLE, first_line

# The model's argument that tells features from text, of Qwen's families.
QWEN_TYPES: Final = "mm_token_type_ids"
# Arrays of image processors that are made of the pixels' shape again, and no model's argument.
_COUNTS: Final = frozenset({"num_patches", "num_crops"})
_OF_TEXT: Final = frozenset({"input_ids", "attention_mask", "text_replacement_offsets", "pixel_values"})

Shape = tuple[int, ...]
Arrays = Mapping[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How models of one type read a picture."""

    mark: str  # what the chat template writes for it
    text: str  # a picture outside a chat, in marks
    feature: str  # token that stands for one of its features
    before: str = ""  # written around the features
    after: str = ""
    # Features by the shape of pixel_values; not of a processor of transformers, which writes `Picture.text`.
    n_features: Callable[[Shape], int] | None = None
    n_rows: Callable[[Shape], int]  # of the vision tower, likewise
    types: str | None = None  # the model's argument that tells features from text, a number a token
    options: Mapping[str, bool] = field(default_factory=dict[str, bool])  # of the image processor
    passed: frozenset[str] = frozenset()  # arrays beside pixel_values that the model takes
    tail: Shape | None = None  # all but the first axis of pixel_values; None: pictures of a batch have it anyway
    n_frames: int = 1  # that pixel_values repeats, each row once a channel; an image processor's arrays hold one
    patchify: Callable[..., tuple[npt.NDArray[np.generic], int, int]] | None = None  # instead of the image processor's
    processor: Any = None  # that of transformers, of a model that is none of the families here

    def written(self, picture: Picture) -> str:
        """All that stands for a picture where its mark was."""
        if self.n_features is None:
            return picture.text
        return f"{self.before}{self.feature * self.n_features(picture.shape)}{self.after}"

    def arrays(self, image_processor: Any, image: Image.Image, **options: Any) -> tuple[Arrays, str]:
        """The arrays of a picture, and the text that stands for it (`Picture.text`).

        Args:
            image_processor: the checkpoint's.
            image: RGB.
            options: further ones of the image processor.

        Raises: ValueError: the image processor refuses the picture.
        """
        if self.processor is None:
            found = image_processor(images=[image], return_tensors="np", **self.options, **options)
            return {name: np.asarray(found[name]) for name in found if name not in _COUNTS}, ""
        found = _processed(self.processor, self.mark, [image], options)
        text = found["text_replacement_offsets"][0][0]["replacement"]
        names = {"pixel_values", *self.passed}
        return {name: np.asarray(found[name]) for name in found if name in names}, text


def reads_pictures(config: PreTrainedConfig) -> bool:
    """Whether a model has a vision tower, and a token that stands for what it makes of a picture."""
    return hasattr(config, "vision_config") and isinstance(getattr(config, "image_token_id", None), int)


def reader_of(path: Path, config: PreTrainedConfig, tokenizer: Any, image_processor: Callable[[], Any]) -> Reader:
    """How the model of a checkpoint reads pictures.

    Args:
        path: the checkpoint.
        config: its configuration.
        tokenizer: its tokenizer.
        image_processor: makes its image processor.

    Raises: SweepError: it reads none, or in a way that is not known here.
    """
    if not reads_pictures(config):
        raise SweepError(
            f"{path} is of model type {config.model_type}, which reads no pictures, or by no token of its own. "
            "Type a data set without pictures, or another model.path=DIR."
        )
    if (family := FAMILIES.get(config.model_type)) is not None:
        return family(config, tokenizer)
    return _of_transformers(path, config, tokenizer, image_processor())


# Any model that transformers has a processor for


def _of_transformers(path: Path, config: PreTrainedConfig, tokenizer: Any, image_processor: Any) -> Reader:
    """By the checkpoint's whole processor, with its image processor on PIL.

    Raises: SweepError: it does not load, or its arrays of two pictures are not those of each, one after the other.
    """
    processor = _loaded(path, config)
    processor.image_processor = image_processor
    mark: str = processor.image_token
    drawn = [_drawn(160, 96), _drawn(96, 240)]
    try:
        alone = [_processed(processor, mark, [image], {}) for image in drawn]
        both = _processed(processor, f"{mark} and {mark}.", drawn, {})
        written = [each["text_replacement_offsets"][0][0]["replacement"] for each in alone]
    except (*UNREADABLE, IndexError, ImportError) as error:
        raise _unknown(path, config, f"refuses a picture of {drawn[0].size} pixels ({first_line(error)})") from error
    ids = np.asarray(both["input_ids"])
    if ids.tolist() != [tokenizer(f"{written[0]} and {written[1]}.")["input_ids"]]:
        raise _unknown(path, config, "writes other text around pictures than that in place of their marks")
    passed, types = set[str](), None
    for name in sorted(both.keys() - _OF_TEXT):
        if np.shape(both[name]) == ids.shape:
            types = name
            if not np.array_equal(both[name], ids == config.image_token_id):
                raise _unknown(path, config, f"gives {name}, which is not whether a token stands for a picture")
        elif np.asarray(both[name]).dtype.kind in "iu":
            passed.add(name)
        else:
            raise _unknown(path, config, f"gives {name} beside pixel_values, which are no whole numbers")
    for name in ("pixel_values", *sorted(passed)):
        found, parts = np.asarray(both[name]), [np.asarray(each[name]) for each in alone]
        if {part.shape[1:] for part in parts} != {found.shape[1:]} or not np.array_equal(found, np.concatenate(parts)):
            shapes = f"{parts[0].shape} and {parts[1].shape}, together {found.shape}"
            raise _unknown(path, config, f"pads pictures or nests them ({name} of two: {shapes})")
    pixels = np.asarray(both["pixel_values"])
    if pixels.ndim > 4:
        raise _unknown(path, config, f"nests pictures (pixel_values of two: {pixels.shape})")
    patch = getattr(config.vision_config, "patch_size", None)
    return Reader(
        mark=mark,
        text=mark,
        feature=tokenizer.convert_ids_to_tokens(config.image_token_id),
        n_rows=lambda shape: _n_tower_rows(shape, patch if isinstance(patch, int) else 1),
        types=types,
        passed=frozenset(passed),
        tail=pixels.shape[1:],
        processor=processor,
    )


def _loaded(path: Path, config: PreTrainedConfig) -> Any:
    """The processor of transformers. Raises: SweepError: it does not load, or is none of pictures and text."""
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (*UNREADABLE, ImportError) as error:
        why = f"does not load: {first_line(error)} Copy the model's processor files there"
        if "torchvision" in str(error).lower():
            why = "needs torchvision. Install it, of the build of this torch"
        raise SweepError(
            f"The processor of {path} (model type {config.model_type}) {why}, or type a data set without pictures."
        ) from error
    if not all(hasattr(processor, name) for name in ("image_processor", "tokenizer")):
        raise _unknown(path, config, "is none of pictures and text: copy the model's processor_config.json there. It")
    if not isinstance(getattr(processor, "image_token", None), str):
        raise _unknown(path, config, "names no image_token")
    return processor


def _unknown(path: Path, config: PreTrainedConfig, what: str) -> SweepError:
    return SweepError(
        f"The processor of {path} (model type {config.model_type}) {what}. Models are read whose processor gives each "
        f"picture rows of its own; {', '.join(sorted(FAMILIES))} are. Type a data set without pictures, or another "
        "model.path=DIR."
    )


def _processed(processor: Any, text: str, images: Sequence[Image.Image], options: Mapping[str, Any]) -> Any:
    return processor(
        text=[text],
        images=list(images),
        return_tensors="np",
        return_text_replacement_offsets=True,
        images_kwargs=dict(options),
    )


def _drawn(width: int, height: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _n_tower_rows(shape: Shape, patch: int) -> int:
    """Patches: of pictures [n, channels, height, width], else rows of patches."""
    if len(shape) == 4:
        return shape[0] * max(1, shape[2] // patch) * max(1, shape[3] // patch)
    return int(np.prod(shape[:-1]))


# How each family reads pictures. Source: the processors of transformers 5.24, models/*/processing_*.py, and what the
# models check: as many placeholders as features.


def _qwen(config: PreTrainedConfig, tokenizer: Any) -> Reader:
    """Patches, merged in squares; the template writes the tokens around them."""
    start, image, end = tokenizer.convert_ids_to_tokens(
        [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    )
    merged = config.vision_config.spatial_merge_size**2
    return Reader(
        mark=image,
        text=f"{start}{image}{end}",
        feature=image,
        n_features=lambda shape: shape[0] // merged,
        n_rows=lambda shape: shape[0],
        types=QWEN_TYPES,
        passed=frozenset({"image_grid_thw"}),
        n_frames=config.vision_config.temporal_patch_size,
        patchify=_patches,
    )


def _patches(
    image: npt.NDArray[np.generic], *, patch_size: int, merge_size: int, temporal_patch_size: int
) -> tuple[npt.NDArray[np.generic], int, int]:
    """A picture [channels, height, width] in patches [n, channels * values] of its own type, rows, and columns.

    One frame of them: its copies are made when they are read. The image processor would make all, in float32, at five
    times the cost. Patches that are merged lie side by side.
    """
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    blocks = image.reshape(
        *(channels, rows // merge_size, merge_size, patch_size),
        *(columns // merge_size, merge_size, patch_size),
    )
    return blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, -1), rows, columns


def _internvl(config: PreTrainedConfig, tokenizer: Any) -> Reader:
    """Tiles of one size, and a small picture of the whole; each has a class token, which is dropped."""
    image = tokenizer.convert_ids_to_tokens(config.image_token_id)
    patches = _n_patches(config)
    return Reader(
        mark=image,
        text=image,
        feature=image,
        before=tokenizer.start_image_token,
        after=tokenizer.end_image_token,
        n_features=lambda shape: shape[0] * config.image_seq_length,
        n_rows=lambda shape: shape[0] * (patches + 1),
        options={"crop_to_patches": True},
    )


def _llava(config: PreTrainedConfig, tokenizer: Any) -> Reader:
    """One picture, all of its patches; CLIP has a class token beside them, which the model may drop."""
    image = tokenizer.convert_ids_to_tokens(config.image_token_id)
    rows = _n_patches(config) + (config.vision_config.model_type == "clip_vision_model")
    dropped = int(config.vision_feature_select_strategy == "default")
    return Reader(
        mark=image,
        text=image,
        feature=image,
        n_features=lambda shape: shape[0] * (rows - dropped),
        n_rows=lambda shape: shape[0] * rows,
    )


def _gemma3(config: PreTrainedConfig, tokenizer: Any) -> Reader:
    """One picture of a fixed size, pooled to a fixed number of features; they attend to each other in both ways."""
    begin, image, end = tokenizer.convert_ids_to_tokens(
        [config.boi_token_id, config.image_token_id, config.eoi_token_id]
    )
    patches = _n_patches(config)
    return Reader(
        mark=begin,
        text=begin,
        feature=image,
        before=f"\n\n{begin}",
        after=f"{end}\n\n",
        n_features=lambda shape: shape[0] * config.mm_tokens_per_image,
        n_rows=lambda shape: shape[0] * patches,
        types="token_type_ids",
        options={"do_pan_and_scan": False},
    )


def _n_patches(config: PreTrainedConfig) -> int:
    """Patches of a picture of the vision tower's size."""
    sizes = [config.vision_config.image_size, config.vision_config.patch_size]
    (height, width), (rows, columns) = (size if isinstance(size, list | tuple) else (size, size) for size in sizes)
    return (height // rows) * (width // columns)


FAMILIES: Final[Mapping[str, Callable[[PreTrainedConfig, Any], Reader]]] = {
    "qwen3_vl": _qwen,
    "qwen3_vl_moe": _qwen,
    "qwen2_5_vl": _qwen,
    "internvl": _internvl,
    "llava": _llava,
    "gemma3": _gemma3,
}
