"""Her own data sets: every form of row becomes the same texts, pictures and conversations; all else is refused."""

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from PIL import Image

from sweep.core.errors import SweepError
from sweep.core.text import override
from workers.data.conversations import Conversation, PictureSource
from workers.data.decode import MAX_PIXELS, decoded
from workers.data.own import check_captions, read_captioned, read_conversations, read_texts

RED, BLUE = (255, 0, 0), (0, 0, 255)
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]


def jsonl(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def png(colour: tuple[int, int, int] = RED) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 3), colour).save(file, "PNG")
    return file.getvalue()


def chats(path: str, n: int = 1, most: int = 999, column: str | None = None, *, answered: bool = True):
    return read_conversations(path, "train", column, n, most, answered=answered)


def said(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Role and parts of each message; pictures by their colour."""
    names = {RED: "red", BLUE: "blue"}
    found = []
    for message in conversation.messages:
        parts = [part if isinstance(part, str) else names[decoded(part).getpixel((0, 0))] for part in message.parts]
        found.append((message.role, parts))
    return found


def refused(rows: Sequence[object], tmp_path: Path, **options: object) -> str:
    with pytest.raises(SweepError) as error:
        chats(jsonl(tmp_path / "chats.jsonl", rows), **options)
    return str(error.value)


TEXT_CHATS = {
    "messages": {"messages": CHAT},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, CHAT[1]],
    },
    "conversations": {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]},
}


@pytest.mark.parametrize("row", TEXT_CHATS.values(), ids=TEXT_CHATS)
def test_both_forms_of_chats_are_the_same_conversation(row: object, tmp_path: Path) -> None:
    (found,) = chats(jsonl(tmp_path / "chats.jsonl", [row]))
    assert said(found) == [("user", ["Hello?"]), ("assistant", ["Hello."])]
    assert found.origin == "line 1 of chats.jsonl"


def test_a_system_message_stands_first(tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": ""}, *CHAT, *CHAT]}
    (found,) = chats(jsonl(tmp_path / "chats.jsonl", [row]))
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]


def write_rows(directory: Path, kind: str, rows: list[dict[str, object]]) -> str:
    """Rows as a file of a kind, or a directory of two."""
    directory.mkdir()
    table = datasets.Dataset.from_list(rows)
    match kind:
        case "jsonl":
            return jsonl(directory / "rows.jsonl", rows)
        case "json":
            (directory / "rows.json").write_text(json.dumps(rows, indent=1))
        case "json lines":
            return jsonl(directory / "rows.json", rows)
        case "parquet":
            table.to_parquet(directory / "rows.parquet")
        case "saved":
            table.save_to_disk(directory)
            return str(directory)
        case "arrow":
            table.save_to_disk(directory)
            return str(directory / "data-00000-of-00001.arrow")
        case "directory":
            half = len(rows) // 2
            jsonl(directory / "a.jsonl", rows[:half])
            jsonl(directory / "b.jsonl", rows[half:])
            return str(directory)
    return str(directory / f"rows.{kind}")


KINDS = pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "parquet", "arrow", "saved", "directory"])


@KINDS
def test_every_file_gives_the_same_conversations(kind: str, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(8)
    ]
    found = chats(write_rows(tmp_path / "set", kind, rows), 5, 6)
    assert [said(each) for each in found] == [[("user", [f"{i}?"]), ("assistant", [f"{i}."])] for i in range(6)]


@KINDS
def test_a_text_of_several_lines_stays_whole(kind: str, tmp_path: Path) -> None:
    rows = [{"text": f"one {i}\n\ntwo\u2028three"} for i in range(4)]
    found = read_texts(write_rows(tmp_path / "set", kind, rows), None, "text", 2, 4)
    assert [text for text, _ in found] == [row["text"] for row in rows]


def test_a_text_file_holds_a_text_a_line_and_blank_lines_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n three \n")
    (tmp_path / "b.txt").write_text("four")
    expected = [("one", "line 1 of a.txt"), ("three", "line 3 of a.txt"), ("four", "line 1 of b.txt")]
    assert read_texts(str(tmp_path), None, "text", 2, 9) == expected
    assert read_texts(str(tmp_path), None, "text", 2, 2) == expected[:2]


def test_no_more_is_read_than_needed(tmp_path: Path) -> None:
    """What is broken behind it does not matter."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\nbroken')
    assert len(read_texts(str(path), None, "text", 2, 2)) == 2
    with pytest.raises(SweepError, match=r"Line 3 of .*rows.jsonl is no JSON row: .* Give one object a line"):
        read_texts(str(path), None, "text", 2, 3)


def picture_values(directory: Path) -> dict[str, object]:
    inline = base64.b64encode(png(BLUE)).decode()
    return {
        "image path": {"type": "image", "image": "pictures/blue.png"},
        "image url": {"type": "image", "url": "pictures/blue.png"},
        "image_url": {"type": "image_url", "image_url": {"url": "pictures/blue.png"}},
        "image_url text": {"type": "image_url", "image_url": "pictures/blue.png"},
        "file URL": {"type": "image_url", "image_url": {"url": (directory / "pictures" / "blue.png").as_uri()}},
        "data URL": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{inline}"}},
        "absolute": {"type": "image", "path": str(directory / "pictures" / "blue.png")},
        "inside through ..": {"type": "image", "image": "pictures/../pictures/blue.png"},
    }


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A directory, with a space in its name, of one red and one blue picture."""
    directory = tmp_path / "her data"
    (directory / "pictures").mkdir(parents=True)
    (directory / "pictures" / "blue.png").write_bytes(png(BLUE))
    (directory / "pictures" / "red.png").write_bytes(png(RED))
    return directory


@pytest.mark.parametrize("form", picture_values(Path("/")))
def test_every_way_to_name_a_picture(form: str, pictures: Path) -> None:
    content = [picture_values(pictures)[form], {"type": "text", "text": "What colour?"}]
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Blue."}]}]
    (found,) = chats(jsonl(pictures / "chats.jsonl", rows))
    assert said(found)[0] == ("user", ["blue", "What colour?"])


QUESTIONS = {
    "parts": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}],
    "marks": "<image>or<image>",
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_pictures_of_a_column_fill_marks_in_order(question: object, pictures: Path) -> None:
    answer = {"role": "assistant", "content": "Red."}
    row = {
        "messages": [{"role": "user", "content": question}, answer],
        "images": ["pictures/red.png", "pictures/blue.png"],
    }
    (found,) = chats(jsonl(pictures / "chats.jsonl", [row]))
    assert said(found)[0] == ("user", ["red", "or", "blue"])


def test_pictures_without_a_mark_stand_before_the_first_question(pictures: Path) -> None:
    (found,) = chats(jsonl(pictures / "chats.jsonl", [{"conversations": CHAT, "image": "pictures/red.png"}]))
    assert said(found)[0] == ("user", ["red", "Hello?"])


def test_pictures_of_parts_and_of_a_column_are_not_both_taken(pictures: Path) -> None:
    row = with_picture("pictures/red.png") | {"images": ["pictures/red.png"]}
    assert "have 0 marks for pictures, its column images or image 1 picture" in refused([row], pictures)


def test_a_mark_is_text_where_there_is_no_picture(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "What is <image> in HTML?"}, CHAT[1]]
    (found,) = chats(jsonl(tmp_path / "chats.jsonl", [{"messages": messages}]))
    assert said(found)[0] == ("user", ["What is <image> in HTML?"])


def test_pictures_are_read_as_datasets_stores_them(pictures: Path) -> None:
    """Bytes and a path, in a column beside the messages."""
    rows = {"messages": [CHAT, CHAT], "images": [[Image.new("RGB", (4, 3), RED)], [Image.new("RGB", (4, 3), BLUE)]]}
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(pictures / "chats.parquet")
    found = chats(str(pictures / "chats.parquet"))
    assert [said(each)[0] for each in found] == [("user", ["red", "Hello?"]), ("user", ["blue", "Hello?"])]
    assert [each.origin for each in found] == ["row 1 of chats.parquet", "row 2 of chats.parquet"]


@pytest.mark.parametrize("column", ["text", "caption"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_of_pictures_is_read_as_datasets_reads_it(kind: str, column: str, pictures: Path) -> None:
    rows = [{"file_name": "pictures/red.png", column: "red, warm"}, {"file_name": "pictures/blue.png", column: "blue"}]
    table = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        jsonl(pictures / "metadata.jsonl", rows)
    else:
        getattr(table, f"to_{kind}")(pictures / f"metadata.{kind}")
    found = read_captioned(str(pictures), None, None, 2, 2)
    expected = datasets.load_dataset("imagefolder", data_dir=str(pictures), split="train")
    assert {each.caption: decoded(each.picture).getpixel((0, 0)) for each in found} == {
        row[column]: row["image"].getpixel((0, 0)) for row in expected
    }


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), RED)
    exif = picture.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert decoded(PictureSource(origin="line 1", path=tmp_path / "turned.jpg")).size == (20, 40)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_picture_becomes_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    Image.new(mode, (4, 3)).save(path)
    assert decoded(PictureSource(origin="line 1", path=path)).mode == "RGB"


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),  # nothing of the red that a transparent pixel hides
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),  # a fifth of it
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (0, 0), (255, 255, 255)),
    ],
)
def test_transparent_pictures_are_put_on_white_as_servers_do(
    mode: str, colour: tuple[int, ...], seen: tuple[int, ...], tmp_path: Path
) -> None:
    Image.new(mode, (4, 3), colour).save(tmp_path / "picture.png")
    found = decoded(PictureSource(origin="line 1", path=tmp_path / "picture.png"))
    assert (found.mode, found.getpixel((1, 1))) == ("RGB", seen)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_picture_of_more_than_8_bits_is_refused(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (4, 3)).save(path)
    with pytest.raises(SweepError, match=rf"line 1\) has more than 8 bits a value \(mode {mode} .*with 8 bits a value"):
        decoded(PictureSource(origin="line 1", path=path))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory. Paths of pictures start at the directory of the data file"),
        (b"", "is no picture that Pillow knows. Give a JPEG, PNG"),
        (b"no picture", "is no picture that Pillow knows. Give a JPEG, PNG"),
        (png()[:50], "is broken"),
        (bomb(400, 300), "is broken"),
        (bomb(MAX_PIXELS + 1, 1), f"has {MAX_PIXELS + 1} x 1 pixels; up to {MAX_PIXELS:,} are decoded"),
        (bomb(60000, 60000), "is too large"),
    ],
    ids=["missing", "empty", "no picture", "cut short", "too few values", "huge", "bomb"],
)
def test_a_picture_that_cannot_be_decoded_is_named_with_its_line(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "it.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SweepError) as error:
        decoded(PictureSource(origin="line 12 of chats.jsonl", path=path))
    assert str(error.value).startswith(f"The picture {path} (line 12 of chats.jsonl) ")
    assert message in str(error.value)


def with_picture(value: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [{"type": "image", "image": value}]}, CHAT[1]]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("https://example.com/a.png", "is on the network, and nothing is fetched. Download it"),
        ("hf://datasets/a/b.png", "is on the network"),
        ("../secret.png", "The picture ../secret.png of line 2 of chats.jsonl leaves"),
        ("pictures/../../secret.png", "through `..`. Put it inside, or write its absolute path"),
        ("file:///tmp/%2e%2e/secret.png", "through `..`"),
        ("data:image/png;base64,!!!", "cannot be decoded"),
        ("data:image/png,abc", "does not begin with data:image/...;base64,"),
        (7, "is 7. Give a path"),
    ],
)
def test_a_picture_that_is_elsewhere_is_refused(value: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "set").mkdir()
    assert message in refused([{"messages": CHAT}, with_picture(value)], tmp_path / "set")


def test_a_path_may_leave_where_the_user_typed_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "red.png").write_bytes(png())
    (tmp_path / "set" / "deep").mkdir(parents=True)
    jsonl(tmp_path / "set" / "chats.jsonl", [with_picture("../red.png")])
    monkeypatch.chdir(tmp_path / "set" / "deep")
    (found,) = chats("../chats.jsonl")
    assert said(found)[0] == ("user", ["red"])
    with pytest.raises(SweepError, match="leaves"):
        chats(str(tmp_path / "set" / "chats.jsonl"))
    (found,) = chats(str(tmp_path / "set" / "deep" / ".." / "chats.jsonl"))


def test_a_picture_may_lie_anywhere_in_the_typed_directory(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "red.png").write_bytes(png())
    jsonl(tmp_path / "rows" / "chats.jsonl", [with_picture("../red.png")])
    (found,) = chats(str(tmp_path))
    assert said(found)[0] == ("user", ["red"])


USER, ASSISTANT = CHAT
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ASSISTANT, USER], "are out of order: assistant, user. After at most one system message"),
        ([USER, USER, ASSISTANT], "out of order: user, user, assistant"),
        ([USER, ASSISTANT, SYSTEM], "out of order: user, assistant, system"),
        ([SYSTEM], "out of order: system"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "out of order"),
        ([*CHAT, USER], "ends with the user. Add the answer, or type dataset.answers=model"),
        ([USER], "has no assistant's turn. Add the answer, or type dataset.answers=model"),
        ([USER, {"role": "assistant", "content": " \n"}], "The answer in line 2 of chats.jsonl is empty"),
        ([{"role": "user", "content": ""}, ASSISTANT], "message of the user in line 2 of chats.jsonl is empty"),
        ([{"role": "tool", "content": "7"}], "has the role 'tool'. Allowed: system, developer, user"),
        ([{"content": "7"}], "has the role None"),
        ([USER, {**ASSISTANT, "tool_calls": [{}]}], "calls tools, which is not read"),
        ([USER, {"role": "assistant", "content": None}], "has no content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part of type 'video'. Allowed: text, image, image_url"),
        (["Hello?"], "is no mapping"),
        ([], "is no list of messages"),
        ("Hello?", "is no list of messages"),
        ([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT], "have 1 mark for pictures, its column"),
    ],
)
def test_messages_that_make_no_conversation_are_refused(messages: object, message: str, tmp_path: Path) -> None:
    found = refused([{"messages": CHAT}, {"messages": messages}], tmp_path)
    assert message in found
    assert "line 2 of chats.jsonl" in found


def test_a_picture_of_the_assistant_is_refused(pictures: Path) -> None:
    answer = {"role": "assistant", "content": [{"type": "image", "image": "pictures/red.png"}]}
    assert "message of the assistant has a picture" in refused([{"messages": [USER, answer]}], pictures)


def test_marks_and_pictures_are_as_many(pictures: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>?"}, ASSISTANT], "images": ["pictures/red.png"] * 2}
    assert "have 1 mark for pictures, its column images or image 2 pictures" in refused([row], pictures)


def test_a_conversation_may_end_with_the_user_where_the_model_answers(tmp_path: Path) -> None:
    (found,) = chats(jsonl(tmp_path / "chats.jsonl", [{"messages": [USER]}]), answered=False)
    assert said(found) == [("user", ["Hello?"])]


def test_a_column_that_is_not_there_is_refused_and_columns_are_listed(tmp_path: Path) -> None:
    found = refused([{"chat": CHAT, "id": 1}], tmp_path)
    assert "Column messages or conversations is not in line 1 of chats.jsonl (columns: chat, id)" in found
    assert "(columns: messages)" in refused([{"messages": CHAT}], tmp_path, column="dialogue")
    assert len(chats(jsonl(tmp_path / "chats.jsonl", [{"chat": CHAT}]), column="chat")) == 1


@pytest.mark.parametrize(("n_found", "choice"), [(9, "dataset.size=9"), (20, "dataset.size=small or dataset.size=20")])
def test_a_data_set_that_is_smaller_than_the_size_says_which_sizes_it_has(
    n_found: int, choice: str, tmp_path: Path
) -> None:
    found = refused([{"messages": CHAT}] * n_found, tmp_path, n=64)
    assert f"holds {n_found} conversations; 64 are needed. Type {choice}, or give more conversations." in found


def typed(path: str) -> str:
    return override("dataset.path", path)


def test_data_of_another_kind_is_named(pictures: Path) -> None:
    messages = jsonl(pictures / "chats.jsonl", [{"messages": CHAT}])
    renamed = jsonl(pictures / "c d.txt", [{"messages": CHAT}])
    texts = jsonl(pictures / "texts.jsonl", [{"id": 7, "body": "A text."}])
    jsonl(pictures / "metadata.jsonl", [{"file_name": "pictures/red.png", "text": "red"}])
    cases = [
        (lambda: read_texts(messages, None, "text", 1, 1), f"looks like dataset=chat {typed(messages)}"),
        (lambda: read_texts(messages, None, "messages", 1, 1), f"Type dataset=chat {typed(messages)}"),
        (lambda: read_captioned(messages, None, None, 1, 1), f"looks like dataset=chat {typed(messages)}"),
        (lambda: read_texts(texts, None, "text", 1, 1), "columns: id, body). Type dataset.column=NAME"),
        (lambda: chats(texts), f"looks like dataset=text {typed(texts)} dataset.column=body"),
        (lambda: chats(renamed), f"name end in .jsonl, and type dataset=chat {typed(f'{pictures}/c d.jsonl')}."),
        (lambda: read_texts(renamed, None, None, 1, 1), "holds JSON lines. Let its name end in .jsonl"),
        (lambda: chats(str(pictures)), f"looks like dataset=images {typed(str(pictures))}"),
    ]
    for read, message in cases:
        with pytest.raises(SweepError) as error:
            read()
        assert message in str(error.value)


def test_captions_that_are_something_else_are_named(pictures: Path) -> None:
    messages = jsonl(pictures / "chats.jsonl", [{"messages": CHAT}])
    renamed = jsonl(pictures / "chats.txt", [{"messages": CHAT}])
    texts = jsonl(pictures / "texts.json", [{"body": "A text."}])
    datasets.Dataset.from_list([{"text": "one"}]).to_parquet(pictures / "t.parquet")
    (pictures / "sub").mkdir()
    jsonl(pictures / "sub" / "metadata.jsonl", [{"file_name": "red.png", "text": "red"}])
    cases = {
        messages: f"Type dataset=chat {typed(messages)}",
        renamed: f"name end in .jsonl, and type dataset=chat {typed(messages)}",
        texts: f"Type dataset=text {typed(texts)} dataset.column=body",
        f"{pictures}/t.parquet": f"Type dataset=text {typed(f'{pictures}/t.parquet')}.",
        f"{pictures}/sub": f"Type dataset=images {typed(f'{pictures}/sub')}",
        f"{pictures}/pictures/red.png": "is a binary file",
    }
    for path, message in cases.items():
        with pytest.raises(SweepError) as error:
            check_captions(Path(path))
        assert message in str(error.value)
    (pictures / "captions.txt").write_text("[A] red picture\n{\n")
    check_captions(pictures / "captions.txt")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "holds no file that can be read"),
        ({"a.png": b""}, "holds no file that can be read"),
        ({"a.jsonl": b"", "b.parquet": b""}, "holds files of several formats (.jsonl, .parquet)"),
        ({"a.parquet": b"PAR1 broken"}, "is no whole parquet file"),
        ({"a.arrow": b"broken"}, "is no whole arrow file"),
        ({"a.json": b"[{"}, "is no JSON"),
        ({"a.jsonl": b'{"messages": \xff}'}, "Cannot read"),
        ({"a.jsonl": b"[1]"}, "Line 1 of"),
        ({"a.jsonl": b""}, "holds 0 conversations; 1 are needed. Give more conversations."),
    ],
)
def test_a_directory_that_cannot_be_read_is_refused(names: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SweepError) as error:
        chats(str(tmp_path))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "dataset.path=nowhere is not there"),
        ("./no/where", "is not there"),
        ("someone/chats", "Cannot read data set 'someone/chats' (split 'train') from the hub"),
    ],
)
def test_a_path_that_is_not_there_is_refused(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SweepError) as error:
        chats(path)
    assert message in str(error.value)


def test_a_file_of_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chats.xml").write_text("<chats/>")
    with pytest.raises(SweepError, match=r"is no file that is known by its ending. Give a file that ends in .jsonl"):
        chats(str(tmp_path / "chats.xml"))
