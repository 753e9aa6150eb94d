"""The files of prepared pictures: whole numbers as image processors make them, and their values for the model.

A picture of 1,000 tokens is 25 MB of float32, and 3 MB in its file. Files lie in the cache of this machine, named by
their content.
"""

import secrets
from pathlib import Path

import numpy as np

from sweep.core.batches import FloatArray, Picture
from sweep.core.cache import cache_dir


def picture_file(content: str) -> Path:
    """The file of a prepared picture on this machine. Args: content: see `Picture.content`."""
    return cache_dir() / "pictures" / f"{content}.npy"


def pixel_values(picture: Picture) -> FloatArray:
    """A picture's values as the model takes them, of `Picture.shape`.

    Raises: OSError: its file is not there.
    """
    if picture.values is not None:
        return picture.values
    stored = np.load(picture_file(picture.content))
    if picture.levels is None:
        return stored.reshape(picture.shape)
    channels = [levels[stored[:, channel]] for channel, levels in enumerate(picture.levels)]
    return np.stack(channels, axis=1).reshape(picture.shape)


def write_picture_file(file: Path, data: bytes) -> None:
    """Write a picture's file whole. Raises: OSError: the cache of this machine cannot be written."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    partial.replace(file)
