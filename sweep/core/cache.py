"""Disk cache of what is slow to find (file hashes, token ids, resolved presets, prepared samples), a file each.

Each entry is named by a hash of all that it depends on, so an entry is right or absent, never stale. Deleting the
directory costs seconds. It is ``$SWEEP_CACHE_DIR``, or ``sweep-sensitivity`` under ``$XDG_CACHE_HOME`` (``~/.cache``).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from sweep.core.typed import Plain

T = TypeVar("T", bound=Plain)


def cache_dir() -> Path:
    """The directory of the entries; it may not exist yet."""
    if own := os.environ.get("SWEEP_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sweep-sensitivity"


def remember(kind: str, key: object, compute: Callable[[], T]) -> T:
    """The plain value of `compute()`, read back if it was computed before for an equal `key`.

    Plain is what JSON can hold, and besides tuples and mappings with integer keys, which come back as they were.

    Args:
        kind: what the value is, ``[a-z-]+``; the entry's directory.
        key: JSON-able; everything that the value depends on, versions of code and libraries included.
        compute: called once, when there is no readable entry.
    """
    with contextlib.suppress(ValueError):  # torn: compute again
        if (found := read_entry(kind, key)) is not None:
            return json.loads(found, object_hook=_unpacked)
    value = compute()
    write_entry(kind, key, json.dumps(_packed(value)).encode())
    return value


def read_entry(kind: str, key: object) -> bytes | None:
    """The bytes that were written for an equal key; None: there are none. Args: as `remember`."""
    with contextlib.suppress(OSError):
        return _entry(kind, key).read_bytes()
    return None


def write_entry(kind: str, key: object, content: bytes) -> None:
    """Keep bytes for a key, if the directory can be written. Args: as `remember`."""
    path = _entry(kind, key)
    with contextlib.suppress(OSError):  # a read-only home directory costs speed, not results
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(content)
        partial.replace(path)


def _entry(kind: str, key: object) -> Path:
    return cache_dir() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def _packed(value: Plain) -> Plain:
    """The value with its tuples and mappings as JSON objects that say so."""
    if isinstance(value, Mapping):
        return {"pairs": [[key, _packed(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_packed(item) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def _unpacked(node: Mapping[str, list[tuple[str, Plain]]]) -> Plain:
    return tuple(node["tuple"]) if "tuple" in node else dict(node["pairs"])
