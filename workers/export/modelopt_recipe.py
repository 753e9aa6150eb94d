"""PTQ recipe files, read by ModelOpt's own reader."""

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see workers.quant.modelopt
    from modelopt.recipe import load_recipe


def read_modelopt(path: Path) -> tuple[list[dict[str, Any]], object]:
    """The `quant_cfg` entries of a PTQ recipe file as ModelOpt reads them, and its `algorithm`.

    Entries have only the fields that the file names.

    Args:
        path: absolute; ModelOpt would look a relative one up among its own recipes first.

    Raises: ValueError: ModelOpt refuses the file.
    """
    with redirect_stdout(io.StringIO()):  # it prints the file's name
        recipe: Any = load_recipe(path)
    entries = [_entry(entry.model_dump(exclude_unset=True)) for entry in recipe.quantize.quant_cfg]
    return entries, recipe.quantize.algorithm


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with the axes of blocks as numbers: ModelOpt reads them as numbers or as text."""
    cfg = entry.get("cfg")
    if cfg and cfg.get("block_sizes"):
        blocks = {
            int(key) if str(key).lstrip("-").isdigit() else key: value for key, value in cfg["block_sizes"].items()
        }
        entry["cfg"] = {**cfg, "block_sizes": blocks}
    return entry
