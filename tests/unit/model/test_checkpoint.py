"""A checkpoint is refused before anything heavy is imported, and named by its content."""

import json
import os
import pickle
from pathlib import Path

import pytest

from sweep.core.errors import SweepError
from tests.weights import write_checkpoint
from workers.model import checkpoint
from workers.model.checkpoint import check_checkpoint, file_hash, revision

LATER = 2_000_000_000  # seconds; a time at which nothing here was written


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))


def directory(path: Path, **contents: bytes) -> Path:
    """A directory of files named by key, with ``__`` for a dot."""
    path.mkdir()
    for name, content in contents.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def two_shards(path: Path) -> Path:
    made = directory(path, config__json=b"{}", b__safetensors=b"second", a__safetensors=b"first", tokenizer__json=b"{}")
    write_index(made, "a", "b")
    return made


def write_index(path: Path, *shards: str) -> None:
    weight_map = {f"{shard}.weight": f"{shard}.safetensors" for shard in shards}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_directory_with_config_and_safetensors_is_taken(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({}))  # beside safetensors it is never loaded
    check_checkpoint(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "has no config.json (found: nothing). Give a Hugging Face checkpoint directory."),
        ({"model__safetensors": b"x", "README__md": b"x"}, "has no config.json (found: README.md, model.safetensors)."),
        ({"config__json": b"{}"}, "has no *.safetensors file. Download the weights, or give another model.path=DIR."),
        (
            {"config__json": b"{}", "pytorch_model__bin": b"x"},
            "holds pickled weights (pytorch_model.bin). They can run code when loaded",
        ),
        ({"config__json": b"{}", "weights__pt": b"x"}, "holds pickled weights (weights.pt)"),
        (
            {"config__json": b"{}", "last__ckpt": b"x", "model__pth": b"x"},
            "holds pickled weights (last.ckpt, model.pth)",
        ),
    ],
)
def test_a_directory_that_cannot_be_loaded_safely_is_refused(
    contents: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    path = directory(tmp_path / "model", **contents)
    with pytest.raises(SweepError) as error:
        check_checkpoint(path)
    assert str(error.value).startswith(f"model.path={path} {message}")


@pytest.mark.parametrize("config", [b"{", b"[]", b"\xff", b'{"text_config": []}'])
def test_what_makes_no_model_is_left_to_whoever_makes_it(config: bytes, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model")
    (path / "config.json").write_bytes(config)
    check_checkpoint(path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"model\.path=.*/nowhere is no directory\. Give a local checkpoint directory"):
        check_checkpoint(tmp_path / "nowhere")


def test_the_revision_is_of_what_is_loaded(tmp_path: Path) -> None:
    """A copy in another layout is no other model."""
    path = two_shards(tmp_path / "model")
    before = revision(path)
    (path / "consolidated.safetensors").write_bytes(b"firstsecond")
    assert revision(path) == before


def test_the_revision_does_not_depend_on_times_places_or_other_files(tmp_path: Path) -> None:
    path = two_shards(tmp_path / "model")
    before = revision(path)
    for file in path.iterdir():
        os.utime(file, (LATER, LATER))
    (path / "tokenizer.json").write_text(
        "another tokenizer"
    )  # token ids are part of the data's identity, not of the model's
    assert revision(path) == before == revision(two_shards(tmp_path / "copy"))


@pytest.mark.parametrize("change", ["config.json", "a.safetensors", "b.safetensors", "renamed", "added", "swapped"])
def test_the_revision_changes_with_what_the_model_is(change: str, tmp_path: Path) -> None:
    path = two_shards(tmp_path / "model")
    before = revision(path)
    if change == "renamed":
        (path / "b.safetensors").rename(path / "c.safetensors")
        write_index(path, "a", "c")
    elif change == "added":
        (path / "c.safetensors").write_bytes(b"")
        write_index(path, "a", "b", "c")
    elif change == "swapped":
        (path / "a.safetensors").write_bytes(b"second")
        (path / "b.safetensors").write_bytes(b"first")
    else:
        content = (path / change).read_bytes()
        (path / change).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as long as before
        os.utime(path / change, (LATER, LATER))
    assert revision(path) != before


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"abc")
    first = file_hash(tmp_path / "w.safetensors")
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    monkeypatch.setattr(checkpoint, "_sha256", lambda _: "hashed again")
    assert file_hash(tmp_path / "w.safetensors") == first
    os.utime(tmp_path / "w.safetensors", (LATER, LATER))
    assert file_hash(tmp_path / "w.safetensors") == "hashed again"


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    path = two_shards(tmp_path / "model")
    (path / "config.json").unlink()
    with pytest.raises(SweepError, match=r"Cannot read .*/config\.json: No such file or directory\. Check the path"):
        revision(path)
