"""`sweep export`: a recipe as files that runtimes and people read. What cannot come back as it was is refused, and nothing is left of it."""

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from sweep.core.errors import SweepError, require_known
from sweep.core.exits import EXIT_DONE
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.checks import check_cells, check_recipe
from sweep.mixed_precision.prepared import Prepared, config_of, prepared, read_recipe
from sweep.mixed_precision.text import check_csv, check_modelopt, to_csv, to_modelopt
from sweep.plan.subject import Model, checkpoint_dir
from sweep.store.store import Store

FORMATS: Final = ("compressed-tensors", "modelopt", "csv")
_RECIPE_FILE: Final = "sweep_recipe.yaml"  # beside an exported checkpoint


def export(recipe_path: str, overrides: Sequence[str], *, file_format: str, out: str, overwrite: bool) -> int:
    """Write one export and say how to use it. Returns the exit code.

    Args:
        recipe_path: what `sweep solve` wrote.
        overrides: Hydra's: where the checkpoint and the calibration samples are, if not where the recipe says.
        file_format: one of FORMATS.
        out: a directory for compressed-tensors, else a file.
        overwrite: replace what is there.

    Raises: SweepError: a recipe that cannot be meant, a format that can't express it, or something at `out` already.
    """
    require_known("export format", file_format, FORMATS)
    recipe = read_recipe(Path(recipe_path))
    config = config_of(recipe, overrides)
    target = Path(out).expanduser().absolute()
    if target.exists() and not overwrite:
        raise SweepError(f"{target} exists. Give another place with --out, or --overwrite to replace it.")
    model = Model(checkpoint_dir(config.model))
    if target == model.path or target in model.path.parents:
        raise SweepError(f"{target} is or holds the checkpoint itself. Give another place with --out.")
    check_recipe(recipe, model)
    check_cells(recipe, Store(config.store.uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    if file_format == "compressed-tensors":
        export_checkpoint(prepared(recipe, config), target)
    else:
        export_text(recipe, file_format, model, target)
    _say(recipe, file_format, target)
    return EXIT_DONE


def export_text(recipe: MixedRecipe, file_format: str, model: Model, target: Path) -> None:
    """Write a table or ModelOpt's recipe file, whole or not at all, after it has been read back.

    Raises: SweepError: what comes back is not the recipe.
    """
    if target.is_dir():
        raise SweepError(f"{target} is a directory; --format {file_format} is one file. Give a file name with --out.")
    text = to_csv(recipe) if file_format == "csv" else to_modelopt(recipe)
    partial = _beside(target)
    try:
        partial.write_text(text, encoding="utf-8")
        if file_format == "csv":
            check_csv(partial.read_text(encoding="utf-8"), recipe)
        else:
            from workers.export.modelopt_recipe import read_modelopt

            check_modelopt(*read_modelopt(partial), recipe, list(model.inputs))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def export_checkpoint(ready: Prepared, target: Path) -> None:
    """Calibrate, write the checkpoint beside its place, read it back, and put it there only if it is the recipe.

    Raises: SweepError: something that compressed-tensors can't express.
    """
    from workers.export.calibrated import calibrated
    from workers.export.checkpoint import check_expressible, write_checkpoint
    from workers.export.readback import check_export

    recipe, model = ready.recipe, ready.model
    linears = [(name, n_in, n_out) for name, n_in, n_out in model.structure["linears"]]
    check_expressible(model.path, recipe, linears)
    batches = list(ready.plan.batches(recipe.size))
    quants = calibrated(model.path, ready.config.model.dtype_on("cpu"), recipe, linears, batches)
    partial = _beside(target)
    partial.mkdir()
    try:
        write_checkpoint(model.path, partial, recipe, quants, linears)
        (partial / _RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        check_export(partial, model.path, recipe, quants, linears)
        _swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def exported_recipe(target: Path) -> str | None:
    """The recipe's text of an exported checkpoint; None: there is none at that place."""
    file = target / _RECIPE_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _beside(target: Path) -> Path:
    """A hidden name in the same directory, absolute, so that a rename is enough."""
    return target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")


def _swap(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    old = _beside(target)
    target.rename(old)
    made.rename(target)
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def _say(recipe: MixedRecipe, file_format: str, target: Path) -> None:
    lines = [f"{target}: {len(recipe.groups)} layer groups, {recipe.effective_bits:.3f} bits a weight, predicted KL {recipe.predicted_kl:.3g} nats"]
    if file_format == "compressed-tensors":
        lines += ["read back: every group's format and every weight is the recipe's", f"vllm serve {target}"]
    Console(markup=False, soft_wrap=True).print("\n".join(lines), highlight=False)
