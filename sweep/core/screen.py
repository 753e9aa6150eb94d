"""Text and tables on the screen, right at any width: no word is cut in the middle, no column is lost."""

import os
import textwrap
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_UNLIMITED = 10_000  # columns, where nobody looks: a line of a pipe or file ends where it is at an end


def say(console: Console, text: str, style: str | None = None, *, indent: str = "") -> None:
    """Print text that breaks between words; a word that is longer than the screen, as a path, stays whole.

    Args:
        console: where.
        text: without markup.
        style: rich's word for colour and weight.
        indent: of the lines after the first.
    """
    for line in text.splitlines():
        wrapped = textwrap.wrap(
            line, _width(console), break_long_words=False, break_on_hyphens=False, subsequent_indent=indent
        )
        console.print("\n".join(wrapped), style=style, markup=False, highlight=False, soft_wrap=True)


def show_table(
    console: Console, heading: Sequence[str], rows: Collection[Sequence[str]], figures: Collection[str] = ()
) -> None:
    """Print a table, of which only the last column folds; each row as a sentence where the screen is too narrow.

    Args:
        console: where.
        heading: names of the columns.
        rows: their cells.
        figures: names of columns that stand to the right.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, cells in zip(heading, zip(heading, *rows, strict=True), strict=True):
        last = name == heading[-1]
        width = max(cell_len(word) for cell in cells for word in (cell.split() or [""] if last else [cell]))
        table.add_column(name, justify="right" if name in figures else "left", no_wrap=not last, min_width=width)
    for row in rows:
        table.add_row(*row)
    width = _width(console)
    if console.measure(table, options=console.options.update(width=_UNLIMITED)).minimum <= width:
        console.print(table, width=width, markup=False, highlight=False, soft_wrap=False)
        return
    for row in rows:
        named = (f"{name} {cell}" for name, cell in zip(heading, row, strict=True))
        say(console, "- " + ", ".join(named), indent="  ")


def _width(console: Console) -> int:
    return console.width if console.is_terminal or "COLUMNS" in os.environ else _UNLIMITED
