"""Samples of her own data: of every kind, in order, prepared once, kept until anything that they depend on changes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from sweep.cli import main
from sweep.config.compose import expand
from sweep.config.schema import DatasetConfig
from sweep.core.batches import ANSWER, IMAGE, Sample
from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.plan import own_samples
from sweep.plan.model import Model
from sweep.plan.samples import samples_of, samples_to_boundary
from tests.own import png, write_chats
from workers.data.batches import make_plan
from workers.data.pictures import picture_file
from workers.model.forward import valued

ROOT = Path(__file__).resolve().parents[3]
MODEL = Model(bundled_model_dir())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where each picture stands that is decoded."""
    found: list[str] = []
    decoded = own_samples.decoded

    def counted(source: own_samples.PictureSource) -> object:
        found.append(source.origin)
        return decoded(source)

    monkeypatch.setattr(own_samples, "decoded", counted)
    return found


def dataset(kind: str, path: Path | None, *overrides: str) -> DatasetConfig:
    where = [] if path is None else [f"dataset.path={path}"]
    return expand([f"dataset={kind}", *where, *overrides], multirun=False).points[0].dataset


def same(one: list[Sample], other: list[Sample]) -> bool:
    return len(one) == len(other) and make_plan(one, packed=False).digest(str(len(one))) == make_plan(
        other, packed=False
    ).digest(str(len(other)))


def test_chats_keep_their_order_and_their_pictures(tmp_path: Path) -> None:
    samples = samples_of(dataset("chat", write_chats(tmp_path / "set", 20)), MODEL, 20)
    assert [len(sample.pictures) for sample in samples] == [1] * 20
    assert len({sample.pictures[0].content for sample in samples}) == 20
    for index in (0, 7, 19):  # alone, each is what it is among the others
        alone = tmp_path / f"alone{index}"
        alone.mkdir()
        (alone / "chats.jsonl").write_text((tmp_path / "set" / "chats.jsonl").read_text().splitlines()[index])
        (alone / f"{index}.png").write_bytes((tmp_path / "set" / f"{index}.png").read_bytes())
        (one,) = own_samples.own_samples(dataset("chat", alone), MODEL, 1, 1, None)
        assert one.token_ids.tolist() == samples[index].token_ids.tolist()
        assert one.pictures[0].content == samples[index].pictures[0].content
    assert all({IMAGE, ANSWER} <= set(sample.token_kinds) for sample in samples)


def test_texts_are_tokenized_whole_and_cut_at_max_tokens(tmp_path: Path) -> None:
    texts = [f"A text of two lines.\nNumber {i} is this one." for i in range(16)]
    (tmp_path / "t.jsonl").write_text("".join(f"{json.dumps({'body': text})}\n" for text in texts))
    config = dataset("text", tmp_path / "t.jsonl", "dataset.column=body", "dataset.max_tokens=8")
    samples = samples_of(config, MODEL, 16)
    expected = MODEL.tokenize("test", texts)
    assert [sample.token_ids.tolist() for sample in samples] == [ids[:8] for ids in expected]


def test_a_text_that_is_too_short_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("One long line.\n\na\n")
    with pytest.raises(SweepError, match=r"Sample 2 \(line 3 of t.txt\) has 1 token"):
        samples_of(dataset("text", tmp_path / "t.txt"), MODEL, 2)


def test_pictures_with_captions_are_a_picture_and_then_its_caption(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    lines = ["file_name,text"]
    for index in range(16):
        (tmp_path / "set" / f"{index}.png").write_bytes(png((index, 9, 9)))
        lines.append(f'{index}.png,"a plain, dull picture"')
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(lines))
    samples = samples_of(dataset("images", tmp_path / "set"), MODEL, 16)
    (caption,) = MODEL.tokenize("test", ["a plain, dull picture"])
    assert all(sample.token_ids[-len(caption) :].tolist() == caption for sample in samples)
    assert len({sample.pictures[0].content for sample in samples}) == 16


def test_drawn_chats_need_no_file() -> None:
    samples = samples_of(dataset("scenes_chat", None), MODEL, 16)
    assert all(len(sample.pictures) == 1 and ANSWER in sample.token_kinds for sample in samples)


@pytest.mark.parametrize("kind", ["chat", "scenes_chat"])
def test_the_second_time_no_picture_is_read(kind: str, tmp_path: Path, decodings: list[str]) -> None:
    config = dataset(kind, write_chats(tmp_path / "set", 16) if kind == "chat" else None)
    first = samples_of(config, MODEL, 16)
    assert len(decodings) == 16
    assert same(samples_of(config, MODEL, 16), first)
    assert len(decodings) == 16


def test_the_second_run_imports_no_heavy_library(tmp_path: Path) -> None:
    """Parquet, so that the first needs both."""
    path = write_chats(tmp_path / "set", 16).with_name("chats.parquet")
    datasets.Dataset.from_json(str(path.with_suffix(".jsonl"))).to_parquet(path)
    script = (
        "import sys\nfrom sweep.config.compose import expand\n"
        "from sweep.plan.model import Model\nfrom sweep.plan.samples import samples_of\n"
        "from sweep.core.paths import bundled_model_dir\n"
        f"point = expand(['dataset=chat', 'dataset.path={path}'], multirun=False).points[0]\n"
        "samples_of(point.dataset, Model(bundled_model_dir()), 16)\n"
        "print([name for name in ('datasets', 'transformers', 'PIL') if name in sys.modules])"
    )
    run = [sys.executable, "-c", script]
    outputs = [subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert outputs == ["['datasets', 'transformers', 'PIL']\n", "[]\n"]


def touch_picture(directory: Path) -> None:
    (directory / "3.png").write_bytes(png((200, 200, 200)))


def touch_chat(directory: Path) -> None:
    path = directory / "chats.jsonl"
    path.write_text(path.read_text().replace("What is number 3?", "And number 3?"))


def drop_prepared(directory: Path) -> None:
    next((directory.parent / "cache" / "pictures").iterdir()).unlink()


def tear_entry(directory: Path) -> None:
    (entry,) = (directory.parent / "cache" / "samples").iterdir()
    os.truncate(entry, entry.stat().st_size // 2)


CHANGES: list[tuple[Callable[[Path], None], bool]] = [
    (touch_picture, False),
    (touch_chat, False),
    (drop_prepared, True),
    (tear_entry, True),
]


@pytest.mark.parametrize(("change", "is_equal"), CHANGES)
def test_samples_are_made_again_where_something_has_changed(
    change: Callable[[Path], None], is_equal: bool, tmp_path: Path, decodings: list[str]
) -> None:
    config = dataset("chat", write_chats(tmp_path / "set", 16))
    first = samples_of(config, MODEL, 16)
    change(tmp_path / "set")
    again = samples_of(config, MODEL, 16)
    assert len(decodings) == 32
    assert same(again, first) == is_equal
    assert all(picture_file(sample.pictures[0].content).is_file() for sample in again)


@pytest.mark.parametrize("key", ["dataset.max_tokens=100", "dataset.loss=all", "dataset.max_pixels=1024"])
def test_keys_of_the_data_set_count(key: str, tmp_path: Path, decodings: list[str]) -> None:
    path = write_chats(tmp_path / "set", 16)
    samples_of(dataset("chat", path), MODEL, 16)
    samples_of(dataset("chat", path, key), MODEL, 16)
    assert len(decodings) == 32


def test_the_first_picture_that_cannot_be_read_is_named(tmp_path: Path, decodings: list[str]) -> None:
    path = write_chats(tmp_path / "set", 300)
    for index in (5, 200):
        (tmp_path / "set" / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(SweepError, match=r"5.png \(line 6 of chats.jsonl\) is no picture"):
        samples_of(dataset("chat", path), MODEL, 300)
    assert len(decodings) < 300  # the rest is not waited for


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(SweepError, match="Set SWEEP_CACHE_DIR to a directory"):
        samples_of(dataset("chat", write_chats(tmp_path / "set", 16)), MODEL, 16)
    plain = dataset("chat", write_chats(tmp_path / "plain", 16, pictures=False))
    assert len(samples_of(plain, MODEL, 16)) == 16  # texts need none


@pytest.mark.parametrize(("n_asked", "n_read"), [(16, 16), (20, 40), (2, 16), (40, 40)])
def test_a_size_reads_up_to_the_boundary_as_far_as_there_are_samples(n_asked: int, n_read: int, tmp_path: Path) -> None:
    config = dataset("chat", write_chats(tmp_path / "set", 40, pictures=False))
    samples = samples_to_boundary(config, MODEL, n_asked)
    assert len(samples) == n_read
    assert len(samples_of(config, MODEL, n_asked)) == n_asked
    plans = [make_plan(each, packed=False) for each in (samples, samples_to_boundary(config, MODEL, 40))]
    assert plans[0].digest(str(n_asked)) == plans[1].digest(str(n_asked))


def test_bundled_texts_read_up_to_the_boundary_too() -> None:
    config = expand([], multirun=False).points[0].dataset
    assert [len(samples_to_boundary(config, MODEL, n)) for n in (16, 64, 600)] == [16, 128, 640]


def test_more_samples_than_there_are_are_refused(tmp_path: Path) -> None:
    config = dataset("chat", write_chats(tmp_path / "set", 40, pictures=False))
    with pytest.raises(SweepError, match=r"holds 40 conversations; 64 are needed\. Type dataset.size=small or"):
        samples_to_boundary(config, MODEL, 64)


def wrong_data(directory: Path) -> Iterator[tuple[list[str], str]]:
    """Overrides that name data of another kind or damaged data, and what is said of them."""
    chats = write_chats(directory / "chats", 20)
    (directory / "texts.jsonl").write_text('{"text": "A text of some words."}\n' * 20)
    texts = directory / "texts.jsonl"
    broken = write_chats(directory / "broken", 20)
    (broken.parent / "4.png").write_bytes(png((1, 2, 3))[:60])
    missing = write_chats(directory / "missing", 20)
    (missing.parent / "2.png").unlink()
    captions = ["dataset=coco2017_captions"]
    yield [*captions, f"dataset.captions_path={chats}"], f"dataset=chat dataset.path={chats}"
    yield [*captions, f"dataset.captions_path={chats.parent}"], f"dataset=chat dataset.path={chats.parent}"
    yield [*captions, f"dataset.captions_path={chats.parent}/1.png"], "dataset=images dataset.path=DIR"
    yield ["dataset=text", f"dataset.path={chats}"], f"dataset=chat dataset.path={chats}"
    yield ["dataset=chat", f"dataset.path={texts}"], f"dataset=text dataset.path={texts}"
    yield ["dataset=images", f"dataset.path={texts}"], "Column file_name or image is not in line 1 of texts.jsonl"
    yield ["dataset=chat", f"dataset.path={broken}"], "4.png (line 5 of chats.jsonl) is broken"
    yield ["dataset=chat", f"dataset.path={missing}"], "2.png (line 3 of chats.jsonl) cannot be read"
    yield ["dataset=chat", f"dataset.path={chats}", "dataset.size=medium"], "Type dataset.size=small or dataset.size=20"
    yield ["dataset=text", f"dataset.path={texts}", "dataset.column=words"], "(columns: text). Type dataset.column=NAME"


def test_wrong_data_end_with_2_and_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for overrides, message in wrong_data(tmp_path):
        assert main(["run", f"store.uri={tmp_path}/store", *overrides]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("sweep run: ")
        assert "Traceback" not in err
        assert message in err
    assert not (tmp_path / "store").exists()


@pytest.mark.filterwarnings("error")
def test_values_of_kept_pictures_come_without_a_warning() -> None:
    """Levels that were read from a file are not writable, of which torch warns when it shares them."""
    levels = np.arange(768, dtype=np.float32).reshape(3, 256)
    levels.setflags(write=False)
    stored = torch.tensor([[[1], [2], [3]]], dtype=torch.uint8)
    assert valued(stored, levels, (1, 3)).tolist() == [[1, 258, 515]]


def test_kept_samples_are_equal_to_the_bit(tmp_path: Path) -> None:
    config = dataset("chat", write_chats(tmp_path / "set", 16))
    for one, other in zip(samples_of(config, MODEL, 16), samples_of(config, MODEL, 16), strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.token_kinds, other.token_kinds)
        np.testing.assert_array_equal(one.predictions, other.predictions)
        assert one.pictures[0].shape == other.pictures[0].shape
        np.testing.assert_array_equal(one.pictures[0].levels, other.pictures[0].levels)
