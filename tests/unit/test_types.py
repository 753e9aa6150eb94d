"""Untyped values live at the gates alone: where YAML, JSON, Parquet rows and untyped libraries' values enter."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNTYPED = {"Any", "object"}
MAPPINGS = {"Mapping", "MutableMapping", "dict"}
MAX_UNTYPED, MAX_MAPPINGS = 6, 3  # a thousand lines


def aliases(tree: ast.Module) -> set[str]:
    """Names that a module gives to types with an untyped part."""
    found = set[str]()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
            node.value, ast.Subscript | ast.Name | ast.BinOp
        ):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(part, ast.Name) and part.id == "Any" for part in ast.walk(node.value)):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def untyped(tree: ast.Module) -> Iterator[ast.expr]:
    """`Any`, `object`, casts, and aliases of them, wherever they stand."""
    names = UNTYPED | aliases(tree)
    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load)) or (
            isinstance(node, ast.Attribute) and node.attr == "Any"
        ):
            yield node
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
            yield node  # a type in quotes
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cast":
            yield node


def mappings(tree: ast.Module) -> Iterator[ast.Subscript]:
    """Mappings with untyped values."""
    names = UNTYPED | aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in MAPPINGS:
            values = node.slice.elts[1:] if isinstance(node.slice, ast.Tuple) else []
            parts = [part for value in values for part in ast.walk(value)]
            if any(isinstance(part, ast.Name) and part.id in names for part in parts):
                yield node


@pytest.mark.parametrize(
    ("text", "n_untyped", "n_mappings"),
    [
        ("from typing import Any\nx: Any = 1", 1, 0),
        ("def f(x: dict[str, Any]) -> object: ...", 2, 1),
        ("Row = dict[str, Any]\ndef f(x: Row, y: list[Row]) -> None: ...", 3, 1),
        ("x: Mapping[str, Mapping[str, Any]]", 1, 2),
        ("x = cast(int, y)\nz = typing.Any\ndef f(x: 'Any') -> None: ...", 3, 0),
        ("x: dict[str, int]\ny = Anything", 0, 0),
    ],
)
def test_every_disguise_is_counted(text: str, n_untyped: int, n_mappings: int) -> None:
    tree = ast.parse(text)
    assert (len([*untyped(tree)]), len([*mappings(tree)])) == (n_untyped, n_mappings)


def test_few_values_are_untyped() -> None:
    texts = [path.read_text() for package in ("sweep", "workers") for path in (ROOT / package).rglob("*.py")]
    thousands = sum(text.count("\n") for text in texts) / 1000
    trees = [ast.parse(text) for text in texts]
    assert sum(len([*untyped(tree)]) for tree in trees) <= MAX_UNTYPED * thousands
    assert sum(len([*mappings(tree)]) for tree in trees) <= MAX_MAPPINGS * thousands
