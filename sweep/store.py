"""The Parquet store: the only truth about what is measured. Readers need nothing of ours.

``parts/cell=<id>/<part>.parquet`` hold a cell's finished decoder layers; ``scores/cell=<id>/scores.parquet`` appears once,
whole, when the cell is complete. Equal inputs give equal bytes, so two writers of one cell do no harm.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sweep.errors import SweepError
from sweep.files import Files
from sweep.records import SCHEMA_VERSION, SCORES_SCHEMA, TRIALS_SCHEMA, VALIDATIONS_SCHEMA, TrialRow

# A part lives for seconds and is written beside the scoring: a third of the time, for as many bytes.
_PART: Final[dict[str, Any]] = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
# Dictionaries for texts alone: of per-sample scores, all different, one makes the file larger, and takes three quarters of the time.
_SCORES: Final[dict[str, Any]] = {"compression": "zstd", "use_dictionary": ["cell_id", "group", "modules.list.element"]}


class _Damaged(SweepError):
    """A file of the store that cannot be read back whole."""


class Store:
    """Cells, trials and runs under one root."""

    def __init__(self, uri: str) -> None:
        """Open a store; it need not exist yet.

        Args:
            uri: absolute local path or fsspec URL.
        """
        self.uri = uri
        self.files = Files(uri)

    # Cells

    def is_finished(self, cell_id: str) -> bool:
        """Whether the cell's scores are complete."""
        return self.files.exists(_scores_path(cell_id))

    def part_names(self, cell_id: str) -> set[str]:
        """Names of the parts of an unfinished cell, readable or not."""
        return {name.removesuffix(".parquet") for name in self.files.names(f"parts/cell={cell_id}") if name.endswith(".parquet")}

    def has_part(self, cell_id: str, part: str) -> bool:
        """Whether a part of an unfinished cell is there and needs no scoring again; a damaged one is removed.

        Raises: SweepError: it is of a newer schema version.
        """
        try:
            self._read_part(cell_id, part)
        except (_Damaged, FileNotFoundError):  # not found: another writer has just completed the cell
            return False
        return True

    def write_part(self, cell_id: str, part: str, rows: pa.Table) -> None:
        """Keep one finished decoder layer (or top-level block) of a cell; rows as in SCORES_SCHEMA."""
        self.files.write(_part_path(cell_id, part), _parquet(rows, _PART))

    def complete(self, cell_id: str, parts: Mapping[str, pa.Table | None]) -> None:
        """Join the parts, in this order, into the cell's scores and drop them.

        Args:
            cell_id: the cell.
            parts: every part by name; None: read it from the store.

        Raises: SweepError: a part is not readable; run again and it is scored again.
        """
        try:
            table = pa.concat_tables([self._read_part(cell_id, part) if rows is None else rows for part, rows in parts.items()])
            self.files.write(_scores_path(cell_id), _parquet(table.combine_chunks(), _SCORES))
        except FileNotFoundError:
            if not self.is_finished(cell_id):  # else another writer of the same bytes was faster, and dropped the parts
                raise
        self.drop_parts(cell_id)

    def drop_parts(self, cell_id: str) -> None:
        """Remove what is left of a finished cell's parts."""
        self.files.remove_directory(f"parts/cell={cell_id}")

    def drop_leftovers(self) -> None:
        """Remove the parts of finished cells: a writer was cut short after it had completed one."""
        for name in self.files.names("parts"):
            cell_id = name.removeprefix("cell=")
            if self.is_finished(cell_id):
                self.drop_parts(cell_id)

    def scores(self, cell_id: str) -> pa.Table:
        """A finished cell's rows (SCORES_SCHEMA).

        Raises: SweepError: the file is missing, damaged, or of a newer schema version.
        """
        path = _scores_path(cell_id)
        try:
            data = self.files.read(path)
        except FileNotFoundError as error:
            raise SweepError(f"{self.uri}/{path} is missing, though its trial is done. Type the same sweep run again: it is scored again.") from error
        return _read_parquet(data, f"{self.uri}/{path}", SCORES_SCHEMA)

    def _read_part(self, cell_id: str, part: str) -> pa.Table:
        path = _part_path(cell_id, part)
        try:
            return _read_parquet(self.files.read(path), f"{self.uri}/{path}", SCORES_SCHEMA)
        except _Damaged:
            self.files.remove(path)  # scored again
            raise

    # Trials

    def write_trials(self, run_id: str, rows: Iterable[TrialRow]) -> None:
        """Record a run's trials as they are now; the run's earlier record is replaced."""
        self.files.write(f"trials/run-{run_id}.parquet", _trials_parquet(rows))

    def trials(self) -> dict[str, TrialRow]:
        """Every trial's latest event, by trial id, in the order of their first recording."""
        names = self._trial_files()
        while True:
            try:
                return _latest(row for name in names for row in self._read_trials(name))
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
            rows = _latest(row for name in names for row in self._read_trials(name))
        except FileNotFoundError:  # another driver is at it
            return
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        self.files.write(f"trials/compact-{stamp}.parquet", _trials_parquet(rows.values()))
        for name in names:
            self.files.remove(f"trials/{name}")

    def _trial_files(self) -> list[str]:
        return [name for name in self.files.names("trials") if name.endswith(".parquet")]

    def _read_trials(self, name: str) -> list[TrialRow]:
        data = self.files.read(f"trials/{name}")
        return [TrialRow.from_mapping(row) for row in _read_parquet(data, f"{self.uri}/trials/{name}", TRIALS_SCHEMA).to_pylist()]

    # Validations

    def write_validation(self, validation_id: str, rows: pa.Table) -> None:
        """Keep what one recipe was measured to do; rows as in VALIDATIONS_SCHEMA."""
        self.files.write(_validation_path(validation_id), _parquet(rows, {"compression": "zstd"}))

    def validation(self, validation_id: str) -> pa.Table | None:
        """A validation's rows; None: not measured yet. Raises: SweepError: damaged, or of a newer schema version."""
        path = _validation_path(validation_id)
        try:
            data = self.files.read(path)
        except FileNotFoundError:
            return None
        return _read_parquet(data, f"{self.uri}/{path}", VALIDATIONS_SCHEMA)

    # Runs

    def write_run(self, run_id: str, record: dict[str, Any]) -> None:
        """Replace a run's heartbeat: whatever may differ between two equal runs."""
        self.files.write(f"runs/{run_id}.json", json.dumps(record, indent=1).encode())

    def runs(self) -> dict[str, dict[str, Any]]:
        """Every run's last heartbeat, oldest first."""
        names = [name for name in self.files.names("runs") if name.endswith(".json")]
        return {name.removesuffix(".json"): json.loads(self.files.read(f"runs/{name}")) for name in names}


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


def _part_path(cell_id: str, part: str) -> str:
    return f"parts/cell={cell_id}/{part}.parquet"


def _trials_parquet(rows: Iterable[TrialRow]) -> bytes:
    return _parquet(pa.Table.from_pylist([asdict(row) for row in rows], schema=TRIALS_SCHEMA), {"compression": "zstd"})


def _parquet(table: pa.Table, options: Mapping[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, **options)
    return sink.getvalue().to_pybytes()


def _read_parquet(data: bytes, where: str, schema: pa.Schema) -> pa.Table:
    try:
        # Threads, and what pq.read_table brings for whole data sets, take four times as long as these small files.
        table: pa.Table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        version = (table.schema.metadata or {}).get(b"schema_version", b"missing").decode()
        if version != str(SCHEMA_VERSION):
            raise SweepError(f"{where} has schema version {version}; this program reads {SCHEMA_VERSION}. Use the program that wrote it, or another store.uri.")
        return table.cast(schema)  # pyarrow calls a list's items otherwise once they have been in a file
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _Damaged(f"{where} is damaged: {str(error).splitlines()[0]} Move it away and run again: what it held is scored again.") from error
