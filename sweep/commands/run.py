"""`sweep run`: from overrides to published results. The same command again resumes, or finds nothing left to do."""

import contextlib
import hashlib
import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sweep.config.compose import DEFAULT_GRID, Grid, expand
from sweep.config.schema import SweepConfig
from sweep.config.targets import Target
from sweep.core.errors import ClusterLost, MemoryShort, StoreFailed, SweepError
from sweep.core.exits import EXIT_INCOMPLETE
from sweep.core.interrupts import interruptible
from sweep.core.machine import Workers
from sweep.core.screen import say, show_next, show_table
from sweep.core.text import count, duration, override
from sweep.core.threads import every
from sweep.plan.prefixes import take_prefixes
from sweep.plan.trials import SweepPlan, plan_sweep
from sweep.report.files import folder_of
from sweep.report.publish import check_ahead, publish
from sweep.report.render import largest, most_sensitive, summary_table
from sweep.run.progress import Display
from sweep.run.resources import pick_workers
from sweep.run.session import Session, exit_code, row_of
from sweep.store.files import Files
from sweep.store.records import FinishedTrial, TrialRow
from sweep.store.store import Store
from workers.service.shared_pictures import share_pictures
from workers.task import Progress, Task

if TYPE_CHECKING:
    from sweep.run.cluster import Connection

_HEARTBEAT_SECONDS = 2.0
_SHOWN_FAILURES = 5
_SUMMARY_RECIPES = 24  # recipes whose most sensitive layers are printed at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A grid, the workers that will score it, and their plan."""

    grid: Grid
    workers: Workers
    plan: SweepPlan


def prepare(grid: Grid) -> Prepared:
    """Count the workers, and plan the grid for them. Raises: SweepError: wrong input; nothing has been written."""
    workers = pick_workers(grid.points[0].cluster)
    return Prepared(grid=grid, workers=workers, plan=plan_sweep(grid.points, workers.device, workers.nodes))


def run(overrides: Sequence[str], *, multirun: bool, console: Console) -> int:
    """Score the grid that overrides span: see `run_prepared`.

    Args:
        overrides: Hydra overrides, with comma lists if `multirun`.
        multirun: whether comma lists span a grid.
        console: that progress and results are printed on.
    """
    started = time.monotonic()
    return run_prepared(prepare(expand(overrides, multirun=multirun, default_grid=DEFAULT_GRID)), console, started)


def run_prepared(prepared: Prepared, console: Console, started: float) -> int:
    """Score the cells of a grid that the store lacks, publish all reports, and print the most sensitive layers.

    Args:
        prepared: the grid.
        console: that progress and results are printed on.
        started: when the command has begun, by the monotonic clock.

    Returns: exit code: 0 done, 3 some trials failed, 75 interrupted.

    Raises: SweepError: wrong input; nothing has been written.
    """
    grid, workers, plan = prepared.grid, prepared.workers, prepared.plan
    base = grid.points[0]
    for node in workers.nodes:
        if node.warning is not None:
            say(console, node.warning, "yellow")
    store = Store(base.store.uri)
    store.files.check_writable("store.uri")
    store.drop_leftovers()
    root = _output_root(base, plan)
    set_aside = set(store.files.names("quarantine"))
    if n_taken := take_prefixes(plan, store, workers.device):
        say(console, f"{count(n_taken, 'cell')} taken from the samples' scores of larger sizes")
    session = Session(grid, plan, store)
    _say_set_aside(store, set_aside, console)
    if session.tasks:
        Files(root).check_writable("output_layout.root")
        if not base.output_layout.overwrite:
            _check_folders(plan, root)
    for note in plan.notes:
        say(console, note, "yellow")
    say_grid(session, console)
    try:
        with interruptible():
            if session.tasks:
                try:
                    _score(session, workers, console)
                finally:
                    _say_set_aside(store, set_aside, console)
            states = session.end(None)
            finished = _finished(session)
            result = publish(finished, root, overwrite=base.output_layout.overwrite)
    except KeyboardInterrupt:
        why = "Interrupted"
    except StoreFailed as error:
        why = f"{error} Make room, or mend what is wrong with it. Stopped"
    except MemoryShort as error:
        why = f"{error} Make room on it, or type cluster.workers=N for fewer workers at a time. Stopped"
    except ClusterLost as error:
        why = f"{error} Stopped"
    else:
        say_results(session, finished, console, root, len(result.written), time.monotonic() - started)
        return exit_code(states)
    return _leave(session, console, why)


def _leave(session: Session, console: Console, why: str) -> int:
    """Record an incomplete run, as far as the store can be written, and say how to go on. Returns the exit code."""
    with contextlib.suppress(StoreFailed):  # that may be why it ends
        session.end(EXIT_INCOMPLETE)
    done = f"{session.counts()['done']} of {len(session.plan.trials)} trials are done"
    say(console, f"{why}: {done}. Type the same command again to resume.")
    return EXIT_INCOMPLETE


def _say_set_aside(store: Store, known: set[str], console: Console) -> None:
    """Print which damaged files this process or its workers have set aside since the last call.

    Args:
        store: whose files.
        known: names that need no mention; the new ones are added.
        console: that they are printed on.
    """
    with contextlib.suppress(OSError):
        for name in store.files.names("quarantine"):
            if name not in known:
                known.add(name)
                say(console, f"Set aside in {store.uri}/quarantine/{name}: {store.why(name)}", "yellow")


def _score(session: Session, workers: Workers, console: Console) -> None:
    """Score the tasks of a session that are left, and show their progress."""
    from sweep.run import driver  # imports Ray: only when there is something to do

    if session.plan.trials[0].config.cluster.address != "local":
        share_pictures(session.plan.plans.values(), session.store)
    work = driver.Work(
        orders=[
            driver.TrialOrder(name=trial.name, task_id=trial.task_id)
            for trial in session.pending_trials()
            if trial.task_id
        ],
        tasks=session.tasks,
        plans=session.plan.plans,
        windowed=session.plan.windowed,
        store_uri=session.store.uri,
        memory_gb=session.plan.trials[0].config.sensitivity.memory_gb,
    )
    session.record.workers = workers.count
    with Display(console, session.tally) as display, ExitStack() as beating:
        events = _Events(session, display, console, beating)
        events.stage(f"Starting Ray and {count(workers.count, 'worker')} ({workers.device}) ...")
        outcome = driver.run_trials(work, workers, events)
        session.failures = dict(outcome.failures)
        session.record.worker_info = [dict(info) for info in outcome.worker_info]


class _Events:
    """Records the events of a run in the session and shows them; see sweep.run.driver.RunEvents."""

    def __init__(self, session: Session, display: Display, console: Console, beating: ExitStack) -> None:
        self._session, self._display, self._console, self._beating = session, display, console, beating
        self.stage, self.warn, self.picture = display.stage, display.say, session.picture

    def connected(self, connection: "Connection") -> None:
        record = self._session.record
        record.ray_address, record.dashboard_url = connection.address, connection.dashboard_url
        record.metrics = list(connection.metrics)
        if connection.dashboard_url is not None:
            self._display.note(f"Ray dashboard: {connection.dashboard_url}")

    def ready(self) -> None:
        """Record the trials as running: only now, so that a model that does not load leaves no trace in the store."""
        self._session.write_trials(running=True)
        self._session.beat()
        self._beating.enter_context(every(_HEARTBEAT_SECONDS, lambda: _beat(self._session), "heartbeat"))
        self._session.tally.start()
        self._display.stage("Workers hold the model; capturing activations and gradients ...")

    def dead(self, what: str) -> None:
        """End the process at once: the main thread may wait for Ray for ever."""
        self._display.__exit__(None, None, None)
        os._exit(_leave(self._session, self._console, f"{what}. Stopped"))

    def progress(self, progress: Progress) -> None:
        session = self._session
        session.tally.update(progress)
        if progress.warning is not None:
            self._display.say(progress.warning)
        task = session.tasks[progress.task_id]
        if session.first_result is None and session.tally.done_of(task.task_id) == task.n_steps:
            say_first_result(session, task, self._display)
        self._display.update()

    def ended(self) -> None:
        self._session.record.scoring_seconds = self._session.tally.seconds


def _finished(session: Session) -> list[FinishedTrial]:
    return [
        FinishedTrial(
            trial=session.row(trial),
            scores=session.scores[trial.cell_id],
            elements=session.plan.models[trial.model_revision],
        )
        for trial in session.plan.trials
        if trial.cell_id is not None and trial.cell_id in session.finished
    ]


def _output_root(base: SweepConfig, plan: SweepPlan) -> str:
    """The path or URL of the reports.

    `{run_id}` becomes a hash of the grid's trials, so that the same command finds its reports again.
    """
    grid_id = hashlib.sha256("\n".join(trial.trial_id for trial in plan.trials).encode()).hexdigest()[:12]
    root = base.output_layout.root.replace("{run_id}", grid_id)
    return root if "://" in root else str(Path(root).expanduser().absolute())


def _check_folders(plan: SweepPlan, root: str) -> None:
    """Refuse a grid whose trials lack report folders of their own, before hours are spent on it.

    Raises: SweepError: two of its trials have one folder, or a folder holds other content; names them.
    """
    by_folder: dict[str, TrialRow] = {}
    for trial in plan.trials:
        row = row_of(trial, "planned", None, "")
        folder = "/".join(folder_of(row))
        if trial.cell_id is not None and by_folder.setdefault(folder, row).cell_id != trial.cell_id:
            raise SweepError(
                f"Two trials {trial.name} of this grid have one report folder: "
                f"{by_folder[folder].trial_id} and {trial.trial_id}. "
                "Run them one after the other, each with its own dataset.name=NAME or output_layout.root=DIR, "
                "or keep the later one's report with output_layout.overwrite=true."
            )
    check_ahead(root, by_folder)


def _beat(session: Session) -> None:
    with contextlib.suppress(StoreFailed):  # a worker will meet it, too, and end the run
        session.beat()


def say_grid(session: Session, console: Console) -> None:
    """Print the number of trials and cells, how many are done or skipped, and what they cover of the model."""
    counts = session.counts()
    cells = {trial.cell_id for trial in session.plan.trials if trial.cell_id}
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    trials, distinct = count(len(session.plan.trials), "trial"), count(len(cells), "distinct cell")
    n_found = len(cells & session.finished)
    say(console, f"{trials}{skipped}: {distinct}, {n_found} in the store already ({session.store.uri})")
    for reason, n in Counter(trial.reason for trial in session.plan.trials if trial.reason).most_common(3):
        say(console, f"  skipped {n}: {reason}", "dim")
    for label, coverage in session.plan.coverages:
        say(console, f"{label}: {coverage.text}", None if coverage.warning is None else "yellow", indent="  ")


def say_first_result(session: Session, task: Task, display: Display) -> None:
    """Show the most sensitive layers of the first task that is done."""
    cell = list(task.cells.values())[-1]
    if session.store.is_finished(cell):
        session.first_result = time.monotonic() - session.started
        ranked = ", ".join(most_sensitive(session.store.scores(cell), 3))
        display.say(f"First result after {session.first_result:.1f} s: {task.label}/{list(task.cells)[-1]}: {ranked}")


def say_results(
    session: Session, finished: Sequence[FinishedTrial], console: Console, root: str, written: int, seconds: float
) -> None:
    """Print the most sensitive layers of each recipe, where reports and scores are, and what to type next."""
    counts = session.counts()
    scored = sum(cell in session.finished for task in session.tasks.values() for cell in task.cells.values())
    console.print()
    shown = largest(finished)
    if shown:
        target = Target.from_config(session.plan.trials[0].config.target)
        heading, *rows = summary_table(shown[:_SUMMARY_RECIPES], 3, target)
        show_table(console, heading, rows)
    if len(shown) > _SUMMARY_RECIPES:
        say(console, f"... and {len(shown) - _SUMMARY_RECIPES} more recipes, in the reports", "dim")
    done = f"{counts['done']} of {len(session.plan.trials)} trials done"
    say(console, f"\n{done}, {count(scored, 'cell')} scored, in {duration(seconds)}.")
    for label, coverage in session.plan.coverages:
        if coverage.warning is not None:
            say(console, f"{label}: {coverage.warning}", "yellow", indent="  ")
    failed = [trial for trial in session.plan.trials if session.state(trial)[0] == "failed"]
    for trial in failed[:_SHOWN_FAILURES]:
        say(console, f"failed: {trial.config.model.name}: {trial.name}: {session.state(trial)[1]}", "red")
    if failed:
        say(console, "What has failed stays so; type the same command with cluster.retry_failed=true to try again.")
    say(console, f"Reports: {root} ({written} written)")
    say(console, f"Scores:  {session.store.uri}/scores/*/*.parquet")
    store = override("store.uri", session.store.uri)
    if finished:
        page = f"{root}/{finished[0].trial.model}/layer-analysis/README.md"
        show_next(console, f"open {shlex.quote(page)}", f"sweep publish {store}  # puts reports into models/")
    else:
        show_next(console, f"sweep status {store}")
