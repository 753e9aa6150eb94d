"""`sweep publish`: put every finished trial of a store into the models directory."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sweep.commands.recipes import by_recipe, show_recipes
from sweep.config.compose import expand
from sweep.config.schema import to_plain
from sweep.core.errors import SweepError
from sweep.core.exits import EXIT_DONE
from sweep.core.screen import say
from sweep.report.files import folder_of
from sweep.report.publish import publish
from sweep.store.records import FinishedTrial
from sweep.store.select import finished_trials, opened


def publish_store(overrides: Sequence[str], *, overwrite: bool, as_json: bool) -> int:
    """Sync the store that the overrides name; unfinished trials stay out. Returns the exit code.

    Raises: SweepError: nothing finished to publish, or a folder that another model revision or data set content left.
    """
    config = expand(["output_layout=publish", *overrides], multirun=False).points[0]
    if "{run_id}" in config.output_layout.root:
        raise SweepError(
            "output_layout=tmp is for the reports of one run. Leave it out, or type output_layout.root=DIR."
        )
    with opened(config.store.uri) as store:
        rows = finished_trials(store, overrides, [to_plain(config)])
        models = store.models()
        finished = [
            FinishedTrial(trial=row, scores=store.scores(row.cell_id), elements=models.get(row.model_revision))
            for row in rows
            if row.cell_id is not None
        ]
    root = (
        config.output_layout.root if "://" in config.output_layout.root else Path(config.output_layout.root).absolute()
    )
    result = publish(finished, root, overwrite=overwrite or config.output_layout.overwrite)
    if as_json:
        counts = {"written": result.written, "unchanged": len(result.unchanged), "root": str(root)}
        print(json.dumps(counts, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
        return EXIT_DONE
    console = Console(markup=False, highlight=False)
    written = set(result.written)
    done = [(one.trial, "written" if f"{root}/{_folder(one)}" in written else "unchanged") for one in finished]
    show_recipes(console, by_recipe(done), ("written", "unchanged"))
    say(console, f"{len(result.written)} written, {len(result.unchanged)} unchanged, under {root}")
    return EXIT_DONE


def _folder(finished: FinishedTrial) -> str:
    return "/".join(folder_of(finished.trial))
