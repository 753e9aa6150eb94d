"""What a run says: before it starts, at its first result, and at its end."""

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from sweep.config.targets import Target
from sweep.report.render import most_sensitive, summary_lines
from sweep.run.progress import Display, count, duration
from sweep.run.session import Session
from sweep.store.records import FinishedTrial
from workers.data.samples import SIZES
from workers.task import Task

_SUMMARY_RECIPES = 24  # recipes whose most sensitive layers are printed at the end


def say_grid(session: Session, console: Console) -> None:
    """How many trials, and what of them is done or left out."""
    counts = session.counts()
    cells = {trial.cell_id for trial in session.plan.trials if trial.cell_id}
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    trials, distinct = count(len(session.plan.trials), "trial"), count(len(cells), "distinct cell")
    console.print(f"{trials}{skipped}: {distinct}, {len(cells & session.finished)} in the store already ({session.store.uri})", soft_wrap=True)
    for reason, n in Counter(trial.reason for trial in session.plan.trials if trial.reason).most_common(3):
        console.print(f"  skipped {n}: {reason}", style="dim", highlight=False)


def say_first_result(session: Session, task: Task, display: Display) -> None:
    """The first ranking, as soon as there is one."""
    cell = list(task.cells.values())[-1]
    if session.store.is_finished(cell):
        session.first_result = time.monotonic() - session.started
        ranked = ", ".join(most_sensitive(session.store.scores(cell), 3))
        display.say(f"First result after {session.first_result:.1f} s: {task.label}/{list(task.cells)[-1]}: {ranked}")


def say_results(session: Session, finished: Sequence[FinishedTrial], console: Console, root: str, written: int, seconds: float) -> None:
    """The most sensitive layers of each recipe, where everything is, and what to type next."""
    counts = session.counts()
    scored = sum(cell in session.finished for task in session.tasks.values() for cell in task.cells.values())
    console.print()
    shown = list(_largest(finished).values())
    target = Target.from_config(session.plan.trials[0].config.target)
    for line in summary_lines(shown[:_SUMMARY_RECIPES], 3, target) if shown else ():
        console.print(line, highlight=False, soft_wrap=True)
    if len(shown) > _SUMMARY_RECIPES:
        console.print(f"... and {len(shown) - _SUMMARY_RECIPES} more recipes, in the reports", style="dim")
    console.print(f"\n{counts['done']} of {len(session.plan.trials)} trials done, {count(scored, 'cell')} scored, in {duration(seconds)}.")
    for trial, reason in [(trial, session.state(trial)[1]) for trial in session.plan.trials if session.state(trial)[0] == "failed"][:5]:
        console.print(f"failed: {trial.config.model.name}: {trial.name}: {reason}", style="red", highlight=False)
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
