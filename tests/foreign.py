"""Files, links and directories of others where a command writes, and how to see that all are still there."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "sweep_manifest.json"


@dataclass(frozen=True, slots=True)
class Place:
    """A place before a command."""

    make: Callable[[Path, Path], object]  # called with the place, and with where else something may lie
    refused: bool  # whether the command must refuse it


def seen(root: Path) -> dict[str, object]:
    """Every path below a directory, with what it is: links as such, files by content and inode."""
    found: dict[str, object] = {}
    for directory, directories, names in os.walk(root):
        for path in (Path(directory, name) for name in (*directories, *names)):
            what: object = "directory"
            if path.is_symlink():
                what = f"link to {os.readlink(path)}"
            elif path.is_file():
                what = (path.stat().st_ino, path.read_bytes())
            elif not path.is_dir():
                what = "special"
            found[str(path.relative_to(root))] = what
    return found


def foreign(place: Path) -> dict[str, object]:
    """Put files, directories and links of others into a directory. Returns what is to be seen of them."""
    place.mkdir(parents=True, exist_ok=True)
    before = seen(place)
    (place / "nested" / "deeper").mkdir(parents=True)
    for name in ("notes.txt", ".hidden", "nested/deeper/thesis.txt", "nested/config.json"):
        (place / name).write_text(f"my {name}")
    (place / "link-to-file").symlink_to("notes.txt")
    (place / "link-to-directory").symlink_to("nested")
    (place / "link-to-nothing").symlink_to("nothing")
    return {name: what for name, what in seen(place).items() if name not in before}


def _elsewhere(path: Path) -> Path:
    if not path.exists():
        foreign(path)
    return path


def _named(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
    """A directory in which something has a name that the command needs."""

    def put(out: Path, elsewhere: Path) -> None:
        foreign(out)
        make(out / name, _elsewhere(elsewhere))

    return put


def _lists(*names: str) -> Callable[[Path, Path], object]:
    """A directory whose manifest was edited: it lists files of others, with their true content where they have any."""

    def put(out: Path, elsewhere: Path) -> None:
        foreign(out)
        _elsewhere(elsewhere)
        files: dict[str, Any] = {}
        for name in (each.replace("ELSEWHERE", str(elsewhere)) for each in names):
            content = (out / name).read_bytes() if (out / name).is_file() else b""
            files[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        document = {"manifest_version": 1, "kind": "checkpoint", "files": files, "replaced": files}
        (out / MANIFEST).write_text(json.dumps(document))

    return put


def _says(text: str) -> Callable[[Path, Path], object]:
    return _named(MANIFEST, lambda path, _: path.write_text(text))


def _mine(path: Path, _: Path) -> None:
    path.write_text("mine")


def _bytes(path: Path, _: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def _to_directory(path: Path, elsewhere: Path) -> None:
    path.symlink_to(_elsewhere(elsewhere))


def _to_file(path: Path, elsewhere: Path) -> None:
    path.symlink_to(_elsewhere(elsewhere) / "notes.txt")


def _to_itself(path: Path, _: Path) -> None:
    path.symlink_to(path.name)


def _to_nothing(path: Path, _: Path) -> None:
    path.symlink_to("nothing")


_FILE = '{"manifest_version": 1, "kind": "checkpoint", "files": %s, "replaced": {}}'

# By what is at the place of an output directory, or in it.
PLACES = {
    "files, directories and links": Place(lambda out, _: foreign(out), refused=False),
    "a link to a directory": Place(_to_directory, refused=False),
    "a file": Place(_mine, refused=True),
    "an empty file": Place(lambda out, _: out.write_text(""), refused=True),
    "a pipe": Place(lambda out, _: os.mkfifo(out), refused=True),
    "a link to a file": Place(_to_file, refused=True),
    "a link to nothing": Place(_to_nothing, refused=True),
    "a link to itself": Place(_to_itself, refused=True),
    "a file that is needed": Place(_named("config.json", _mine), refused=True),
    "a link that is needed": Place(_named("config.json", _to_file), refused=True),
    "a link to nothing that is needed": Place(_named("config.json", _to_nothing), refused=True),
    "a directory that is needed": Place(_named("config.json", lambda path, _: foreign(path)), refused=True),
    "weights that a reader would load": Place(_named("other.safetensors", _mine), refused=True),
    "a manifest that climbs": Place(_lists("../elsewhere/notes.txt"), refused=True),
    "a manifest that climbs from a directory": Place(_lists("nested/../../elsewhere/notes.txt"), refused=True),
    "a manifest that leads away": Place(_lists("ELSEWHERE/notes.txt"), refused=True),
    "a manifest that leads below": Place(_lists("nested/deeper/thesis.txt"), refused=True),
    "a manifest of the directory itself": Place(_lists("."), refused=True),
    "a manifest of the directory above": Place(_lists(".."), refused=True),
    "a manifest of nothing": Place(_lists(""), refused=True),
    "a manifest of itself": Place(_lists(MANIFEST), refused=True),
    "a manifest of a directory": Place(_lists("nested"), refused=False),
    "a manifest of links": Place(_lists("link-to-file", "link-to-directory", "link-to-nothing"), refused=False),
    "a manifest of what is not there": Place(_lists("gone", "go\0ne", "go\ud800ne"), refused=False),
    "a manifest without sums": Place(_says(_FILE % '{"notes.txt": null}'), refused=True),
    "a manifest with other sums": Place(_says(_FILE % '{"notes.txt": {"size": 12, "sha256": "0"}}'), refused=False),
    "a manifest that is a list": Place(_says(_FILE % '["notes.txt"]'), refused=True),
    "a manifest of another kind": Place(_says((_FILE % "{}").replace("checkpoint", "other")), refused=True),
    "a manifest of someone else": Place(_says('{"name": "my app"}'), refused=True),
    "a manifest cut short": Place(_says('{"manifest_version": 1'), refused=True),
    "a manifest without an end": Place(_says("[" * 100_000), refused=True),
    "a manifest that is no text": Place(_named(MANIFEST, _bytes), refused=True),
    "a manifest that is a link": Place(_named(MANIFEST, _to_file), refused=True),
    "a manifest that is a link to nothing": Place(_named(MANIFEST, _to_nothing), refused=True),
    "a manifest that is a directory": Place(_named(MANIFEST, lambda path, _: foreign(path)), refused=True),
    "a manifest that is a pipe": Place(_named(MANIFEST, lambda path, _: os.mkfifo(path)), refused=True),
}
