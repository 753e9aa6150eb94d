"""PTQ recipe files, read by ModelOpt's own reader."""

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import msgspec

from sweep.formats.recipe import Entry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see workers.quant.modelopt
    from modelopt.recipe import load_recipe


def read_modelopt(path: Path) -> tuple[list[Entry], object]:
    """The `quant_cfg` entries of a PTQ recipe file as ModelOpt reads them, and its `algorithm`.

    Entries have only the fields that the file names.

    Args:
        path: absolute; ModelOpt would look a relative one up among its own recipes first.

    Raises: ValueError: ModelOpt refuses the file.
    """
    with redirect_stdout(io.StringIO()):  # it prints the file's name
        recipe: Any = load_recipe(path)
    entries = [entry.model_dump(exclude_unset=True) for entry in recipe.quantize.quant_cfg]
    for cfg in (entry["cfg"] for entry in entries if entry.get("cfg")):
        if blocks := cfg.get("block_sizes"):  # ModelOpt reads the axes as numbers or as text
            cfg["block_sizes"] = {int(key) if _is_axis(key) else key: value for key, value in blocks.items()}
    return msgspec.convert(entries, list[Entry]), recipe.quantize.algorithm


def _is_axis(key: int | str) -> bool:
    return str(key).lstrip("-").isdigit()
