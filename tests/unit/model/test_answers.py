"""Answers that the model writes: by content, kept, resumed by the chunk, in a process of their own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sweep.core.batches import ANSWER, Sample
from sweep.core.errors import SweepError
from sweep.store.integrity import check_store
from sweep.store.store import Store
from tests.vision import chat, picture, save_vision, written_here
from workers.data.conversations import Conversation
from workers.model import answers
from workers.model.answers import Answer, Author, answered_samples, written_answers
from workers.model.loading import load
from workers.model.processing import Processor

QUESTIONS = [chat(f"What is {index} of {'many ' * index}things?") for index in range(12)]


class Killed(Exception):
    """Stands for a process that ends."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(tmp_path_factory.mktemp("qwen"), "qwen3_vl")


@pytest.fixture(scope="module")
def author(checkpoint: Path) -> Author:
    return Author(path=checkpoint, revision="one", dtype="float32", device="cpu", is_greedy=False, n_tokens=6)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model writes in this process; returns the chunks that it has written."""
    return written_here(monkeypatch)


def prompts(checkpoint: Path, conversations: Sequence[Conversation] = QUESTIONS) -> list[Sample]:
    processor = Processor(checkpoint, None)
    return [processor.prompt(each, [], max_tokens=512) for each in conversations]


def write(author: Author, store: Store, conversations: Sequence[Conversation] = QUESTIONS) -> list[Answer]:
    processor = Processor(author.path, None)
    return written_answers(prompts(author.path, conversations), processor, author, store, lambda _: None)


def test_the_process_of_its_own_writes_what_this_one_would(author: Author, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    counts: list[int] = []
    found = written_answers(prompts(author.path), Processor(author.path, None), author, store, counts.append)
    assert len(found) == 12
    assert counts == [0, 8, 12]
    chunk = prompts(author.path)[:8]
    here = answers._write(author, answers._chunk_id(chunk, author), chunk)
    assert [(Processor(author.path, None).decode(ids), is_cut) for ids, is_cut in here] == [
        (answer.text, answer.is_cut) for answer in found[:8]
    ]


def test_an_interrupted_run_goes_on_and_a_second_writes_nothing(
    author: Author, tmp_path: Path, here: list[str]
) -> None:
    whole, broken = Store(str(tmp_path / "whole")), Store(str(tmp_path / "broken"))
    expected = write(author, whole)
    assert len(here) == 2

    def killed(n_there: int) -> None:
        if n_there == 8:
            raise Killed

    with pytest.raises(Killed):
        written_answers(prompts(author.path), Processor(author.path, None), author, broken, killed)
    here.clear()
    assert write(author, broken) == expected
    assert len(here) == 1
    here.clear()
    assert write(author, broken) == write(author, whole) == expected
    assert here == []


def test_what_was_written_serves_larger_sizes(author: Author, tmp_path: Path, here: list[str]) -> None:
    store = Store(str(tmp_path))
    small = write(author, store, QUESTIONS[:8])
    here.clear()
    assert write(author, store)[:8] == small
    assert len(here) == 1


def test_answers_depend_on_the_model_the_conversations_and_the_way(
    author: Author, tmp_path: Path, here: list[str]
) -> None:
    store = Store(str(tmp_path))
    drawn = write(author, store)
    greedy = write(replace(author, is_greedy=True), store)
    assert greedy != drawn
    assert write(replace(author, revision="two"), store) != drawn  # as another seed draws
    assert write(replace(author, revision="two", is_greedy=True), store) == greedy  # the weights are the same here
    others = write(author, store, [chat(f"Why is {index}?") for index in range(12)])
    assert others != drawn
    assert len(here) == 10
    assert len(store.files.names("answers")) == 10
    assert write(author, store) == drawn


def test_equal_chunks_are_all_answered(author: Author, tmp_path: Path, here: list[str]) -> None:
    found = write(author, Store(str(tmp_path)), [*QUESTIONS[:8], *QUESTIONS[:8]])
    assert len(found) == 16
    assert found[:8] == found[8:]


def test_greedy_answers_are_those_of_one_conversation_alone(author: Author, tmp_path: Path, here: list[str]) -> None:
    """Padding on the left changes no token: each is the most likely after all before it."""
    store = Store(str(tmp_path))
    processor = Processor(author.path, None)
    model = load(author.path, dtype=torch.float32, device="cpu")
    for prompt, answer in zip(prompts(author.path), write(replace(author, is_greedy=True), store), strict=True):
        ids = prompt.token_ids.tolist()
        for _ in range(author.n_tokens):
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best == 2:
                break
            ids.append(best)
        assert processor.decode(ids[len(prompt.token_ids) :]) == answer.text
        assert answer.is_cut == (len(ids) == len(prompt.token_ids) + author.n_tokens)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen2_5_vl", "internvl", "llava", "gemma3"])
def test_samples_of_answered_chats_with_pictures(
    kind: str, author: Author, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))
    path = save_vision(tmp_path / "model", kind)
    processor = Processor(path, None)
    chats = [chat("What?", "A cat.", "Why?", "So.", n_pictures=1), chat("What is it?", n_pictures=1), chat("And?")]
    pictures = [[processor.prepare(picture())], [processor.prepare(picture(seed=1))], []]
    samples = answered_samples(
        chats,
        pictures,
        processor,
        replace(author, path=path),
        Store(str(tmp_path / "store")),
        loss="answers",
        max_tokens=512,
        on_written=lambda _: None,
    )
    assert len(here) == 1
    own, *_ = samples
    texts = [processor._tokenizer.decode(each.token_ids[each.token_kinds == ANSWER]) for each in samples]
    assert texts[0].startswith("A cat.<|im_end|>")
    assert "So." not in processor._tokenizer.decode(own.token_ids)
    assert all(each.predictions.any() for each in samples)


def test_a_conversation_that_leaves_no_room_is_refused(checkpoint: Path) -> None:
    with pytest.raises(SweepError, match=r"tokens before its answer.*dataset.max_tokens"):
        Processor(checkpoint, None).prompt(QUESTIONS[11], [], max_tokens=10)


def test_a_damaged_chunk_is_set_aside_and_written_again(author: Author, tmp_path: Path, here: list[str]) -> None:
    store = Store(str(tmp_path))
    expected = write(author, store)
    name = store.files.names("answers")[0]
    content = store.files.read(f"answers/{name}")
    store.files.write(f"answers/{name}", content[: len(content) // 2])
    findings = check_store(store)
    assert [finding.verdict for finding in findings] == ["warning", "ok"]
    assert "answers of the model (1 file)" in findings[-1].text
    here.clear()
    assert write(author, store) == expected
    assert len(here) == 1


def test_a_process_that_dies_is_named(author: Author, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_write", _die)
    with pytest.raises(SweepError, match="was killed, perhaps for want of memory"):
        write(author, Store(str(tmp_path)))


def _die(author: Author, chunk_id: str, prompts: Sequence[Sample]) -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
