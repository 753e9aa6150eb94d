"""Progress of a running sweep on the screen: a live table on a terminal, elsewhere a line every ten seconds."""

import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from sweep.core.screen import say
from sweep.core.text import duration
from workers.task import Progress, Task

_LINE_SECONDS = 10.0  # between lines where there is no terminal
_SHOWN_TASKS = 6  # running recipes listed below the totals
_BAR = 20  # columns of a bar: on a screen of 80 the longest recipe's name stays whole beside it


class Tally:
    """Layer groups and trials done, and how fast; plain numbers, shared by the display and the heartbeat."""

    def __init__(self, tasks: Mapping[str, Task], trials_of: Mapping[str, int], n_trials: int) -> None:
        """Start with nothing done of what is left.

        Args:
            tasks: what is left, by task id.
            trials_of: number of trials that each task answers.
            n_trials: all trials of the grid; those without a task here are done or skipped already.
        """
        self.tasks = tasks
        self.total_groups = sum(task.n_steps for task in tasks.values())
        self.n_trials = n_trials
        self._trials_of = trials_of
        self._done: dict[str, dict[int, int]] = {task_id: {} for task_id in tasks}  # by assignment
        self._found: dict[tuple[str, int], int] = {}  # groups that were in the store before, by task and assignment
        self._started: float | None = None
        self._begun: dict[str, float] = {}  # when, by task id
        self._ended: set[str] = set()
        self._failed: set[str] = set()
        self._trial_seconds: list[float] = []  # not taken yet

    def start(self) -> None:
        """The workers are ready; the clock for rate and ETA starts."""
        self._started = time.monotonic()

    def update(self, progress: Progress) -> None:
        """Count a task's progress."""
        self._found[progress.task_id, progress.assignment] = progress.found
        self._done[progress.task_id][progress.assignment] = progress.done
        task_id, now = progress.task_id, time.monotonic()
        self._begun.setdefault(task_id, now)
        if progress.failure is not None:
            self._failed.add(task_id)
        if task_id not in self._ended and (
            task_id in self._failed or self.done_of(task_id) == self.tasks[task_id].n_steps
        ):
            self._ended.add(task_id)
            self._trial_seconds += [now - self._begun[task_id]] * self._trials_of[task_id]

    def trials_by_state(self) -> Counter[str]:
        """Trials of this run that are planned, running, done or failed."""
        states: Counter[str] = Counter(planned=0, running=0, done=0, failed=0)
        known = {"failed": self._failed, "done": self._ended, "running": self._begun}  # the first that knows a task
        for task_id, n in self._trials_of.items():
            states[next((state for state, ids in known.items() if task_id in ids), "planned")] += n
        return states

    def take_trial_seconds(self) -> tuple[float, ...]:
        """Seconds of each trial that has ended since the last call, counted from its task's first progress."""
        taken, self._trial_seconds = self._trial_seconds, []
        return tuple(taken)

    def done_of(self, task_id: str) -> int:
        """Layer groups done of one task, over all its cells."""
        found_twice = sum(list(self._done[task_id].values()))  # the next assignment finds a dead worker's groups again
        return min(found_twice, self.tasks[task_id].n_steps)

    @property
    def done_groups(self) -> int:
        """Layer groups done, over all cells."""
        return sum(map(self.done_of, self._done))

    @property
    def scored_groups(self) -> int:
        """Layer groups done that were not in the store before."""
        return self.done_groups - sum(list(self._found.values()))

    @property
    def done_trials(self) -> int:
        """Trials that need nothing more."""
        left = sum(
            self._trials_of[task_id] for task_id, task in self.tasks.items() if self.done_of(task_id) < task.n_steps
        )
        return self.n_trials - left

    @property
    def running(self) -> list[tuple[Task, int]]:
        """Tasks under way, with their groups done."""
        begun = [(task, self.done_of(task_id)) for task_id, task in self.tasks.items() if self._done[task_id]]
        return [(task, done) for task, done in begun if done < task.n_steps]

    @property
    def seconds(self) -> float:
        """Since the workers were ready."""
        return 0.0 if self._started is None else time.monotonic() - self._started

    @property
    def groups_per_second(self) -> float:
        """Rate of this run, parts found in the store not counted."""
        return self.scored_groups / max(self.seconds, 1e-3) if self._started is not None else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at this rate; None while there is no rate."""
        rate = self.groups_per_second
        return (self.total_groups - self.done_groups) / rate if rate else None


class Display:
    """A context that shows a tally on the console."""

    def __init__(self, console: Console, tally: Tally) -> None:
        self._console, self._tally = console, tally
        self._stage = "starting"
        self._last_line = time.monotonic()
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def stage(self, text: str) -> None:
        """Show the current stage of the run, in words."""
        self._stage = text
        if not self._live:
            self._console.print(text)

    def say(self, text: str) -> None:
        """Print a warning, which stays on the screen."""
        say(self._console, text, "yellow")

    def note(self, text: str) -> None:
        """Print information, which stays on the screen."""
        say(self._console, text)

    def update(self) -> None:
        """Show a changed tally."""
        if not self._live and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(self._totals())

    def _totals(self) -> str:
        tally = self._tally
        eta = tally.eta_seconds
        left = "" if eta is None else f", about {duration(eta)} left"
        groups = f"{tally.done_groups} of {tally.total_groups} layer groups"
        return f"{tally.done_trials} of {tally.n_trials} trials, {groups}, {tally.groups_per_second:.0f}/s{left}"

    def _render(self) -> RenderableType:
        """Bars of the whole and of the recipes under way; their text takes the rest of the line and folds."""
        tally, running = self._tally, self._tally.running
        text = TextColumn("{task.description}", markup=False, table_column=Column())
        bars = Bars(BarColumn(_BAR), text, console=self._console, auto_refresh=False)
        bars.add_task(self._totals(), total=max(tally.total_groups, 1), completed=tally.done_groups)
        for task, done in running[:_SHOWN_TASKS]:
            groups = f"{done} of {task.n_steps} layer groups ({', '.join(task.cells)})"
            bars.add_task(f"{task.label}: {groups}", total=task.n_steps, completed=done)
        return bars.get_renderable() if running else Group(bars.get_renderable(), Text(self._stage, style="dim"))
