"""Her own data sets: texts, pictures with captions, and conversations, a row each."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from sweep.core.errors import SweepError
from sweep.core.text import override
from workers.data.conversations import CaptionedPicture, Conversation
from workers.data.messages import conversation
from workers.data.rows import Cell, Row, read_rows
from workers.data.samples import check_enough
from workers.data.sources import picture_source

T = TypeVar("T")

# Names of columns that are looked for where none is typed.
_MESSAGES: Final = ("messages", "conversations")
_CAPTIONS: Final = ("text", "caption", "captions")
_PICTURES: Final = ("file_name", "image")
_HEAD: Final = 1 << 20  # bytes of a file by which it is known: more than the line of a chat


def read_texts(path: str, split: str | None, column: str | None, n_least: int, n_most: int) -> list[tuple[str, str]]:
    """The first texts of a data set, each with its place.

    Args:
        path: file, directory, or id on the hub.
        split: of a data set of the hub.
        column: that holds the text; None: the usual names.
        n_least: samples that there must be.
        n_most: samples that are read if there are so many.

    Raises: SweepError: they cannot be read, are too few, or one is empty or no text.
    """

    def parse(row: Row) -> tuple[str, str]:
        _check_no_json(row, path)
        return _text(row, _column(row, column, _CAPTIONS, "text", path), path), row.origin

    return _taken(path, split, "texts", parse, n_least, n_most)


def read_captioned(
    path: str, split: str | None, column: str | None, n_least: int, n_most: int
) -> list[CaptionedPicture]:
    """The first pictures of a data set with their captions; arguments and errors as `read_texts`."""

    def parse(row: Row) -> CaptionedPicture:
        name = _column(row, None, _PICTURES, "images", path)
        caption = _text(row, _column(row, column, _CAPTIONS, "images", path), path)
        return CaptionedPicture(picture=picture_source(row.values[name], row, path), caption=caption, origin=row.origin)

    return _taken(path, split, "pictures", parse, n_least, n_most)


def read_conversations(
    path: str, split: str | None, column: str | None, n_least: int, n_most: int, *, answered: bool
) -> list[Conversation]:
    """The first conversations of a data set; arguments and errors as `read_texts`.

    `answered`: whether each must end with an answer.
    """

    def parse(row: Row) -> Conversation:
        _check_no_json(row, path)
        return conversation(row, _column(row, column, _MESSAGES, "chat", path), path, answered=answered)

    return _taken(path, split, "conversations", parse, n_least, n_most)


def _taken(path: str, split: str | None, what: str, parse: Callable[[Row], T], n_least: int, n_most: int) -> list[T]:
    found = [parse(row) for row in islice(read_rows(path, split), n_most)]
    check_enough(len(found), n_least, f"data set {path}", what)
    return found


def _check_no_json(row: Row, path: str) -> None:
    """Refuse JSON lines in a file of texts. Raises: SweepError: names the ending that it should have."""
    text = row.values.get("text")
    if row.origin.endswith(".txt") and isinstance(text, str) and isinstance(values := _json(text), Mapping):
        renamed = path if Path(path).expanduser().is_dir() else str(Path(path).with_suffix(".jsonl"))
        advice = _advice(Row(values=values, origin=row.origin), renamed)
        raise SweepError(f"{path} holds JSON lines. Let its name end in .jsonl, and type {advice}.")


def _column(row: Row, typed: str | None, usual: Sequence[str], kind: str, path: str) -> str:
    """The column to read. Raises: SweepError: the row has none of them; lists those that it has."""
    wanted = [typed] if typed is not None else [*usual]
    for name in wanted:
        if row.values.get(name) is not None:
            return name
    columns = ", ".join(name for name, value in row.values.items() if value is not None) or "none"
    advice = f"It looks like {_advice(row, path)}" if _kind(row) != kind else "Type dataset.column=NAME"
    raise SweepError(f"Column {' or '.join(wanted)} is not in {row.origin} (columns: {columns}). {advice}.")


def _text(row: Row, column: str, path: str) -> str:
    """The text of a column, or the first of its texts."""
    value = row.values[column]
    first = value[0] if isinstance(value, Sequence) and not isinstance(value, str | bytes) and value else value
    if not isinstance(first, str):
        advice = _advice(row, path) if isinstance(first, Mapping) else "dataset.column=NAME, of a column of texts"
        raise SweepError(f"Column {column!r} of {row.origin} holds no text. Type {advice}.")
    if not first.strip():
        raise SweepError(f"The text of {row.origin} (column {column!r}) is empty. Write it, or leave the row out.")
    return first


def _kind(row: Row) -> str:
    """The kind of data set that a row looks like."""
    if any(name in row.values for name in _MESSAGES):
        return "chat"
    return "images" if any(name in row.values for name in _PICTURES) else "text"


def _advice(row: Row, path: str) -> str:
    """What to type for a row that is of another kind."""
    kind = _kind(row)
    texts = [name for name, value in row.values.items() if isinstance(value, str)]
    known = kind != "text" or "text" in texts or not texts
    words = [
        f"dataset={kind}",
        override("dataset.path", path),
        *([] if known else [override("dataset.column", texts[0])]),
    ]
    return " ".join(words)


def check_captions(path: Path) -> None:
    """Refuse what is no text file with one caption a line, and name the data set that reads it.

    Raises: SweepError: a directory, a table, rows of JSON, or a binary file.
    """
    if path.is_dir() or path.suffix.lower() in (".jsonl", ".json", ".parquet", ".arrow"):
        row = next(read_rows(str(path), None), None)
        if row is not None:
            raise SweepError(f"{path} is no text file with one caption a line. Type {_advice(row, str(path))}.")
    elif path.is_file():
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if b"\0" in head:
            raise SweepError(
                f"{path} is a binary file, and no text with one caption a line. Type dataset=text or dataset=chat "
                "with dataset.path=FILE.parquet or FILE.arrow, or dataset=images dataset.path=DIR for pictures."
            )
        values = _json(head.lstrip(b"\xef\xbb\xbf").lstrip().split(b"\n")[0])
        if isinstance(values, Mapping):
            row = Row(values=values, origin=f"line 1 of {path.name}")
            raise SweepError(
                f"{path} holds JSON lines, and no captions. "
                f"Let its name end in .jsonl, and type {_advice(row, str(path.with_suffix('.jsonl')))}."
            )


def _json(text: str | bytes) -> Cell:
    """The value of a JSON document; None: it is none."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
