"""Data sets as users bring them: chats about pictures."""

import json
from io import BytesIO
from pathlib import Path

from PIL import Image


def png(colour: tuple[int, int, int], side: int = 32) -> bytes:
    """A plain picture."""
    file = BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def chat(index: int, picture: str | None) -> dict[str, list[dict[str, object]]]:
    """A question and its answer, with the picture of a path if it has one."""
    text = {"type": "text", "text": f"What is number {index}?"}
    content = [text] if picture is None else [{"type": "image", "image": picture}, text]
    answer = f"It is a plain colour, number {index}."
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def write_chats(directory: Path, n: int, *, pictures: bool = True) -> Path:
    """A file of `n` chats, each with a picture of its own beside it."""
    directory.mkdir()
    for index in range(n if pictures else 0):
        (directory / f"{index}.png").write_bytes(png((index, 0, 255 - index)))
    rows = [chat(index, f"{index}.png" if pictures else None) for index in range(n)]
    path = directory / "chats.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
