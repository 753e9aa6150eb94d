"""The files of prepared pictures: whole numbers as image processors make them, and their values for the model.

A picture of 1,000 tokens of Qwen3-VL is 25 MB of float32, and 3 MB in its file, which holds once what the model takes
as two equal frames. Files lie in the cache of this machine, named by their content.
"""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
    return valued(np.load(picture_file(picture.content)), picture.levels, picture.shape)


def valued(stored: npt.NDArray[np.generic], levels: FloatArray | None, shape: tuple[int, ...]) -> FloatArray:
    """The values of what is stored.

    Args:
        stored: [n, channels, values], of one frame where a picture has several, equal ones.
        levels: see `Picture.levels`.
        shape: of the values.
    """
    by_channel = [] if levels is None else [each[stored[:, channel]] for channel, each in enumerate(levels)]
    values = np.stack(by_channel, axis=1) if by_channel else stored.astype(np.float32, copy=False)
    return np.tile(values, math.prod(shape) // stored.size).reshape(shape)
