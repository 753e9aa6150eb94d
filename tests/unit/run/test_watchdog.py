"""The driver and its cluster end together, with plain processes in the place of Ray's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest

from sweep.run import watchdog
from sweep.run.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[3]
DRIVER = """
import os, subprocess, sys, time
from sweep.run.watchdog import Watchdog
with Watchdog(lambda what: None):
    orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(orphan.pid, flush=True)
    {then}
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.mark.parametrize(
    ("name", "what"), [("raylet", "Ray's raylet has died"), ("gcs_server", "Ray's control service (GCS) has died")]
)
def test_it_says_which_process_of_the_cluster_has_died_and_only_while_ray_runs(
    name: str, what: str, tmp_path: Path
) -> None:
    shutil.copy("/bin/sleep", tmp_path / name)
    said: list[str] = []
    told = Event()
    with Watchdog(lambda text: (said.append(text), told.set())) as dog:  # pyright: ignore[reportArgumentType]
        dog.started()
        process = subprocess.Popen([tmp_path / name, "600"])
        assert not told.wait(2.0)
        process.kill()
        assert told.wait(20)
        dog.stopping()
        process.wait()
    assert set(said) == {what}


def test_a_raylet_that_ends_while_the_cluster_starts_is_no_news_nor_is_what_was_given_up(tmp_path: Path) -> None:
    """Both are started once more."""
    said: list[str] = []
    with Watchdog(said.append) as dog:
        processes: list[subprocess.Popen[bytes]] = []
        for name in ("raylet", "gcs_server"):
            shutil.copy("/bin/sleep", tmp_path / name)
            processes.append(subprocess.Popen([tmp_path / name, "600"]))
        time.sleep(1.2)
        processes[0].kill()
        time.sleep(1.2)
        dog.failed()
        for process in processes:
            process.kill()
            process.wait()
        dog.started()
        time.sleep(1.2)
    assert said == []


def test_processes_that_end_while_ray_is_being_stopped_are_no_news(tmp_path: Path) -> None:
    shutil.copy("/bin/sleep", tmp_path / "raylet")
    said: list[str] = []
    with Watchdog(said.append) as dog:
        process = subprocess.Popen([tmp_path / "raylet", "600"])
        time.sleep(1.2)
        dog.stopping()
        process.kill()
        process.wait()
        time.sleep(1.2)
    assert said == []


def test_a_shutdown_that_takes_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.run.watchdog._SHUTDOWN_SECONDS", 0.1)
    told = Event()
    with Watchdog(lambda what: told.set()) as dog:
        dog.stopping()
        assert told.wait(20)


@pytest.mark.parametrize("then", ["time.sleep(600)", "sys.exit()", "os._exit(1)"])
def test_what_a_driver_has_started_does_not_outlive_it_and_somebody_says_how_to_go_on(then: str) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(then=then)], cwd=ROOT, text=True, **pipes)
    assert driver.stdout is not None
    orphan = int(driver.stdout.readline())
    if "sleep" in then:
        assert is_alive(orphan)
        driver.send_signal(signal.SIGKILL)
    _, said = driver.communicate()
    assert ends(orphan)
    assert ("Type the same command again to resume." in said) == ("sys.exit" not in then)


def test_a_process_of_the_cluster_that_has_lost_its_environment_does_not_outlive_the_driver(tmp_path: Path) -> None:
    """Ray's agents write their titles over it."""
    session = tmp_path / f"session_2026-01-02_03-04-05_678901_{os.getpid()}"
    session.mkdir()
    with (session / "agent.out").open("wb") as log, Watchdog(lambda what: None) as dog:
        dog.own(str(session))
        agent = subprocess.Popen(["sleep", "600"], stdout=log, env={})
    agent.wait()
    assert agent.returncode == -signal.SIGKILL


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    """Processes that read the logs, and those of other clusters.

    The latter are of another driver, and of an earlier one that had this one's process id.
    """
    dates = {
        "own": "2026-01-02_03-04-05_678901",
        "earlier": "2026-01-02_03-04-05_678900",
        "longer": "2026-01-02_03-04-05_678901",
    }
    sessions = {
        name: tmp_path / f"session_{date}_{os.getpid()}{'1' * (name == 'longer')}" for name, date in dates.items()
    }
    others: list[subprocess.Popen[bytes]] = []
    for name, session in sessions.items():
        session.mkdir()
        (session / "raylet.out").touch()
        with (session / "raylet.out").open("rb" if name == "own" else "ab") as log:
            others.append(subprocess.Popen(["sleep", "600"], stdin=log, stdout=log if name != "own" else None))
    with Watchdog(lambda what: None) as dog:
        dog.own(str(sessions["own"]))
    assert ([is_alive(other.pid) for other in others], "SWEEP_DRIVER" in os.environ) == ([True, True, True], False)
    for other in others:
        other.kill()
        other.wait()


def test_of_a_cluster_that_is_joined_nothing_is_killed() -> None:
    with Watchdog(lambda what: None, owns_cluster=False):
        process = subprocess.Popen(["sleep", "600"])
    assert is_alive(process.pid)
    process.kill()
    process.wait()


def test_a_cluster_elsewhere_that_goes_on_taking_no_connections_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "_SILENT_SECONDS", 1.0)
    said: list[str] = []
    told = Event()
    with Watchdog(lambda text: (said.append(text), told.set())) as dog:  # pyright: ignore[reportArgumentType]
        with socket.create_server(("127.0.0.1", 0)) as service:
            port = service.getsockname()[1]
            dog.watch({"Ray's control service (GCS)": ("127.0.0.1", port)})
            assert not told.wait(2.0)
        assert told.wait(20)
    assert said[0] == f"Ray's control service (GCS) at 127.0.0.1:{port} does not answer"
