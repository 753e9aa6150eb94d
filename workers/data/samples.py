"""Samples: captions of a file or of a data set of the hub, tokenized, with drawn scenes before them if configured."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sweep.core.batches import IMAGE, PROMPT, Picture, Sample
from sweep.core.errors import SweepError
from sweep.core.sizes import SIZES
from workers.data.scenes import patches, scene


def read_captions(path: Path, n_samples: int, n_most: int = 0) -> list[str]:
    """The first `n_samples` captions of a text file, one a line, and more of them up to `n_most` if there are some.

    Raises: SweepError: unreadable, not UTF-8, an empty line among the captions, or fewer captions than asked for.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut captions at U+2028, too
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(
            f"Cannot read the captions file {path}: {error}. "
            "Give a UTF-8 text file with one caption a line: dataset.captions_path=FILE."
        ) from error
    return first_texts([line.strip() for line in lines], n_samples, f"captions file {path}", n_most)


def read_hub_captions(hub_id: str, split: str, column: str, n_samples: int, n_most: int = 0) -> list[str]:
    """The first captions of a Hugging Face data set's text column, streamed, as many as `read_captions` reads.

    Raises: SweepError: the data set, split or column cannot be read.
    """
    import datasets

    try:
        stream = datasets.load_dataset(hub_id, split=split, streaming=True)
        texts: list[str] = []
        for row in stream.take(max(n_samples, n_most)):
            value = row[column]
            first = next(iter(value), None) if isinstance(value, list) else value
            texts.append("" if first is None else str(first).strip())
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise SweepError(
            f"Cannot read data set {hub_id!r} (split {split!r}, column {column!r}) from the hub: "
            f"{type(error).__name__}: {error}. "
            "Give a local file with one caption a line instead: dataset.captions_path=FILE."
        ) from error
    return first_texts(texts, n_samples, f"data set {hub_id!r}", n_most)


def first_texts(texts: Sequence[str], n_samples: int, source: str, n_most: int = 0) -> list[str]:
    """The first `n_samples` texts, and more of them up to `n_most` if there are some.

    Raises: SweepError: there are fewer, or one of them is blank.
    """
    while texts and not texts[-1]:
        texts = texts[:-1]
    check_enough(len(texts), n_samples, source, "captions")
    taken = list(texts[: max(n_samples, n_most)])
    for number, text in enumerate(taken, start=1):
        if not text:
            raise SweepError(f"Caption {number} of the {source} is empty. Remove blank lines: one caption a line.")
    return taken


def check_enough(n_found: int, n_needed: int, source: str, what: str) -> None:
    """Refuse a data set of too few samples. Raises: SweepError: says which sizes it has samples for."""
    if n_found >= n_needed:
        return
    fitting = [f"dataset.size={size}" for size, n in SIZES.items() if n <= n_found]
    number = f"dataset.size={n_found}" if n_found >= 2 and n_found not in SIZES.values() else ""
    choice = " or ".join([*fitting, number] if number else fitting)
    advice = f"Type {choice}, or give more {what}." if choice else f"Give more {what}."
    raise SweepError(f"The {source} holds {n_found} {what}; {n_needed} are needed. {advice}")


def text_samples(token_ids: Sequence[Sequence[int]], max_tokens: int, origins: Sequence[str] = ()) -> list[Sample]:
    """Tokenized texts as samples, cut at `max_tokens`; `origins` says where they stand.

    Raises: SweepError: a text of fewer than 2 tokens has no token to predict.
    """
    for index, ids in enumerate(token_ids):
        if len(ids) < 2:
            place = f" ({origins[index]})" if origins else ""
            raise SweepError(
                f"Sample {index + 1}{place} has {len(ids)} token(s); at least 2 are needed to predict one. "
                "Remove or lengthen that text."
            )
    return [Sample(token_ids=np.array(ids[:max_tokens], dtype=np.int64)) for ids in token_ids]


def scene_captions(n_samples: int) -> list[str]:
    """Captions of the first `n_samples` drawn scenes."""
    return [scene(i).caption for i in range(n_samples)]


def with_scenes(
    captions: Sequence[Sample], *, vision_start: int, vision_end: int, image_token: int, merge: int
) -> list[Sample]:
    """Put the drawn image of each scene before its tokenized caption.

    Args:
        captions: samples of scene_captions, in order.
        vision_start: token id that opens an image.
        vision_end: token id that closes it.
        image_token: token id that stands for one merged patch.
        merge: patches merged into one token along each side (the model's spatial_merge_size).
    """
    samples: list[Sample] = []
    for index, caption in enumerate(captions):
        pixel_values, grid = patches(scene(index).pixels)
        n_image_tokens = int(np.prod(grid)) // merge**2
        image = np.array([vision_start, *[image_token] * n_image_tokens, vision_end], dtype=np.int64)
        token_ids = np.concatenate([image, caption.token_ids])
        is_image = token_ids == image_token
        picture = Picture(
            content=f"scene {index}",
            shape=pixel_values.shape,
            n_rows=len(pixel_values),
            tensors={"image_grid_thw": np.array([grid], dtype=np.int64)},
            values=pixel_values,
        )
        samples.append(
            Sample(
                token_ids=token_ids,
                kinds=np.where(is_image, IMAGE, PROMPT).astype(np.uint8),
                arrays={"mm_token_type_ids": is_image.astype(np.int64)},
                pictures=(picture,),
            )
        )
    return samples
