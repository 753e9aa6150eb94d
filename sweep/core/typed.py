"""The gate of YAML files: msgspec turns plain values into dataclasses of the configuration, or says what to type."""

import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Literal, Self, TypeAlias

import msgspec

from sweep.core.errors import SweepError, require_known

# Values as YAML gives them: JSON, and whole numbers as keys.
Plain: TypeAlias = "Mapping[str, Plain] | Mapping[int | str, Plain] | Sequence[Plain] | str | int | float | bool | None"

_MISSING = "???"  # Hydra's word for a value that must be given
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


@cache
def hints_of(kind: type) -> dict[str, type]:
    """The type of each field."""
    return typing.get_type_hints(kind)


def fits(value: Plain, hint: type) -> bool:
    """Whether a plain value may stand in a field of that type."""
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True


def describe(hint: type) -> str:
    """The values that a type allows, in words for a message."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, options))
    if origin is Literal:
        return ", ".join(map(str, options))
    if origin in (tuple, list):
        return f"a list, each item {describe(options[0])}"
    return _WORDS.get(hint, "a mapping")


class Section:
    """One group of the config; `from_node` is the only place where untyped values enter."""

    @classmethod
    def from_node(cls, section: str, node: Mapping[str, Plain]) -> Self:
        """Check keys and types of a composed node.

        Raises: SweepError: an unknown or missing key, or a value of another type; says what to type.
        """
        hints = hints_of(cls)
        for key in node:
            if key not in hints:
                require_known("key", f"{section}.{key}", [f"{section}.{name}" for name in hints])
        for name in hints:
            if node.get(name, _MISSING) == _MISSING:
                raise SweepError(f"{section}.{name} has no value. Type {section}.{name}=VALUE.")
        try:
            return msgspec.convert(node, cls)
        except msgspec.ValidationError:
            name = next(name for name, hint in hints.items() if not fits(node[name], hint))
            allowed = describe(hints[name])
            raise SweepError(f"{section}.{name}={node[name]!r} is not allowed. Allowed: {allowed}.") from None
