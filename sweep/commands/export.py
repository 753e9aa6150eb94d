"""`sweep export`: a recipe as files that runtimes and people read.

Each file is read back; one that does not hold the same recipe is refused, and nothing is left of it.
"""

import os
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from sweep.config.targets import EXPORTS, LIKELIEST, Server, Target, target_called
from sweep.core.errors import SweepError, require_known
from sweep.core.exits import EXIT_DONE
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.checks import check_cells, check_recipe
from sweep.mixed_precision.recipe_context import RecipeContext, config_of, context_of, load_model, read_recipe
from sweep.mixed_precision.shapes import check_shapes
from sweep.mixed_precision.text import CSV_BEGINS, MODELOPT_BEGINS, check_csv, check_modelopt, to_csv, to_modelopt
from sweep.plan.model import Model, checkpoint_dir
from sweep.run.resources import own_device
from sweep.store.outputs import OutputDirectory, OutputFile, place_of, typed_path
from sweep.store.store import Store
from workers.model.checkpoint import NOT_HELD

_PROMPT_TOKENS: Final = 8192
_PROCESSORS: Final = ("preprocessor_config.json", "video_preprocessor_config.json")
FORMATS: Final = (*EXPORTS, "modelopt", "csv")
_RECIPE_FILE: Final = "sweep_recipe.yaml"  # beside an exported checkpoint
_QUANT_CONFIG: Final = "hf_quant_config.json"  # of ModelOpt's checkpoints
_LOADED: Final = ("*.safetensors", "*.safetensors.index.json")  # vLLM loads every shard, and follows any index


def export(recipe_path: str, overrides: Sequence[str], *, file_format: str, out: str, overwrite: bool) -> int:
    """Write one export and say how to use it. Returns the exit code.

    Args:
        recipe_path: what `sweep solve` wrote.
        overrides: Hydra's: where the checkpoint and the calibration samples are, if not where the recipe says.
        file_format: one of FORMATS.
        out: a directory for checkpoints, else a file.
        overwrite: replace what an earlier export has put there, and nothing else.

    Raises: SweepError: a recipe that cannot be applied to the model, a format that can't express it, or something in
        the way at `out`.
    """
    require_known("export format", file_format, FORMATS)
    path, recipe = typed_path(out), read_recipe(Path(recipe_path))
    config = config_of(recipe, overrides)
    model = Model(checkpoint_dir(config.model))
    check_recipe(recipe, model)
    check_cells(recipe, config, Store(config.store.uri))
    _check_apart(path, model)
    if file_format in EXPORTS:
        check_held(recipe, model)
        if (target := target_called(recipe.target)) is not None:
            check_readable(recipe, target, file_format)
            check_shapes(recipe, target, model)
        directory = checkpoint_at(path, model, overwrite=overwrite, others=False)
        directory.check()
        export_checkpoint(context_of(recipe, config), directory, file_format)
    else:
        file = OutputFile(path=path, begins=CSV_BEGINS if file_format == "csv" else MODELOPT_BEGINS)
        if file.check().exists() and not overwrite:
            raise SweepError(f"{path} exists. Give another place with --out, or --overwrite to replace it.")
        file.put(checked_text(recipe, file_format, model).encode())
    _say(recipe, file_format, path.absolute(), model.source_note)
    return EXIT_DONE


def checked_text(recipe: MixedRecipe, file_format: str, model: Model) -> str:
    """A table, or ModelOpt's recipe file, after it has been read back.

    Raises: SweepError: what comes back is not the recipe.
    """
    if file_format == "csv":
        text = to_csv(recipe)
        check_csv(text, recipe)
        return text
    from workers.export.modelopt_recipe import read_modelopt

    text = to_modelopt(recipe)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        check_modelopt(*read_modelopt(file), recipe, model.linears)
    return text


def check_held(recipe: MixedRecipe, model: Model) -> None:
    """Refuse to quantize what no reader of the checkpoint would find: see `Model.without_weights`."""
    for group in model.without_weights(each.group for each in recipe.groups if each.format is not None):
        raise SweepError(
            f"{group.short_name} cannot be exported quantized: its weight in {model.path} is {NOT_HELD}. Solve again "
            f"with --exclude {group.name.rpartition('.')[2]}, which leaves it in 16 bits."
        )


def _check_apart(path: Path, model: Model) -> None:
    """Refuse a place that is a link, or that holds the model's checkpoint or lies in it."""
    place = place_of(path)
    if place == model.path:
        raise SweepError(f"{path} is the checkpoint itself. Give another place with --out.")
    if place.is_relative_to(model.path):
        raise SweepError(f"{path} is inside the checkpoint {model.path}. Give another place with --out.")
    if model.path.is_relative_to(place):
        raise SweepError(f"{path} holds the checkpoint {model.path}. Give a place of its own with --out.")
    if path.is_symlink():
        raise SweepError(f"{path} is a link to {os.readlink(path)}. Give that place itself with --out, or another.")


def check_readable(recipe: MixedRecipe, target: Target, file_format: str) -> None:
    """Refuse a ModelOpt checkpoint of formats that the recipe's target does not read in one.

    Raises: SweepError: names the format, and what to choose.
    """
    if file_format != "modelopt-checkpoint":
        return
    for label, each in recipe.formats.items():
        status = target.status(each.quant_pair, each.quant_granularity, each.algorithm)
        if EXPORTS[file_format] not in status.export:
            raise SweepError(
                f"{target.runtime}, for which the recipe was made, reads no {label} in a ModelOpt checkpoint. "
                f"Type --format {target.checkpoint}, or solve again without it."
                if target.checkpoint != file_format
                else f"{target.runtime}, for which the recipe was made, has no name for {label} in a ModelOpt "
                "checkpoint. Solve again without it, or type --format modelopt for ModelOpt's own recipe."
            )


def checkpoint_at(path: Path, model: Model, *, overwrite: bool, others: bool) -> OutputDirectory:
    """The directory of an exported checkpoint, with the names of its files.

    Args:
        path: of the directory.
        model: that is exported.
        overwrite: replace an earlier export.
        others: whether files of others may be there that no reader of checkpoints takes.

    Raises: SweepError: the model's own checkpoint is there.
    """
    place = place_of(path)
    if place == model.path:
        raise SweepError(f"{path} is the checkpoint itself. Give another place with --out.")
    return OutputDirectory(
        directory=place,
        kind="checkpoint",
        names=[*model.file_names(), _QUANT_CONFIG, _RECIPE_FILE],
        exclusive=_LOADED if others else ("*",),
        overwrite=overwrite,
    )


def export_checkpoint(
    context: RecipeContext, directory: OutputDirectory, file_format: str = "compressed-tensors"
) -> None:
    """Calibrate, write the checkpoint, read it back, and put it in its place only if it is the recipe.

    Raises: SweepError: something that the checkpoint format can't express.
    """
    from workers.export.calibrated import calibrated
    from workers.export.checkpoint import COMPRESSED_TENSORS, check_expressible, write_checkpoint
    from workers.export.compute import Compute
    from workers.export.modelopt_layout import ModelOptLayout
    from workers.export.names import aliases, linears_on_disk, recipe_on_disk
    from workers.export.readback import check_export

    model, structure = context.model, context.model.structure
    names = structure.on_disk
    recipe, linears = recipe_on_disk(context.recipe, names), linears_on_disk(structure.linears, names)
    layout = ModelOptLayout() if file_format == "modelopt-checkpoint" else COMPRESSED_TENSORS
    check_expressible(model.path, recipe, linears, layout)
    batches = context.calibration
    loaded = load_model(context, own_device(context.config.cluster))  # as `validate` does, whose ranges these must be
    found, compute = calibrated(loaded, context.recipe, structure.linears, batches), Compute.of(loaded)
    quants = {names[module]: quant for module, quant in found.items()}
    with directory.filled() as partial:
        write_checkpoint(model.path, partial, recipe, quants, linears, compute, layout, aliases(names))
        (partial / _RECIPE_FILE).write_text(context.recipe.to_yaml(), encoding="utf-8")
        check_export(partial, model.path, recipe, quants, linears, compute, layout)


def is_exported(recipe: MixedRecipe, directory: OutputDirectory) -> bool:
    """Whether a directory holds the recipe's checkpoint already, whole."""
    return directory.holds(_RECIPE_FILE, recipe.to_yaml().encode())


class _Sizes(msgspec.Struct):
    """Of config.json: how long a prompt may be."""

    max_position_embeddings: int | None = None


class _Served(_Sizes):
    """config.json, as far as the serve line depends on it."""

    text_config: _Sizes = msgspec.field(default_factory=_Sizes)
    vision_config: dict[str, msgspec.Raw] | None = None


def serve_line(directory: Path, target: Target | None = None) -> str:
    """The command that serves an exported checkpoint, with vLLM on one GPU if no target says otherwise.

    Images and videos are switched off where the checkpoint lacks the files that prepare them: vLLM 0.26 and 0.32 do not
    load it otherwise. Prompts are limited to what a small cache holds, and `sweep validate --served` gets what it asks.
    """
    config = msgspec.json.decode((directory / "config.json").read_bytes(), type=_Served)
    server = Server() if target is None else target.server
    words = [*server.command.split(), str(directory)]
    if target is not None and target.tp > 1:
        words += [server.parallel, str(target.tp)]
    longest = config.text_config.max_position_embeddings or config.max_position_embeddings
    if longest is not None:
        words += [server.longest, str(min(longest, _PROMPT_TOKENS))]
    if server.likeliest:
        words += [server.likeliest, str(LIKELIEST)]
    if config.vision_config is not None and not all((directory / name).is_file() for name in _PROCESSORS):
        words += shlex.split(server.text_alone)
    return shlex.join(words)


def _say(recipe: MixedRecipe, file_format: str, place: Path, note: str | None) -> None:
    lines = [
        f"{place}: {len(recipe.groups)} layer groups, {recipe.effective_bits:.3f} bits a weight, "
        f"predicted KL {recipe.predicted_kl:.3g} nats",
        *([] if note is None else [note]),
    ]
    if file_format in EXPORTS:
        line = serve_line(place, target_called(recipe.target))
        lines += ["read back: every group's format and every weight is the recipe's", line]
    Console(markup=False, soft_wrap=True).print("\n".join(lines), highlight=False)
