"""ModelOpt's own reader of recipe files."""

import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # see workers.quant.modelopt
    from modelopt.recipe import load_recipe


def read_modelopt(path: Path) -> tuple[list[dict[str, Any]], object]:
    """The `quant_cfg` entries of a PTQ recipe file as ModelOpt reads them, only with the fields that the file names, and its `algorithm`.

    Args:
        path: absolute; ModelOpt would look a relative one up among its own recipes first.

    Raises: ValueError: ModelOpt refuses the file.
    """
    with redirect_stdout(io.StringIO()):  # it says what it loads
        recipe: Any = load_recipe(path)
    return [
        _entry(entry.model_dump(exclude_unset=True)) for entry in recipe.quantize.quant_cfg
    ], recipe.quantize.algorithm


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    """Blocks' axes are written as numbers, and read by ModelOpt as numbers or as text."""
    cfg = entry.get("cfg")
    if cfg and cfg.get("block_sizes"):
        blocks = {
            int(key) if str(key).lstrip("-").isdigit() else key: value for key, value in cfg["block_sizes"].items()
        }
        entry["cfg"] = {**cfg, "block_sizes": blocks}
    return entry
