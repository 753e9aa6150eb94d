"""A recipe as text: a table for people, and a recipe file for ModelOpt's own tools. Opens no file."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from sweep.core.errors import SweepError
from sweep.formats.format import Format, GroupFormat
from sweep.formats.mixed import MixedRecipe, yaml_text
from sweep.formats.quantizer import Quantizer
from sweep.formats.recipe import Entry, quantizer_for

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


def to_csv(recipe: MixedRecipe) -> str:
    """One row a layer group; modules are separated by spaces, and a group in 16 bits has no format."""
    out = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        row = {
            "group": choice.group.name,
            "modules": " ".join(choice.group.modules),
            "layer_index": choice.group.layer_index,
            "weight_elements": choice.group.weight_elements,
            "effective_bits": recipe.bits_of(choice),
            "predicted_kl": choice.predicted_kl,
            "cell_id": choice.cell_id,
        }
        named = ("quant_pair", "quant_granularity", "algorithm", "scales") if chosen is not None else ()
        writer.writerow(row | {name: getattr(chosen, name) for name in named})
    return out.getvalue()


def check_csv(text: str, recipe: MixedRecipe) -> None:
    """Read a table back and compare each group's format. Raises: SweepError: one is not the recipe's."""
    rows = list(csv.DictReader(io.StringIO(text)))
    found = {row["group"]: (row["quant_pair"], row["quant_granularity"], row["algorithm"]) for row in rows}
    for choice in recipe.groups:
        chosen, name = recipe.format_of(choice), choice.group.name
        wanted = ("", "", "") if chosen is None else (chosen.quant_pair, chosen.quant_granularity, chosen.algorithm)
        if found.get(name) != wanted:
            raise SweepError(f"{name}: CSV can't express {wanted}, it comes back as {found.get(name)}.")


def quant_cfg(recipe: MixedRecipe) -> list[Entry]:
    """ModelOpt's ordered entries (list form, >= 0.44): everything off, then each quantizer of each module by name."""
    entries = [Entry("*", enable=False)]
    for choice in recipe.groups:
        for module in choice.group.modules:
            for place, quantizer in _places(recipe.format_of(choice)):
                if quantizer is not None:
                    entries.append(Entry(f"{module}.{place}", quantizer.attributes))
    return entries


def _places(chosen: Format | None) -> Iterator[tuple[str, Quantizer | None]]:
    """ModelOpt's names of a linear's quantizers, with those that a format has there."""
    yield "weight_quantizer", chosen and chosen.weight
    yield "input_quantizer", chosen and chosen.inputs


def to_modelopt(recipe: MixedRecipe) -> str:
    """A PTQ recipe file: `hf_ptq.py --recipe FILE`, or `mtq.quantize` with its `quantize` section.

    Source: ModelOptPTQRecipe of ModelOpt 0.47: `metadata` and `quantize`, the latter with `quant_cfg` and one
        `algorithm`.
    Raises: SweepError: groups are calibrated with different algorithms, or FP8 blocks have power-of-two scales: the
        format can't express either.
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
            f"it has one for the whole model. {others[0].group.name} has algorithm {algorithms[1]!r}. "
            "Solve again among formats of one algorithm."
        )
    for choice in recipe.groups:
        chosen = recipe.format_of(choice)
        if chosen is not None and any(each.has_e8m0_blocks for each in chosen.quantizers):
            raise SweepError(
                f"{choice.group.name}: a ModelOpt recipe can't express power-of-two scales of FP8 blocks (format "
                f"{chosen.label!r}): ModelOpt would leave them in float32. Solve again with another format there, or "
                "--format compressed-tensors."
            )
    description = f"{recipe.name}: {recipe.effective_bits:.3f} {_COVERS} {recipe.model}"
    document = {
        "metadata": {"recipe_type": "ptq", "description": description},
        "quantize": {"quant_cfg": [each.to_modelopt() for each in quant_cfg(recipe)], "algorithm": algorithms[0]},
    }
    return yaml_text(document)


def check_modelopt(entries: Sequence[Entry], algorithm: object, recipe: MixedRecipe, modules: Iterable[str]) -> None:
    """Compare the quantizers that ModelOpt would give every module with the recipe's.

    Args:
        entries: of `quant_cfg`, as ModelOpt's own parser read them.
        algorithm: the calibration algorithm, as ModelOpt's own parser read it.
        recipe: the recipe that was exported.
        modules: every linear of the model.

    Raises: SweepError: names the group and the quantizer or the algorithm that the format can't express.
    """
    chosen_of: dict[str, GroupFormat] = {}
    for choice in recipe.groups:
        if (chosen := recipe.format_of(choice)) is not None:
            chosen_of |= dict.fromkeys(choice.group.modules, chosen)
            if chosen.algorithm != algorithm:
                raise SweepError(
                    f"{choice.group.name}: a ModelOpt recipe can't express algorithm {chosen.algorithm!r}, "
                    f"it comes back as {algorithm!r}."
                )
    for module in modules:
        for place, wanted in _places(chosen_of.get(module)):
            found = quantizer_for(entries, module, place, "nn.Linear")
            if (found and found.id) != (wanted and wanted.id):
                raise SweepError(
                    f"{module}.{place}: a ModelOpt recipe can't express {wanted and wanted.attributes}, "
                    f"it comes back as {found and found.attributes}."
                )
