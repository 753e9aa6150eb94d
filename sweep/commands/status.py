"""`sweep status`: progress of a store's sweeps, from its tables and heartbeats; Ray is asked only with `--cluster`."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from sweep.config.compose import expand
from sweep.config.schema import ClusterConfig
from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE
from sweep.core.text import count, duration
from sweep.store.integrity import revisions
from sweep.store.store import Store

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
    if not running and (gone := states.pop("running", 0)):  # the driver that ran them is gone
        states["planned"] += gone
    return {
        "store": store.uri,
        "trials": {
            "total": len(trials),
            **{state: states[state] for state in ("planned", "running", "done", "failed", "skipped")},
        },
        "failures": [{"trial": row.trial_id, "reason": row.reason} for row in trials.values() if row.state == "failed"],
        "running": running,
        "last_run": last,
        "damaged": [*store.damage.values()],
        "set_aside": len(store.files.names("quarantine")),
        "mixed": [f"{finding.subject}: {finding.text}" for finding in revisions(trials)],
    }


def print_status(overrides: Sequence[str], *, as_json: bool, watch: bool, ask_ray: bool = False) -> int:
    """Print the status of the store that the overrides name. Returns the exit code.

    Args:
        overrides: Hydra overrides.
        as_json: print JSON.
        watch: print it again every few seconds, as long as a run is under way.
        ask_ray: ask the run's Ray cluster, too, or the one that the overrides name.

    Raises: SweepError: wrong overrides, a damaged store, or no cluster answers.
    """
    config = expand(overrides, multirun=False).points[0]
    store = Store(config.store.uri, repairs=False)
    # No markup, no wrapping: paths and reasons may hold brackets, and are copied from the screen.
    console = Console(markup=False, soft_wrap=True)
    while True:
        status = read_status(store)
        if ask_ray:
            status["cluster"] = _ask_ray(config.cluster, status)
        if watch and console.is_terminal and not as_json:
            console.clear()
        if as_json:
            text = json.dumps(status, indent=1)
            print(text, flush=True)  # noqa: T201 -- machine-readable output, not for rich to wrap
        else:
            _print(status, console)
        if not (watch and status["running"]):
            return EXIT_DONE
        time.sleep(_WATCH_SECONDS)


def _ask_ray(config: ClusterConfig, status: dict[str, Any]) -> dict[str, Any] | None:
    """Nodes, GPUs and workers of the cluster that the config names, or of that of the run under way.

    Returns: as sweep.run.cluster.look; None: there is no such run any more.


    Raises: SweepError: nothing names a cluster, or none answers.
    """
    address = (
        (status["last_run"] or {}).get("ray_address")
        if config.address == "local"
        else config.address or os.environ.get("RAY_ADDRESS")
    )
    if config.address == "local" and not status["running"]:
        if status["trials"]["total"]:
            return None
        raise SweepError(
            "No run is under way that would have a Ray cluster. Type cluster.address=HOST:6379 to ask one."
        )
    if not address:
        raise SweepError("No Ray cluster is named. Type cluster.address=HOST:6379, or set RAY_ADDRESS.")
    own = config.address == "local" and address.startswith("127.")  # else the run has joined it
    if own:
        # Ray turns it on by itself in the process that starts a cluster, not in one that connects to it.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from sweep.run.cluster import look  # imports Ray

    return look(address, on_loopback=own)


def _print(status: dict[str, Any], console: Console) -> None:
    trials = status["trials"]
    for reason in status["damaged"]:
        console.print(f"{reason} Type: sweep doctor --store store.uri={status['store']}", style="red", highlight=False)
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
    if cluster := status.get("cluster"):
        console.print(_cluster_line(cluster), highlight=False)
    if last := status["last_run"]:
        console.print(_run_line(last, running=status["running"]), highlight=False)
    for mixed in status["mixed"]:
        console.print(mixed, style="yellow", highlight=False)
    if not status["running"] and trials["planned"]:
        console.print("Interrupted: type the same `sweep run` command again to resume.")


def _cluster_line(cluster: dict[str, Any]) -> str:
    sweeps = [f"{len(names)} workers of {space}" for space, names in cluster["workers"].items()]
    gpus = f"{cluster['gpus'] - cluster['gpus_free']:g} of {cluster['gpus']:g} GPUs in use"
    workers = ", ".join(sweeps) or "no workers of a sweep"
    return f"Ray at {cluster['address']}: {count(len(cluster['nodes']), 'node')}, {gpus}, {workers}"


def _run_line(run: dict[str, Any], *, running: bool) -> str:
    groups = f"{run.get('groups_done', 0)} of {run.get('groups_total', 0)} layer groups"
    workers = f"{run.get('workers', 0)} workers on {run.get('host', 'an unknown host')}"
    if running:
        eta, url = run.get("eta_seconds"), run.get("dashboard_url")
        left = "" if eta is None else f", about {duration(eta)} left"
        return f"Running: {groups}, {workers}, {run.get('groups_per_second', 0):.0f}/s{left}" + (
            f"\nRay dashboard: {url}" if url else ""
        )
    ended = run.get("ended_at")
    return f"Last run: {groups}, {workers}, " + (
        f"ended {ended} with exit code {run.get('exit_code')}"
        if ended
        else f"no sign of life since {run.get('heartbeat_at')}"
    )


def _is_alive(run: dict[str, Any]) -> bool:
    if "ended_at" in run or "heartbeat_at" not in run:
        return False
    return (datetime.now(UTC) - datetime.fromisoformat(run["heartbeat_at"])).total_seconds() < _ALIVE_SECONDS
