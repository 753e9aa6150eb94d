"""`sweep run`: from overrides to published results. The same command again resumes, or finds nothing left to do."""

import hashlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from sweep.compose import Grid, expand
from sweep.config import SweepConfig, to_plain
from sweep.errors import SweepError
from sweep.files import Files
from sweep.machine import Workers, pick_workers
from sweep.planning import PlannedTrial, SweepPlan, plan_sweep, versions
from sweep.progress import Display, Tally, duration
from sweep.publish import publish
from sweep.records import FinishedTrial, TrialRow, TrialState
from sweep.report import most_sensitive, summary_lines
from sweep.store import Store
from workers.data import SIZES
from workers.task import Progress, Task

EXIT_DONE, EXIT_FAILED, EXIT_INCOMPLETE = 0, 3, 75
_HEARTBEAT_SECONDS = 2.0
_SUMMARY_RECIPES = 24  # recipes whose most sensitive layers are printed at the end


def run(overrides: Sequence[str], *, multirun: bool, console: Console) -> int:
    """Score what the store lacks of a grid, publish all of it, and say what came out.

    Args:
        overrides: Hydra overrides, with comma lists if `multirun`.
        multirun: whether comma lists span a grid.
        console: where a person reads.

    Returns: exit code: 0 done, 3 some trials failed, 75 interrupted.

    Raises: SweepError: wrong input; nothing has been written.
    """
    started = time.monotonic()
    grid = expand(overrides, multirun=multirun)
    base = grid.points[0]
    workers = pick_workers(base.cluster)
    plan = plan_sweep(grid.points, workers.device)
    store = Store(base.store.uri)
    store.files.check_writable("store.uri")
    root = _output_root(base, plan)
    session = _Session(grid, plan, store)
    if session.tasks:
        Files(root).check_writable("output_layout.root")
        _check_folders(plan, overwrite=base.output_layout.overwrite)
    _say_grid(session, console)
    if session.tasks:
        try:
            with _interruptible():
                _score(session, workers, console)
        except KeyboardInterrupt:
            session.end(EXIT_INCOMPLETE)
            console.print(f"Interrupted: {session.counts()['done']} of {len(plan.trials)} trials are done. Type the same command again to resume.")
            return EXIT_INCOMPLETE
    states = session.end(None)
    finished = _finished(session)
    result = publish(finished, root, overwrite=base.output_layout.overwrite)
    _say_results(session, finished, console, root, len(result.written), time.monotonic() - started)
    return _exit_code(states)


def _exit_code(states: Counter[str]) -> int:
    return EXIT_FAILED if states["failed"] else EXIT_INCOMPLETE if states["planned"] else EXIT_DONE


class _Session:
    """One run: which trials are left, which are done, and their record in the store."""

    def __init__(self, grid: Grid, plan: SweepPlan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.started = time.monotonic()
        self.first_result: float | None = None  # seconds until there was one
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"
        self.failures: dict[str, str] = {}  # by task id
        self._before = store.trials()
        self._written: dict[str, TrialRow] = {}
        cells = {trial.cell_id for trial in plan.trials if trial.cell_id}
        self.finished = {cell for cell in cells if store.is_finished(cell)}
        given_up: set[str] = set()
        if not grid.points[0].cluster.retry_failed:
            given_up = {trial.cell_id for trial in plan.trials if trial.cell_id is not None and self._failed_before(trial)}
        self._given_up = given_up - self.finished
        self.tasks = plan.pending(self.finished | self._given_up)
        self._versions = json.dumps(versions(), sort_keys=True)
        self.record: dict[str, Any] = {
            "run_id": self.run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": _now(),
            "trials": len(plan.trials),
        }
        self.tally = Tally(self.tasks, Counter(trial.task_id for trial in self.pending_trials() if trial.task_id), len(plan.trials))

    def pending_trials(self) -> list[PlannedTrial]:
        """Trials that still lack scores, in the order asked for."""
        return [trial for trial in self.plan.trials if trial.task_id in self.tasks and trial.cell_id in self.tasks[trial.task_id].cells.values()]

    def state(self, trial: PlannedTrial) -> tuple[TrialState, str | None]:
        """A trial's state as the store has it, and why."""
        if trial.cell_id is None:
            return "skipped", trial.reason
        if trial.cell_id in self.finished:
            return "done", None
        if trial.task_id in self.failures:
            return "failed", self.failures[trial.task_id]
        if trial.cell_id in self._given_up:
            return "failed", self._before[
                trial.trial_id
            ].reason if trial.trial_id in self._before else "its cell failed before; cluster.retry_failed=true tries again"
        return "planned", None

    def counts(self) -> Counter[str]:
        """Trials by state."""
        return Counter(self.state(trial)[0] for trial in self.plan.trials)

    def write_trials(self, running: bool) -> None:
        """Record every trial whose state is not what the store says already."""
        for trial in self.plan.trials:
            state, reason = self.state(trial)
            if state == "planned" and running:
                state = "running"
            last = self._written.get(trial.trial_id) or self._before.get(trial.trial_id)
            if last is None or (last.state, last.cell_id, last.reason) != (state, trial.cell_id, reason):
                self._written[trial.trial_id] = self._row(trial, state, reason)
        if self._written:
            self.store.write_trials(self.run_id, self._written.values())

    def beat(self) -> None:
        """Write the run's heartbeat."""
        tally = self.tally
        self.record |= {
            "heartbeat_at": _now(),
            "groups_done": tally.done_groups,
            "groups_total": tally.total_groups,
            "groups_per_second": round(tally.groups_per_second, 3),
            "eta_seconds": None if tally.eta_seconds is None else round(tally.eta_seconds, 1),
        }
        self.store.write_run(self.run_id, self.record)

    def end(self, exit_code: int | None) -> Counter[str]:
        """Take stock of the store and record how the run ended. Returns trials by state."""
        cells = [cell for task in self.tasks.values() for cell in task.cells.values()]
        self.finished |= {cell for cell in cells if self.store.is_finished(cell)}
        self.write_trials(running=False)
        counts = self.counts()
        if self.tasks:
            self.record |= {"ended_at": _now(), "exit_code": _exit_code(counts) if exit_code is None else exit_code}
            self.beat()
        if self._written:
            self.store.compact_trials(run_id for run_id, record in self.store.runs().items() if "ended_at" in record)
        return counts

    def row(self, trial: PlannedTrial) -> TrialRow:
        """The trial's latest row."""
        return self._written.get(trial.trial_id) or self._before[trial.trial_id]

    def _failed_before(self, trial: PlannedTrial) -> bool:
        row = self._before.get(trial.trial_id)
        return row is not None and row.state == "failed" and row.cell_id == trial.cell_id

    def _row(self, trial: PlannedTrial, state: TrialState, reason: str | None) -> TrialRow:
        config = trial.config
        assert config.model.name is not None  # SweepConfig has checked
        return TrialRow(
            trial_id=trial.trial_id,
            cell_id=trial.cell_id,
            model=config.model.name,
            model_revision=trial.model_revision,
            dataset=config.dataset.name,
            dataset_revision=trial.dataset_revision,
            size=config.dataset.size,
            coverage=config.sensitivity.coverage,
            method=config.sensitivity.method,
            engine=config.sensitivity.engine,
            quant_pair=config.quant_pair.name,
            quant_granularity=config.quant_granularity.name,
            state=state,
            reason=reason,
            config=json.dumps(to_plain(config)),
            versions=self._versions,
            created_at=datetime.now(UTC),
            run_id=self.run_id,
        )


def _score(session: _Session, workers: Workers, console: Console) -> None:
    with Display(console, session.tally) as display:
        display.stage(f"Starting Ray and {workers.count} worker{'s' if workers.count > 1 else ''} ({workers.device}) ...")
        from sweep import driver  # imports Ray: only when there is something to do

        beating = ExitStack()

        def on_ready() -> None:  # a model that does not load has left no trace in the store
            session.write_trials(running=True)
            beating.enter_context(_heartbeat(session))
            session.tally.start()
            display.stage("Workers hold the model; capturing activations and gradients ...")

        def on_progress(progress: Progress) -> None:
            session.tally.update(progress)
            if progress.warning is not None:
                display.say(progress.warning)
            if session.first_result is None and progress.done == progress.total:
                _say_first_result(session, session.tasks[progress.task_id], display)
            display.update()

        orders = [driver.TrialOrder(name=trial.name, task_id=trial.task_id) for trial in session.pending_trials() if trial.task_id]

        session.record["workers"] = workers.count
        with beating:
            session.failures, infos = driver.run_trials(
                orders,
                session.tasks,
                session.plan.plans,
                workers,
                session.store.uri,
                memory_gb=session.plan.trials[0].config.sensitivity.memory_gb,
                on_ready=on_ready,
                on_progress=on_progress,
            )
            session.record |= {"worker_info": infos, "scoring_seconds": session.tally.seconds}


def _say_first_result(session: _Session, task: Task, display: Display) -> None:
    """The first ranking, as soon as there is one."""
    cell = list(task.cells.values())[-1]
    if session.store.is_finished(cell):
        session.first_result = time.monotonic() - session.started
        ranked = ", ".join(most_sensitive(session.store.scores(cell), 3))
        display.say(f"First result after {session.first_result:.1f} s: {task.label}/{list(task.cells)[-1]}: {ranked}")


def _finished(session: _Session) -> list[FinishedTrial]:
    tables = {}
    finished: list[FinishedTrial] = []
    for trial in session.plan.trials:
        if trial.cell_id is not None and trial.cell_id in session.finished:
            if trial.cell_id not in tables:
                tables[trial.cell_id] = session.store.scores(trial.cell_id)
            finished.append(FinishedTrial(trial=session.row(trial), scores=tables[trial.cell_id]))
    return finished


def _output_root(base: SweepConfig, plan: SweepPlan) -> str:
    """Where reports go, a path or URL; `{run_id}` is the grid's own name, so that the same command finds its reports again."""
    grid_id = hashlib.sha256("\n".join(trial.trial_id for trial in plan.trials).encode()).hexdigest()[:12]
    root = base.output_layout.root.replace("{run_id}", grid_id)
    return root if "://" in root else str(Path(root).expanduser().absolute())


def _check_folders(plan: SweepPlan, *, overwrite: bool) -> None:
    """Refuse a grid two of whose trials belong in one report folder, before hours are spent on it.

    Raises: SweepError: names the two.
    """
    by_folder: dict[tuple[object, ...], PlannedTrial] = {}
    for trial in plan.trials if not overwrite else ():
        config = trial.config
        folder = (config.model.name, config.dataset.name, config.sensitivity.coverage, config.sensitivity.method, trial.name)
        if trial.cell_id is not None and by_folder.setdefault(folder, trial).cell_id != trial.cell_id:
            raise SweepError(
                f"Two trials {trial.name} of this grid have one report folder: {by_folder[folder].trial_id} and {trial.trial_id}. "
                "Run them one after the other, each with its own output_layout.root=DIR, or keep the later one's report with output_layout.overwrite=true."
            )


@contextmanager
def _interruptible() -> Generator[None]:
    """SIGTERM ends a run as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the way out is under way; a second Ctrl-C would cut it short
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _heartbeat(session: _Session) -> Generator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_HEARTBEAT_SECONDS):
            session.beat()

    session.beat()
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _say_grid(session: _Session, console: Console) -> None:
    counts = session.counts()
    cells = {trial.cell_id for trial in session.plan.trials if trial.cell_id}
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    console.print(
        f"{len(session.plan.trials)} trials{skipped}: {len(cells)} distinct cells, {len(cells & session.finished)} in the store already ({session.store.uri})"
    )
    for reason, n in Counter(trial.reason for trial in session.plan.trials if trial.reason).most_common(3):
        console.print(f"  skipped {n}: {reason}", style="dim", highlight=False)


def _say_results(session: _Session, finished: Sequence[FinishedTrial], console: Console, root: str, written: int, seconds: float) -> None:
    counts = session.counts()
    scored = sum(cell in session.finished for task in session.tasks.values() for cell in task.cells.values())
    console.print()
    shown = list(_largest(finished).values())
    for line in summary_lines(shown[:_SUMMARY_RECIPES], 3):
        console.print(line, highlight=False, soft_wrap=True)
    if len(shown) > _SUMMARY_RECIPES:
        console.print(f"... and {len(shown) - _SUMMARY_RECIPES} more recipes, in the reports", style="dim")
    console.print(f"\n{counts['done']} of {len(session.plan.trials)} trials done, {scored} cells scored, in {duration(seconds)}.")
    for trial, reason in [(trial, session.state(trial)[1]) for trial in session.plan.trials if session.state(trial)[0] == "failed"][:5]:
        console.print(f"failed: {trial.name}: {reason}", style="red", highlight=False)
    if counts["failed"]:
        console.print("What has failed stays so; type the same command with cluster.retry_failed=true to try again.", highlight=False)
    console.print(f"Reports: {root} ({written} written)", highlight=False, soft_wrap=True)
    console.print(f"Scores:  {session.store.uri}/scores/*/*.parquet", highlight=False, soft_wrap=True)
    page = f"{root}/{finished[0].trial.model}/layer-analysis/README.md" if finished else ""
    console.print(f"Next:    open {page}; sweep publish puts reports into models/" if finished else "Next:    sweep status", highlight=False, soft_wrap=True)


def _largest(finished: Sequence[FinishedTrial]) -> dict[tuple[str, ...], FinishedTrial]:
    """Of each recipe the trial with the most samples, in the order asked for."""
    best: dict[tuple[str, ...], FinishedTrial] = {}
    for one in finished:
        trial = one.trial
        key = (trial.model, trial.dataset, trial.coverage, trial.method, trial.engine, trial.quant_pair, trial.quant_granularity)
        if key not in best or SIZES[best[key].trial.size] < SIZES[trial.size]:
            best[key] = one
    return best


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
