"""What must not outlive what: the driver its cluster, and the cluster's processes the driver.

Ray's own processes end with a driver that is killed, but for the node's agents; and a driver whose raylet or GCS was killed waits for them
for ever, in `ray.shutdown` too (Ray 2.60).
"""

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_LOOK_SECONDS: Final = 0.5
_SHUTDOWN_SECONDS: Final = 60.0  # Ray takes 1 to 5
_PROBE_SECONDS: Final = 5.0  # between looks at what is on other machines, and until it must have answered
_SILENT_SECONDS: Final = 45.0  # a control service that is started anew is back by then; after 60 Ray ends this process without a word
_MARK: Final = "SWEEP_DRIVER"  # in the environment of every process of a driver's cluster
_ESSENTIAL: Final = {"raylet": "Ray's raylet", "gcs_server": "Ray's control service (GCS)"}

# Waits for the driver's end of a pipe to close, then kills what is left of its cluster.
_REAPER: Final = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sweep.run.watchdog import kill_cluster
told = sys.stdin.buffer.read()
kill_cluster(sys.argv[2])
if not told:
    print("The run was killed, or Ray has ended it. Type the same command again to resume.", file=sys.stderr)
"""


class Watchdog:
    """Ends this process when its Ray cluster dies, and its cluster when this process dies."""

    def __init__(self, on_dead: Callable[[str], None]) -> None:
        """Prepare it; enter it before Ray starts.

        Args:
            on_dead: called from another thread with what has died, for people; it must end the process.
        """
        self._on_dead = on_dead
        self._mark = f"{os.getpid()}-{time.time_ns()}"
        self._stopping: float | None = None  # since when Ray is being stopped
        self._left = threading.Event()
        self._remote: dict[str, tuple[str, int]] = {}
        self._answered: dict[str, float] = {}  # when what is remote last did
        self._probed = 0.0
        self._watched: dict[int, str] = {}  # of the cluster's head: children of this process, from the moment that they are there

    def __enter__(self) -> Self:
        os.environ[_MARK] = self._mark
        root = str(Path(__file__).resolve().parents[2])
        # A session of its own: Ctrl-C in a terminal would end it first.
        self._reaper = subprocess.Popen([sys.executable, "-Sc", _REAPER, root, self._mark], stdin=subprocess.PIPE, start_new_session=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        self._thread.join()
        self._tell()
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()
        del os.environ[_MARK]

    def _tell(self) -> None:
        """This process is about to end, and says itself why."""
        assert self._reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the reaper
            self._reaper.stdin.write(b"ended")
            self._reaper.stdin.flush()

    def watch(self, remote: Mapping[str, tuple[str, int]]) -> None:
        """Look at these as well, for people by name: a host and a port that must take a connection now and then."""
        self._answered = dict.fromkeys(remote, time.monotonic())
        self._remote = dict(remote)

    def stopping(self) -> None:
        """Ray is about to be stopped: its processes may end, but it must not take for ever."""
        self._check()
        self._stopping = time.monotonic()

    def _end(self, why: str) -> None:
        self._tell()
        self._on_dead(why)

    def _check(self) -> None:
        dead = next((name for pid, name in self._watched.items() if not _is_alive(pid)), None)
        if dead is not None and self._stopping is None:  # it was not told to end meanwhile
            self._end(f"{dead} has died")

    def _probe(self) -> None:
        if time.monotonic() - self._probed < _PROBE_SECONDS:
            return
        for name, address in self._remote.items():
            if _takes_connections(address):
                self._answered[name] = time.monotonic()
            elif time.monotonic() - self._answered[name] > _SILENT_SECONDS:
                self._end(f"{name} at {address[0]}:{address[1]} does not answer")
        self._probed = time.monotonic()

    def _watch(self) -> None:
        while not self._left.wait(_LOOK_SECONDS):
            if self._stopping is None:
                self._check()
                self._probe()
                self._watched |= {pid: _ESSENTIAL[name] for pid, name in _children(os.getpid()) if name in _ESSENTIAL}
            elif time.monotonic() - self._stopping > _SHUTDOWN_SECONDS:
                self._end("Ray did not stop")


def _takes_connections(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


def kill_cluster(mark: str) -> None:
    """Kill every process of a driver's own cluster, until there is none.

    Args:
        mark: the driver's process id, a hyphen, and what tells it from an earlier one.
    """
    wanted = f"{_MARK}={mark}".encode()
    driver = int(mark.partition("-")[0])
    # A process that gives itself a title writes it over its environment. But it writes to the session's logs.
    session = re.compile(rf"/session_[\d_-]+_{driver}/")
    spared = {os.getpid(), driver}
    for _ in range(100):  # what is killed may just have started another
        found = [
            pid
            for pid in _pids()
            if pid not in spared and (wanted in _environment(pid) or any(session.search(path) for path in _written(pid))) and _is_alive(pid)
        ]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, 9)
        time.sleep(0.05)


def _pids() -> Iterator[int]:
    yield from (int(name) for name in os.listdir("/proc") if name.isdigit())


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _written(pid: int) -> Iterator[str]:
    """Files that a process has open for writing."""
    with contextlib.suppress(OSError):
        for handle in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if handle.stat(follow_symlinks=False).st_mode & stat.S_IWUSR:
                    yield os.readlink(handle.path)


def _stat(pid: int) -> tuple[str, str, int] | None:
    """A process' name, state and parent; None if it is gone."""
    try:
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    except OSError:
        return None
    state, parent, *_ = tail.split()
    return head.partition("(")[2], state, int(parent)


def _children(parent: int) -> Iterator[tuple[int, str]]:
    for pid in _pids():
        if (found := _stat(pid)) is not None and found[2] == parent:
            yield pid, found[0]


def _is_alive(pid: int) -> bool:
    return (found := _stat(pid)) is not None and found[1] not in "ZX"
