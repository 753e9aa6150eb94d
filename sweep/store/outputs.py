"""Output directories and files at places that a user names: a command replaces only files that a command put there.

A directory gets a manifest, with the size and SHA-256 of each file that was put there. A later command replaces or
removes a file only if the manifest lists it and it still is that file: files of others, edited ones, links and
directories are somebody's. A file alone has no manifest: it is replaced if it begins as files of its kind do.

New files are made in a hidden directory inside the place, which may be a mount, or the only one where we may write.
Then the manifest lists the old files and the new ones, the old ones go, the new ones come, and the manifest lists these
alone. Wherever that is cut short, each file of ours is listed, and no reader finds files of two commands.
"""

import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Collection, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from sweep.core.errors import SweepError
from sweep.core.paths import MANIFEST
from sweep.store.files import Files

_MANIFEST_VERSION: Final = 1
_PARTIAL: Final = ".sweep-partial-"  # begins the name of a directory in which files are being made
# Files that a killed writer has not renamed yet: `Files`, and safetensors 0.8 where a checkpoint is being made.
_HALF_MANIFEST, _HALF_TENSORS = f".{MANIFEST}.*.tmp", ".tmp*"
_WAY_OUT: Final = "Give another place with --out."
_N_NAMED: Final = 5  # files, in a message
_N_READ: Final = 2**20  # bytes of a file, to tell its kind: a picture says it after some 20 kB


@dataclass(frozen=True, slots=True)
class _Content:
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    """The files that were put in a directory; while they are being replaced, the old ones too."""

    manifest_version: int = _MANIFEST_VERSION
    kind: str
    files: Mapping[str, _Content]
    replaced: Mapping[str, _Content] = field(default_factory=dict[str, _Content])

    def __post_init__(self) -> None:
        if self.manifest_version != _MANIFEST_VERSION:
            raise ValueError(f"manifest_version is {self.manifest_version}, and {_MANIFEST_VERSION} is known")
        for name in (*self.files, *self.replaced):
            if name in ("", ".", "..", MANIFEST) or os.path.basename(name) != name:
                raise ValueError(f"{name!r} is no file directly inside")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDirectory:
    """A directory that a command fills with files."""

    directory: Path  # absolute, with links followed
    kind: str  # of what the files are together: those of another kind are not replaced
    names: Collection[str]  # of the files
    exclusive: Collection[str] = ()  # patterns of names of which readers take every file: nobody else's may be there
    overwrite: bool  # whether to replace what the manifest lists

    def check(self) -> None:
        """Refuse the place if something is in the way, before minutes are spent on its files.

        Raises: SweepError: the place is no directory, cannot be written, or holds what may not be replaced.
        """
        with _reported(self.directory):
            self._replaceable(self.names)
        Files(str(self.directory)).check_writable("--out")

    def holds(self, name: str, content: bytes) -> bool:
        """Whether a file of this content was put there, and all that was put there with it is still as it was."""
        with _reported(self.directory):
            manifest = _read(self.directory)
            if manifest is None or (manifest.kind, manifest.replaced) != (self.kind, {}):
                return False
            if manifest.files.get(name) != _Content(len(content), hashlib.sha256(content).hexdigest()):
                return False
            return len(_unchanged(self.directory, manifest)) == len(manifest.files)

    @contextmanager
    def filled(self) -> Generator[Path]:
        """A directory to write the files into; they are put in place at the end, if no error comes.

        Raises: SweepError: as for `check`.
        """
        with _reported(self.directory):
            missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                with locked(self.directory):
                    _drop_leftovers(self.directory)
                    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=self.directory) as partial:
                        plan = dict.fromkeys(self.names, _Content(0, ""))  # if it is killed: which files of it to drop
                        _write(Path(partial), _Manifest(kind=self.kind, files=plan))
                        yield Path(partial)
                        self._put(Path(partial))
            finally:
                with suppress(OSError):  # not empty: it has become the output
                    for path in missing:
                        path.rmdir()

    def _put(self, partial: Path) -> None:
        made = sorted(path for path in partial.iterdir() if path.name != MANIFEST)
        for path in made:
            sync(path)
        files = dict(zip((path.name for path in made), _contents(made), strict=True))
        old = self._replaceable(files)
        _write(self.directory, _Manifest(kind=self.kind, files=files, replaced=old))
        _unlink(self.directory / name for name in old)
        for path in made:
            path.rename(self.directory / path.name)
        sync(self.directory)
        _write(self.directory, _Manifest(kind=self.kind, files=files))

    def _replaceable(self, names: Collection[str]) -> dict[str, _Content]:
        """Files of an earlier command, all of which may go. Raises: SweepError: something else has one of the names."""
        place = self.directory
        if place == place.parent:
            raise SweepError(f"{place} is the root of a file system, no place for files. {_WAY_OUT}")
        if os.path.exists(place) and not os.path.isdir(place):
            raise SweepError(f"{place} is no directory, and one is needed. {_WAY_OUT}")
        found = sorted(os.listdir(place)) if os.path.exists(place) else []
        found = [name for name in found if not name.startswith(_PARTIAL)]
        if found and not self.overwrite:
            raise SweepError(
                f"{place} exists and holds {_listing(found)}. Give another place with --out, or --overwrite: "
                f"it replaces the files that an export has put there, as {MANIFEST} lists them, and leaves all others."
            )
        manifest = _read(place)
        if manifest is not None and manifest.kind != self.kind:
            raise SweepError(f"{place} holds a {manifest.kind}, which a {self.kind} does not replace. {_WAY_OUT}")
        old = {} if manifest is None else _unchanged(place, manifest)
        foreign = [name for name in found if name not in old and name != MANIFEST]
        loaded = {name for each in self.exclusive for name in fnmatch.filter(foreign, each)}
        if in_the_way := [name for name in foreign if name in names or name in loaded]:
            some = [place / name for name in in_the_way] if len(in_the_way) <= _N_NAMED else [place]
            raise SweepError(
                f"{place} holds {_listing(in_the_way)}, in the way of a {self.kind}. Only files that {MANIFEST} lists "
                f"are replaced, as long as they are unchanged. Type {_move(some)}, or give another place with --out."
            )
        return old


def typed_path(text: str) -> Path:
    """A local path as a user types it. Raises: SweepError: a URL, or nothing."""
    if not text.strip():
        raise SweepError("--out is empty. Give a path with --out; the working directory is called '.'.")
    if "://" in text:
        raise SweepError(f"{text} is a URL, and this is written to a local disk. Give a path with --out.")
    return Path(os.path.expanduser(text))


def place_of(path: Path) -> Path:
    """Where a path leads, absolute: a link stays, and what it leads to is the place.

    Raises: SweepError: a link that leads nowhere, or a name that no file can have.
    """
    with _reported(path), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # a name that is too long is not there for all that follows
    for each in (path, *path.parents):
        if os.path.islink(each) and not os.path.exists(each):
            leads = os.readlink(each)
            raise SweepError(f"{each} is a link to {leads}, which is not there. Make that, or give another place.")
    return Path(os.path.realpath(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file that a command writes at a place of the user's choice."""

    path: Path  # as it was typed, or follows from what was
    begins: re.Pattern[bytes]  # how all files of its kind begin, and no others
    way_out: str = _WAY_OUT

    def check(self) -> Path:
        """Refuse to replace a file of somebody else. Returns the place that the path leads to.

        Raises: SweepError: what is there is no file of this kind.
        """
        place = place_of(self.path)
        with _reported(place, self.way_out):
            if not os.path.lexists(place):
                return place
            if not place.is_file():
                raise SweepError(f"{place} is a directory, or no regular file. {self.way_out}")
            with place.open("rb") as file:
                content = file.read(_N_READ)
            if content and not self.begins.match(content):
                why = "is not what this command writes there, and stays"
                raise SweepError(f"{place} {why}. Type {_move([place])}. Or: {self.way_out}")
            return place

    def put(self, content: bytes) -> None:
        """Write it whole, over an older one of its kind. Raises: SweepError: as `check`, or it cannot be written."""
        place = self.check()
        with _reported(place, self.way_out):
            Files(str(place.parent)).write(place.name, content)


@contextmanager
def locked(directory: Path) -> Generator[None]:
    """Keep other writers out of a directory meanwhile."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems lock no directories
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _reported(place: Path, way_out: str = _WAY_OUT) -> Generator[None]:
    try:
        yield
    except OSError as error:
        at = "" if error.filename in (None, str(place)) else f" ({error.filename})"
        raise SweepError(f"Cannot write {place}: {error.strerror or error}{at}. {way_out}") from error


def _read(directory: Path) -> _Manifest | None:
    """A directory's manifest; None: there is none. Raises: SweepError: it is none that this program wrote."""
    path = directory / MANIFEST
    try:
        if not os.path.lexists(path):
            return None
        if not _is_regular(path):
            raise ValueError("it is no regular file")
        return msgspec.convert(
            json.loads(path.read_bytes()), _Manifest
        )  # names may be no UTF-8, which its decoder wants
    except (ValueError, RecursionError) as error:
        raise SweepError(
            f"{path} is not as this program writes it ({error}), so nothing says which files may be replaced. "
            f"Type {_move([directory])}, or give another place with --out."
        ) from error


def _write(directory: Path, manifest: _Manifest) -> None:
    Files(str(directory)).write(MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def _unchanged(directory: Path, manifest: _Manifest) -> dict[str, _Content]:
    """The listed files that are still what was put there."""
    listed = [*manifest.replaced.items(), *manifest.files.items()]
    there = [(directory / name, content) for name, content in listed if _is_regular(directory / name)]
    there = [(path, content) for path, content in there if path.stat().st_size == content.size]
    found = _contents([path for path, _ in there])
    return {path.name: content for (path, content), now in zip(there, found, strict=True) if now == content}


def _is_regular(path: Path) -> bool:
    """Whether it is a file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def _contents(paths: Collection[Path]) -> list[_Content]:
    with ThreadPoolExecutor() as threads:  # hashing lets other threads run
        return list(threads.map(_content, paths))


def _content(path: Path) -> _Content:
    with path.open("rb") as file:
        return _Content(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _drop_leftovers(directory: Path) -> None:
    """Remove what a killed command was making here; a directory that holds anything else stays."""
    _unlink(directory.glob(_HALF_MANIFEST))
    for left in directory.glob(f"{_PARTIAL}*"):
        if left.is_dir() and not left.is_symlink():
            with suppress(SweepError, OSError):
                _unlink(left.glob(_HALF_MANIFEST))
                if (manifest := _read(left)) is not None:
                    _unlink(left.glob(_HALF_TENSORS))
                    _unlink(left / name for name in manifest.files)
                    (left / MANIFEST).unlink()  # last: another attempt would need it
                left.rmdir()


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        if _is_regular(path):
            path.unlink()


def _move(paths: Collection[Path]) -> str:
    """The command that moves things out of the way; -n: a file that has the new name already stays as well."""
    if len(paths) == 1:
        (path,) = paths
        return shlex.join(["mv", "-n", str(path), f"{path}.old"])
    return f"{shlex.join(['mv', '-n', *map(str, paths)])} ELSEWHERE"


def _listing(names: Collection[str]) -> str:
    shown = list(names)[:_N_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
