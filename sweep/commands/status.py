"""`sweep status`: progress of a store's sweeps, from its tables and heartbeats; Ray is asked only with `--cluster`."""

import os
import time
from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.console import Console

from sweep.commands.recipes import RecipeCount, by_recipe, show_recipes
from sweep.config.compose import expand
from sweep.config.schema import ClusterConfig
from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE
from sweep.core.screen import say, show_table
from sweep.core.text import count, duration, override
from sweep.store.integrity import revisions
from sweep.store.records import RunRecord
from sweep.store.store import Store

_ALIVE_SECONDS = 15.0  # a heartbeat older than this means that the driver is gone
_SHOWN_FAILURES = 10
_WATCH_SECONDS = 2.0


class ClusterState(msgspec.Struct, frozen=True):
    """A Ray cluster's answer: see sweep.run.cluster.look."""

    address: str  # host:port
    nodes: list[dict[str, str | float]]  # `host`, `cpus` and `gpus` of each that lives
    gpus: float
    gpus_free: float
    workers: dict[str, list[str]]  # names, by the namespace of each sweep


class Status(msgspec.Struct, kw_only=True):
    """The state of a store's sweeps, as `--json` prints it."""

    store: str  # path or URL
    trials: dict[str, int]  # number in total and by state
    recipes: list[RecipeCount]
    failures: list[dict[str, str | None]]  # `trial` and `reason` of each that has failed
    running: bool  # whether a run is under way
    last_run: RunRecord | None  # of several the one that is under way
    damaged: list[str]  # reasons
    set_aside: int  # files in the quarantine
    mixed: list[str]  # revisions of one model, data set or score version
    cluster: ClusterState | msgspec.UnsetType | None = msgspec.UNSET  # unset: not asked for; None: no run under way


def read_status(store: Store) -> Status:
    """Trials by state, failures with their reasons, and the last run's progress."""
    trials = store.trials()
    by_start = sorted(store.runs().values(), key=lambda run: run.started_at or "")
    alive = [run for run in by_start if run.is_alive(_ALIVE_SECONDS)]
    # Where no driver lives, the one that ran them is gone.
    states = [(row, "planned" if row.state == "running" and not alive else row.state) for row in trials.values()]
    counts = Counter(state for _, state in states)
    return Status(
        store=store.uri,
        trials={
            "total": len(trials),
            **{state: counts[state] for state in ("planned", "running", "done", "failed", "skipped")},
        },
        recipes=by_recipe(states),
        failures=[{"trial": row.trial_id, "reason": row.reason} for row in trials.values() if row.state == "failed"],
        running=bool(alive),
        last_run=next(reversed(alive or by_start), None),
        damaged=[*store.damage.values()],
        set_aside=len(store.files.names("quarantine")),
        mixed=[f"{finding.subject}: {finding.text}" for finding in revisions(trials)],
    )


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
    console = Console(markup=False, highlight=False)  # paths and reasons may hold brackets
    while True:
        status = read_status(store)
        if ask_ray:
            status.cluster = _ask_ray(config.cluster, status)
        if watch and console.is_terminal and not as_json:
            console.clear()
        if as_json:
            text = msgspec.json.format(msgspec.json.encode(status), indent=1).decode()
            print(text, flush=True)  # noqa: T201 -- machine-readable output, not for rich to wrap
        else:
            _print(status, console)
        if not (watch and status.running):
            return EXIT_DONE
        time.sleep(_WATCH_SECONDS)


def _ask_ray(config: ClusterConfig, status: Status) -> ClusterState | None:
    """Nodes, GPUs and workers of the cluster that the config names, or of that of the run under way.

    Returns: None: there is no such run any more.

    Raises: SweepError: nothing names a cluster, or none answers.
    """
    of_run = status.last_run.ray_address if status.last_run else None
    address = of_run if config.address == "local" else config.address or os.environ.get("RAY_ADDRESS")
    if config.address == "local" and not status.running:
        if status.trials["total"]:
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

    return msgspec.convert(look(address, on_loopback=own), ClusterState, from_attributes=True)


def _print(status: Status, console: Console) -> None:
    trials = status.trials
    for reason in status.damaged:
        say(console, f"{reason} Type: sweep doctor --store {override('store.uri', status.store)}", "red")
    if not trials["total"]:
        say(console, f"No trials in {status.store} yet. Type: sweep run")
        return
    say(console, f"{trials['done']} of {trials['total']} trials done ({status.store})")
    states = [state for state in ("running", "planned", "failed", "skipped", "done") if trials[state]]
    show_table(console, ("state", "trials"), [(state, str(trials[state])) for state in states], ("trials",))
    console.print()
    show_recipes(console, status.recipes, states)
    console.print()
    for failure in status.failures[:_SHOWN_FAILURES]:
        say(console, f"failed: {failure['trial']}: {failure['reason']}", "red", indent="  ")
    if status.cluster:
        say(console, _cluster_line(status.cluster))
    if status.last_run:
        say(console, _run_line(status.last_run, running=status.running))
    for mixed in status.mixed:
        say(console, mixed, "yellow", indent="  ")
    if not status.running and trials["planned"]:
        say(console, "Interrupted: type the same `sweep run` command again to resume.")


def _cluster_line(cluster: ClusterState) -> str:
    sweeps = [f"{len(names)} workers of {space}" for space, names in cluster.workers.items()]
    gpus = f"{cluster.gpus - cluster.gpus_free:g} of {cluster.gpus:g} GPUs in use"
    workers = ", ".join(sweeps) or "no workers of a sweep"
    return f"Ray at {cluster.address}: {count(len(cluster.nodes), 'node')}, {gpus}, {workers}"


def _run_line(run: RunRecord, *, running: bool) -> str:
    groups = f"{run.groups_done or 0} of {run.groups_total or 0} layer groups"
    workers = f"{count(run.workers or 0, 'worker')} on {run.host or 'an unknown host'}"
    if running:
        left = "" if run.eta_seconds is None else f", about {duration(run.eta_seconds)} left"
        dashboard = f"\nRay dashboard: {run.dashboard_url}" if run.dashboard_url else ""
        return f"Running: {groups}, {workers}, {run.groups_per_second or 0:.0f}/s{left}{dashboard}"
    ended = f"ended {run.ended_at} with exit code {run.exit_code}"
    return f"Last run: {groups}, {workers}, {ended if run.ended_at else f'no sign of life since {run.heartbeat_at}'}"
