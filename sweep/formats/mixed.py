"""Mixed-precision recipes: the format of each layer group, as a YAML file.

`solve` and `recommend` write it, `validate` and `export` read it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any, Final, Self

import msgspec
import yaml

from sweep.core.batches import TOKEN_KINDS
from sweep.core.errors import SweepError, require_known
from sweep.core.groups import Coverage, LayerGroup
from sweep.core.pairs import ALGORITHMS, Algorithm, Scales
from sweep.core.sizes import n_samples_of
from sweep.core.typed import Plain, describe, fits, hints_of
from sweep.formats.fields import QUANTIZERS, check_fields
from sweep.formats.format import GroupFormat
from sweep.formats.quantizer import COST_HINT, UNQUANTIZED_BITS, Attributes, Quantizer

RECIPE_VERSION: Final = 1  # of the file's layout
RECIPE_BEGINS: Final = re.compile(rb"recipe_version: \d+\nname: ")  # by which such a file is known again
# Keys that may be missing: `tp` is left out where it is 1, `tokens` where all count, `joint_kl` and `joint_of` where
# interactions are not known; files of earlier programs lack the others.
_OPTIONAL: Final = frozenset(
    {"tp", "tokens", "joint_kl", "joint_of", "samples", "calibration_samples", "dtype", "store"}
)
_NESTED: Final = frozenset({"formats", "groups"})  # keys whose values are looked at one by one
Value = str | int | float | bool | None  # of a key that a user may type


class _FormatNode(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A format in the file."""

    quant_pair: str
    quant_granularity: str
    algorithm: Algorithm
    scales: Scales
    weight: Attributes | None  # of ModelOpt's QuantizerAttributeConfig
    inputs: Attributes | None
    tp: int = 1


class _GroupNode(msgspec.Struct, kw_only=True):
    """A layer group in the file."""

    group: str
    modules: tuple[str, ...]
    layer_index: int | None
    weight_elements: int
    format: str | None
    cell_id: str | None
    predicted_kl: float


class _RecipeNode(msgspec.Struct, kw_only=True):
    """The file, but for its version and totals."""

    name: str
    model: str
    model_revision: str
    model_path: str | None
    dataset: str
    dataset_revision: str
    size: str
    coverage: Coverage
    target: str | None
    tokens: tuple[str, ...] = ()
    joint_kl: float | None = None
    joint_of: str | None = None  # `MixedRecipe.formats_digest` that it is of: an edited file has another mix
    samples: dict[str, Value] | None = None
    calibration_samples: int | None = None
    dtype: str | None = None
    store: str | None = None
    formats: dict[str, _FormatNode]
    groups: tuple[_GroupNode, ...]


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists, and every value where it stands."""

    def ignore_aliases(self, data: Plain) -> bool:
        del data
        return True


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChoice:
    """The format of one layer group, with its predicted KL."""

    group: LayerGroup
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
    size: str
    coverage: Coverage
    target: str | None  # runtime and hardware that it was made for
    # Kinds of token (TOKEN_KINDS) whose scores alone decided and make up its predicted KL; empty: all.
    tokens: tuple[str, ...] = ()
    # Predicted KL of the whole mix, nats per prediction, with the interactions of its groups; None: they are not known.
    joint_kl: float | None = None
    # Where it came from; None: an earlier program has not recorded it.
    samples: Mapping[str, Value] | None = None  # the other keys of the data set's configuration
    calibration_samples: int | None = None  # that found the ranges of the inputs; None: those of `size`
    dtype: str | None = None  # that the scores were computed in: float32, bfloat16
    store: str | None = None  # URI of the store that has them
    formats: Mapping[str, GroupFormat]  # by label, those that are used
    groups: tuple[GroupChoice, ...]  # in the model's order

    @property
    def predicted_kl(self) -> float:
        """Nats per prediction: `joint_kl`; without it the sum over groups, which add up as long as they are small."""
        return self.linear_kl if self.joint_kl is None else self.joint_kl

    @property
    def formats_digest(self) -> str:
        """Hash of which group has which format from which cell."""
        chosen = [(choice.group.name, choice.format, choice.cell_id) for choice in self.groups]
        return hashlib.sha256(repr(chosen).encode()).hexdigest()[:12]

    @property
    def linear_kl(self) -> float:
        """Sum of the KL of each group alone, nats per prediction."""
        return sum(choice.predicted_kl for choice in self.groups)

    @property
    def effective_bits(self) -> float:
        """Mean bits a weight of the covered groups, block scales counted."""
        elements = sum(choice.group.weight_elements for choice in self.groups)
        return sum(self.bits_of(choice) * choice.group.weight_elements for choice in self.groups) / elements

    def bits_of(self, choice: GroupChoice) -> float:
        """Bits a weight of one group."""
        return UNQUANTIZED_BITS if choice.format is None else self.formats[choice.format].effective_bits

    def format_of(self, choice: GroupChoice) -> GroupFormat | None:
        """The format of one group; None: left in 16 bits."""
        return None if choice.format is None else self.formats[choice.format]

    def to_yaml(self) -> str:
        """The file's text; equal recipes give equal text."""
        own = {name: getattr(self, name) for name in self.__slots__ if name not in _NESTED}
        node = _RecipeNode(
            **own,
            joint_of=self.formats_digest,
            formats={label: _format_node(each) for label, each in self.formats.items()},
            groups=tuple(map(_group_node, self.groups)),
        )
        document = {"recipe_version": RECIPE_VERSION, **msgspec.to_builtins(node)}
        has_joint = self.joint_kl is not None
        for name, is_known in (("tokens", bool(self.tokens)), ("joint_kl", has_joint), ("joint_of", has_joint)):
            if not is_known:
                del document[name]
        document["totals"] = {"effective_bits": self.effective_bits, "predicted_kl": self.predicted_kl}
        return yaml_text(document)

    @classmethod
    def from_yaml(cls, text: str, where: str) -> Self:
        """Read a file back, `totals` aside, which follow from the rest.

        Args:
            text: the file's content.
            where: its name, for errors.

        Raises: SweepError: not such a file, or one that was edited into something that no model can have.
        """
        try:
            document = yaml.safe_load(text)
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
        del document["recipe_version"]
        document.pop("totals", None)
        node = _read(document, where)
        formats = {label: _format(each) for label, each in node.formats.items()}
        for label, each in formats.items():
            if each.label != label:
                raise SweepError(
                    f"{where}: format {label!r} describes {each.label!r}. Give it the name of what it describes."
                )
        groups = tuple(_choice(each, formats, where) for each in node.groups)
        counts = Counter(module for choice in groups for module in choice.group.modules)
        if doubled := sorted(module for module, n in counts.items() if n > 1):
            raise SweepError(f"{where}: {doubled[0]} is in two layer groups. A linear has one format.")
        for kind in node.tokens:
            require_known(f"kind of token in {where}", kind, TOKEN_KINDS)
        n_scored = n_samples_of(node.size, f"{where}: size")
        if node.calibration_samples is not None and node.calibration_samples < n_scored:
            raise SweepError(
                f"{where}: calibration_samples is {node.calibration_samples}. It is null, or at least the "
                f"{n_scored} samples of size {node.size}. Have `sweep solve` write it again."
            )
        if node.joint_kl is not None:
            _check_kl(node.joint_kl, f"{where}: joint_kl")
        own = {name: getattr(node, name) for name in node.__struct_fields__ if name not in {*_NESTED, "joint_of"}}
        recipe = cls(**own, formats=formats, groups=groups)
        return recipe if node.joint_of == recipe.formats_digest else replace(recipe, joint_kl=None)


def yaml_text(document: Mapping[str, Plain]) -> str:
    """A file's text: keys in the order given, tuples as lists, nothing wrapped."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1000)


def counted(tokens: Sequence[str]) -> str:
    """What a predicted KL is of, by kinds of token: ``errors at image, answer tokens alone``; empty: at all tokens."""
    return f"errors at {', '.join(tokens)} tokens alone" if tokens else ""


def is_called(names: Iterable[str], pattern: str) -> bool:
    """Whether one of the names ends as a typed pattern says; * stands for anything."""
    return any(fnmatch(name, f"*{pattern}") for name in names)


def _format_node(chosen: GroupFormat) -> _FormatNode:
    weight, inputs = (each and each.attributes for each in (chosen.weight, chosen.inputs))
    return _FormatNode(
        quant_pair=chosen.quant_pair,
        quant_granularity=chosen.quant_granularity,
        algorithm=chosen.algorithm,
        scales=chosen.scales,
        weight=weight,
        inputs=inputs,
        tp=chosen.tp,
    )


def _group_node(choice: GroupChoice) -> _GroupNode:
    return _GroupNode(
        group=choice.group.name,
        modules=choice.group.modules,
        layer_index=choice.group.layer_index,
        weight_elements=choice.group.weight_elements,
        format=choice.format,
        cell_id=choice.cell_id,
        predicted_kl=choice.predicted_kl,
    )


def _format(node: _FormatNode) -> GroupFormat:
    return GroupFormat(
        quant_pair=node.quant_pair,
        quant_granularity=node.quant_granularity,
        algorithm=node.algorithm,
        scales=node.scales,
        weight=None if node.weight is None else Quantizer(node.weight),
        inputs=None if node.inputs is None else Quantizer(node.inputs),
    ).on_ranks(node.tp)


def _choice(node: _GroupNode, formats: Mapping[str, GroupFormat], where: str) -> GroupChoice:
    _check_kl(node.predicted_kl, f"{where}: group {node.group!r}: predicted_kl")
    if node.format is not None:
        require_known(f"format of group {node.group!r} in {where}", node.format, formats)
    return GroupChoice(
        group=LayerGroup(name=node.group, modules=node.modules, weight_elements=node.weight_elements),
        format=node.format,
        cell_id=node.cell_id,
        predicted_kl=node.predicted_kl,
    )


def _check_kl(value: float, where: str) -> None:
    if not 0 <= value < float("inf"):
        raise SweepError(f"{where} is {value}. It is a number of 0 or more. Have `sweep solve` write it again.")


def _read(document: dict[str, Any], where: str) -> _RecipeNode:
    """The file's content, checked. Raises: SweepError: names the key, the value, and what is allowed."""
    _check_keys(document, _RecipeNode, where)
    for label, node in _mapping(document["formats"], f"{where}: formats").items():
        place = f"{where}: format {label!r}"
        if isinstance(algorithm := _mapping(node, place).get("algorithm"), str):
            require_known(f"calibration algorithm of {place}", algorithm, ALGORITHMS)
        _check_keys(node, _FormatNode, place)
        if node.get("tp", 1) < 1:
            raise SweepError(f"{place}: tp is {node['tp']}, no number of ranks. Have `sweep solve` write it again.")
        for name, quantizer in zip(("weight", "inputs"), QUANTIZERS, strict=True):
            fields = {key: value for key, value in (node[name] or {}).items() if key != COST_HINT}
            check_fields(quantizer, fields, place)
    if not isinstance(document["groups"], list) or not document["groups"]:
        raise SweepError(f"{where} names no layer groups.")
    for node in document["groups"]:
        name = node.get("group", "?") if isinstance(node, dict) else "?"
        _check_keys(node, _GroupNode, f"{where}: group {name!r}")
    try:
        return msgspec.convert(document, _RecipeNode)
    except msgspec.ValidationError as error:
        raise SweepError(f"{where}: {error}. Have `sweep solve` write it again.") from error


def _check_keys(node: Any, kind: type, where: str) -> None:
    """Refuse keys that are not fields of `kind`, fields without a key, and values of another type."""
    hints = hints_of(kind)
    for key in _mapping(node, where):
        require_known(f"key in {where}", str(key), hints)
    if missing := [name for name in hints if name not in node and name not in _OPTIONAL]:
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
