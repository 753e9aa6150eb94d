"""`sweep publish`: put every finished trial of a store into the models directory."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sweep.compose import expand
from sweep.config import to_plain
from sweep.errors import SweepError
from sweep.publish import publish
from sweep.records import FinishedTrial, TrialRow
from sweep.store import Store


def _is_asked_for(row: TrialRow, overrides: Sequence[str], asked: Mapping[str, Any]) -> bool:
    """Whether a trial has the values that were typed: `quant_pair=wfp8_afp8` publishes only its trials."""
    config = json.loads(row.config)
    for override in overrides:
        section, *keys = override.partition("=")[0].strip().split(".")
        if section in ("store", "output_layout", "cluster", "target"):
            continue
        wanted, found = asked[section], config[section]
        for key in keys or ["name"] if "name" in wanted else keys:
            wanted, found = wanted[key], found.get(key)  # a record older than the key has none
        if wanted != found:
            return False
    return True


def publish_store(overrides: Sequence[str], *, overwrite: bool, as_json: bool) -> int:
    """Sync the store that the overrides name; unfinished trials stay out. Returns the exit code.

    Raises: SweepError: nothing finished to publish, or a folder that another model revision or data set content left.
    """
    config = expand(["output_layout=publish", *overrides], multirun=False).points[0]
    store = Store(config.store.uri)
    if "{run_id}" in config.output_layout.root:
        raise SweepError("output_layout=tmp is for the reports of one run. Leave it out, or type output_layout.root=DIR.")
    asked = to_plain(config)
    rows = [row for row in store.trials().values() if row.state == "done" and row.cell_id is not None and _is_asked_for(row, overrides, asked)]
    if not rows:
        raise SweepError(f"The store {store.uri} holds no finished trial of that kind. Type `sweep run` first, or store.uri=DIR.")
    finished = [FinishedTrial(trial=row, scores=store.scores(row.cell_id)) for row in rows if row.cell_id is not None]
    root = config.output_layout.root if "://" in config.output_layout.root else Path(config.output_layout.root).absolute()
    result = publish(finished, root, overwrite=overwrite or config.output_layout.overwrite)
    if as_json:
        counts = {"written": [str(path) for path in result.written], "unchanged": len(result.unchanged), "root": str(root)}
        print(json.dumps(counts, indent=1))  # noqa: T201 -- machine-readable output, not for rich to wrap
    else:
        Console(markup=False).print(f"{len(result.written)} written, {len(result.unchanged)} unchanged, under {root}", highlight=False, soft_wrap=True)
    return 0
