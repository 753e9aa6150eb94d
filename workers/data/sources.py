"""Where pictures of a row are: files beside the data, `file:` and `data:` URLs, bytes as `datasets` stores them."""

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from sweep.core.errors import SweepError
from workers.data.conversations import PictureSource
from workers.data.rows import Cell, Row

PICTURE_KEYS: Final = ("bytes", "url", "path", "image", "image_url")  # of a mapping that says where a picture is


def picture_source(value: Cell, row: Row, root: str) -> PictureSource:
    """The picture that a value of a row names, unread.

    Args:
        value: path relative to the row's file, URL, or mapping: {"url": ...}, {"bytes": ..., "path": ...}.
        row: that it stands in.
        root: dataset.path; paths may leave its directory through ``..`` where that has one.

    Raises: SweepError: it is none of these, is on the network, or leaves the data set's directory.
    """
    if isinstance(value, bytes):
        return PictureSource(origin=row.origin, content=value)
    if isinstance(value, Mapping):
        named = next((value[key] for key in PICTURE_KEYS if value.get(key) is not None), None)
        return picture_source(named, row, root)
    if not isinstance(value, str) or not value:
        raise SweepError(
            f"A picture of {row.origin} is {_short(value)}. Give a path relative to the data file, a file: URL, "
            "or a base64 data: URL."
        )
    if value.startswith("data:"):
        return PictureSource(origin=row.origin, content=_inline(value, row))
    if value.startswith("file:"):
        return PictureSource(origin=row.origin, path=_inside(unquote(urlsplit(value).path), row, root))
    if "://" in value:
        raise SweepError(
            f"The picture {_short(value)} of {row.origin} is on the network, and nothing is fetched. "
            "Download it, and write its path relative to the data file."
        )
    return PictureSource(origin=row.origin, path=_inside(value, row, root))


def _inline(url: str, row: Row) -> bytes:
    header, comma, data = url.partition(",")
    try:
        if not comma or not header.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise SweepError(
            f"The data: URL of a picture of {row.origin} cannot be decoded: {error}. Give data:image/png;base64,..."
        ) from error


def _inside(name: str, row: Row, root: str) -> Path:
    if row.directory is None:
        raise SweepError(
            f"The picture {name} of {row.origin} is a path, and the rows are of the hub. "
            "Download the data set with its pictures, and type dataset.path=DIR."
        )
    typed = Path(root).expanduser()
    tree = typed if typed.is_dir() else typed.parent
    path = Path(os.path.abspath(row.directory / name))  # takes `..` away without following links
    if ".." in Path(name).parts and ".." not in typed.parts and not path.is_relative_to(tree.absolute()):
        raise SweepError(
            f"The picture {name} of {row.origin} leaves {tree} through `..`. Put it inside, or write its absolute path."
        )
    return path


def _short(value: Cell) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
