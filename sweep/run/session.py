"""State of one run: which trials are left, which are done, and their record in the store."""

import json
import os
import secrets
import socket
import time
from collections import Counter
from datetime import UTC, datetime
from operator import attrgetter

from sweep.config.compose import Grid
from sweep.config.schema import to_record
from sweep.core.exits import EXIT_DONE, EXIT_FAILED, EXIT_INCOMPLETE
from sweep.plan.trials import PlannedTrial, SweepPlan, versions
from sweep.run.progress import Tally
from sweep.store.records import ATTRIBUTES, RunRecord, TrialRow, TrialState
from sweep.store.store import Store
from workers.task import Picture


def exit_code(states: Counter[str]) -> int:
    """The exit code of a run, from its number of trials by state."""
    return EXIT_FAILED if states["failed"] else EXIT_INCOMPLETE if states["planned"] else EXIT_DONE


class Session:
    """One run: which trials are left, which are done, and their record in the store."""

    def __init__(self, grid: Grid, plan: SweepPlan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.started = time.monotonic()
        self.first_result: float | None = None  # seconds until there was one
        # Runs in two containers may have one process id.
        self.run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{secrets.token_hex(2)}"
        self.failures: dict[str, str] = {}  # by task id
        self._before = store.trials()
        self._written: dict[str, TrialRow] = {}
        cells = {trial.cell_id for trial in plan.trials if trial.cell_id}
        # Read now, not when reports are made: what is damaged is scored again in this run.
        self.scores = {cell: rows for cell in sorted(cells) if (rows := store.whole_scores(cell)) is not None}
        self.finished = set(self.scores)
        given_up: set[str] = set()
        if not grid.points[0].cluster.retry_failed:
            given_up = {
                trial.cell_id for trial in plan.trials if trial.cell_id is not None and self._failed_before(trial)
            }
        self._given_up = given_up - self.finished
        self.tasks = plan.pending(self.finished | self._given_up)
        self.record = RunRecord(
            run_id=self.run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=now(),
            trials=len(plan.trials),
            models={revision: dict(elements) for revision, elements in plan.models.items()},
        )
        self._at_first = self.counts()
        self.tally = Tally(
            self.tasks, Counter(trial.task_id for trial in self.pending_trials() if trial.task_id), len(plan.trials)
        )

    def pending_trials(self) -> list[PlannedTrial]:
        """Trials that still lack scores, in the order asked for."""
        return [
            trial
            for trial in self.plan.trials
            if trial.task_id in self.tasks and trial.cell_id in self.tasks[trial.task_id].cells.values()
        ]

    def state(self, trial: PlannedTrial) -> tuple[TrialState, str | None]:
        """A trial's state as the store has it, and why."""
        if trial.cell_id is None:
            return "skipped", trial.reason
        if trial.cell_id in self.finished:
            return "done", None
        if trial.task_id in self.failures:
            return "failed", self.failures[trial.task_id]
        if trial.cell_id in self._given_up:
            return (
                "failed",
                self._before[trial.trial_id].reason
                if trial.trial_id in self._before
                else "its cell failed before; cluster.retry_failed=true tries again",
            )
        return "planned", None

    def counts(self) -> Counter[str]:
        """Trials by state."""
        return Counter(self.state(trial)[0] for trial in self.plan.trials)

    def picture(self) -> Picture:
        """Trials and layer groups by state, for the metrics."""
        tally = self.tally
        live = tally.trials_by_state()
        at_first = {state: n for state, n in self._at_first.items() if state in ("done", "failed", "skipped")}
        return Picture(
            trials={
                state: live[state] + at_first.get(state, 0)
                for state in ("planned", "running", "done", "failed", "skipped")
            },
            groups_done=tally.done_groups,
            groups_total=tally.total_groups,
            groups_scored=tally.scored_groups,
            failed_trials=live["failed"],
            queue=live["planned"],
            models=len({task.model.revision for task in self.tasks.values()}),
            eta_seconds=tally.eta_seconds,
            trial_seconds=tally.take_trial_seconds(),
        )

    def write_trials(self, running: bool) -> None:
        """Record every trial whose state is not what the store says already."""
        for trial in self.plan.trials:
            state, reason = self.state(trial)
            if state == "planned" and running:
                state = "running"
            last = self._written.get(trial.trial_id) or self._before.get(trial.trial_id)
            if last is None or (last.state, last.cell_id, last.reason) != (state, trial.cell_id, reason):
                self._written[trial.trial_id] = row_of(trial, state, reason, self.run_id)
        if self._written:
            self.store.write_trials(self.run_id, self._written.values())

    def beat(self) -> None:
        """Write the run's heartbeat."""
        tally, record = self.tally, self.record
        record.heartbeat_at = now()
        record.groups_done, record.groups_total = tally.done_groups, tally.total_groups
        record.groups_per_second = round(tally.groups_per_second, 3)
        record.eta_seconds = None if tally.eta_seconds is None else round(tally.eta_seconds, 1)
        self.store.write_run(self.run_id, record)

    def end(self, code: int | None) -> Counter[str]:
        """Read from the store which cells are finished, and record the end of the run. Returns trials by state.

        A run with nothing left to score is recorded if it knows more of a model than the store does.
        """
        for cell in (cell for task in self.tasks.values() for cell in task.cells.values()):
            if (rows := self.store.whole_scores(cell)) is not None:
                self.scores[cell] = rows
        self.finished = set(self.scores)
        self.write_trials(running=False)
        counts = self.counts()
        known = self.store.models()
        if self.tasks or any(len(known.get(model, {})) < len(kinds) for model, kinds in self.record.models.items()):
            self.record.ended_at, self.record.exit_code = now(), exit_code(counts) if code is None else code
            self.beat()
        if self._written:
            self.store.compact_trials(run_id for run_id, record in self.store.runs().items() if record.ended_at)
        return counts

    def row(self, trial: PlannedTrial) -> TrialRow:
        """The trial's latest row."""
        return self._written.get(trial.trial_id) or self._before[trial.trial_id]

    def _failed_before(self, trial: PlannedTrial) -> bool:
        row = self._before.get(trial.trial_id)
        return row is not None and row.state == "failed" and row.cell_id == trial.cell_id


def row_of(trial: PlannedTrial, state: TrialState, reason: str | None, run_id: str) -> TrialRow:
    """A trial's row of the store, dated now."""
    attributes = {name: attrgetter(key)(trial.config) for name, key in ATTRIBUTES.items()} | {"dtype": trial.dtype}
    return TrialRow(
        **attributes,
        tp=trial.tp,
        calibration=trial.calibration,
        draws=trial.config.sensitivity.draws,
        trial_id=trial.trial_id,
        cell_id=trial.cell_id,
        model_revision=trial.model_revision,
        dataset_revision=trial.dataset_revision,
        state=state,
        reason=reason,
        config=json.dumps(to_record(trial.config)),
        versions=json.dumps(versions(trial.score_version), sort_keys=True),
        created_at=datetime.now(UTC),
        run_id=run_id,
    )


def now() -> str:
    """The current time in UTC, in ISO format to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
