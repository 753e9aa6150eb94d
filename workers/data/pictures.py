"""The files of prepared pictures: whole numbers as image processors make them, and their values for the model.

A picture of 1,000 tokens of Qwen3-VL is 25 MB of float32, and 3 MB in its file, which holds once what the model takes
as two equal frames. Files lie in the cache of this machine, named by their content.
"""

import contextlib
import secrets
from pathlib import Path

from sweep.core.cache import cache_dir
from sweep.core.errors import SweepError


def picture_file(content: str) -> Path:
    """The file of a prepared picture on this machine. Args: content: see `Picture.content`."""
    return cache_dir() / "pictures" / f"{content}.npy"


def write_picture_file(file: Path, data: bytes) -> None:
    """Write a picture's file whole, if it is not there.

    Raises: SweepError: the cache of this machine cannot be written.
    """
    if file.exists():
        return
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise SweepError(
            f"Cannot keep prepared pictures in {file.parent}: {error.strerror or error}. "
            "Set SWEEP_CACHE_DIR to a directory that can be written and has room."
        ) from error
