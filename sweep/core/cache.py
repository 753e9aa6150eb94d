"""Disk cache of facts that are slow to find (file hashes, token ids, resolved presets), as JSON files.

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
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = cache_dir() / kind / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):  # absent or torn: compute again
        return json.loads(path.read_text(encoding="utf-8"), object_hook=_unpacked)
    value = compute()
    with contextlib.suppress(OSError):  # a read-only home directory costs speed, not results
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(_packed(value)), encoding="utf-8")
        partial.replace(path)
    return value


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
