"""Answers of drawn chats are true of the caption, which test_scenes holds to the pixels."""

import hashlib
import re
from collections import Counter
from io import BytesIO

import numpy as np
import pytest

from workers.data.scene_chats import scene_conversations, scene_turns
from workers.data.scenes import scene

CAPTION = re.compile(r"an? (\w+ \w+) (left of|right of|above|below) an? (\w+ \w+) on an? (\w+) background")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def is_true(index: int, question: str, answer: str) -> bool:
    """Whether the answer follows from the scene's caption."""
    first, relation, second, background = CAPTION.fullmatch(scene(index).caption).groups()  # type: ignore[union-attr]
    things = {first, second}
    lies = {(first, relation, second), (second, OPPOSITE[relation], first)}
    words = answer[0].lower() + answer.removesuffix(".")[1:]
    named = set(re.findall(r"an? (\w+ (?:circle|square|triangle|cross|ring))\b", words))
    if asked := re.fullmatch(r"What is (left of|right of|above|below) the (\w+ \w+)\?", question):
        if len(named) != 1:
            return False
        (thing,) = named
        return (thing, *asked.groups()) in lies and words in (
            re.sub(r"^(an? \w+ \w+).*", r"\1", words),
            f"{'an' if thing[0] == 'o' else 'a'} {thing} is {asked[1]} the {asked[2]}",
        )
    if asked := re.fullmatch(r"Where is the (\w+ \w+)\?", question):
        found = re.fullmatch(rf"(?:the {asked[1]} is )?(left of|right of|above|below) the (\w+ \w+)", words)
        return found is not None and (asked[1], *found.groups()) in lies
    if asked := re.fullmatch(r"Which shape is (\w+)\?", question):
        found = re.fullmatch(rf"(?:the|the {asked[1]} shape is an?) (\w+)", words)
        return found is not None and f"{asked[1]} {found[1]}" in things
    if asked := re.fullmatch(r"Which colour is the (circle|square|triangle|cross|ring)\?", question):
        (colour,) = (thing.split()[0] for thing in things if thing.endswith(asked[1]))  # one alone: no ambiguity
        return words in (colour, f"the {asked[1]} is {colour}")
    if question == "Which colour is the background?":
        return words in (background, f"the background is {background}")
    if question == "How many shapes are on the picture?":
        return words == "two" or (words.startswith("there are two shapes, ") and named == things)
    if asked := re.fullmatch(r"How many (\w+?)e?s are there\?", question):
        shape = {"circl": "circle", "squar": "square", "triangl": "triangle"}.get(asked[1], asked[1])
        number = sum(thing.endswith(shape) for thing in (first, second))
        sentences = (f"there are no {shape}", f"there is one {shape}", f"there are two {shape}")
        return words == ("none", "one", "two")[number] or re.sub(r"(?<=[^s])s$|es$", "", words) in (
            sentences[number],
            sentences[number].removesuffix("e"),
        )
    if asked := re.fullmatch(r"Is there an? (\w+ \w+)\?", question):
        truth = "yes" if asked[1] in things else "no"
        return words == truth or (words.startswith(f"{truth}, there is ") and named == things)
    assert question == "What is on the picture?"
    return words == scene(index).caption or named == things


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_every_answer_is_true(start: int) -> None:
    for index in range(start, start + 1000):
        for question, answer in scene_turns(index):
            assert is_true(index, question, answer), (scene(index).caption, question, answer)


def test_a_false_answer_would_be_seen() -> None:
    turns = [(index, question, answer) for index in range(300) for question, answer in scene_turns(index)]
    swapped = [is_true(index, question, scene_turns(index + 300)[0][1]) for index, question, _ in turns]
    assert sum(swapped) < len(turns) / 10


def test_questions_are_of_many_kinds_and_a_third_of_the_chats_have_two_turns() -> None:
    turns = [scene_turns(index) for index in range(512)]
    assert {len(each) for each in turns} == {1, 2}
    assert 0.27 < sum(len(each) == 2 for each in turns) / 512 < 0.4
    assert all(len(each) == 1 or each[0][0] != each[1][0] for each in turns)
    first_words = Counter(question.split()[0] for each in turns for question, _ in each)
    assert {word for word, n in first_words.items() if n > 30} == {"What", "Where", "Which", "How", "Is"}
    truths = Counter(
        answer.split(",")[0].strip(".") for each in turns for question, answer in each if question[0] == "I"
    )
    assert min(truths["Yes"], truths["No"]) > 10
    lengths = [len(answer.split()) for each in turns for _, answer in each]
    assert min(lengths) == 1
    assert max(lengths) > 10


def test_the_shipped_chats_never_change() -> None:
    """Scores of the data set `scenes_chat` are comparable across machines and versions only as long as this holds."""
    digest = hashlib.sha256()
    for index in range(512):
        digest.update(repr(scene_turns(index)).encode())
    assert digest.hexdigest() == "7d3c287707cf813904996d59b656f954391735272c2d6cf3f3ef96c7875adb8f"


def test_conversations_alternate_and_hold_their_scene_once() -> None:
    image = pytest.importorskip("PIL.Image")
    for index, conversation in enumerate(scene_conversations(40)):
        turns = scene_turns(index)
        assert [message.role for message in conversation.messages] == ["user", "assistant"] * len(turns)
        assert [message.text for message in conversation.messages] == [text for turn in turns for text in turn]
        (picture,) = conversation.messages[0].pictures
        assert conversation.pictures == (picture,)
        assert picture.content is not None
        np.testing.assert_array_equal(np.asarray(image.open(BytesIO(picture.content))), scene(index).pixels)
