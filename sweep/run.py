"""`sweep run`: from overrides to published results. The same command again resumes, or finds nothing left to do."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from sweep.announce import say_first_result, say_grid, say_results
from sweep.compose import DEFAULT_GRID, expand
from sweep.config import SweepConfig
from sweep.errors import ClusterLost, StoreFailed, SweepError
from sweep.files import Files
from sweep.interrupts import interruptible
from sweep.machine import Workers, pick_workers
from sweep.planning import PlannedTrial, SweepPlan, plan_sweep
from sweep.progress import Display
from sweep.publish import check_ahead, publish
from sweep.records import FinishedTrial
from sweep.report_files import folder_of
from sweep.session import EXIT_INCOMPLETE, Session, exit_code
from sweep.store import Store
from workers.task import Progress

_HEARTBEAT_SECONDS = 2.0


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
    grid = expand(overrides, multirun=multirun, default_grid=DEFAULT_GRID)
    base = grid.points[0]
    workers = pick_workers(base.cluster)
    for node in workers.nodes:
        if node.warning is not None:
            console.print(node.warning, style="yellow", highlight=False, soft_wrap=True)
    plan = plan_sweep(grid.points, workers.device, workers.nodes)
    store = Store(base.store.uri)
    store.files.check_writable("store.uri")
    store.drop_leftovers()
    root = _output_root(base, plan)
    set_aside = set(store.files.names("quarantine"))
    session = Session(grid, plan, store)
    _say_set_aside(store, set_aside, console)
    if session.tasks:
        Files(root).check_writable("output_layout.root")
        if not base.output_layout.overwrite:
            _check_folders(plan, root)
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
    console.print(f"{why}: {session.counts()['done']} of {len(session.plan.trials)} trials are done. Type the same command again to resume.", highlight=False)
    return EXIT_INCOMPLETE


def _say_set_aside(store: Store, known: set[str], console: Console) -> None:
    """Name damaged files that were set aside, by this process or its workers, since the last time; `known` takes them up."""
    with contextlib.suppress(OSError):
        for name in store.files.names("quarantine"):
            if name not in known:
                known.add(name)
                console.print(f"Set aside in {store.uri}/quarantine/{name}: {store.why(name)}", style="yellow", highlight=False)


def _score(session: Session, workers: Workers, console: Console) -> None:
    with Display(console, session.tally) as display:
        display.stage(f"Starting Ray and {workers.count} worker{'s' if workers.count > 1 else ''} ({workers.device}) ...")
        from sweep import driver  # imports Ray: only when there is something to do

        beating = ExitStack()

        def on_connected(connection: "driver.cluster.Connection") -> None:
            session.record |= {"ray_address": connection.address, "dashboard_url": connection.dashboard_url, "metrics": connection.metrics}
            if connection.dashboard_url is not None:
                display.note(f"Ray dashboard: {connection.dashboard_url}")

        def on_ready() -> None:  # a model that does not load has left no trace in the store
            session.write_trials(running=True)
            beating.enter_context(_heartbeat(session))
            session.tally.start()
            display.stage("Workers hold the model; capturing activations and gradients ...")

        def on_dead(what: str) -> None:  # the main thread may wait for Ray for ever
            display.__exit__(None, None, None)
            os._exit(_leave(session, console, f"{what}. Stopped"))

        def on_progress(progress: Progress) -> None:
            session.tally.update(progress)
            if progress.warning is not None:
                display.say(progress.warning)
            task = session.tasks[progress.task_id]
            if session.first_result is None and session.tally.done_of(task.task_id) == task.n_steps:
                say_first_result(session, task, display)
            display.update()

        orders = [driver.TrialOrder(name=trial.name, task_id=trial.task_id) for trial in session.pending_trials() if trial.task_id]

        session.record["workers"] = workers.count
        with beating:
            session.failures, infos = driver.run_trials(
                orders,
                session.tasks,
                session.plan.plans,
                session.plan.windowed,
                workers,
                session.store.uri,
                memory_gb=session.plan.trials[0].config.sensitivity.memory_gb,
                picture=session.picture,
                on_connected=on_connected,
                on_stage=display.stage,
                on_ready=on_ready,
                on_dead=on_dead,
                on_progress=on_progress,
                on_ended=lambda: session.record.update(scoring_seconds=session.tally.seconds),
            )
            session.record["worker_info"] = infos


def _finished(session: Session) -> list[FinishedTrial]:
    return [
        FinishedTrial(trial=session.row(trial), scores=session.scores[trial.cell_id])
        for trial in session.plan.trials
        if trial.cell_id is not None and trial.cell_id in session.finished
    ]


def _output_root(base: SweepConfig, plan: SweepPlan) -> str:
    """Where reports go, a path or URL; `{run_id}` is the grid's own name, so that the same command finds its reports again."""
    grid_id = hashlib.sha256("\n".join(trial.trial_id for trial in plan.trials).encode()).hexdigest()[:12]
    root = base.output_layout.root.replace("{run_id}", grid_id)
    return root if "://" in root else str(Path(root).expanduser().absolute())


def _check_folders(plan: SweepPlan, root: str) -> None:
    """Refuse a grid whose reports have no folder of their own, before hours are spent on it.

    Raises: SweepError: two of its trials belong in one, or one holds other content; names them.
    """
    by_folder: dict[str, PlannedTrial] = {}
    for trial in plan.trials:
        config = trial.config
        assert config.model.name is not None  # SweepConfig has checked
        pair = {"weight": config.quant_pair.weight, "activation": config.quant_pair.activation}
        dataset, sensitivity = config.dataset, config.sensitivity
        parts = folder_of(
            config.model.name,
            pair,
            config.quant_granularity.name,
            sensitivity.coverage,
            dataset.name,
            dataset.size,
            sensitivity.method,
            algorithm=sensitivity.quant_algorithm,
            scales=sensitivity.scales,
        )
        folder = "/".join(parts)
        if trial.cell_id is not None and by_folder.setdefault(folder, trial).cell_id != trial.cell_id:
            raise SweepError(
                f"Two trials {trial.name} of this grid have one report folder: {by_folder[folder].trial_id} and {trial.trial_id}. "
                "Run them one after the other, each with its own output_layout.root=DIR, or keep the later one's report with output_layout.overwrite=true."
            )
    identities = {
        folder: {"model_revision": trial.model_revision, "dataset_revision": trial.dataset_revision, "cell_id": trial.cell_id}
        for folder, trial in by_folder.items()
    }
    check_ahead(root, identities)


@contextmanager
def _heartbeat(session: Session) -> Generator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_HEARTBEAT_SECONDS):
            with contextlib.suppress(StoreFailed):  # a worker will meet it, too, and end the run
                session.beat()

    session.beat()
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
