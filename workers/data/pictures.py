"""The files of prepared pictures: whole numbers as image processors make them, and their values for the model.

A picture of 1,000 tokens of Qwen3-VL is 25 MB of float32, and 3 MB in its file, which holds once what the model takes
as two equal frames. Files lie in the cache of this machine, named by their content.
"""

from pathlib import Path

from sweep.core.cache import cache_dir


def picture_file(content: str) -> Path:
    """The file of a prepared picture on this machine. Args: content: see `Picture.content`."""
    return cache_dir() / "pictures" / f"{content}.npy"
