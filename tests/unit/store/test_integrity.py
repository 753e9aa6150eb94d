"""Damaged stores: each fault is found, named and set aside; all else reads as it was written.

Nothing ends in a traceback.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweep.cli import main
from sweep.commands.status import read_status
from sweep.core.errors import SweepError
from sweep.store.integrity import check_store
from sweep.store.parquet import encode
from sweep.store.records import (
    SCHEMA_VERSION,
    SCORES_SCHEMA,
    SCORES_VERSION,
    TRIALS_SCHEMA,
    TRIALS_VERSION,
    VALIDATIONS_SCHEMA,
    RunRecord,
)
from sweep.store.store import Store
from sweep.store.upgrades import UPGRADES
from tests.scored import store_at
from tests.unit.store.test_store import CELL, PARTS, SCORES, fill, of_version, rows, trial

OTHER = "fedcba98"
OTHER_SCORES, PART = f"scores/cell={OTHER}/scores.parquet", f"parts/cell=unfinished/{PARTS[0]}.parquet"
TRIALS, RUN, VALIDATION = "trials/run-1.parquet", "runs/1.json", "validations/0123.parquet"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two finished cells, one that is not, and their trials."""
    store = Store(str(tmp_path / "store"))
    fill(store).complete(CELL, dict.fromkeys(PARTS))
    for part in PARTS:
        store.write_part(OTHER, part, rows(part, OTHER))
    store.complete(OTHER, dict.fromkeys(PARTS))
    store.write_part("unfinished", PARTS[0], rows(PARTS[0], "unfinished"))
    store.write_trials(
        "1",
        [
            trial("a", cell_id=CELL, state="done"),
            trial("b", cell_id=OTHER, state="done"),
            trial("c", cell_id="unfinished"),
        ],
    )
    store.write_run(
        "1",
        RunRecord(run_id="1", host="h", heartbeat_at="2026-01-01T00:00:00+00:00", groups_done=1, groups_total=2),
    )
    names = ("recipe", "model_revision", "held_out", "dtype")
    measured = dict.fromkeys(names, "a") | {
        "effective_bits": 4.5,
        "predicted_kl": 0.5,
        "sample": 0,
        "kl": 0.5,
        "loss_change": 0.5,
        "n_predictions": 3,
    }
    store.write_validation("0123", pa.Table.from_pylist([measured], schema=VALIDATIONS_SCHEMA))
    return tmp_path / "store"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    """One bit of the first score."""
    at = pq.ParquetFile(path).metadata.row_group(0).column(4)
    data = bytearray(path.read_bytes())
    data[(at.dictionary_page_offset or at.data_page_offset) + at.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


def edited(path: Path) -> None:
    """Someone halved the scores with pyarrow, which keeps the schema's metadata."""
    table = pq.read_table(path, partitioning=None)
    at = table.column_names.index("score")
    pq.write_table(
        table.set_column(at, table.field(at), [[None if s is None else s / 2 for s in table["score"].to_pylist()]]),
        path,
    )


def edited_name(path: Path) -> None:
    """Someone gave what was measured to another recipe."""
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.set_column(0, table.field(0), [["b"]]), path)


def foreign(path: Path) -> None:
    """Another program's Parquet."""
    pq.write_table(pq.read_table(path, partitioning=None).replace_schema_metadata(None), path)


def no_parquet(path: Path) -> None:
    path.write_text("PAR1 this is a text PAR1")


def linked_out(path: Path) -> None:
    outside = path.parents[3] / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)


def directory_linked_out(path: Path) -> None:
    outside = path.parents[3] / "outside"
    shutil.move(path.parent, outside)
    path.parent.symlink_to(outside)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "x").write_text("")


def rewritten(path: Path) -> None:
    """Someone halved the scores and wrote a table of the right schema, without the metadata that this program adds."""
    found = pq.read_table(path, partitioning=None).to_pylist()
    pq.write_table(
        pa.Table.from_pylist(
            [row | {"score": row["score"] and row["score"] / 2} for row in found], schema=SCORES_SCHEMA
        ),
        path,
    )


def linked_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def linked_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing.parquet")


def linked_inside(path: Path) -> None:
    path.unlink()
    path.symlink_to(next(parent for parent in path.parents if parent.name == "store") / SCORES)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def of_another_cell(path: Path) -> None:
    shutil.copy(path.parents[2] / SCORES, path)


def other_columns(path: Path) -> None:
    path.write_bytes(of_version(SCHEMA_VERSION, TRIALS_SCHEMA))


def too_old(path: Path) -> None:
    path.write_bytes(of_version(0, SCORES_SCHEMA))


def text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content)

    write.__name__ = f"text {content[:30]!r}"
    return write


SCORES_FAULTS = [cut, empty, flipped, edited, foreign, no_parquet, linked_out, of_another_cell, other_columns, too_old]
NO_FILES = [linked_to_itself, linked_to_nothing, linked_inside, a_pipe]
SCORES_FAULTS += [rewritten, *NO_FILES]
FAULTS = [(OTHER_SCORES, damage) for damage in SCORES_FAULTS]
FAULTS += [(path, damage) for path in (PART, TRIALS, VALIDATION, RUN) for damage in NO_FILES]
FAULTS += [(PART, rewritten)]
FAULTS += [
    (RUN, text(content))
    for content in (
        '{"started_at": 5}',
        '{"eta_seconds": NaN}',
        '{"models": null}',
        '{"models": {"r": 1}}',
        "[" * 100_000,
    )
]
FAULTS += [(PART, damage) for damage in (cut, flipped, linked_out, of_another_cell)]
FAULTS += [(TRIALS, damage) for damage in (cut, empty, foreign, no_parquet)]
FAULTS += [(VALIDATION, damage) for damage in (cut, edited_name, foreign)]
FAULTS += [
    (RUN, damage) for damage in (cut, text("[]"), text('{"heartbeat_at": "yesterday"}'), text('{"heartbeat_at": 5}'))
]


@pytest.mark.parametrize(
    ("path", "damage"), FAULTS, ids=[f"{path.split('/')[0]}-{damage.__name__}" for path, damage in FAULTS]
)
def test_a_damaged_file_is_named_set_aside_and_never_read(
    path: str, damage: Callable[[Path], None], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = {
        name: (root / name).read_bytes()
        for name in (SCORES, OTHER_SCORES, PART, TRIALS, VALIDATION, RUN)
        if name != path
    }
    damage(root / path)
    status = read_status(Store(str(root), repairs=False))  # a reader moves nothing, and says what it passed over
    assert [path in line for line in status.damaged] == ([True] if path in (TRIALS, RUN) else [])
    assert os.path.lexists(root / path)
    assert main(["doctor", "--store", "--json", f"store.uri={root}"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert [finding["verdict"] for finding in findings if finding["subject"] == path] == ["warning"]
    assert not os.path.lexists(root / path)
    (kept,) = (place for place in (root / "quarantine").glob(f"*/{path}*") if os.path.lexists(place))
    assert (kept.parents[len(path.split("/")) - 1] / "why.txt").read_text()
    gone = {TRIALS: [PART]}.get(path, [])  # without its trial a part is nobody's
    assert {name: (root / name).read_bytes() for name in sound if (root / name).exists()} == {
        n: b for n, b in sound.items() if n not in gone
    }
    again = [finding for finding in check_store(Store(str(root))) if finding.verdict != "ok"]
    assert all("has no scores" in finding.text for finding in again)


@pytest.mark.parametrize("damage", SCORES_FAULTS)
def test_a_run_takes_a_damaged_cell_for_unfinished(damage: Callable[[Path], None], root: Path) -> None:
    damage(root / OTHER_SCORES)
    store = Store(str(root))
    assert store.whole_scores(OTHER) is None
    assert not store.is_finished(OTHER)
    assert store.whole_scores(CELL) is not None
    for part in PARTS:
        store.write_part(OTHER, part, rows(part, OTHER))
    store.complete(OTHER, dict.fromkeys(PARTS))
    assert store.scores(OTHER).num_rows == 2 * len(PARTS)


@pytest.mark.parametrize("damage", [a_directory, directory_linked_out])
def test_a_directory_in_a_files_place_is_no_file(damage: Callable[[Path], None], root: Path) -> None:
    damage(root / OTHER_SCORES)
    assert Store(str(root), repairs=False).whole_scores(OTHER) is None
    assert any(
        finding.subject.startswith(f"scores/cell={OTHER}") and finding.verdict == "warning"
        for finding in check_store(Store(str(root)))
    )
    assert not any(finding.subject.startswith(f"scores/cell={OTHER}") for finding in check_store(Store(str(root))))


def test_a_newer_programs_file_is_left_alone_and_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = of_version(SCORES_VERSION + 1, SCORES_SCHEMA)
    (root / OTHER_SCORES).write_bytes(newer)
    assert main(["doctor", "--store", f"store.uri={root}"]) == 2
    assert "Use the program that wrote it" in capsys.readouterr().out
    assert (root / OTHER_SCORES).read_bytes() == newer


@pytest.mark.parametrize("verb", [["publish"], ["solve", "--bits", "4"]])
def test_other_commands_name_what_they_set_aside(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store_at(tmp_path / "store")
    copied = tmp_path / "store" / "trials" / "run-copy.parquet"
    shutil.copy(min(copied.parent.iterdir()), copied)
    main([*verb, f"store.uri={tmp_path / 'store'}"])
    assert f"Set aside in {tmp_path / 'store'}/quarantine: {copied} is damaged" in capsys.readouterr().err


def test_a_newer_programs_file_hides_nothing_else(root: Path) -> None:
    (root / TRIALS).write_bytes(of_version(TRIALS_VERSION + 1, TRIALS_SCHEMA))
    cut(root / OTHER_SCORES)
    found = {finding.subject: finding.verdict for finding in check_store(Store(str(root)))}
    assert (found[OTHER_SCORES], found[TRIALS]) == ("warning", "error")


def test_what_lies_outside_the_stores_own_folders_is_named_and_stays(root: Path) -> None:
    """As where store.uri is one directory too high."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    (root.parent / "thesis.txt").write_text("mine")
    found = check_store(Store(str(root.parent)))
    assert [finding.verdict for finding in found if "thesis" in finding.subject] == ["warning"]
    assert {path: path.read_bytes() for path in before} == before
    assert (root.parent / "thesis.txt").exists()


def test_parts_are_kept_where_the_scores_that_they_made_are_damaged(root: Path) -> None:
    store = Store(str(root))
    for part in PARTS:
        store.write_part(OTHER, part, rows(part, OTHER))
    cut(root / OTHER_SCORES)
    store.drop_leftovers()
    store.complete(OTHER, dict.fromkeys(PARTS))
    assert store.scores(OTHER).num_rows == 2 * len(PARTS)


def test_a_link_within_the_store_deletes_nothing(root: Path) -> None:
    shutil.rmtree(root / "parts")
    (root / "parts").symlink_to("scores")
    with pytest.raises(SweepError, match="reached by a link"):
        Store(str(root)).drop_leftovers()
    assert Store(str(root)).is_finished(CELL)


def test_a_store_that_can_only_be_read_is_no_traceback(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    cut(root / OTHER_SCORES)
    (root / "scores" / ".x.tmp").write_bytes(b"")
    os.utime(root / "scores" / ".x.tmp", (0, 0))
    for name in ("write", "move", "remove"):
        monkeypatch.setattr(Store(str(root)).files.__class__, name, refuse)
    found = [finding for finding in check_store(Store(str(root))) if finding.verdict == "error"]
    assert any("Permission denied" in finding.text for finding in found)
    assert (root / OTHER_SCORES).exists()


def test_an_older_programs_rows_are_upgraded_step_by_step(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0, made up for this test, called predicted_kl otherwise."""
    now = rows(PARTS[0])
    old = now.rename_columns(
        ["kl" if name == "predicted_kl" else name for name in now.column_names]
    ).replace_schema_metadata({"schema_version": "0"})
    data = encode(old, SCORES)
    (root / SCORES).write_bytes(data)
    monkeypatch.setitem(UPGRADES, ("cell_id", 0), lambda table: table.rename_columns(SCORES_SCHEMA.names))
    found = Store(str(root)).scores(CELL)
    assert found.equals(now)
    assert found.schema.equals(SCORES_SCHEMA, check_metadata=True)
    assert (root / SCORES).read_bytes() == data  # readers of other versions may be about


def test_scores_of_version_1_know_no_kinds_of_tokens(root: Path) -> None:
    now = rows(PARTS[0])
    added = [
        name
        for name in now.column_names
        if name.startswith(("score_", "sample_scores_", "sample_predictions", "projections"))
    ]
    old = now.drop_columns(added).replace_schema_metadata({"schema_version": "1"})
    (root / SCORES).write_bytes(encode(old, SCORES))
    found = Store(str(root)).scores(CELL)
    assert found.schema.equals(SCORES_SCHEMA, check_metadata=True)
    assert found.drop_columns(added).equals(now.drop_columns(added))
    assert all(found[name].null_count == len(found) for name in added)


def test_scores_of_version_2_have_no_projections(root: Path) -> None:
    now = rows(PARTS[0])
    old = now.drop_columns(["projections"]).replace_schema_metadata({"schema_version": "2"})
    (root / SCORES).write_bytes(encode(old, SCORES))
    found = Store(str(root)).scores(CELL)
    assert found.schema.equals(SCORES_SCHEMA, check_metadata=True)
    assert found.drop_columns(["projections"]).equals(now.drop_columns(["projections"]))
    assert found["projections"].null_count == len(found)


def test_what_killed_writers_left_goes_and_what_is_being_written_stays(root: Path) -> None:
    old, new = (
        root / f"scores/cell={CELL}/.scores.parquet.1-ff.tmp",
        root / f"scores/cell={CELL}/.scores.parquet.2-ff.tmp",
    )
    for path in (old, new):
        path.write_bytes(b"PAR1")
    os.utime(old, (time.time() - 3600,) * 2)
    (finding,) = (finding for finding in check_store(Store(str(root))) if finding.verdict == "warning")
    assert (finding.subject, old.exists(), new.exists()) == (str(old.relative_to(root)), False, True)


def test_parts_of_finished_cells_go_and_foreign_files_are_named(root: Path) -> None:
    store = Store(str(root))
    store.write_part(CELL, PARTS[0], rows(PARTS[0]))
    (root / "scores" / "notes.txt").write_text("mine")
    (root / "README").write_text("mine")
    found = {finding.subject: finding.text for finding in check_store(store) if finding.verdict == "warning"}
    assert found.keys() == {f"parts/cell={CELL}/{PARTS[0]}.parquet", "scores/notes.txt", "README"}
    assert (root / "README").exists()
    assert not (root / "scores" / "notes.txt").exists()
    assert store.files.names(f"parts/cell={CELL}") == []


def test_what_others_put_among_parts_stays_when_their_cell_is_finished(root: Path) -> None:
    store = Store(str(root))
    for name in ("notes.txt", "nested/thesis.txt", ".hidden"):
        path = root / f"parts/cell={OTHER}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for part in PARTS:
        store.write_part(OTHER, part, rows(part, OTHER))
    before = {path for path in (root / f"parts/cell={OTHER}").rglob("*") if path.suffix != ".parquet"}
    store.complete(OTHER, dict.fromkeys(PARTS))
    store.drop_leftovers()
    assert set((root / f"parts/cell={OTHER}").rglob("*")) == before


def test_tables_of_runs_that_were_killed_are_joined_and_read_the_same(root: Path) -> None:
    store = Store(str(root))
    for run in ("2", "3"):
        store.write_trials(run, [trial("d", second=int(run), cell_id=CELL)])
    before = store.trials()
    assert any("3 tables of ended runs joined" in finding.text for finding in check_store(store))
    assert len(store.files.names("trials")) == 1
    assert store.trials() == before


def test_scores_of_two_revisions_of_one_model_are_told_apart(root: Path) -> None:
    store = Store(str(root))
    store.write_trials("2", [trial("d", second=2, cell_id=CELL, model_revision="newer", state="done")])
    (mixed,) = read_status(store).mixed
    assert mixed == "model x: the store holds 2 revisions: x (3 trials), newer (1 trial); they are never mixed"


@pytest.mark.parametrize(("other", "n_findings"), [("1+bf16_scales.1", 0), ("2", 1)])
def test_score_versions_of_some_formats_alone_are_no_finding(root: Path, other: str, n_findings: int) -> None:
    versions = {"d": '{"score": "1"}', "e": json.dumps({"score": other})}
    Store(str(root)).write_trials("2", [trial(name, versions=text) for name, text in versions.items()])
    assert len([one for one in read_status(Store(str(root))).mixed if one.startswith("score version")]) == n_findings


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "scores/../../outside", "scores/a\0b"])
def test_a_path_that_climbs_is_refused(path: str, root: Path) -> None:
    store = Store(str(root))
    removed = lambda: store.files.remove_directory(path, re.compile(".*"))  # noqa: E731 -- as those below
    for touch in (lambda: store.files.read(path), lambda: store.files.write(path, b""), removed):
        with pytest.raises(SweepError, match="no path under a root"):
            touch()
