"""Rows of chat data as conversations: OpenAI's `messages`, or the `conversations` of ShareGPT."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from sweep.core.errors import SweepError
from sweep.core.text import count
from workers.data.conversations import Conversation, Message, PictureSource
from workers.data.rows import Cell, Row
from workers.data.sources import PICTURE_KEYS, picture_source

_ROLES: Final = {  # OpenAI's, and those of ShareGPT
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_PICTURE_COLUMNS: Final = ("images", "image")  # whose pictures fill the marks of messages, in order
_MARK: Final = "<image>"
_PICTURE_PARTS: Final = ("image", "image_url")
_PLACE: Final = PictureSource(origin="")  # of a mark that no picture has filled yet


def conversation(row: Row, column: str, root: str, *, answered: bool) -> Conversation:
    """The conversation of a row.

    Args:
        row: of the data set.
        column: that holds the messages.
        root: dataset.path.
        answered: whether it must end with an answer.

    Raises: SweepError: the messages are of no known form, are empty or out of order, or lack a picture.
    """
    items = row.values[column]
    if not isinstance(items, Sequence) or isinstance(items, str | bytes) or not items:
        raise SweepError(
            f"Column {column!r} of {row.origin} is no list of messages. "
            'Give [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        )
    own = next((row.values[name] for name in _PICTURE_COLUMNS if row.values.get(name) is not None), None)
    values = own if isinstance(own, Sequence) and not isinstance(own, str | bytes) else [own] if own else []
    pictures = [picture_source(value, row, root) for value in values]
    messages = [_message(item, row, root, marks=bool(pictures)) for item in items]
    messages = _filled(messages, pictures, row)
    _check_order([message.role for message in messages], row, answered=answered)
    for message in messages:
        _check_content(message, row)
    return Conversation(messages=tuple(messages), origin=row.origin)


def _message(item: Cell, row: Row, root: str, *, marks: bool) -> Message:
    if not isinstance(item, Mapping):
        raise SweepError(f'A message of {row.origin} is no mapping. Give {{"role": "user", "content": "..."}}.')
    names = ("role", "content") if item.get("role") is not None else ("from", "value")
    said, content = (item.get(name) for name in names)
    if not isinstance(said, str) or said not in _ROLES:
        raise SweepError(
            f"A message of {row.origin} has the role {said!r}. Allowed: {', '.join(_ROLES)}. "
            "Calls of tools and their results are not read: leave such conversations out."
        )
    if item.get("tool_calls"):
        raise SweepError(f"A message of {row.origin} calls tools, which is not read. Leave such conversations out.")
    return Message(role=_ROLES[said], parts=tuple(_parts(content, row, root, marks=marks)))


def _parts(content: Cell, row: Row, root: str, *, marks: bool) -> Iterator[str | PictureSource]:
    """Texts and pictures of a message; marks: whether `<image>` in a text stands for a picture of a column."""
    if isinstance(content, str):
        for piece in re.split(f"({_MARK})", content) if marks else [content]:
            if piece:
                yield _PLACE if piece == _MARK else piece
        return
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise SweepError(
            f"A message of {row.origin} has no content. Give a text, or parts: "
            '[{"type": "image", "image": "FILE"}, {"type": "text", "text": "..."}].'
        )
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str):
            yield from _parts(part, row, root, marks=marks)
        elif isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
            yield from _parts(part["text"], row, root, marks=marks)
        elif isinstance(part, Mapping) and kind in _PICTURE_PARTS:
            is_named = any(part.get(key) is not None for key in PICTURE_KEYS)
            yield picture_source(part, row, root) if is_named else _PLACE
        else:
            raise SweepError(
                f"A message of {row.origin} has a part of type {kind!r}. Allowed: text, {', '.join(_PICTURE_PARTS)}; "
                "sound and video are not read."
            )


def _filled(messages: Sequence[Message], pictures: Sequence[PictureSource], row: Row) -> list[Message]:
    """Messages with the pictures of the row's column at their marks; before the first question if there are none."""
    n_marks = sum(message.parts.count(_PLACE) for message in messages)
    first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
    if pictures and first is not None and not any(message.pictures for message in messages):
        leading = Message(role="user", parts=(*pictures, *messages[first].parts))
        return [*messages[:first], leading, *messages[first + 1 :]]
    if n_marks != len(pictures):
        raise SweepError(
            f"The messages of {row.origin} have {count(n_marks, 'mark')} for pictures, "
            f"its column {' or '.join(_PICTURE_COLUMNS)} {count(len(pictures), 'picture')}. Give as many of each."
        )
    left, filled = iter(pictures), list[Message]()
    for message in messages:
        parts = tuple(next(left) if part is _PLACE else part for part in message.parts)
        filled.append(Message(role=message.role, parts=parts))
    return filled


def _check_order(roles: Sequence[str], row: Row, *, answered: bool) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if not turns or [*turns] != expected[: len(turns)]:
        raise SweepError(
            f"The roles of {row.origin} are out of order: {', '.join(roles)}. "
            "After at most one system message, user and assistant speak by turns, the user first."
        )
    if answered and turns[-1] != "assistant":
        what = "ends with the user" if "assistant" in turns else "has no assistant's turn"
        raise SweepError(
            f"The conversation of {row.origin} {what}. Add the answer, "
            "or type dataset.answers=model, with which the model writes it."
        )


def _check_content(message: Message, row: Row) -> None:
    if message.role != "user" and message.pictures:
        raise SweepError(
            f"A message of the {message.role} has a picture in {row.origin}. Pictures stand in messages of the user."
        )
    if message.role != "system" and not message.pictures and not message.text.strip():
        what = "answer" if message.role == "assistant" else "message of the user"
        raise SweepError(f"The {what} in {row.origin} is empty. Write it, or leave the conversation out.")
