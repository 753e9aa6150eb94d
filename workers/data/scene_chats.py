"""Chats about drawn scenes: questions with answers that are true of the picture, deterministic by index.

A third of them have two turns, the second about another thing than the first.
"""

from io import BytesIO
from typing import Final

import numpy as np

from workers.data.conversations import Conversation, Message, PictureSource
from workers.data.scenes import COLOURS, SHAPES, Pixels, Scene, scene, with_article

_OPPOSITE: Final = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scene_turns(index: int) -> list[tuple[str, str]]:
    """Questions about the scene of an index and their answers, one or two, equal on every machine."""
    random = np.random.Generator(np.random.PCG64([index, 1]))  # the scene itself is drawn from the index alone
    questions = _questions(scene(index), random)
    chosen = random.permutation(len(questions))[: 2 if random.integers(3) == 0 else 1]
    turns: list[tuple[str, str]] = []
    for question, *answers in (questions[i] for i in chosen):
        answer = answers[random.integers(2)]
        turns.append((question, f"{answer[0].upper()}{answer[1:]}."))
    return turns


def scene_conversations(n_samples: int) -> list[Conversation]:
    """Chats about the first `n_samples` drawn scenes, each with its picture as PNG before the first question."""
    return [_conversation(index) for index in range(n_samples)]


def _conversation(index: int) -> Conversation:
    origin = f"scene {index}"
    messages: list[Message] = []
    for question, answer in scene_turns(index):
        picture = () if messages else (PictureSource(origin=origin, content=_png(scene(index).pixels)),)
        messages.append(Message(role="user", parts=(*picture, question)))
        messages.append(Message(role="assistant", parts=(answer,)))
    return Conversation(messages=tuple(messages), origin=origin)


def _questions(drawn: Scene, random: np.random.Generator) -> list[tuple[str, str, str]]:
    """A question of each kind that the scene allows, its answer in a few words, and one that says more."""
    one = int(random.integers(2))
    colour, shape, this, that = drawn.colours[one], drawn.shapes[one], drawn.things[one], drawn.things[1 - one]
    place = drawn.relation if one == 0 else _OPPOSITE[drawn.relation]
    both = f"{with_article(this)} and {with_article(that)}"
    asked = this if random.integers(2) else f"{list(COLOURS)[random.integers(len(COLOURS))]} {shape}"
    truth = "yes" if asked in drawn.things else "no"
    found = [
        (f"What is {place} the {that}?", with_article(this), f"{with_article(this)} is {place} the {that}"),
        (f"Where is the {this}?", f"{place} the {that}", f"the {this} is {place} the {that}"),
        (f"Which shape is {colour}?", f"the {shape}", f"the {colour} shape is {with_article(shape)}"),
        ("Which colour is the background?", drawn.background, f"the background is {drawn.background}"),
        ("How many shapes are on the picture?", "two", f"there are two shapes, {both}"),
        _count(SHAPES[random.integers(len(SHAPES))], drawn),
        (f"Is there {with_article(asked)}?", truth, f"{truth}, there is {both}"),
        ("What is on the picture?", both, drawn.caption),
    ]
    if drawn.shapes[0] != drawn.shapes[1]:
        found.append((f"Which colour is the {shape}?", colour, f"the {shape} is {colour}"))
    return found


def _count(shape: str, drawn: Scene) -> tuple[str, str, str]:
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    number = drawn.shapes.count(shape)
    answer = ("none", "one", "two")[number]
    sentence = (f"there are no {plural}", f"there is one {shape}", f"there are two {plural}")[number]
    return f"How many {plural} are there?", answer, sentence


def _png(pixels: Pixels) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
