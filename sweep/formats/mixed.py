"""Mixed-precision recipes: the format of each layer group, as a YAML file.

`solve` and `recommend` write it, `validate` and `export` read it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any, Final, Literal, Self

import yaml

from sweep.core.errors import SweepError, require_known
from sweep.core.groups import Coverage
from sweep.core.pairs import ALGORITHMS
from sweep.core.sizes import Size
from sweep.core.typed import describe, fits, hints_of
from sweep.formats.fields import QUANTIZERS, check_fields
from sweep.formats.quantizer import COST_HINT, UNQUANTIZED_BITS, QuantizerSpec, listed, tupled

RECIPE_VERSION: Final = 1  # of the file's layout
RECIPE_BEGINS: Final = re.compile(rb"recipe_version: \d+\nname: ")  # by which such a file is known again
_NESTED: Final = frozenset({"formats", "groups"})  # keys whose values are looked at one by one

Attributes = Mapping[str, Any]  # fields of ModelOpt's QuantizerAttributeConfig; tuples and integer keys intact


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFormat:
    """A number format for layer groups: pair, granularity, calibration algorithm, and the quantizers' attributes."""

    quant_pair: str
    quant_granularity: str
    algorithm: str  # ModelOpt's calibration algorithm
    scales: Literal["fused", "private"]  # whether the linears of a group share their per-tensor scales
    weight: Attributes | None  # None: left unquantized
    inputs: Attributes | None

    @property
    def label(self) -> str:
        """Its name in files and tables: ``wint4_afp16/w_group128/awq_lite``.

        The algorithm `max` is left out.
        """
        algorithm = [] if self.algorithm == "max" else [self.algorithm]
        return "/".join([self.quant_pair, self.quant_granularity, *algorithm])

    @property
    def effective_bits(self) -> float:
        """Bits a weight, block scales counted."""
        return UNQUANTIZED_BITS if self.weight is None else QuantizerSpec(attributes=self.weight).effective_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChoice:
    """The format of one layer group, with its predicted KL."""

    group: str  # the first module
    modules: tuple[str, ...]
    layer_index: int | None  # None outside decoder blocks
    weight_elements: int
    format: str | None  # label of one of the recipe's formats; None: left in 16 bits
    cell_id: str | None  # where its score was read
    predicted_kl: float  # nats per prediction; 0 where it is left in 16 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRecipe:
    """A format for every layer group of one model."""

    name: str
    model: str  # name
    model_revision: str  # hash of weights and config.json
    model_path: str | None  # None: the bundled model
    dataset: str  # that calibrated and scored
    dataset_revision: str  # of it, in the size used
    size: Size
    coverage: Coverage
    target: str | None  # runtime and hardware that it was made for
    formats: Mapping[str, GroupFormat]  # by label, those that are used
    groups: tuple[GroupChoice, ...]  # in the model's order

    @property
    def predicted_kl(self) -> float:
        """Sum over groups, nats per prediction: the KL of single groups adds up as long as it is small."""
        return sum(choice.predicted_kl for choice in self.groups)

    @property
    def effective_bits(self) -> float:
        """Mean bits a weight of the covered groups, block scales counted."""
        elements = sum(choice.weight_elements for choice in self.groups)
        return sum(self.bits_of(choice) * choice.weight_elements for choice in self.groups) / elements

    def bits_of(self, choice: GroupChoice) -> float:
        """Bits a weight of one group."""
        return UNQUANTIZED_BITS if choice.format is None else self.formats[choice.format].effective_bits

    def format_of(self, choice: GroupChoice) -> GroupFormat | None:
        """The format of one group; None: left in 16 bits."""
        return None if choice.format is None else self.formats[choice.format]

    def to_yaml(self) -> str:
        """The file's text; equal recipes give equal text."""
        document = {"recipe_version": RECIPE_VERSION, **asdict(self)}
        document["totals"] = {"effective_bits": self.effective_bits, "predicted_kl": self.predicted_kl}
        return yaml.safe_dump(listed(document), sort_keys=False, width=1000)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> Self:
        """Read a file back, `totals` aside, which follow from the rest.

        Args:
            text: the file's content.
            where: its name, for errors.

        Raises: SweepError: not such a file, or one that was edited into something that no model can have.
        """
        try:
            document: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SweepError(
                f"{where} is no YAML: {str(error).splitlines()[0]}. Have `sweep solve` write it again."
            ) from error
        if not isinstance(document, dict) or "recipe_version" not in document:
            raise SweepError(f"{where} is no recipe file: it has no recipe_version. `sweep solve` writes them.")
        if document["recipe_version"] != RECIPE_VERSION:
            raise SweepError(
                f"{where} has recipe_version {document['recipe_version']}; this program reads {RECIPE_VERSION}. "
                "Have `sweep solve` write it again."
            )
        nodes: dict[str, Any] = {
            key: value for key, value in document.items() if key not in ("recipe_version", "totals")
        }
        _check_keys(nodes, cls, where)
        formats: dict[str, GroupFormat] = {}
        for label, node in _mapping(nodes["formats"], f"{where}: formats").items():
            formats[label] = _format(node, f"{where}: format {label!r}")
            if formats[label].label != label:
                raise SweepError(
                    f"{where}: format {label!r} describes {formats[label].label!r}. "
                    "Give it the name of what it describes."
                )
        if not isinstance(nodes["groups"], list) or not nodes["groups"]:
            raise SweepError(f"{where} names no layer groups.")
        groups = tuple(_choice(node, formats, where) for node in nodes["groups"])
        modules = [module for choice in groups for module in choice.modules]
        doubled = sorted(module for module, n in Counter(modules).items() if n > 1)
        if doubled:
            raise SweepError(f"{where}: {doubled[0]} is in two layer groups. A linear has one format.")
        nodes |= {"formats": formats, "groups": groups}
        return cls(**nodes)


def is_called(names: Iterable[str], pattern: str) -> bool:
    """Whether one of the names ends as a typed pattern says; * stands for anything."""
    return any(fnmatch(name, f"*{pattern}") for name in names)


def _format(node: Any, where: str) -> GroupFormat:
    _check_keys(_mapping(node, where), GroupFormat, where)
    require_known(f"calibration algorithm of {where}", node["algorithm"], ALGORITHMS)
    for quantizer, attributes in zip(QUANTIZERS, (node["weight"], node["inputs"]), strict=True):
        if attributes is not None:
            check_fields(quantizer, {key: value for key, value in attributes.items() if key != COST_HINT}, where)
    fields_: dict[str, Any] = tupled(node)
    return GroupFormat(**fields_)


def _choice(node: Any, formats: Mapping[str, GroupFormat], where: str) -> GroupChoice:
    name = node.get("group", "?") if isinstance(node, dict) else "?"
    _check_keys(_mapping(node, f"{where}: group {name!r}"), GroupChoice, f"{where}: group {name!r}")
    if not 0 <= node["predicted_kl"] < float("inf"):
        raise SweepError(
            f"{where}: group {name!r}: predicted_kl is {node['predicted_kl']}. It is a number of 0 or more. "
            "Have `sweep solve` write it again."
        )
    fields_: dict[str, Any] = {**node, "modules": tuple(node["modules"])}
    choice = GroupChoice(**fields_)
    if choice.format is not None:
        require_known(f"format of group {choice.group!r} in {where}", choice.format, formats)
    return choice


def _check_keys(node: Mapping[str, Any], kind: type, where: str) -> None:
    """Refuse keys that are not fields of `kind`, fields without a key, and values of another type."""
    hints = hints_of(kind)
    for key in node:
        require_known(f"key in {where}", str(key), hints)
    if missing := [name for name in hints if name not in node]:
        raise SweepError(f"{where} lacks {missing[0]!r}. Have `sweep solve` write it again.")
    for key, value in node.items():
        if key not in _NESTED and not fits(value, hints[key]):
            raise SweepError(
                f"{where}: {key} is {value!r}. Allowed: {describe(hints[key])}. Have `sweep solve` write it again."
            )


def _mapping(node: Any, where: str) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise SweepError(f"{where} is no mapping of keys to values. Have `sweep solve` write it again.")
    return node
