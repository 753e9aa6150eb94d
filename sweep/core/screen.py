"""Text and tables on the screen, right at any width: no word is cut in the middle, no column is lost."""

import os
import textwrap
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_UNLIMITED = 10_000  # columns


def say(console: Console, text: str, style: str | None = None, *, indent: str = "") -> None:
    """Print text that breaks between words; a word that is longer than the screen, as a path, stays whole.

    Args:
        console: where.
        text: without markup.
        style: rich's word for colour and weight.
        indent: of the lines after the first.
    """
    console = _whole(console)
    wrap = textwrap.TextWrapper(console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    wrapped = "\n".join(wrap.fill(line) for line in text.splitlines())
    console.print(wrapped, style=style, markup=False, highlight=False, soft_wrap=True)


def show_next(console: Console, *commands: str) -> None:
    """Print what to type next, each command whole on a line of its own, so that it can be copied at any width."""
    console.print("\n  ".join(["Next:", *commands]), markup=False, highlight=False, soft_wrap=True)


def show_table(
    console: Console, heading: Sequence[str], rows: Sequence[Sequence[str]], figures: Collection[str] = ()
) -> None:
    """Print a table, of which only the last column folds.

    On a screen that is too narrow, values that all rows share are named before the table; if that is not enough, each
    row becomes a sentence.

    Args:
        console: where.
        heading: names of the columns.
        rows: their cells.
        figures: names of columns that stand to the right.
    """
    console, columns = _whole(console), list(zip(heading, *rows, strict=True))
    if not _fits(console, columns) and len(rows) > 1:
        shared = [column for column in columns if len(set(column[1:])) == 1]
        if shared:
            say(console, f"{', '.join(f'{name} {cells[0]}' for name, *cells in shared)}:")
        columns = [column for column in columns if column not in shared]
    if not _fits(console, columns):
        for cells in list(zip(*columns, strict=True))[1:]:
            named = (f"{name} {cell}" for (name, *_), cell in zip(columns, cells, strict=True))
            say(console, f"- {', '.join(named)}", indent="  ")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        name = column[0]
        table.add_column(name, justify="right" if name in figures else "left", no_wrap=column is not columns[-1])
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*cells)
    console.print(table, markup=False, highlight=False, soft_wrap=False)


def _fits(console: Console, columns: Sequence[Sequence[str]]) -> bool:
    """Whether all columns are as wide as their cells, but for the last one, which is as wide as its longest word."""
    *whole, last = columns
    widths = [max(map(cell_len, cells)) + 2 for cells in whole]
    return sum(widths) + max(cell_len(word) for cell in last for word in cell.split() or [""]) <= console.width


def _whole(console: Console) -> Console:
    """The console; where nobody looks, in a pipe or a file, one of no width, as lines end there where they end."""
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(file=console.file, width=_UNLIMITED, quiet=console.quiet)
