"""The store: cells appear whole, damage is refused, a trial's latest event counts, and stock readers read it."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweep.config.compose import expand
from sweep.core.errors import SweepError
from sweep.store.parquet import decode, encode
from sweep.store.records import (
    ATTRIBUTES,
    SCORES_SCHEMA,
    SCORES_VERSION,
    TRIALS_SCHEMA,
    TRIALS_VERSION,
    USUAL,
    RunRecord,
    TrialRow,
)
from sweep.store.store import Store

CELL, PARTS = (
    "0123abcd",
    ["model.visual.merger", "model.layers.0", "model.layers.1"],
)  # in the model's order, not the alphabet's
IN_STORE = dict.fromkeys(PARTS)  # every part is to be read from the store
SCORES, PART = f"scores/cell={CELL}/scores.parquet", f"parts/cell={CELL}/model.layers.0.parquet"
COMPLETE = """
import os, signal, sys
from sweep.store.store import Store
store = Store(sys.argv[1])
{patch}
store.complete(sys.argv[2], dict.fromkeys(sys.argv[3:]))
"""


def whole_parts(store: Store, cell: str) -> set[str]:
    """Parts that need no scoring again."""
    return {part for part in store.part_names(cell) if store.has_part(cell, part)}


def rows(part: str, cell: str = CELL) -> pa.Table:
    """Two groups of a part; the second was never called."""
    common = {
        "cell_id": cell,
        "layer_index": 0,
        "n_predictions": 10,
        "n_samples": 2,
        "weight_elements": 64,
        "effective_bits": 4.5,
    }
    measured = {"score": len(part) / 3, "sensitivity": len(part) / 30, "sample_scores": [0.25, -0.0]}
    q = common | measured | {"group": f"{part}.q", "modules": [f"{part}.q", f"{part}.k"]}
    return pa.Table.from_pylist([q, common | {"group": f"{part}.o", "modules": [f"{part}.o"]}], schema=SCORES_SCHEMA)


def trial(trial_id: str = "t", second: int = 0, **changed: Any) -> TrialRow:
    text = dict.fromkeys((field.name for field in fields(TrialRow)), "x")
    event = {
        "trial_id": trial_id,
        "state": "planned",
        "reason": None,
        "tp": 1,
        "calibration": None,
        "draws": None,
        "created_at": datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC),
    }
    return replace(TrialRow(**text), **(event | changed))  # pyright: ignore[reportArgumentType]


def of_version(version: int | None, schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(schema.with_metadata({"schema_version": str(version)} if version else None).empty_table(), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture(params=["path", "memory://", "s3://"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "s3://":
        request.getfixturevalue("s3")
        yield Store("s3://bucket/store")
        return
    yield Store(str(tmp_path / "store") if request.param == "path" else "memory://test-store/store")
    if request.param == "memory://":
        fs = fsspec.filesystem("memory")
        if fs.exists("/test-store"):
            fs.rm("/test-store", recursive=True)


def fill(store: Store, *parts: str) -> Store:
    for part in parts or PARTS:
        store.write_part(CELL, part, rows(part))
    return store


def test_a_cell_is_finished_when_its_parts_are_joined_in_the_order_given(store: Store) -> None:
    for n, part in enumerate(PARTS, start=1):
        fill(store, part)
        assert whole_parts(store, CELL) == set(PARTS[:n])
    assert not store.is_finished(CELL)
    store.complete(CELL, IN_STORE)
    assert store.is_finished(CELL)
    scores = store.scores(CELL)
    assert scores.schema.equals(SCORES_SCHEMA, check_metadata=True)
    assert scores["group"].to_pylist() == [f"{part}.{module}" for part in PARTS for module in "qo"]
    assert scores["score"].to_pylist() == [
        value for part in PARTS for value in (len(part) / 3, None)
    ]  # doubles, to the last bit
    assert scores["sample_scores"].to_pylist()[:2] == [[0.25, 0.0], None]
    assert whole_parts(store, CELL) == set()
    assert store.files.names("parts") == []


def test_equal_rows_are_equal_bytes(tmp_path: Path) -> None:
    one, other = fill(Store(str(tmp_path / "one"))), fill(Store(str(tmp_path / "other")), *reversed(PARTS))
    assert one.files.read(PART) == other.files.read(PART)
    one.complete(CELL, IN_STORE)
    other.complete(CELL, {part: rows(part) for part in PARTS})  # scored just now, still in memory
    assert one.files.read(SCORES) == other.files.read(SCORES)


def test_a_second_writer_of_a_cell_does_no_harm(store: Store) -> None:
    fill(store).complete(CELL, IN_STORE)
    before = store.files.read(SCORES)
    fill(store, PARTS[2]).complete(CELL, IN_STORE)  # the first writer has dropped the parts that this one counts on
    assert store.files.read(SCORES) == before
    assert store.files.names("parts") == []


def test_a_cell_that_lacks_a_part_is_not_finished(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        fill(store, *PARTS[:2]).complete(CELL, IN_STORE)
    assert not store.is_finished(CELL)
    assert whole_parts(store, CELL) == set(PARTS[:2])


@pytest.mark.parametrize(
    ("patch", "finished"),
    [
        ("os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)", False),  # all bytes written, not yet renamed
        ("store.drop_parts = lambda _: os.kill(os.getpid(), signal.SIGKILL)", True),
    ],
)
def test_a_writer_killed_while_completing_loses_nothing(patch: str, finished: bool, tmp_path: Path) -> None:
    store = fill(Store(str(tmp_path)))
    ended = subprocess.run(
        [sys.executable, "-c", COMPLETE.format(patch=patch), str(tmp_path), CELL, *PARTS], check=False
    )
    assert ended.returncode == -signal.SIGKILL
    assert store.is_finished(CELL) == finished
    assert len(list(tmp_path.glob("scores/*/*.parquet"))) == finished  # what a reader without our code globs
    assert whole_parts(store, CELL) == set(PARTS)
    store.complete(CELL, IN_STORE)
    assert store.scores(CELL).num_rows == 2 * len(PARTS)
    assert store.files.names("parts") == []


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def with_another_value(data: bytes) -> bytes:
    """The first group's score, changed in place: the file still opens."""
    at = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(SCORES_SCHEMA.get_field_index("score"))
    last = (at.dictionary_page_offset or at.data_page_offset) + at.total_compressed_size - 1
    return data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :]


def with_another_byte_in_the_footer(data: bytes) -> bytes:
    return data.replace(b"weight_elements", b"weight_\xffelement")


DAMAGES = [cut, empty, with_another_value, with_another_byte_in_the_footer]


def test_parts_that_a_finished_cell_has_left_are_dropped_and_no_others(store: Store) -> None:
    fill(store).complete(CELL, IN_STORE)
    fill(store, PARTS[1])  # as if the writer had been killed before it dropped this one
    store.write_part("other", PARTS[0], rows(PARTS[0], "other"))
    before = store.files.read(SCORES)
    store.drop_leftovers()
    assert store.files.names(f"parts/cell={CELL}") == []
    assert whole_parts(store, "other") == {PARTS[0]}
    assert store.files.read(SCORES) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_not_finished_and_scored_again(damage: Callable[[bytes], bytes], store: Store) -> None:
    fill(store).files.write(PART, damage(store.files.read(PART)))
    assert whole_parts(store, CELL) == {PARTS[0], PARTS[2]}
    assert not store.files.exists(PART)
    fill(store, PARTS[1]).complete(CELL, IN_STORE)
    assert store.scores(CELL)["group"].to_pylist() == [f"{part}.{module}" for part in PARTS for module in "qo"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_never_read_as_scores(damage: Callable[[bytes], bytes], store: Store) -> None:
    fill(store).files.write(PART, damage(store.files.read(PART)))
    with pytest.raises(SweepError, match=rf"{PART} is damaged"):
        store.complete(CELL, IN_STORE)
    assert not store.is_finished(CELL)
    fill(store).complete(CELL, IN_STORE)
    store.files.write(SCORES, damage(store.files.read(SCORES)))
    with pytest.raises(SweepError, match=rf"{SCORES} is damaged: .* It is set aside; type the same sweep run again"):
        store.scores(CELL)
    assert not store.is_finished(CELL)


def test_a_file_of_a_newer_schema_version_is_refused_and_kept(store: Store) -> None:
    scores, trials = of_version(SCORES_VERSION + 1, SCORES_SCHEMA), of_version(TRIALS_VERSION + 1, TRIALS_SCHEMA)
    contents = {SCORES: scores, PART: scores, "trials/run-r.parquet": trials}
    for path, content in contents.items():
        store.files.write(path, content)
    for known, read in (
        (SCORES_VERSION, lambda: store.scores(CELL)),
        (SCORES_VERSION, lambda: whole_parts(store, CELL)),
        (SCORES_VERSION, lambda: store.complete(CELL, {PARTS[1]: None})),
        (TRIALS_VERSION, store.trials),
    ):
        with pytest.raises(SweepError, match=f"has schema version {known + 1}; this program reads {known}"):
            read()
    assert {path: store.files.read(path) for path in contents} == contents


def of_version_1(*rows: TrialRow) -> bytes:
    """A file of trials as version 1 wrote it: without algorithm, scales, dtype and tp."""
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=TRIALS_SCHEMA)
    table = table.drop_columns(["algorithm", "scales", "dtype", "tp", "calibration", "draws"]).replace_schema_metadata(
        {"schema_version": "1"}
    )
    return encode(table, "trials/run-old.parquet")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("algorithm", "scales"), [("max", "private"), ("mse", "private"), ("awq_lite", "fused")])
def test_a_trial_of_version_1_has_the_algorithm_and_scales_of_its_config_and_the_dtype_in_its_ids_hash(
    dtype: str, algorithm: str, scales: str, store: Store
) -> None:
    variant = [value for value in (algorithm, scales) if value not in ("max", "private")]
    asked = ["m", "rev", "data", "texts", "small", "wint8_aint8", "default", "lm_only", False, "gradient", "layerwise"]
    digest = hashlib.sha256(json.dumps([*asked, dtype, CELL, *variant]).encode()).hexdigest()[:10]
    config = {"model": {"dtype": "auto"}, "sensitivity": {"lm_head": False}}
    config["sensitivity"] |= {"quant_algorithm": algorithm} if algorithm != "max" else {}  # older than the key
    config["sensitivity"] |= {"scales": scales} if scales != "private" else {}
    names = {"model": "m", "model_revision": "rev", "dataset_revision": "data", "dataset": "texts", "size": "small"}
    names |= {"quant_pair": "wint8_aint8", "quant_granularity": "default", "coverage": "lm_only"}
    names |= {"method": "gradient", "engine": "layerwise", "config": json.dumps(config), "cell_id": CELL}
    old = trial(f"wint8_aint8-default-small-{digest}", **names)
    store.files.write("trials/run-old.parquet", of_version_1(old, replace(old, trial_id="made-0123456789")))
    known, unknown = store.trials().values()
    assert known == replace(old, algorithm=algorithm, scales=scales, dtype=dtype)
    assert unknown.dtype is None  # no dtype gives that hash


def test_a_typed_dtype_of_version_1_is_the_one_of_its_config(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.files.write("trials/run-old.parquet", of_version_1(trial(config='{"model": {"dtype": "bfloat16"}}')))
    assert store.trials()["t"].dtype == "bfloat16"


def test_a_trial_of_version_2_was_scored_on_one_rank(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    table = pa.Table.from_pylist([asdict(trial())], schema=TRIALS_SCHEMA)
    table = table.drop_columns(["tp", "calibration", "draws"])
    table = table.replace_schema_metadata({"schema_version": "2"})
    store.files.write("trials/run-old.parquet", encode(table, "trials/run-old.parquet"))
    assert store.trials() == {"t": trial(tp=1)}


def test_a_program_of_version_1_says_that_the_trials_are_newer(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_trials("r", [trial()])
    older = TRIALS_SCHEMA.with_metadata({"schema_version": "1"})
    with pytest.raises(SweepError, match=r"has schema version 5; this program reads 1\. Use the program that wrote it"):
        decode(store.files.read("trials/run-r.parquet"), "trials/run-r.parquet", "here", older)


def test_a_trial_is_what_its_latest_event_says(store: Store) -> None:
    store.write_trials("1", [trial("a", 1), trial("b", 1)])
    store.write_trials(
        "2",
        [
            trial("a", 5, state="failed", reason="NaN in model.layers.3.mlp.down_proj"),
            trial("c", 5, state="skipped", cell_id=None),
        ],
    )
    store.write_trials(
        "1", [trial("a", 9, state="done"), trial("b", 3, state="running")]
    )  # the run's earlier record is replaced
    found = store.trials()
    assert list(found) == ["a", "b", "c"]
    assert found == {
        "a": trial("a", 9, state="done"),
        "b": trial("b", 3, state="running"),
        "c": trial("c", 5, state="skipped", cell_id=None),
    }


def write_runs(store: Store) -> None:
    store.write_trials("1", [trial("a", 9, state="done"), trial("b", 1)])
    store.write_trials("2", [trial("b", 2, state="failed", reason="why"), trial("a", 3)])
    store.write_trials("3", [trial("c", 4), trial("b", 5, state="running")])


@pytest.mark.parametrize("ended", [[], ["1"], ["1", "2"], ["1", "2", "3"], ["2", "3"], ["1", "nobody"]])
def test_compaction_changes_nothing_for_readers(ended: list[str], store: Store) -> None:
    write_runs(store)
    before = store.trials()
    for _ in range(2):
        store.compact_trials(ended)
        assert store.trials() == before
    live = [f"run-{run}.parquet" for run in "123" if run not in ended or len(ended) < 2 or ended == ["1", "nobody"]]
    assert [name for name in store.files.names("trials") if name.startswith("run-")] == live
    store.write_trials("4", [trial("b", 7, state="done")])
    store.compact_trials([*ended, "4"])
    assert store.trials() == before | {"b": trial("b", 7, state="done")}


def test_a_compaction_cut_short_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_runs(store)
    before = store.trials()
    with monkeypatch.context() as patch:
        patch.setattr(store.files, "remove", lambda _: None)  # the joined file is there, and the old ones still are
        store.compact_trials(["1", "2"])
    assert store.trials() == before
    store.compact_trials(["1", "2"])
    assert store.trials() == before
    assert len(store.files.names("trials")) == 2


def test_a_reader_whom_a_compaction_overtakes_misses_no_trial(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_runs(store)
    before = store.trials()
    read = store.files.read

    def overtaken(path: str) -> bytes:
        monkeypatch.setattr(store.files, "read", read)
        Store(store.uri).compact_trials(["1", "2", "3"])  # after the listing, before the first file is read
        return read(path)

    monkeypatch.setattr(store.files, "read", overtaken)
    assert store.trials() == before


def test_a_runs_heartbeat_is_the_last_one_written_oldest_run_first(store: Store) -> None:
    for run_id, groups in (("20260102T000000-7", 1), ("20260101T000000-9", 5), ("20260102T000000-7", 2)):
        store.write_run(run_id, RunRecord(run_id=run_id, groups_done=groups))
    assert [(run_id, record.groups_done, record.eta_seconds) for run_id, record in store.runs().items()] == [
        ("20260101T000000-9", 5, None),
        ("20260102T000000-7", 2, None),
    ]


def test_every_attribute_of_a_trial_is_a_column_and_a_key_of_the_config() -> None:
    config = expand([], multirun=False).points[0]
    values = {name: attrgetter(key)(config) for name, key in ATTRIBUTES.items()}
    assert set(values) <= set(TRIALS_SCHEMA.names)
    assert {name: values[name] for name in USUAL} == USUAL


def test_an_empty_store_holds_nothing(store: Store) -> None:
    store.compact_trials(["1"])
    assert (store.trials(), store.runs(), whole_parts(store, CELL), store.is_finished(CELL)) == ({}, {}, set(), False)


def test_duckdb_reads_the_store_without_our_code(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    store = fill(Store(str(tmp_path)))
    store.complete(CELL, IN_STORE)
    store.write_part("unfinished", PARTS[0], rows(PARTS[0], "unfinished"))
    store.write_trials("1", [trial("a", state="done", cell_id=CELL), trial("b", cell_id="unfinished")])
    query = (
        f"select t.trial_id, count(*), sum(s.score), max(len(s.sample_scores)) from '{tmp_path}/scores/*/*.parquet' s "
    )
    query += f"join '{tmp_path}/trials/*.parquet' t using (cell_id) group by 1"
    assert duckdb.sql(query).fetchall() == [("a", 6, pytest.approx(sum(len(part) for part in PARTS) / 3, rel=1e-15), 2)]
    columns = [
        name
        for name, *_ in duckdb.sql(
            f"describe select * from read_parquet('{tmp_path}/scores/*/*.parquet', hive_partitioning=false)"
        ).fetchall()
    ]
    assert columns == SCORES_SCHEMA.names
