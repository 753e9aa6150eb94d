"""The Parquet store: the only truth about what is measured. Readers need nothing of ours.

``parts/cell=<id>/<part>.parquet`` hold a cell's finished decoder layers; ``scores/cell=<id>/scores.parquet`` appears
once, whole, when the cell is complete. Equal inputs give equal bytes, so two writers of one cell do no harm.
What cannot be read back as it was written is moved to ``quarantine/``, with the reason beside it, and never read.
"""

import errno
import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

import msgspec
import pyarrow as pa

from sweep.core.errors import StoreFailed, SweepError
from sweep.store.files import Files, Misplaced
from sweep.store.parquet import Damaged, decode, encode
from sweep.store.records import ANSWERS_SCHEMA, SCORES_SCHEMA, TRIALS_SCHEMA, VALIDATIONS_SCHEMA, RunRecord, TrialRow

T = TypeVar("T")

_NO_FILE: Final = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP}  # what is there is no file; anything else may pass
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

_PARTS: Final = re.compile(r".*\.parquet|\..*\.tmp")  # the files of a directory of parts, half-written ones too


class Store:
    """Cells, trials and runs under one root."""

    def __init__(self, uri: str, *, repairs: bool = True) -> None:
        """Open a store; it need not exist yet.

        Args:
            uri: absolute local path or fsspec URL.
            repairs: whether damaged files that are met are moved away; else they are only passed over, and named.
        """
        self.uri = uri
        self.files = Files(uri)
        self.repairs = repairs
        self.damage: dict[str, str] = {}  # what was wrong with files that were met, by path

    # Cells

    def is_finished(self, cell_id: str) -> bool:
        """Whether the cell's scores are complete."""
        return self.files.exists(_scores_path(cell_id))

    def part_names(self, cell_id: str) -> set[str]:
        """Names of the parts of an unfinished cell, readable or not."""
        return {
            name.removesuffix(".parquet")
            for name in self.files.names(f"parts/cell={cell_id}")
            if name.endswith(".parquet")
        }

    def has_part(self, cell_id: str, part: str) -> bool:
        """Whether a part of an unfinished cell is there and needs no scoring again; a damaged one is set aside.

        Raises: SweepError: it is of a newer schema version.
        """
        # Not there: another writer has just completed the cell.
        return _unless_gone(lambda: self._read_rows(_part_path(cell_id, part), cell_id)) is not None

    def write_part(self, cell_id: str, part: str, rows: pa.Table) -> None:
        """Keep one finished decoder layer (or top-level block) of a cell; rows as in SCORES_SCHEMA."""
        path = _part_path(cell_id, part)
        self._write(path, encode(rows, path, short_lived=True))

    def complete(self, cell_id: str, parts: Mapping[str, pa.Table | None]) -> None:
        """Join the parts, in this order, into the cell's scores and drop them.

        Args:
            cell_id: the cell.
            parts: every part by name; None: read it from the store.

        Raises: SweepError: a part is not readable; run again and it is scored again.
        """
        path = _scores_path(cell_id)
        try:
            found = [
                self._read_rows(_part_path(cell_id, part), cell_id) if rows is None else rows
                for part, rows in parts.items()
            ]
            self._write(path, encode(pa.concat_tables(found).combine_chunks(), path))
        except FileNotFoundError:
            if not self.is_finished(cell_id):  # else another writer of the same bytes was faster, and dropped the parts
                raise
        self.drop_parts(cell_id)

    def drop_parts(self, cell_id: str) -> None:
        """Remove what is left of a finished cell's parts."""
        self.files.remove_directory(f"parts/cell={cell_id}", _PARTS)

    def drop_leftovers(self) -> None:
        """Remove the parts of finished cells: a writer was cut short after it had completed one."""
        for name in self.files.names("parts"):
            cell_id = name.removeprefix("cell=")
            if self.whole_scores(cell_id) is not None:
                self.drop_parts(cell_id)

    def scores(self, cell_id: str) -> pa.Table:
        """A finished cell's rows (SCORES_SCHEMA).

        Raises: SweepError: the file is missing, damaged, or of a newer schema version.
        """
        path = _scores_path(cell_id)
        try:
            return self._read_rows(path, cell_id)
        except FileNotFoundError as error:
            raise SweepError(
                f"{self.uri}/{path} is missing, though its trial is done. "
                "Type the same sweep run again: it is scored again."
            ) from error

    def whole_scores(self, cell_id: str) -> pa.Table | None:
        """A cell's rows if it is finished, else None; a damaged file is set aside, so that the cell is scored again.

        Raises: SweepError: it is of a newer schema version.
        """
        return _unless_gone(lambda: self._read_rows(_scores_path(cell_id), cell_id))

    def _read_rows(self, path: str, cell_id: str) -> pa.Table:
        def read() -> pa.Table:
            rows = decode(self.files.read(path), path, f"{self.uri}/{path}", SCORES_SCHEMA)
            if any(found != cell_id for found in rows["cell_id"].unique().to_pylist()):
                raise Damaged(f"{self.uri}/{path} is damaged: it holds rows of another cell.")
            return rows

        return self._guarded(path, read)

    # Damage

    def set_aside(self, path: str, reason: str) -> None:
        """Move a file that cannot be trusted into the quarantine, with the reason beside it. Raises: StoreFailed."""
        if self.repairs:
            place = f"quarantine/{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
            self._write(f"{place}/why.txt", f"{reason}\n".encode(errors="surrogateescape"))
            try:
                self.files.move(path, f"{place}/{path}")
            except OSError as error:
                raise StoreFailed(f"{reason} It cannot be set aside: {error.strerror or error}.") from error
        self.damage[path] = reason

    def why(self, name: str) -> str:
        """Why a directory of the quarantine was made."""
        try:
            return self.files.read(f"quarantine/{name}/why.txt").decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return "reason unknown"

    def _guarded(self, path: str, read: Callable[[], T]) -> T:
        """Read, and set aside what proves damaged.

        Raises:
            Damaged: says where it is now.
            FileNotFoundError: it is gone.
            StoreFailed: it cannot be read just now, or not be set aside.
        """
        try:
            return read()
        except (Damaged, Misplaced) as error:
            reason, cause = str(error), error
        except FileNotFoundError as error:
            if not self.files.is_link(path):
                raise
            reason, cause = f"{self.uri}/{path} is damaged: a link to nothing.", error
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise StoreFailed(f"Cannot read {self.uri}/{path}: {error.strerror or error}.") from error
            reason, cause = f"{self.uri}/{path} is damaged: {error.strerror}.", error
        self.set_aside(path, reason)
        raise Damaged(
            f"{reason} It is set aside; type the same sweep run again, and what it held is scored again."
        ) from cause

    def _table(self, path: str, schema: pa.Schema) -> pa.Table:
        """A file's rows. Raises: as `_guarded`."""
        return self._guarded(path, lambda: decode(self.files.read(path), path, f"{self.uri}/{path}", schema))

    def _write_table(self, path: str, rows: pa.Table) -> None:
        self._write(path, encode(rows, path))

    def _write(self, path: str, data: bytes) -> None:
        try:
            self.files.write(path, data)
        except OSError as error:
            raise StoreFailed(f"Cannot write to the store {self.uri}: {error.strerror or error}.") from error

    # Trials

    def write_trials(self, run_id: str, rows: Iterable[TrialRow]) -> None:
        """Record a run's trials as they are now; the run's earlier record is replaced."""
        self._write_trials(f"trials/run-{run_id}.parquet", rows)

    def trials(self) -> dict[str, TrialRow]:
        """Every trial's latest event, by trial id, in the order of their first recording."""
        names = self._trial_files()
        while True:
            try:
                return _latest(row for name in names for row in self.read_trials(name))
            except FileNotFoundError:  # compacted by another driver since it was listed: its rows are in a newer file
                listed, names = names, self._trial_files()
                if names == listed:
                    raise

    def compact_trials(self, ended_runs: Iterable[str]) -> None:
        """Join the records of runs that have ended into one file. Reading before, during and after gives the same."""
        ended = {f"run-{run_id}.parquet" for run_id in ended_runs}
        names = [name for name in self._trial_files() if name in ended or name.startswith("compact-")]
        if len(names) < 2:
            return
        try:
            rows = _latest(row for name in names for row in self.read_trials(name))
        except FileNotFoundError:  # another driver is at it
            return
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        self._write_trials(f"trials/compact-{stamp}.parquet", rows.values())
        for name in names:
            self.files.remove(f"trials/{name}")

    def _trial_files(self) -> list[str]:
        return [name for name in self.files.names("trials") if name.endswith(".parquet")]

    def read_trials(self, name: str) -> list[TrialRow]:
        """One file's rows; none if it is damaged."""
        path = f"trials/{name}"
        try:
            table = self._table(path, TRIALS_SCHEMA)
        except Damaged:
            return []
        at = table.schema.get_field_index("created_at")
        microseconds = table.column(at).cast(pa.int64())  # times as Python's would import pandas: a quarter of a second
        rows = table.set_column(at, "created_at", microseconds).to_pylist()
        for row in rows:
            row["created_at"] = _EPOCH + timedelta(microseconds=row["created_at"])
        return msgspec.convert(rows, list[TrialRow])

    def _write_trials(self, path: str, rows: Iterable[TrialRow]) -> None:
        self._write_table(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=TRIALS_SCHEMA))

    # Validations

    def write_validation(self, validation_id: str, rows: pa.Table) -> None:
        """Keep the measured KL and loss change of one recipe; rows as in VALIDATIONS_SCHEMA."""
        self._write_table(_validation_path(validation_id), rows)

    def validation(self, validation_id: str) -> pa.Table | None:
        """A validation's rows; None: not measured yet, or damaged and set aside.

        Raises: SweepError: it is of a newer schema version.
        """
        return _unless_gone(lambda: self._table(_validation_path(validation_id), VALIDATIONS_SCHEMA))

    # Answers

    def write_answers(self, chunk_id: str, rows: pa.Table) -> None:
        """Keep what the unquantized model wrote to a chunk of conversations; rows as in ANSWERS_SCHEMA."""
        self._write_table(_answers_path(chunk_id), rows)

    def answers(self, chunk_id: str) -> pa.Table | None:
        """A chunk's rows; None: not written yet, or damaged and set aside.

        Raises: SweepError: it is of a newer schema version.
        """
        return _unless_gone(lambda: self._table(_answers_path(chunk_id), ANSWERS_SCHEMA))

    # Pictures

    def write_picture(self, content: str, data: bytes) -> None:
        """Keep the file of a prepared picture for workers on other machines. Args: content: its name; data: bytes."""
        self._write(_picture_path(content), hashlib.sha256(data).digest() + data)

    def has_picture(self, content: str) -> bool:
        """Whether a picture's file is there; it is not read."""
        return self.files.exists(_picture_path(content))

    def picture(self, content: str) -> bytes | None:
        """The bytes of a picture's file; None: it is not there, or damaged and set aside."""
        path = _picture_path(content)

        def read() -> bytes:
            stored = self.files.read(path)
            if hashlib.sha256(stored[32:]).digest() != stored[:32]:
                raise Damaged(f"{self.uri}/{path} is damaged: its bytes are not those that were written.")
            return stored[32:]

        return _unless_gone(lambda: self._guarded(path, read))

    # Runs

    def write_run(self, run_id: str, record: RunRecord) -> None:
        """Replace a run's heartbeat."""
        self._write(f"runs/{run_id}.json", msgspec.json.format(msgspec.json.encode(record), indent=1))

    def runs(self) -> dict[str, RunRecord]:
        """Every run's last heartbeat, oldest first; damaged ones are set aside."""
        found: dict[str, RunRecord] = {}
        for name in self.files.names("runs"):
            if name.endswith(".json") and (record := self.run_record(f"runs/{name}")) is not None:
                found[name.removesuffix(".json")] = record
        return found

    def models(self) -> dict[str, dict[str, int]]:
        """Elements of each model that was swept, by revision, as the run knew them that knew most: RunRecord.models."""
        found: dict[str, dict[str, int]] = {}
        for record in self.runs().values():
            for revision, elements in record.models.items():
                found[revision] = max(found.get(revision, {}), elements, key=len)
        return found

    def run_record(self, path: str) -> RunRecord | None:
        """One heartbeat; None if it is damaged."""

        def read() -> RunRecord:
            try:
                return msgspec.json.decode(self.files.read(path), type=RunRecord)
            except (msgspec.DecodeError, RecursionError) as error:
                raise Damaged(f"{self.uri}/{path} is damaged: {error}.") from error

        return _unless_gone(lambda: self._guarded(path, read))


def _unless_gone(read: Callable[[], T]) -> T | None:
    """The value that a reader gives; None where the file is not there, or damaged and set aside."""
    try:
        return read()
    except (Damaged, FileNotFoundError):
        return None


def _latest(rows: Iterable[TrialRow]) -> dict[str, TrialRow]:
    latest: dict[str, TrialRow] = {}
    for row in rows:
        if row.trial_id not in latest or latest[row.trial_id].created_at <= row.created_at:
            latest[row.trial_id] = row
    return latest


def _scores_path(cell_id: str) -> str:
    return f"scores/cell={cell_id}/scores.parquet"


def _validation_path(validation_id: str) -> str:
    return f"validations/{validation_id}.parquet"


def _picture_path(content: str) -> str:
    return f"pictures/{content}.npy"


def _answers_path(chunk_id: str) -> str:
    return f"answers/{chunk_id}.parquet"


def _part_path(cell_id: str, part: str) -> str:
    return f"parts/cell={cell_id}/{part}.parquet"
