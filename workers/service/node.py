"""Checks and locks of one node: it must see the shared store and checkpoint, and loads a checkpoint once."""

import fcntl
import hashlib
import os
import socket
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sweep.core.errors import Unfit
from sweep.store.store import Store

_CACHED_SECONDS = 600.0  # for so long a checkpoint that one worker has read is likely to be in the page cache


def check_shared(store: Store, mark: str, model: Path) -> None:
    """Make sure that this machine sees the driver's store and checkpoint.

    Args:
        store: of the run.
        mark: a file that the driver has put there.
        model: directory of the checkpoint.

    Raises: Unfit: it does not.
    """
    host = socket.gethostname()
    if not store.files.exists(mark):
        raise Unfit(
            f"{host} does not see the store {store.uri}. "
            "On a cluster it must lie on storage that every node mounts: store.uri=DIR, or a URL."
        )
    if not (model / "config.json").is_file():
        raise Unfit(
            f"{host} does not see the model {model}. "
            "On a cluster it must lie at the same path on every node, or on shared storage: model.path=DIR."
        )


@contextmanager
def first_alone(model: Path) -> Generator[None]:
    """Let one worker of a machine load a checkpoint while the others wait; then all of them, from the page cache.

    So shared storage is read once a machine, however many GPUs it has. A lock that a dead process held is free again.
    """
    name = hashlib.sha256(str(model).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"sweep-load-{os.getuid()}-{name}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.read() and time.time() - os.fstat(descriptor).st_mtime < _CACHED_SECONDS:
            fcntl.flock(file, fcntl.LOCK_UN)
            yield
            return
        yield
        file.seek(0)
        file.write(b"loaded")
