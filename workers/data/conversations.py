"""Conversations, captioned pictures and texts as data sets have them, before a model's processor has seen them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSource:
    """A picture that is not read yet: of a file, or encoded bytes that stand in the data set."""

    origin: str  # "line 12 of chats.jsonl"
    path: Path | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one speaker says: texts and pictures, in the order of the model's prompt."""

    role: str  # system, user or assistant
    parts: tuple[str | PictureSource, ...]

    @property
    def text(self) -> str:
        """Its texts, without its pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """In the order of their marks in the prompt."""
        return tuple(part for part in self.parts if isinstance(part, PictureSource))


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages: at most one of the system, then user and assistant by turns."""

    messages: tuple[Message, ...]
    origin: str  # "line 12 of chats.jsonl"

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Of all messages, in order."""
        return tuple(picture for message in self.messages for picture in message.pictures)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedPicture:
    """A picture, and the text that describes it."""

    picture: PictureSource
    caption: str
    origin: str  # "line 12 of metadata.csv"
