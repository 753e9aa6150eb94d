"""Rows of data sets: JSON, JSON lines, CSV, text, Parquet and Arrow files, directories of them, data sets of the hub.

JSON lines are read here and not by `datasets`, which gives all lines one type and so changes some, and knows no line.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from sweep.core.errors import SweepError

# A value of a row: what JSON can hold, and bytes.
Cell: TypeAlias = "Mapping[str, Cell] | Sequence[Cell] | str | bytes | int | float | bool | None"
Read: TypeAlias = Callable[[Path], Iterator[tuple[str, Mapping[str, Cell]]]]

METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # beside pictures, for `datasets`' imagefolder
_STATE: Final = "state.json"  # beside the Arrow files of `Dataset.save_to_disk`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row, and where it stands."""

    values: Mapping[str, Cell]  # by column
    origin: str  # "line 12 of chats.jsonl"
    directory: Path | None = None  # of its file, from which paths of pictures start; None: it is of the hub


def files_of(path: str) -> list[Path]:
    """The files of a data set, in the order of their rows; none: it is a hub id.

    Raises: SweepError: there is no such path, or no file in it that can be read, or files of several formats.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _files_in(place)
    if place.is_file():
        if place.suffix.lower() not in _READERS:
            raise SweepError(
                f"dataset.path={path} is no file that is known by its ending. "
                f"Give a file that ends in {', '.join(_READERS)}, a directory of them, or a hub id."
            )
        return [place]
    if path.count("/") == 1 and not path.startswith((".", "~", "/")) and not place.suffix and not place.parent.exists():
        return []
    raise SweepError(f"dataset.path={path} is not there. Give a file, a directory, or the id of a data set of the hub.")


def _files_in(directory: Path) -> list[Path]:
    if metadata := [directory / name for name in METADATA if (directory / name).is_file()]:
        return metadata[:1]
    suffixes = (".arrow",) if (directory / _STATE).is_file() else tuple(_READERS)
    files = [file for file in sorted(directory.rglob("*")) if file.suffix.lower() in suffixes and file.is_file()]
    formats = sorted({file.suffix.lower() for file in files})
    if len(formats) == 1:
        return files
    what = f"files of several formats ({', '.join(formats)})" if formats else "no file that can be read"
    raise SweepError(
        f"dataset.path={directory} holds {what}. Give a directory whose files end in one of {', '.join(_READERS)}, or "
        f"of pictures with {', '.join(METADATA[:-1])} or {METADATA[-1]}."
    )


def read_rows(path: str, split: str | None) -> Iterator[Row]:
    """The rows of a data set in order, read as they are asked for.

    Args:
        path: file, directory, or id on the hub.
        split: of a data set of the hub.

    Raises: SweepError: it is not there, or broken; names the place.
    """
    files = files_of(path)
    if not files:
        yield from _hub_rows(path, split)
    for file in files:
        try:
            for place, values in _READERS[file.suffix.lower()](file):
                yield Row(values=values, origin=f"{place} of {file.name}", directory=file.parent)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise SweepError(
                f"Cannot read {file}: {error}. Give a whole {file.suffix} file, text in UTF-8: dataset.path=PATH."
            ) from error


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from ((number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip())


def _text_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Cell]]]:
    for number, line in _lines(file):
        yield f"line {number}", {"text": line}


def _json_line_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Cell]]]:
    for number, line in _lines(file):
        yield f"line {number}", _json_row(line, f"Line {number} of {file}")


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Cell]]]:
    """A list of rows; or JSON lines, as many files of that name are."""
    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_line_rows(file)
        return
    try:
        rows = msgspec.json.decode(text, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise SweepError(
            f"{file} is no JSON: {error}. Give a list of rows, or one row a line in FILE.jsonl."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _json_row(row, f"Row {number} of {file}")


def _json_row(text: str | msgspec.Raw, place: str) -> Mapping[str, Cell]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise SweepError(f'{place} is no JSON row: {error}. Give one object a line: {{"COLUMN": ...}}.') from error


def _csv_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Cell]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            yield f"line {reader.line_num}", {key: value for key, value in row.items() if isinstance(value, str)}


def _table_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Cell]]]:
    import datasets
    from datasets.exceptions import DatasetsError

    kind = file.suffix.lower().removeprefix(".")
    try:
        stream = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True).decode(False)
        for number, row in enumerate(stream, start=1):
            yield f"row {number}", row
    except (ValueError, RuntimeError, DatasetsError) as error:  # pyarrow's errors are ValueErrors
        raise SweepError(f"{file} is no whole {kind} file: {error}. Copy it again: dataset.path=PATH.") from error


def _hub_rows(path: str, split: str | None) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    split = split or "train"
    try:
        stream = datasets.load_dataset(path, split=split, streaming=True).decode(False)
        for number, row in enumerate(stream, start=1):
            yield Row(values=row, origin=f"row {number} of {path}")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise SweepError(
            f"Cannot read data set {path!r} (split {split!r}) from the hub: {type(error).__name__}: {error}. "
            "Type dataset.split=SPLIT, or give local files: dataset.path=PATH."
        ) from error


_READERS: Mapping[str, Read] = {
    ".jsonl": _json_line_rows,
    ".json": _json_rows,
    ".parquet": _table_rows,
    ".arrow": _table_rows,
    ".csv": _csv_rows,
    ".txt": _text_rows,
}
