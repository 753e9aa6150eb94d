"""Text tables for the screen."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, figures: bool = False) -> list[str]:
    """One line a row, columns two spaces apart.

    Args:
        rows: a heading and the rest, all of one length.
        figures: columns after the first are numbers, which stand to the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = (text.rjust(width) if figures and column else text.ljust(width) for column, (text, width) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines
