"""Places that a user names: what others have put there stays, whatever it is, and wherever a command is cut short."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from sweep.core.errors import SweepError
from sweep.core.paths import MANIFEST
from sweep.store.outputs import OutputDirectory, OutputFile, place_of, typed_path
from tests.foreign import PLACES, foreign, seen

OLD = {"config.json": b"old", "a.safetensors": b"old a", "b.safetensors": b"old b"}
NEW = {"config.json": b"new", "a.safetensors": b"new a", "tokenizer.json": b"new"}


def output(place: Path, names: Collection[str], *, overwrite: bool = True, kind: str = "checkpoint") -> OutputDirectory:
    weights = ("*.safetensors",)
    return OutputDirectory(directory=place_of(place), kind=kind, names=names, exclusive=weights, overwrite=overwrite)


def fill(place: Path, files: Mapping[str, bytes], *, overwrite: bool = True, kind: str = "checkpoint") -> None:
    to = output(place, files, overwrite=overwrite, kind=kind)
    to.check()
    with to.filled() as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != MANIFEST}


def test_new_files_replace_those_of_the_command_before_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD, overwrite=False)
    assert contents(tmp_path / "out") == OLD
    others = foreign(tmp_path / "out")
    fill(tmp_path / "out", NEW)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in NEW} == NEW
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["a.safetensors"]
    assert others.items() <= seen(tmp_path / "out").items()
    assert len(seen(tmp_path / "out")) == len(others) + len(NEW) + 1


def test_equal_files_give_an_equal_manifest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(tmp_path / name, OLD)
    fill(tmp_path / "two", OLD)
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()


def test_nothing_is_replaced_unless_asked(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD, overwrite=False)
    with pytest.raises(SweepError, match=r"exists and holds a\.safetensors, .* or --overwrite: it replaces the"):
        output(tmp_path / "out", NEW, overwrite=False).check()
    with pytest.raises(SweepError, match="--overwrite"):
        fill(tmp_path / "out", NEW, overwrite=False)
    assert contents(tmp_path / "out") == OLD


def test_an_empty_directory_needs_no_permission(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", OLD, overwrite=False)
    assert contents(tmp_path / "out") == OLD


@pytest.mark.parametrize("name", OLD)
def test_a_file_that_was_changed_since_is_not_replaced(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "out", OLD)
    (tmp_path / "out" / name).write_bytes(OLD[name].upper())  # of the same size
    before = seen(tmp_path / "out")
    said = rf"holds {name}, in the way of a checkpoint\. .* Type mv -n \S+/{name} \S+/{name}\.old,"
    with pytest.raises(SweepError, match=said):
        fill(tmp_path / "out", NEW)
    assert seen(tmp_path / "out") == before


def test_what_was_put_there_is_known_to_be_whole_or_not(tmp_path: Path) -> None:
    to = output(tmp_path / "out", OLD)
    assert not to.holds("config.json", b"old")
    fill(tmp_path / "out", OLD)
    assert to.holds("config.json", b"old")
    assert not to.holds("config.json", b"new")
    (tmp_path / "out" / "b.safetensors").unlink()
    assert not to.holds("config.json", b"old")


def test_another_kind_of_files_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)
    with pytest.raises(SweepError, match="holds a checkpoint, which a recommendation does not replace"):
        fill(tmp_path / "out", {"README.md": b""}, kind="recommendation")
    assert contents(tmp_path / "out") == OLD


@pytest.mark.parametrize("place", PLACES)
def test_whatever_is_there_nothing_of_others_is_gone(tmp_path: Path, place: str) -> None:
    """The same table as for `sweep export` and `sweep recommend`, for a directory that a command has filled before."""
    PLACES[place].make(tmp_path / "out", tmp_path / "elsewhere")
    before = seen(tmp_path)
    if PLACES[place].refused:
        with pytest.raises(SweepError):
            fill(tmp_path / "out", OLD)
        assert seen(tmp_path) == before
        return
    before.pop(f"out/{MANIFEST}", None)  # one of ours that was edited
    for files in (OLD, NEW):
        fill(tmp_path / "out", files)
        assert before.items() <= seen(tmp_path).items()
        assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_the_root_of_the_file_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mkdir", "open", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, None)  # whoever tried would end in a TypeError
    for path in ("/", "//", "/tmp/..", "/proc/self/root"):
        with pytest.raises(SweepError, match="is the root of a file system"):
            output(Path(path), OLD).check()


def test_a_place_that_cannot_be_written_is_said_before_and_after(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="Choose a writable place: --out=DIR"):
        output(Path("/proc/nothing/out"), OLD).check()
    with pytest.raises(SweepError, match=r"Cannot write /proc/nothing/out: .* \(/proc/nothing\)\. Give another place"):
        fill_unchecked(Path("/proc/nothing/out"))


def fill_unchecked(place: Path) -> None:
    with output(place, OLD).filled():
        pass


def test_an_error_on_the_way_leaves_all_as_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "out", OLD)
    before = seen(tmp_path)
    for place in (tmp_path / "out", tmp_path / "new" / "deeper"):
        with pytest.raises(SweepError, match=r"Cannot write .*: No space left on device"):
            fill_half(place)
        assert seen(tmp_path) == before


def fill_half(place: Path) -> None:
    with output(place, NEW).filled() as partial:
        (partial / "a.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28))


CRASHES = """
import os, signal, sys
from pathlib import Path
from tests.unit.store.test_outputs import NEW, output

place, n_left = Path(sys.argv[1]), int(sys.argv[2])

def kill(event, arguments):
    global n_left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        n_left -= 1
        if n_left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
with output(place, NEW).filled() as partial:
    for name, content in NEW.items():
        (partial / name).write_bytes(content)
"""


def test_wherever_it_is_killed_no_two_exports_are_mixed_and_the_next_call_works(tmp_path: Path) -> None:
    """Before each call that changes the file system, one after the other, until it comes to its end."""
    root = Path(__file__).resolve().parents[2]
    for n_calls in range(200):
        place = tmp_path / str(n_calls)
        fill(place, OLD)
        others = foreign(place)
        ended = subprocess.run([sys.executable, "-c", CRASHES, str(place), str(n_calls)], cwd=root, check=False)
        assert ended.returncode in (0, -signal.SIGKILL)
        assert others.items() <= seen(place).items()
        read = {name: (place / name).read_bytes() for name in {**OLD, **NEW} if (place / name).exists()}
        assert read.items() <= OLD.items() or read.items() <= NEW.items()
        fill(place, NEW)
        assert others.items() <= seen(place).items()
        assert seen(place).keys() == {*NEW, MANIFEST, *others}
        if ended.returncode == 0:
            break
    assert n_calls > 20


def test_tensors_that_a_killed_writer_has_not_renamed_yet_are_removed(tmp_path: Path) -> None:
    """As safetensors calls them; gigabytes, in a real checkpoint."""
    with output(tmp_path / "out", OLD).filled() as partial:
        shutil.copytree(partial, killed := tmp_path / "out" / ".sweep-partial-killed")
        for name in ("config.json", ".tmpqnqc5B"):
            (killed / name).write_bytes(b"half")
    assert killed.exists()
    fill(tmp_path / "out", NEW)
    assert seen(tmp_path / "out").keys() == {*NEW, MANIFEST}


def test_a_hidden_directory_of_others_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    for name, files in {"mine": ("notes.txt",), "listed": (MANIFEST, "a.safetensors", "notes.txt")}.items():
        (tmp_path / f".sweep-partial-{name}").mkdir()
        for file in files:
            (tmp_path / f".sweep-partial-{name}" / file).write_bytes((tmp_path / MANIFEST).read_bytes())
    fill(tmp_path, NEW)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(".sweep-partial-*/*")) == [
        ".sweep-partial-listed/notes.txt",
        ".sweep-partial-mine/notes.txt",
    ]


def a_directory(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def another_file(path: Path) -> None:
    path.write_text("# my notes\nkind: ")


def a_link_to_another_file(path: Path) -> None:
    another_file(path.with_name("target"))
    path.symlink_to("target")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


LINKS = [a_link_to_another_file, a_link_to_nothing, a_link_to_itself]


@pytest.mark.parametrize("make", [a_directory, another_file, os.mkfifo, *LINKS])
def test_a_file_of_others_is_not_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "out")
    before = seen(tmp_path)
    with pytest.raises(SweepError, match=r"Type mv|[Gg]ive "):
        kind_file(tmp_path / "out").put(b"kind: b")
    assert seen(tmp_path) == before


@pytest.mark.parametrize("before", [None, b"", b"kind: a"])
def test_a_file_of_its_kind_is_replaced_and_a_link_to_it_stays(tmp_path: Path, before: bytes | None) -> None:
    if before is not None:
        (tmp_path / "out").write_bytes(before)
        (tmp_path / "link").symlink_to("out")
        kind_file(tmp_path / "link").put(b"kind: b")
        assert (tmp_path / "link").is_symlink()
    kind_file(tmp_path / "out").put(b"kind: b")
    assert (tmp_path / "out").read_bytes() == b"kind: b"


def kind_file(path: Path) -> OutputFile:
    return OutputFile(path=path, begins=re.compile(b"kind: "))


def test_a_url_is_refused() -> None:
    with pytest.raises(SweepError, match="is a URL"):
        typed_path("s3://bucket/out")


def test_a_manifest_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, OLD)
    document = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(document | {"manifest_version": 2}))
    before = seen(tmp_path)
    with pytest.raises(SweepError, match="manifest_version is 2, and 1 is known"):
        fill(tmp_path, NEW)
    assert seen(tmp_path) == before
