"""Columns stand under each other, and nothing trails."""

from sweep.core.text import aligned


def test_columns_are_as_wide_as_their_widest_text() -> None:
    assert aligned([("recipe", "KL"), ("a", "0.0139"), ("bb", "2")]) == ["recipe  KL", "a       0.0139", "bb      2"]


def test_figures_stand_to_the_right() -> None:
    assert aligned([("recipe", "KL"), ("a", "0.0139"), ("bb", "2")], figures=True) == ["recipe      KL", "a       0.0139", "bb           2"]
