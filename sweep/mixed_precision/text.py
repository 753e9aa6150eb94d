"""A recipe as text: a table for people, and a recipe file for ModelOpt's own tools. Opens no file."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from sweep.core.errors import SweepError
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import canonical_attributes, listed
from sweep.formats.recipe import attributes_for

COLUMNS: Final[tuple[str, ...]] = (
    "group",
    "modules",
    "layer_index",
    "weight_elements",
    "quant_pair",
    "quant_granularity",
    "algorithm",
    "scales",
    "effective_bits",
    "predicted_kl",
    "cell_id",
)
# The beginnings of these files, by which an earlier export is recognized.
CSV_BEGINS: Final = re.compile(",".join(COLUMNS).encode() + b"\n")
_COVERS: Final = "bits a weight over the covered layer groups of"
MODELOPT_BEGINS: Final = re.compile(rf"metadata:\n  recipe_type: ptq\n  description: .* {_COVERS} ".encode())

_QUANTIZERS: Final = ("weight_quantizer", "input_quantizer")


def to_csv(recipe: MixedRecipe) -> str:
    """One row a layer group; modules are separated by spaces, and a group in 16 bits has no format."""
    out = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        row: dict[str, Any] = {
            name: getattr(choice, name)
            for name in ("group", "layer_index", "weight_elements", "predicted_kl", "cell_id")
        }
        row |= {"modules": " ".join(choice.modules), "effective_bits": recipe.bits_of(choice)}
        if chosen is not None:
            row |= {name: getattr(chosen, name) for name in ("quant_pair", "quant_granularity", "algorithm", "scales")}
        writer.writerow(row)
    return out.getvalue()


def check_csv(text: str, recipe: MixedRecipe) -> None:
    """Read a table back and compare each group's format. Raises: SweepError: one is not the recipe's."""
    rows = list(csv.DictReader(io.StringIO(text)))
    found = {row["group"]: (row["quant_pair"], row["quant_granularity"], row["algorithm"]) for row in rows}
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        wanted = ("", "", "") if chosen is None else (chosen.quant_pair, chosen.quant_granularity, chosen.algorithm)
        if found.get(choice.group) != wanted:
            raise SweepError(f"{choice.group}: CSV can't express {wanted}, it comes back as {found.get(choice.group)}.")


def quant_cfg(recipe: MixedRecipe) -> list[dict[str, Any]]:
    """ModelOpt's ordered entries (list form, >= 0.44): everything off, then each quantizer of each module by name."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        for module in choice.modules if chosen is not None else ():
            for quantizer, attributes in zip(
                _QUANTIZERS, (chosen.weight, chosen.inputs) if chosen is not None else (), strict=True
            ):
                if attributes is not None:
                    entries.append({"quantizer_name": f"{module}.{quantizer}", "cfg": dict(attributes)})
    return entries


def to_modelopt(recipe: MixedRecipe) -> str:
    """A PTQ recipe file: `hf_ptq.py --recipe FILE`, or `mtq.quantize` with its `quantize` section.

    Source: ModelOptPTQRecipe of ModelOpt 0.47: `metadata` and `quantize`, the latter with `quant_cfg` and one
        `algorithm`.
    Raises: SweepError: groups are calibrated with different algorithms, which the format can't express.
    """
    used = {choice.format for choice in recipe.groups if choice.format is not None}
    algorithms = sorted({recipe.formats[label].algorithm for label in used}) or ["max"]
    if len(algorithms) > 1:
        others = [
            choice
            for choice in recipe.groups
            if choice.format is not None and recipe.formats[choice.format].algorithm == algorithms[1]
        ]
        raise SweepError(
            f"A ModelOpt recipe can't express several calibration algorithms ({', '.join(algorithms)}): "
            f"it has one for the whole model. {others[0].group} has algorithm {algorithms[1]!r}. "
            "Solve again among formats of one algorithm."
        )
    description = f"{recipe.name}: {recipe.effective_bits:.3f} {_COVERS} {recipe.model}"
    document = {
        "metadata": {"recipe_type": "ptq", "description": description},
        "quantize": {"quant_cfg": listed(quant_cfg(recipe)), "algorithm": algorithms[0]},
    }
    return yaml.safe_dump(document, sort_keys=False, width=1000)


def check_modelopt(
    entries: Sequence[Mapping[str, Any]], algorithm: object, recipe: MixedRecipe, modules: Sequence[str]
) -> None:
    """Compare the quantizer attributes that ModelOpt would give every module with the recipe's.

    Args:
        entries: of `quant_cfg`, as ModelOpt's own parser read them.
        algorithm: the calibration algorithm, as ModelOpt's own parser read it.
        recipe: the recipe that was exported.
        modules: every linear of the model.

    Raises: SweepError: names the group and the quantizer or the algorithm that the format can't express.
    """
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is not None and chosen.algorithm != algorithm:
            raise SweepError(
                f"{choice.group}: a ModelOpt recipe can't express algorithm {chosen.algorithm!r}, "
                f"it comes back as {algorithm!r}."
            )
    chosen_of = {module: recipe.format_of(choice) for choice in recipe.groups for module in choice.modules}
    for module in modules:
        chosen = chosen_of.get(module)
        for quantizer, wanted in zip(
            _QUANTIZERS, (None, None) if chosen is None else (chosen.weight, chosen.inputs), strict=True
        ):
            found = attributes_for(entries, module, quantizer, "nn.Linear")
            if canonical_attributes(found) != canonical_attributes(wanted):
                raise SweepError(
                    f"{module}.{quantizer}: a ModelOpt recipe can't express {wanted}, it comes back as {found}."
                )
