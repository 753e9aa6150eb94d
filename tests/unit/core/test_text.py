"""Seconds are said as a person says them, and overrides so that a shell and Hydra read the value."""

import shlex

import pytest

from sweep.config.compose import expand
from sweep.core.text import duration, override


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (48, "48 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_a_duration_is_said_as_a_person_says_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "path", ["/data/chats-2.jsonl", "my chats.jsonl", "a 'b', {c} (d).txt", 'a "b"=\\c', "$HOME/[x]"]
)
def test_an_override_is_read_as_it_was_meant(path: str) -> None:
    (word,) = shlex.split(override("dataset.captions_path", path))
    config = expand(["dataset=coco2017_captions", word], multirun=False).points[0]
    assert config.dataset.captions_path == path
    assert override("dataset.path", "/data/chats-2.jsonl") == "dataset.path=/data/chats-2.jsonl"
    assert override("dataset.path", "my chats.jsonl") == "'dataset.path=\"my chats.jsonl\"'"
