"""Tables and sentences at every width: each word whole, each value there, each line as long as the screen at most."""

from io import StringIO

import pytest
from rich.console import Console

from sweep.core.screen import say, show_table

HEADING = ("pair", "granularity", "algorithm", "done", "most sensitive layer groups")
ROWS = [
    ("wfp8_afp8", "recipe_match_channel_token", "max", "12", "layers.0.self_attn.q/k/v_proj 23%, layers.0.o_proj 9%"),
    ("wfp8_afp8", "default", "awq_lite", "3", "[layers.0.mlp.down_proj] 23%"),
]


def shown(width: int | None, rows: list[tuple[str, ...]] = ROWS) -> list[str]:
    """Lines on a terminal of this width; None: in a pipe."""
    out = StringIO()
    show_table(Console(file=out, width=width, force_terminal=width is not None, color_system=None), HEADING, rows)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def words(text: str) -> set[str]:
    return {word.strip(",:") for word in text.split()}


@pytest.mark.parametrize("width", [None, *range(32, 140, 6)])
def test_no_word_is_cut_and_no_value_is_lost(width: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = shown(width)
    assert words(" ".join([*HEADING, *(cell for row in ROWS for cell in row)])) <= words(" ".join(lines))
    assert max(map(len, lines)) <= (width or 10_000)


def test_in_a_pipe_a_row_is_a_line_unless_the_width_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert len(shown(None)) == 1 + len(ROWS)
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, shown(None))) <= 60


def test_where_columns_do_not_fit_the_values_that_all_rows_share_come_first() -> None:
    short = [(pair, "default", algorithm, n, groups) for pair, _, algorithm, n, groups in ROWS]
    first, heading, *rows = shown(60, short)
    assert first == "pair wfp8_afp8, granularity default:"
    assert heading.split()[:2] == ["algorithm", "done"]
    assert [row.split()[0] for row in rows if not row.startswith(" ")] == ["max", "awq_lite"]


def test_where_nothing_fits_a_row_is_a_sentence() -> None:
    assert shown(32)[:2] == ["pair wfp8_afp8:", "- granularity"]


def test_a_path_longer_than_the_screen_stays_whole() -> None:
    out = StringIO()
    say(Console(file=out, width=30, force_terminal=True, color_system=None), f"Cannot write {'/long' * 10}: full disk.")
    assert out.getvalue().splitlines() == ["Cannot write", f"{'/long' * 10}:", "full disk."]
