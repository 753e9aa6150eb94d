"""Encodes a table of the store as a file's bytes, and decodes it: schema version, checksums, digest of rows and path.

Page checksums find flipped bits. The digest finds rows that were edited with a Parquet tool, and files that were copied
to another's place.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.core.errors import SweepError
from sweep.store.upgrades import UPGRADES

_VERSION: Final = b"schema_version"
_DIGEST: Final = b"rows_sha256"
_FIRST_WITH_DIGEST: Final = 1  # schema version


class Damaged(SweepError):
    """A file that cannot be read back as it was written."""


def encode(table: pa.Table, path: str, *, short_lived: bool = False) -> bytes:
    """A file's bytes; equal rows at an equal path give equal bytes.

    Args:
        table: rows, with a schema of sweep.store.records.
        path: where in the store the file will be.
        short_lived: it is written beside the scoring and lives for seconds: a third of the time, for as many bytes.
    """
    sink = pa.BufferOutputStream()
    metadata = {**(table.schema.metadata or {}), _DIGEST: _digest(table, path)}
    pq.write_table(
        table.replace_schema_metadata(metadata),
        sink,
        compression="lz4" if short_lived else "zstd",
        # The stub knows no names.
        use_dictionary=False if short_lived else _dictionaries(table),  # pyright: ignore[reportArgumentType]
        write_statistics=not short_lived,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _dictionaries(table: pa.Table) -> bool | list[str]:
    """Columns that get a dictionary: of scores the texts, and the samples' predictions, equal in all rows.

    Of per-sample scores, all different, one makes the file larger, and takes three quarters of the time.
    """
    if "sample_scores" not in table.column_names:
        return True
    return ["cell_id", "group", "modules.list.element", "sample_predictions.list.element"]


def decode(data: bytes, path: str, where: str, schema: pa.Schema) -> pa.Table:
    """The rows of a file, upgraded if an earlier version of this program wrote them.

    Args:
        data: the file's bytes.
        path: where in the store it is.
        where: its path or URL, for messages.
        schema: of sweep.store.records, which the rows must have.

    Raises:
        Damaged: these are not the bytes, or not the rows, that this program put there.
        SweepError: a newer version of this program wrote it.
    """
    try:
        # Threads, and what pq.read_table brings for whole data sets, take four times as long as these small files.
        table: pa.Table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
        known = int(schema.metadata[_VERSION])
        version = _version(metadata, where, known)
        digest = metadata.get(_DIGEST)
        if digest is None and version >= _FIRST_WITH_DIGEST:  # as tools leave it that rewrite a table
            raise Damaged(f"{where} is damaged: it has no digest of its rows, so that another program has written it.")
        if digest is not None and digest != _digest(table, path):
            raise Damaged(f"{where} is damaged: its rows were changed, or belong elsewhere, after they were written.")
        for step in range(version, known):
            if (upgrade := UPGRADES.get((schema.names[0], step))) is None:
                raise Damaged(
                    f"{where} is damaged: schema version {version} is older than any that this program upgrades."
                )
            table = upgrade(table)
        return table.cast(schema)  # pyarrow calls a list's items otherwise once they have been in a file
    except (pa.ArrowException, ValueError, OSError) as error:
        raise Damaged(f"{where} is damaged: {str(error).splitlines()[0]}") from error


def _version(metadata: Mapping[bytes, bytes], where: str, known: int) -> int:
    text = metadata.get(_VERSION, b"").decode(errors="replace")
    if not text.isdecimal():
        raise Damaged(f"{where} is damaged: it has no schema version, so that this program did not write it.")
    if int(text) > known:
        raise SweepError(
            f"{where} has schema version {text}; this program reads {known}. "
            "Use the program that wrote it, or another store.uri."
        )
    return int(text)


def _digest(table: pa.Table, path: str) -> bytes:
    digest = hashlib.sha256(path.encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(name.encode())
        for value in _plain(pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)):
            digest.update(value)
    return digest.hexdigest().encode()


def _plain(values: pa.Array) -> list[bytes | memoryview]:
    """An array's content as bytes that depend on nothing but the values and which of them are NULL.

    Without `fill_null` and `to_numpy`, which import pandas: a quarter of a second.
    """
    missing, present = _numbers(values.is_null()), values.drop_null()
    if pa.types.is_list(values.type):
        return [missing, *_plain(present.value_lengths()), *_plain(present.flatten())]
    if pa.types.is_string(values.type):
        _, offsets, content = present.buffers()
        ends = np.zeros(1, np.int32)
        if offsets:
            ends = np.frombuffer(offsets, np.int32)[present.offset : present.offset + len(present) + 1]
        return [missing, np.diff(ends).tobytes(), memoryview(content)[ends[0] : ends[-1]] if content else b""]
    return [missing, _numbers(present.cast(pa.int64()) if pa.types.is_timestamp(values.type) else present)]


def _numbers(values: pa.Array) -> memoryview:
    """The bytes of numbers, none of them NULL."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    size = values.type.bit_width // 8
    return memoryview(values.buffers()[1] or b"")[values.offset * size : (values.offset + len(values)) * size]
