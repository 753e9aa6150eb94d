"""Whole files or none, on a local disk or behind any fsspec URL.

Locally a file appears by rename after fsync; on object storage one PUT is already whole.
"""

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from sweep.core.errors import SweepError


class Misplaced(SweepError):
    """A path that does not lead to a place of its own under the root."""


class Files:
    """Files under one root, named by relative paths with forward slashes."""

    def __init__(self, uri: str) -> None:
        """Open the root; it need not exist yet.

        Args:
            uri: absolute local path, or a URL that fsspec knows (``s3://bucket/prefix``).

        Raises: SweepError: a URL whose protocol has no fsspec driver installed.
        """
        self.uri = uri
        path = uri.removeprefix("file://")  # fsspec would write in place and make no directories
        self._local = Path(path) if "://" not in path else None
        if self._local is None:
            import fsspec

            try:
                if uri.startswith("s3://"):
                    self._fs, self._root = _s3(), uri.removeprefix("s3://").rstrip("/")
                else:
                    # No cache of listings: other processes write here, too.
                    self._fs, self._root = fsspec.core.url_to_fs(uri, use_listings_cache=False)
            except (ImportError, ValueError) as error:
                raise SweepError(
                    f"Cannot open {uri!r}: {error}. Give a local path, or install the driver for that protocol."
                ) from error

    def check_writable(self, key: str) -> None:
        """Write and remove a small file, so that hours of work are not lost for want of a place to keep them.

        Nothing is left behind.

        Args:
            key: what names the root in the config, for the message.

        Raises: SweepError: the root cannot be written.
        """
        name = f".writable-{secrets.token_hex(4)}.tmp"
        try:
            places = [self._local, *self._local.parents] if self._local else []
            missing = [path for path in places if not path.exists()]
            self.write(name, b"")
            self.remove(name)
        except OSError as error:
            raise SweepError(
                f"Cannot write to {self.uri}: {error.strerror or error}. Choose a writable place: {key}=DIR."
            ) from error
        with contextlib.suppress(OSError):  # another process has put something there
            for path in missing:
                path.rmdir()

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file in place, over an older one of that name."""
        if self._local is None:
            self._fs.pipe_file(self._url(path), data)
            return
        final = self._inside(path)
        partial = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with _opened(partial) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(final)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def read(self, path: str) -> bytes:
        """A file's content. Raises FileNotFoundError."""
        if self._local is None:
            content: Any = self._fs.cat_file(self._url(path))
            return bytes(content)
        final = self._inside(path)
        if stat.S_IFMT(final.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):  # reading a pipe would wait for ever
            raise Misplaced(f"{final} is no regular file.")
        return final.read_bytes()

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        if self._local is None:
            return bool(self._fs.exists(self._url(path)))
        return self._inside(path).is_file()

    def names(self, directory: str, *, hidden: bool = False) -> list[str]:
        """Names in a directory, sorted, hidden ones only if asked for; empty if there is no such directory."""
        if self._local is None:
            try:
                found: list[str] = self._fs.ls(self._url(directory), detail=False)
            except FileNotFoundError:
                return []
            names = [name.rstrip("/").rsplit("/", 1)[-1] for name in found]
        else:
            try:
                names = os.listdir(self._inside(directory))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(name for name in names if hidden or not name.startswith("."))

    def remove(self, path: str) -> None:
        """Remove a file and, locally, the directory that it leaves empty; nothing happens if it is gone already."""
        if self._local is None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._url(path))
            return
        final = self._inside(path)
        final.unlink(missing_ok=True)
        if "/" in path:
            with contextlib.suppress(OSError):  # not empty, or another process was faster
                final.parent.rmdir()

    def remove_directory(self, path: str, written: re.Pattern[str]) -> None:
        """Remove the files of a directory that are called as we call them, and it too if that leaves it empty.

        Nothing happens if it is gone already.

        Args:
            path: the directory.
            written: names of files that we write there, half-written ones too.
        """
        names = self.names(path, hidden=True)
        ours = [name for name in names if written.fullmatch(name) and not self.is_link(f"{path}/{name}")]
        if self._local is None and len(ours) == len(names):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm(self._url(path), recursive=True)  # one request
            return
        for name in ours:
            with contextlib.suppress(IsADirectoryError, PermissionError):  # what unlink says of a directory: not ours
                self.remove(f"{path}/{name}")
        if self._local is not None:
            with contextlib.suppress(OSError):  # not empty, or another process was faster
                self._inside(path).rmdir()

    def walk(self) -> Iterator[str]:
        """Every file under the root, hidden ones and links too, sorted within a directory; links are not followed."""
        if self._local is None:
            try:
                found: list[str] = self._fs.find(self._root)
            except FileNotFoundError:
                return
            yield from sorted(path.removeprefix(self._root).lstrip("/") for path in found)
            return
        for directory, directories, names in os.walk(self._local):
            directories.sort()
            linked = [name for name in directories if os.path.islink(os.path.join(directory, name))]
            below = os.path.relpath(directory, self._local)
            yield from (name if below == "." else f"{below}/{name}" for name in sorted([*names, *linked]))

    def is_link(self, path: str) -> bool:
        """Whether it is a symbolic link; object storage has none."""
        return self._local is not None and (self._local / path).is_symlink()

    def age_seconds(self, path: str) -> float:
        """How long ago a file was written; 0 if that is not known, or the file is gone."""
        try:
            if self._local is None:
                return time.time() - self._fs.modified(self._url(path)).timestamp()
            return time.time() - (self._local / path).lstat().st_mtime
        except (FileNotFoundError, NotImplementedError):
            return 0.0

    def move(self, path: str, to: str) -> None:
        """Give a file, or a link as such, another path under the root; nothing happens if it is gone already."""
        if self._local is None:
            with contextlib.suppress(FileNotFoundError):
                self.write(to, self.read(path))
                self.remove(path)
            return
        final = self._inside(to)
        final.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._inside(os.path.dirname(path)).joinpath(os.path.basename(path)).rename(final)
        with contextlib.suppress(OSError):  # not empty
            (self._local / path).parent.rmdir()

    @cached_property
    def _real_root(self) -> str:
        assert self._local is not None
        return os.path.realpath(self._local)

    def _url(self, path: str) -> str:
        _check_path(path)
        return f"{self._root}/{path}"

    def _inside(self, path: str) -> Path:
        """The local path. Raises Misplaced: a link below the root leads elsewhere."""
        _check_path(path)
        assert self._local is not None
        full, root = self._local / path, self._real_root
        real = os.path.realpath(full)
        if real != os.path.normpath(os.path.join(root, path)):
            leads = f"leads out of {self.uri}" if os.path.commonpath([real, root]) != root else "leads elsewhere in it"
            raise Misplaced(f"{full} is reached by a link that {leads}. Put what it leads to in its place.")
        return full


def _opened(path: Path) -> BinaryIO:
    """A new file, in a directory that another process may remove as empty just then."""
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return path.open("wb")
    return path.open("wb")


def _s3() -> Any:
    """S3 through pyarrow, which is installed anyway.

    Credentials, region and endpoint come from the usual AWS_* variables, profiles and roles.

    A file of up to 5 MB is one PUT; a larger one is sent in pieces and appears, whole, with the last request.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem

    # pyarrow does not look at these two.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return ArrowFSWrapper(S3FileSystem(allow_delayed_open=True, endpoint_override=endpoint))


def _check_path(path: str) -> None:
    """Raises: Misplaced: the path is absolute or climbs."""
    if path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise Misplaced(f"{path!r} is no path under a root. Use relative names with forward slashes, without '..'.")
