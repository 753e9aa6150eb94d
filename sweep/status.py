"""`sweep status`: how far a store's sweeps are, from its tables and heartbeats alone; needs neither Ray nor a GPU."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from sweep.compose import expand
from sweep.integrity import revisions
from sweep.progress import duration
from sweep.store import Store

_ALIVE_SECONDS = 15.0  # a heartbeat older than this means that the driver is gone
_SHOWN_FAILURES = 10
_WATCH_SECONDS = 2.0


def read_status(store: Store) -> dict[str, Any]:
    """Trials by state, failures with their reasons, and the last run's progress."""
    trials = store.trials()
    states = Counter(row.state for row in trials.values())
    runs = store.runs()
    by_start = sorted(runs.values(), key=lambda run: run.get("started_at", ""))
    alive = [run for run in by_start if _is_alive(run)]
    last = next(reversed(alive or by_start), None)  # of several sweeps on one store the one that is under way
    running = bool(alive)
    if not running and (gone := states.pop("running", 0)):  # whoever ran them is gone
        states["planned"] += gone
    return {
        "store": store.uri,
        "trials": {"total": len(trials), **{state: states[state] for state in ("planned", "running", "done", "failed", "skipped")}},
        "failures": [{"trial": row.trial_id, "reason": row.reason} for row in trials.values() if row.state == "failed"],
        "running": running,
        "last_run": last,
        "damaged": [*store.damage.values()],
        "set_aside": len(store.files.names("quarantine")),
        "mixed": [f"{finding.subject}: {finding.text}" for finding in revisions(trials)],
    }


def print_status(overrides: Sequence[str], *, as_json: bool, watch: bool) -> int:
    """Print the status of the store that the overrides name. Returns the exit code.

    Args:
        overrides: Hydra overrides.
        as_json: print JSON.
        watch: print it again every few seconds, as long as a run is under way.

    Raises: SweepError: wrong overrides, or a damaged store.
    """
    store = Store(expand(overrides, multirun=False).points[0].store.uri, repairs=False)
    console = Console(markup=False, soft_wrap=True)  # paths and reasons may hold brackets, and are copied from the screen
    while True:
        status = read_status(store)
        if watch and console.is_terminal and not as_json:
            console.clear()
        if as_json:
            print(json.dumps(status, indent=1), flush=True)  # noqa: T201 -- machine-readable output, not for rich to wrap
        else:
            _print(status, console)
        if not (watch and status["running"]):
            return 0
        time.sleep(_WATCH_SECONDS)


def _print(status: dict[str, Any], console: Console) -> None:
    trials = status["trials"]
    for damage in status["damaged"]:
        console.print(f"{damage} Type: sweep doctor --store store.uri={status['store']}", style="red", highlight=False)
    if not trials["total"]:
        console.print(f"No trials in {status['store']} yet. Type: sweep run", highlight=False)
        return
    console.print(f"{trials['done']} of {trials['total']} trials done ({status['store']})", highlight=False)
    table = Table("state", "trials", box=None)
    for state in ("running", "planned", "failed", "skipped", "done"):
        if trials[state]:
            table.add_row(state, str(trials[state]))
    console.print(table)
    for failure in status["failures"][:_SHOWN_FAILURES]:
        console.print(f"failed: {failure['trial']}: {failure['reason']}", style="red", highlight=False)
    if last := status["last_run"]:
        console.print(_run_line(last, running=status["running"]), highlight=False)
    for mixed in status["mixed"]:
        console.print(mixed, style="yellow", highlight=False)
    if not status["running"] and trials["planned"]:
        console.print("Interrupted: type the same `sweep run` command again to resume.")


def _run_line(run: dict[str, Any], *, running: bool) -> str:
    groups = f"{run.get('groups_done', 0)} of {run.get('groups_total', 0)} layer groups"
    workers = f"{run.get('workers', 0)} workers on {run.get('host', 'an unknown host')}"
    if running:
        eta = run.get("eta_seconds")
        return f"Running: {groups}, {workers}, {run.get('groups_per_second', 0):.0f}/s" + ("" if eta is None else f", about {duration(eta)} left")
    ended = run.get("ended_at")
    return f"Last run: {groups}, {workers}, " + (
        f"ended {ended} with exit code {run.get('exit_code')}" if ended else f"no sign of life since {run.get('heartbeat_at')}"
    )


def _is_alive(run: dict[str, Any]) -> bool:
    if "ended_at" in run or "heartbeat_at" not in run:
        return False
    return (datetime.now(UTC) - datetime.fromisoformat(run["heartbeat_at"])).total_seconds() < _ALIVE_SECONDS
