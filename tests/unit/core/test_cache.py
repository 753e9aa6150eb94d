"""A computed value is read back as it was; an entry is right or absent."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from sweep.core.cache import cache_dir, remember


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))


class Computation:
    """Counts how often it is done."""

    def __init__(self, value: Any) -> None:
        self.value, self.n_calls = value, 0

    def __call__(self) -> Any:
        self.n_calls += 1
        return self.value


def entries() -> list[Path]:
    return sorted(path for path in cache_dir().rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3]],
        {"block_sizes": {-1: 64, "type": "dynamic", "scale_bits": (4, 3)}, "enable": True, "axis": None},
        (1, (2, [3, (4,)]), {}),
        [],
        {"tuple": [1], "pairs": [[2, 3]]},
        0.1 + 0.2,
        math.inf,
        "grün\n",
        None,
    ],
)
def test_the_second_time_a_value_is_read_back_with_its_types(value: Any) -> None:
    computation = Computation(value)
    assert remember("presets", ["a", 1], computation) == value
    again = remember("presets", ["a", 1], computation)
    assert computation.n_calls == 1
    assert repr(again) == repr(value)  # tuples, integer keys and the last bit of a float as well


def test_another_key_or_kind_is_another_entry() -> None:
    computations = {("a", 1): Computation("x"), ("a", 2): Computation("y"), ("b", 1): Computation("z")}
    for _ in range(2):
        assert [remember(kind, ["key", n], compute) for (kind, n), compute in computations.items()] == ["x", "y", "z"]
    assert [compute.n_calls for compute in computations.values()] == [1, 1, 1]


@pytest.mark.parametrize("torn", [b"", b'{"pairs": [["a", ', b"\xff\xfe"])
def test_a_torn_entry_is_computed_again_and_replaced(torn: bytes) -> None:
    computation = Computation({"a": 1})
    remember("presets", "key", computation)
    (entry,) = entries()
    entry.write_bytes(torn)
    assert remember("presets", "key", computation) == {"a": 1}
    assert computation.n_calls == 2
    assert remember("presets", "key", computation) == {"a": 1}
    assert computation.n_calls == 2


def test_a_failed_computation_leaves_no_entry() -> None:
    def fail() -> str:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        remember("presets", "key", fail)
    assert entries() == []
    assert remember("presets", "key", lambda: "right") == "right"


def test_where_no_cache_can_be_kept_the_value_is_right_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    computation = Computation([1])
    assert [remember("presets", "key", computation) for _ in range(2)] == [[1], [1]]
    assert computation.n_calls == 2


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SWEEP_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/sweep-sensitivity"),
        ({"SWEEP_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "/home/her/.cache/sweep-sensitivity"),
        ({}, "/home/her/.cache/sweep-sensitivity"),
    ],
)
def test_where_the_entries_live(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/her"} | variables).items():
        monkeypatch.setitem(os.environ, name, value)
    assert cache_dir() == Path(expected)
