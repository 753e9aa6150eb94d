"""Code stays readable line by line: no comprehension inside a comprehension, no function of more than 60 lines."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for package in ("sweep", "workers") for path in (ROOT / package).rglob("*.py"))
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LONGEST = 60


def nested(tree: ast.AST) -> Iterator[int]:
    """Lines of comprehensions that have another one inside."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS) and sum(isinstance(part, COMPREHENSIONS) for part in ast.walk(node)) > 1:
            yield node.lineno


def long(tree: ast.AST) -> Iterator[str]:
    """Names of functions that are too long."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST:
            yield node.name


def test_both_are_found() -> None:
    body = "\n".join(["    pass"] * LONGEST)
    assert [*nested(ast.parse("x = [i for i in y]\nz = [any(j for j in i) for i in y]"))] == [2]
    assert [*long(ast.parse(f"def f():\n{body}\ndef g():\n    pass"))] == ["f"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_readable_line_by_line(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert (path.name, [*nested(tree)], [*long(tree)]) == (path.name, [], [])
