"""Trials counted by recipe: the table of `status` and of `publish`."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from rich.console import Console

from sweep.core.screen import say, show_table
from sweep.store.records import ATTRIBUTES, NUMBERS, RECIPE, UNKNOWN, TrialRow

_SHOWN = 40  # recipes on the screen


class RecipeCount(msgspec.Struct, frozen=True):
    """Trials that have the same attributes but for their size."""

    attributes: dict[str, str]  # those of a recipe, and others in which the trials differ
    trials: dict[str, int]  # number by state, or by whatever else they were counted by

    def numbers(self, words: Iterable[str]) -> Iterator[str]:
        """How many trials each word stands for, as text."""
        return (str(self.trials.get(word, 0)) for word in words)


def by_recipe(trials: Iterable[tuple[TrialRow, str]]) -> list[RecipeCount]:
    """Count trials by recipe and by the word that is given with each, in the order of the first of each recipe."""
    trials = list(trials)
    others = [name for name in (*ATTRIBUTES, *NUMBERS) if name not in (*RECIPE, "size") and _differs(trials, name)]
    names = [*others, *RECIPE]
    counts: dict[tuple[str, ...], Counter[str]] = {}
    for row, word in trials:
        counts.setdefault(tuple(str(getattr(row, name) or UNKNOWN) for name in names), Counter())[word] += 1
    return [RecipeCount(dict(zip(names, key, strict=True)), dict(each)) for key, each in counts.items()]


def _differs(trials: Iterable[tuple[TrialRow, str]], name: str) -> bool:
    return len({getattr(row, name) for row, _ in trials}) > 1


def show_recipes(console: Console, found: Sequence[RecipeCount], words: Sequence[str]) -> None:
    """Print the counts as a table, with a column for each of the words that any recipe has."""
    if found:
        used = set(itertools.chain.from_iterable(each.trials for each in found))
        columns = [word for word in words if word in used]
        heading = [*(name.removeprefix("quant_") for name in found[0].attributes), *columns]
        cells = [[*each.attributes.values(), *each.numbers(columns)] for each in found]
        show_table(console, heading, cells[:_SHOWN], columns)
    if len(found) > _SHOWN:
        say(console, f"and {len(found) - _SHOWN} more recipes")
