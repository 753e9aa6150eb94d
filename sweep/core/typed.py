"""Checks values from files against the type hints of the dataclasses that they become."""

import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Self

from sweep.core.errors import SweepError, require_known

_MISSING = "???"  # Hydra's word for a value that must be given


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """The type of each field."""
    return typing.get_type_hints(kind)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value, as YAML or JSON gives it, may stand in a field of that type."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint) and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(item, typing.get_args(hint)[1]) for item in value.values())
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def describe(hint: Any) -> str:
    """The values that a type hint allows, in words for a message."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if origin is Literal:
        return ", ".join(str(option) for option in typing.get_args(hint))
    if origin is tuple:
        return f"a list, each item {describe(typing.get_args(hint)[0])}"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return words.get(hint, "a mapping")


class Section:
    """One group of the config; `from_node` is the only place where untyped values enter."""

    @classmethod
    def from_node(cls, section: str, node: Mapping[str, Any]) -> Self:
        """Check keys and types of a composed node.

        Raises: SweepError: an unknown or missing key, or a value of another type; says what to type.
        """
        hints = hints_of(cls)
        for key in node:
            if key not in hints:
                require_known("key", f"{section}.{key}", [f"{section}.{name}" for name in hints])
        for name, hint in hints.items():
            if name not in node or node[name] == _MISSING:
                raise SweepError(f"{section}.{name} has no value. Type {section}.{name}=VALUE.")
            if not fits(node[name], hint):
                raise SweepError(f"{section}.{name}={node[name]!r} is not allowed. Allowed: {describe(hint)}.")
        return cls(**node)
