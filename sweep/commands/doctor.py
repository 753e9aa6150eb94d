"""`sweep doctor`: check machine, configuration, model and data before hours are spent."""

import json
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from operator import itemgetter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sweep.commands.run import Prepared
from sweep.config.compose import DEFAULT_GRID, Grid, expand
from sweep.config.schema import SweepConfig
from sweep.core.batches import Plan
from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE, EXIT_WRONG_INPUT
from sweep.core.machine import Speed, Workers, n_cores, n_gpus
from sweep.core.text import count
from sweep.plan.costs import known_speed
from sweep.plan.estimate import estimated
from sweep.plan.model import checkpoint_dir, checkpoint_gb
from sweep.plan.trials import PlannedTrial, SweepPlan, plan_sweep
from sweep.plan.work import Family, families
from sweep.run.resources import pick_workers
from sweep.store.integrity import Finding, check_store
from sweep.store.store import Store
from workers.model.memory import itemsize_of

# Releases that were tested; another one may work and is warned about.
_TESTED = {"nvidia-modelopt": "0.47", "ray": "2.60", "transformers": "5.", "torch": "2."}

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def examine(overrides: Sequence[str], *, multirun: bool, as_json: bool) -> int:
    """Print what would stop or surprise a run with these overrides. Returns 0, or 2 if something would stop it."""
    grid = expand(overrides, multirun=multirun, default_grid=DEFAULT_GRID)
    workers = cache(lambda: pick_workers(grid.points[0].cluster))  # a cluster is asked once
    plan = cache(lambda: plan_sweep(grid.points, workers().device, workers().nodes))  # fails in its own finding
    return _say(grid_findings(grid, workers, plan), as_json=as_json)


def examine_prepared(prepared: Prepared) -> int:
    """Print what would surprise the run of a grid that is planned. Returns as `examine`."""
    return _say(grid_findings(prepared.grid, lambda: prepared.workers, lambda: prepared.plan), as_json=False)


def examine_store(overrides: Sequence[str], *, as_json: bool) -> int:
    """Verify and repair the store that the overrides name, and print what was found.

    Returns: exit code: 0, or 2 if something is left that stops a run.
    """
    store = Store(expand(overrides, multirun=False).points[0].store.uri)
    return _say(check_store(store), as_json=as_json, as_lines=True)


def _say(findings: Sequence[Finding], *, as_json: bool, as_lines: bool = False) -> int:
    """Print findings. Returns the exit code: 2 if one of them is an error."""
    if as_json:
        print(json.dumps([_plain(finding) for finding in findings], indent=1))  # noqa: T201 -- machine-readable output
    elif as_lines:  # subjects are paths, which are copied from the screen
        for finding in findings:
            verdict = Text(f"{finding.verdict:8}", style=COLOURS[finding.verdict])
            Console(soft_wrap=True).print(verdict + Text(f"{finding.subject}: {finding.text}"))
    else:
        table = Table("", "subject", "finding", box=None)
        for finding in findings:
            table.add_row(Text(finding.verdict, style=COLOURS[finding.verdict]), finding.subject, Text(finding.text))
        Console().print(table)
    return EXIT_WRONG_INPUT if any(finding.verdict == "error" for finding in findings) else EXIT_DONE


def _plain(finding: Finding) -> dict[str, str | dict[str, float]]:
    """A finding as JSON has it; without figures where it has none."""
    found = asdict(finding)
    return found if finding.figures else {key: value for key, value in found.items() if key != "figures"}


def grid_findings(grid: Grid, workers: Callable[[], Workers], plan: Callable[[], SweepPlan]) -> list[Finding]:
    """One finding a subject; what raises is an error of its own subject."""
    base = grid.points[0]
    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "packages": _packages,
        "workers": lambda: _workers(workers()),
        "store": lambda: _store(base),
        "model": lambda: _model(base, workers),
        "grid": lambda: _grid(base, plan()),
    }
    findings = [_checked(subject, check) for subject, check in checks.items()]
    if findings[-1].verdict == "error" and findings[-1].text in {finding.text for finding in findings[:-1]}:
        findings.pop()  # planning stops at what has its own finding
    if findings[-1].verdict != "error":
        findings += [Finding(subject="model", verdict="warning", text=note) for note in plan().notes]
        findings += [*_coverage(plan()), *(_data(each) for each in plan().plans.values())]
        findings.append(_checked("estimate", lambda: _estimate(plan(), workers(), Store(base.store.uri))))
    return findings


def _checked(subject: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except SweepError as error:
        return Finding(subject=subject, verdict="error", text=str(error))


def _python() -> Finding:
    text = f"{platform.python_version()}, {n_cores()} cores and {n_gpus()} GPUs here"
    return Finding(subject="python", verdict="ok", text=text)


def _packages() -> Finding:
    found: dict[str, str] = {}
    for name in _TESTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError as error:
            raise SweepError(
                f"{name} is not installed. Install the project with pip and its constraints file."
            ) from error
    odd = [
        f"{name} {found[name]} (tested: {tested}*)"
        for name, tested in _TESTED.items()
        if not found[name].startswith(tested)
    ]
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    return Finding(
        subject="packages", verdict="warning" if odd else "ok", text=f"untested: {', '.join(odd)}" if odd else text
    )


def _workers(workers: Workers) -> Finding:
    gpus = dict.fromkeys(gpu.name for node in workers.nodes for gpu in node.gpus)
    warnings = [node.warning for node in workers.nodes if node.warning is not None]
    text = f"{workers.count} on {workers.device}" + (f" ({', '.join(gpus)})" if gpus else "")
    return Finding(subject="workers", verdict="warning" if warnings else "ok", text=". ".join([text, *warnings]))


def _store(config: SweepConfig) -> Finding:
    store = Store(config.store.uri)
    store.files.check_writable("store.uri")
    if "://" in store.uri:
        return Finding(subject="store", verdict="ok", text=f"{store.uri} is writable")
    free_gb = shutil.disk_usage(_existing(Path(store.uri))).free / 1e9
    return Finding(
        subject="store",
        verdict="ok" if free_gb > 1 else "warning",
        text=f"{store.uri} is writable, {free_gb:.0f} GB free",
    )


def _model(config: SweepConfig, pick: Callable[[], Workers]) -> Finding:
    path = checkpoint_dir(config.model)
    gb = checkpoint_gb(path)
    text, verdict = f"{path}: {gb:.2f} GB of safetensors", "ok"
    with suppress(SweepError):  # without workers, their own finding says why
        workers = pick()
        known = [node for node in workers.nodes if node.unknown is None]
        if known and workers.device == "cpu":
            least = min(known, key=lambda node: node.memory_gb)
            verdict = "warning" if gb * 3 > least.memory_gb else "ok"
            text += f", {least.memory_gb:.0f} GB of memory on {least.host}"
    return Finding(subject="model", verdict=verdict, text=text)


def _grid(base: SweepConfig, plan: SweepPlan) -> Finding:
    store = Store(base.store.uri)
    cells = {trial.cell_id for trial in plan.trials if trial.cell_id}
    done = sum(store.is_finished(cell) for cell in cells)
    skipped = Counter(trial.reason for trial in plan.trials if trial.reason)
    text = f"{count(len(plan.trials), 'trial')}, {count(len(cells), 'distinct cell')}, {done} in the store already"
    if not skipped:
        return Finding(subject="grid", verdict="ok", text=text)
    return Finding(
        subject="grid",
        verdict="warning",
        text=f"{text}, {skipped.total()} skipped: " + "; ".join(skipped),
    )


def _coverage(plan: SweepPlan) -> Iterator[Finding]:
    """What each model's layer groups cover of it."""
    for label, coverage in plan.coverages:
        verdict = "ok" if coverage.warning is None else "warning"
        yield Finding(subject="coverage", verdict=verdict, text=f"{label}: {coverage.text}")


def _data(plan: Plan) -> Finding:
    """The samples of a data set, those up to the boundary of the last batches included."""
    batches = [*plan.batches(plan.size)]
    lengths = [length for batch in batches for length in batch.lengths]
    n_pictures = sum(len(batch.all_pictures) for batch in batches)
    pictures = f", {count(n_pictures, 'picture')}" if n_pictures else ""
    text = (
        f"{count(len(lengths), 'sample')}{pictures}, {sum(lengths):,} tokens, the longest sample has {max(lengths):,}; "
        f"{plan.n_predictions(plan.size):,} predictions"
    )
    return Finding(subject="data", verdict="ok", text=text)


def _estimate(plan: SweepPlan, workers: Workers, store: Store) -> Finding:
    """What the cells that the store lacks will take, at the speed of the workers' machine."""
    cells = {trial.cell_id for trial in plan.trials if trial.cell_id}
    found = families(plan.pending(filter(store.is_finished, cells)).values(), plan, workers)
    estimate = estimated(plan, found, workers, n_cores(), _speed(found, workers) if found else None)
    text, figures = estimate.text(workers.device), estimate.figures
    known = [node.memory_gb for node in workers.nodes if node.unknown is None and workers.device == "cpu"]
    needed = estimate.worker_gb * (workers.per_node or workers.count) + estimate.driver_gb
    if found and known and needed > min(known):
        text += f". {min(known):.1f} GB are available: {_less_memory(plan, min(known) - estimate.driver_gb)}"
        return Finding(subject="estimate", verdict="warning", text=text, figures=figures)
    return Finding(subject="estimate", verdict="ok", text=text, figures=figures)


def _less_memory(plan: SweepPlan, room_gb: float) -> str:
    """What to type for workers that need less memory. Args: room_gb: of a machine, for weights."""
    dtype, weights_gb = max(
        ((trial.dtype, _weights_gb(plan, trial)) for trial in plan.trials if trial.cell_id), key=itemgetter(1)
    )
    if weights_gb < room_gb:
        return "type cluster.workers=N for fewer, or sensitivity.memory_gb=GB"
    half = dtype == "float32" and weights_gb / 2 < room_gb
    others = "type model.dtype=bfloat16, or " if half else ""
    return f"the weights alone are {weights_gb:.1f} GB in {dtype}: {others}use machines with more memory, or GPUs"


def _weights_gb(plan: SweepPlan, trial: PlannedTrial) -> float:
    return plan.models[trial.model_revision]["parameters"] * itemsize_of(trial.dtype) / 1e9


def _speed(found: Sequence[Family], workers: Workers) -> Speed | None:
    """The speed of one worker: measured, if they are on this machine, else that of the slowest GPU; None: not known."""
    if workers.address is None:
        from workers.service.speed import measured_speed  # imports PyTorch: only when all else is right

        n_rows, shape = found[0].typical
        n_sharing = workers.count if workers.device == "cpu" else max(1, int(1 / workers.gpus_each))
        return measured_speed(workers.device, found[0].dtype, n_rows, shape, n_sharing)
    speeds = [known_speed(gpu.name) for node in workers.nodes for gpu in node.gpus]
    known = [speed for speed in speeds if speed is not None]
    return min(known, key=lambda speed: speed.products) if known and len(known) == len(speeds) else None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
