"""Whole files or none, on a disk and behind a URL."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sweep.core.errors import SweepError
from sweep.store.files import Files

KILLED_WHILE_WRITING = """
import os, signal, sys
from sweep.store.files import Files
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # the bytes are written, the rename never comes
Files(sys.argv[1]).write("scores/a.parquet", b"new")
"""


@pytest.fixture(params=["path", "file://", "memory://", "s3://"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    if request.param == "s3://":
        request.getfixturevalue("s3")
        yield Files("s3://bucket/root")
        return
    uri = {
        "path": str(tmp_path / "root"),
        "file://": f"file://{tmp_path}/root",
        "memory://": "memory://test-files/root",
    }[request.param]
    yield Files(uri)
    if request.param == "memory://":
        fs = fsspec.filesystem("memory")
        if fs.exists("/test-files"):
            fs.rm("/test-files", recursive=True)


def test_what_is_written_is_read_and_a_second_write_replaces_it(files: Files) -> None:
    for data in (b"first, and longer", b"second", b""):
        files.write("scores/cell=a/scores.parquet", data)
        assert files.read("scores/cell=a/scores.parquet") == data
    assert files.names("scores/cell=a") == ["scores.parquet"]


def test_what_is_not_there_is_said_so(files: Files) -> None:
    files.write("trials/a.parquet", b"x")
    assert files.exists("trials/a.parquet")
    assert not files.exists("trials/b.parquet")
    assert not files.exists("elsewhere/a.parquet")
    with pytest.raises(FileNotFoundError):
        files.read("trials/b.parquet")
    assert files.names("elsewhere") == []


def test_names_are_those_of_one_level_sorted_and_not_hidden(files: Files) -> None:
    for path in (
        "parts/b.parquet",
        "parts/a.parquet",
        "parts/.a.parquet.1-ff.tmp",
        "parts/deeper/c.parquet",
        "top.json",
    ):
        files.write(path, b"x")
    assert files.names("parts") == ["a.parquet", "b.parquet", "deeper"]


def test_removing_twice_is_removing_once(files: Files) -> None:
    files.write("parts/cell=a/0.parquet", b"x")
    files.write("parts/cell=b/0.parquet", b"x")
    for _ in range(2):
        files.remove("parts/cell=a/0.parquet")
        assert not files.exists("parts/cell=a/0.parquet")
        # On a disk a directory goes with its last file.
        assert [name for name in files.names("parts") if files.names(f"parts/{name}")] == ["cell=b"]
        assert files.names("parts") == ["cell=b"] or files.uri.startswith("s3://")


OURS = re.compile("one|two")


def test_a_directory_goes_with_what_we_write_there_and_a_missing_one_is_no_error(files: Files) -> None:
    for name in ("a/b/one", "a/b/two", "a/c"):
        files.write(name, b"x")
    files.remove_directory("a/b", OURS)
    files.remove_directory("a/b", OURS)
    assert (files.names("a"), files.names("a/b")) == (["c"], [])


def test_what_others_put_into_a_directory_stays_in_it(files: Files) -> None:
    for name in ("a/b/one", "a/b/.two.txt", "a/b/notes/one"):
        files.write(name, b"x")
    files.remove_directory("a/b", OURS)
    assert files.names("a/b", hidden=True) == [".two.txt", "notes"]
    assert files.read("a/b/notes/one") == b"x"


def test_a_check_leaves_nothing_behind(files: Files) -> None:
    files.check_writable("store.uri")
    files.write("a", b"x")
    assert list(files.walk()) == ["a"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(str(tmp_path))
    files.write("scores/a.parquet", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write("scores/a.parquet", b"new")
    assert files.read("scores/a.parquet") == b"old"
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["a.parquet"]


def test_a_writer_killed_half_way_is_never_seen(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files.write("scores/a.parquet", b"old")
    ended = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert files.names("scores") == ["a.parquet"]
    assert files.read("scores/a.parquet") == b"old"
    assert [path.name for path in tmp_path.glob("*/*.parquet")] == ["a.parquet"]  # what a reader without our code globs
    files.write("scores/a.parquet", b"new")
    assert files.read("scores/a.parquet") == b"new"


def test_a_place_that_cannot_be_written_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(
        SweepError, match=r"Cannot write to .*/file/store: Not a directory\. Choose a writable place: store\.uri=DIR\."
    ):
        Files(str(tmp_path / "file" / "store")).check_writable("store.uri")


@pytest.mark.parametrize("uri", ["nosuch://bucket/store", "s4://bucket"])
def test_a_protocol_that_nobody_knows_is_refused(uri: str) -> None:
    with pytest.raises(SweepError, match=rf"Cannot open '{uri}': .*Give a local path, or install the driver"):
        Files(uri)


def test_on_s3_a_file_is_one_put_of_the_whole_content(s3: tuple[dict[str, bytes], list[str]]) -> None:
    objects, requests = s3
    files = Files("s3://bucket/store")
    for data in (b"", b"x" * 100_000):
        requests.clear()
        files.write("parts/cell=a/layers.0.parquet", data)
        assert [request for request in requests if not request.startswith(("HEAD", "GET"))] == [
            "PUT /bucket/store/parts/cell=a/layers.0.parquet"
        ]
        assert objects["bucket/store/parts/cell=a/layers.0.parquet"] == data


def test_a_walk_finds_hidden_files_and_links_and_follows_none(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "root"))
    for path in ("b/x", "a/.x.1-ff.tmp", "top"):
        files.write(path, b"")
    (tmp_path / "root" / "a" / "link").symlink_to(tmp_path)
    assert list(files.walk()) == ["top", "a/.x.1-ff.tmp", "a/link", "b/x"]
    assert [path for path in files.walk() if files.is_link(path)] == ["a/link"]


def test_a_file_moves_with_its_content_and_leaves_no_empty_directory(files: Files) -> None:
    files.write("scores/cell=a/scores.parquet", b"x")
    files.move("scores/cell=a/scores.parquet", "quarantine/1/scores.parquet")
    files.move("scores/cell=a/gone", "quarantine/1/gone")
    assert [path for path in files.walk() if not path.endswith("/")] == ["quarantine/1/scores.parquet"]
    assert files.read("quarantine/1/scores.parquet") == b"x"


def test_what_a_link_leads_to_outside_is_not_reached(tmp_path: Path) -> None:
    files = Files(str(tmp_path / "root"))
    files.write("scores/a", b"")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "root-2").symlink_to(tmp_path / "outside")
    removed = lambda: files.remove_directory("linked", OURS)  # noqa: E731 -- as those below
    for touch in (lambda: files.read("linked/secret"), lambda: files.write("linked/new", b""), removed):
        with pytest.raises(SweepError, match="a link that leads out of"):
            touch()
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret"]
