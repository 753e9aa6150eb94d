"""Progress counts layer groups and trials; rate and time left are those of this run."""

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sweep.run import progress
from sweep.run.progress import Display, Tally
from workers.task import Progress


def task(label: str, n_groups: int, *sizes: str) -> Any:
    """As much of a task as progress needs: `n_groups` in each size."""
    return SimpleNamespace(label=label, cells={size: f"cell-{size}" for size in sizes}, n_steps=n_groups * len(sizes))


def done(task_id: str, n: int, found: int = 0) -> Progress:
    return Progress(task_id=task_id, done=n, found=found)


class Clock:
    """A clock that stands until it is put forward."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(progress, "time", own)
    return own


@pytest.fixture
def tally() -> Tally:
    """7 trials: 2 need nothing more, 4 are answered by task a (10 groups, 2 sizes), 1 by task b (5 groups)."""
    return Tally(
        {"a": task("wfp8_afp8/default", 10, "small", "large"), "b": task("wint4_afp16/default", 5, "small")},
        {"a": 4, "b": 1},
        7,
    )


@pytest.mark.parametrize(
    ("updates", "groups", "trials", "running"),
    [
        ([], 0, 2, []),
        ([("a", 0)], 0, 2, [("wfp8_afp8/default", 0)]),
        ([("a", 12)], 12, 2, [("wfp8_afp8/default", 12)]),
        ([("a", 12), ("b", 3), ("a", 20)], 23, 6, [("wint4_afp16/default", 3)]),
        ([("b", 5), ("a", 20)], 25, 7, []),
    ],
)
def test_groups_and_trials_are_counted(
    updates: list[tuple[str, int]], groups: int, trials: int, running: list[tuple[str, int]], tally: Tally
) -> None:
    for task_id, n in updates:
        tally.update(done(task_id, n))
    assert (tally.done_groups, tally.total_groups, tally.done_trials) == (groups, 25, trials)
    assert [(one.label, n) for one, n in tally.running] == running


def test_rate_and_time_left_do_not_count_what_was_in_the_store(tally: Tally, clock: Clock) -> None:
    assert (tally.groups_per_second, tally.eta_seconds) == (0.0, None)
    clock.now += 60  # Ray starts, models load
    tally.start()
    tally.update(done("a", 8, found=8))
    clock.now += 2
    assert (tally.groups_per_second, tally.eta_seconds) == (0.0, None)
    tally.update(done("a", 12, found=8))
    assert tally.groups_per_second == 4 / 2
    assert tally.eta_seconds == (25 - 12) / 2
    clock.now += 2
    tally.update(done("b", 0))
    tally.update(done("b", 4))
    assert tally.groups_per_second == (4 + 4) / 4
    assert tally.eta_seconds == (25 - 16) / 2


def test_what_several_workers_have_done_of_a_task_adds_up_and_a_dead_ones_part_counts_once(tally: Tally) -> None:
    tally.update(Progress(task_id="a", done=6, found=0, assignment=1))
    tally.update(Progress(task_id="a", done=10, found=0, assignment=2))
    assert tally.done_of("a") == 16
    tally.update(Progress(task_id="a", done=10, found=6, assignment=3))  # what assignment 1 left, and four more
    assert tally.done_of("a") == 20


def test_without_a_terminal_a_line_comes_now_and_then(tally: Tally, clock: Clock) -> None:
    out = StringIO()
    with Display(Console(file=out, width=200), tally) as display:
        display.stage("Starting Ray ...")
        tally.start()
        tally.update(done("b", 0))
        for n in range(1, 5):
            clock.now += 4
            tally.update(done("b", n))
            display.update()
    lines = [
        "Starting Ray ...",
        "2 of 7 trials, 3 of 25 layer groups, 0/s, about 1 min 28 s left",
    ]  # 12 s in: 22 left at 3 in 12 s
    assert out.getvalue().splitlines() == lines


def test_on_a_terminal_the_table_names_what_runs(tally: Tally) -> None:
    tally.update(done("a", 3))
    out = StringIO()
    console = Console(file=out, width=160, force_terminal=True, color_system=None)
    with Display(console, tally):
        pass
    text = out.getvalue()
    assert "2 of 7 trials, 3 of 25 layer groups" in text
    assert "wfp8_afp8/default" in text
    assert "3 of 20 layer groups (small, large)" in text
    assert "wint4_afp16" not in text  # not under way


def test_at_80_columns_no_word_is_cut() -> None:
    label = "wfp8_afp8/recipe_match_channel_token/smoothquant/fused"
    tally = Tally({"a": task(label, 144, "small", "medium", "large")}, {"a": 4}, 4)
    tally.update(done("a", 3))
    out = StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with Display(console, tally) as display:
        display.say(f"Worker 3 died while it scored {label}; what it held is scored again, on /{'long/' * 20}")
    words = out.getvalue().split()
    expected = f"0 of 4 trials, 3 of 432 layer groups (small, medium, large) {label}: {label}; /{'long/' * 20}"
    assert {*expected.split()} <= {*words}


def test_trials_are_planned_running_done_or_failed_and_each_that_ends_has_its_seconds_once(
    tally: Tally, clock: Clock
) -> None:
    assert tally.trials_by_state() == {"planned": 5, "running": 0, "done": 0, "failed": 0}
    tally.update(done("a", 5, found=5))
    assert tally.trials_by_state() == {"planned": 1, "running": 4, "done": 0, "failed": 0}
    assert tally.take_trial_seconds() == ()
    clock.now += 3
    tally.update(done("b", 0))
    tally.update(done("a", 20, found=5))
    clock.now += 1
    tally.update(Progress(task_id="b", done=2, found=0, failure="NaN"))
    tally.update(Progress(task_id="b", done=2, found=0, failure="NaN"))
    assert tally.trials_by_state() == {"planned": 0, "running": 0, "done": 4, "failed": 1}
    assert tally.take_trial_seconds() == (3.0, 3.0, 3.0, 3.0, 1.0)
    assert tally.take_trial_seconds() == ()
    assert tally.scored_groups == 15 + 2
