"""Ends the driver when its Ray cluster has died, and the driver's own cluster when the driver has died.

When a driver is killed, Ray's own processes end with it, but for the node's agents; and a driver whose raylet or GCS
was killed waits for them for ever, in `ray.shutdown` too (Ray 2.60).
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

from sweep.core.threads import every

_LOOK_SECONDS: Final = 0.5
_SHUTDOWN_SECONDS: Final = 60.0  # Ray takes 1 to 5
_PROBE_SECONDS: Final = 5.0  # between looks at what is on other machines, and until it must have answered
# A control service that is started anew is back by then; after 60 s Ray ends this process without a message.
_SILENT_SECONDS: Final = 45.0
_MARK: Final = "SWEEP_DRIVER"  # in the environment of every process that a driver has started
_ESSENTIAL: Final = {"raylet": "Ray's raylet", "gcs_server": "Ray's control service (GCS)"}

# Program of a process that waits until the driver's end of a pipe closes, then kills what is left of the driver's own
# cluster. The pipe carries lines: the session directories that Ray has made for the driver, and ENDED if the driver has
# printed by itself why it ends.
_REAPER: Final = """
import sys
sys.path.insert(0, sys.argv[1])
from sweep.run.watchdog import ENDED, kill_cluster
lines = sys.stdin.read().splitlines()
if sys.argv[2]:
    kill_cluster(sys.argv[2], [line for line in lines if line != ENDED])
if ENDED not in lines:
    print("The run was killed, or Ray has ended it. Type the same command again to resume.", file=sys.stderr)
"""
ENDED: Final = "ended"


class Watchdog:
    """Ends this process when its Ray cluster dies, and its cluster when this process dies."""

    def __init__(self, on_dead: Callable[[str], None], *, owns_cluster: bool = True) -> None:
        """Create a watchdog, to be entered before Ray starts.

        Args:
            on_dead: called from another thread with a description of what has died; it must end this process.
            owns_cluster: this process starts the Ray cluster, whose processes are killed if this one is killed; of a
                cluster that is joined none is killed.
        """
        self._on_dead = on_dead
        self._mark = f"{os.getpid()}-{time.time_ns()}" if owns_cluster else ""
        self._stopping: float | None = None  # since when Ray is being stopped
        self._watching = ExitStack()
        self._remote: dict[str, tuple[str, int]] = {}
        self._answered: dict[str, float] = {}  # when each remote process last did, by monotonic clock
        self._probed = 0.0
        self._watched: dict[int, str] = {}  # names of this process's children that the head needs, by process id
        self._is_started = False
        self._given_up: set[int] = set()  # children of a cluster that did not come up

    def __enter__(self) -> Self:
        if self._mark:
            os.environ[_MARK] = self._mark
        root = str(Path(__file__).resolve().parents[2])
        # A session of its own: Ctrl-C in a terminal would end it first.
        self._reaper = subprocess.Popen(
            [sys.executable, "-c", _REAPER, root, self._mark], stdin=subprocess.PIPE, start_new_session=True
        )
        self._watching.enter_context(every(_LOOK_SECONDS, self._look, "watchdog"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.close()
        self._send(ENDED)
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait()
        os.environ.pop(_MARK, None)

    def own(self, session: str) -> None:
        """Ray makes a session directory, still empty, for a cluster of this process: who writes there belongs to it."""
        self._send(os.path.realpath(session))

    def started(self) -> None:
        """Every process of the cluster runs. Until then its raylet may end: it is started once more."""
        self._is_started = True

    def failed(self) -> None:
        """The cluster has not come up and its processes are about to be killed; another one may be started."""
        self._given_up |= _essential_children().keys()

    def _send(self, line: str) -> None:
        """Send the reaper a session directory, or ENDED: this process is about to end, and prints why by itself."""
        assert self._reaper.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the reaper
            self._reaper.stdin.write(line.encode() + b"\n")
            self._reaper.stdin.flush()

    def watch(self, remote: Mapping[str, tuple[str, int]]) -> None:
        """Watch processes on other machines as well.

        Args:
            remote: host and port by the process's name for people; each must take a connection now and then.
        """
        self._answered = dict.fromkeys(remote, time.monotonic())
        self._remote = dict(remote)

    def stopping(self) -> None:
        """Ray is about to be stopped: its processes may end, but it must not take for ever."""
        self._check()
        self._stopping = time.monotonic()

    def _end(self, why: str) -> None:
        self._send(ENDED)
        self._on_dead(why)

    def _check(self) -> None:
        for pid, name in self._watched.items():
            if pid not in self._given_up and not _is_alive(pid) and self._stopping is None:  # not stopped meanwhile
                return self._end(f"{name} has died")
        return None

    def _probe(self) -> None:
        if time.monotonic() - self._probed < _PROBE_SECONDS:
            return
        for name, address in self._remote.items():
            if _takes_connections(address):
                self._answered[name] = time.monotonic()
            elif time.monotonic() - self._answered[name] > _SILENT_SECONDS:
                self._end(f"{name} at {address[0]}:{address[1]} does not answer")
        self._probed = time.monotonic()

    def _watch_children(self) -> None:
        for pid, name in _essential_children().items():
            if pid not in self._given_up and (self._is_started or name != "raylet"):
                self._watched[pid] = _ESSENTIAL[name]

    def _look(self) -> None:
        if self._stopping is None:
            self._check()
            self._probe()
            self._watch_children()
        elif time.monotonic() - self._stopping > _SHUTDOWN_SECONDS:
            self._end("Ray did not stop")


def _takes_connections(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False


def kill_cluster(mark: str, sessions: Collection[str]) -> None:
    """Kill every process of a driver's own cluster, until there is none.

    Args:
        mark: the driver's process id, a hyphen, and what tells it from an earlier one.
        sessions: directories that Ray has made for it. Ray's agents write their titles over the environment that holds
            the mark, but have logs open there.
    """
    spared = {os.getpid(), int(mark.partition("-")[0])}
    for _ in range(100):  # a process may have started another just before it was killed
        found = [
            process
            for process in psutil.process_iter()
            if process.pid not in spared and _belongs(process, mark, sessions)
        ]
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def _belongs(process: psutil.Process, mark: str, sessions: Collection[str]) -> bool:
    """Whether a process lives, and carries the mark or has a file of a session open for writing."""
    with contextlib.suppress(psutil.Error):
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(_MARK) == mark:
            return True
    with contextlib.suppress(psutil.Error):
        written = [file.path for file in process.open_files() if file.mode != "r"]
        return any(path.startswith(f"{session}/") for path in written for session in sessions)
    return False


def _essential_children() -> dict[int, str]:
    """Processes of the cluster's head that this process has started: names by process id."""
    found: dict[int, str] = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if (name := child.name()) in _ESSENTIAL:
                found[child.pid] = name
    return found


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
