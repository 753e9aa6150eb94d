"""Answers that the unquantized model writes itself, so that scores are measured on what it says when it serves.

Conversations are answered in chunks of the data set's order. A chunk is named by all that its answers depend on, and
kept in the store as soon as it is written: a run that was interrupted goes on with the next one, and what has been
written is never written again, nor for a larger size of the same data set. The model runs in a process of its own,
whose memory is free again before any worker starts.
"""

import functools
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch
from transformers import GenerationConfig

from sweep.core.batches import Picture, Sample
from sweep.core.errors import SweepError
from sweep.core.machine import Device
from sweep.store.records import ANSWERS_SCHEMA
from sweep.store.store import Store
from workers.data.conversations import Conversation, Message
from workers.model.forward import pictures_to
from workers.model.loading import load
from workers.model.processing import Processor

# Conversations that are answered side by side. It divides every boundary of sizes, so that these share their chunks.
CHUNK: Final = 8
_VERSION: Final = 1  # of how answers are written: the seed, the padding, the sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Author:
    """The model that writes, and how."""

    path: Path  # of its checkpoint
    revision: str  # of its weights
    dtype: Literal["float32", "bfloat16"]
    device: Device
    is_greedy: bool  # else drawn at temperature 1
    n_tokens: int  # of the longest answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model wrote."""

    text: str
    is_cut: bool  # it had not ended after Author.n_tokens


def answered_samples(
    conversations: Sequence[Conversation],
    pictures: Sequence[Sequence[Picture]],
    processor: Processor,
    author: Author,
    store: Store,
    *,
    loss: Literal["answers", "all"],
    max_tokens: int,
    on_written: Callable[[int], None],
) -> list[Sample]:
    """Samples of conversations whose last answer is the model's own.

    Args:
        conversations: each ends with its user, or with an answer that is written anew.
        pictures: of each conversation, prepared.
        processor: of the author's checkpoint.
        author: that writes.
        store: keeps the answers.
        loss: see `Processor.sample`.
        max_tokens: likewise.
        on_written: called with the number of answers that are there, each time there are more.

    Raises: SweepError: as `Processor.sample` and `written_answers`.
    """
    asked = [_asked(conversation) for conversation in conversations]
    shown = [found[: len(each.pictures)] for each, found in zip(asked, pictures, strict=True)]
    prompts = [processor.prompt(each, found, max_tokens=max_tokens) for each, found in zip(asked, shown, strict=True)]
    answers = written_answers(prompts, processor, author, store, on_written)
    return [
        processor.sample(_with(each, answer), found, loss=loss, max_tokens=max_tokens, is_cut=answer.is_cut)
        for each, answer, found in zip(asked, answers, shown, strict=True)
    ]


def written_answers(
    prompts: Sequence[Sample],
    processor: Processor,
    author: Author,
    store: Store,
    on_written: Callable[[int], None],
) -> list[Answer]:
    """The answer to each prompt, from the store, or written now and kept there.

    Raises:
        SweepError: the model does not load, or its process died.
        StoreFailed: the store cannot be written.
    """
    parts = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    chunks = [(_chunk_id(chunk, author), chunk) for chunk in parts]
    kept = {chunk_id: store.answers(chunk_id) for chunk_id, _ in chunks}
    missing = [(chunk_id, chunk) for chunk_id, chunk in chunks if kept[chunk_id] is None]
    n_there = len(prompts) - sum(len(chunk) for _, chunk in missing)
    on_written(n_there)
    for (chunk_id, chunk), tokens in zip(missing, _generated(missing, author), strict=True):
        rows = [
            {"chunk_id": chunk_id, "conversation": index, "answer": processor.decode(ids), "is_cut": is_cut}
            for index, (ids, is_cut) in enumerate(tokens)
        ]
        table = pa.Table.from_pylist(rows, schema=ANSWERS_SCHEMA)
        store.write_answers(chunk_id, table)
        kept[chunk_id] = table
        n_there += len(chunk)
        on_written(n_there)
    tables = [table for chunk_id, _ in chunks if (table := kept[chunk_id]) is not None]
    found = pa.concat_tables(tables).to_pylist()
    return [Answer(text=row["answer"], is_cut=row["is_cut"]) for row in found]


Written = list[tuple[list[int], bool]]  # token ids without the one that ends them, and whether none did


def _generated(chunks: Sequence[tuple[str, Sequence[Sample]]], author: Author) -> Iterator[Written]:
    """What the model writes to each chunk, one after the other, in a process that ends with the last one."""
    if not chunks:
        return
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        pending = [process.submit(_write, author, chunk_id, chunk) for chunk_id, chunk in chunks]
        try:
            for each in pending:
                yield each.result()
        except BrokenProcessPool as error:
            raise SweepError(
                "The process in which the model writes answers was killed, perhaps for want of memory. Type the same "
                "again, and it goes on where it was; or type cluster.device=cpu, or a smaller dataset.answer_tokens."
            ) from error
        finally:
            process.shutdown(wait=False, cancel_futures=True)


def _chunk_id(prompts: Sequence[Sample], author: Author) -> str:
    """Hash of all that the answers to prompts depend on, but for the machine that writes them."""
    sha = hashlib.sha256(f"{_VERSION}:{author.revision}:{author.is_greedy}:{author.n_tokens}".encode())
    for prompt in prompts:
        sha.update(f":{len(prompt.token_ids)}:".encode() + prompt.token_ids.tobytes())
        sha.update("".join(f"{picture.content}:" for picture in prompt.pictures).encode())
    return sha.hexdigest()[:32]


def _asked(conversation: Conversation) -> Conversation:
    """A conversation without the answer that it ends with."""
    if conversation.messages[-1].role != "assistant":
        return conversation
    return replace(conversation, messages=conversation.messages[:-1])


def _with(conversation: Conversation, answer: Answer) -> Conversation:
    return replace(conversation, messages=(*conversation.messages, Message(role="assistant", parts=(answer.text,))))


# In the process that writes


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, dtype: str, device: Device) -> Any:
    if device == "cpu":
        torch.set_num_threads(1)  # as wherever a CPU computes here: more would change bits
    return load(path, dtype=getattr(torch, dtype), device=device)


def _write(author: Author, chunk_id: str, prompts: Sequence[Sample]) -> Written:
    """Let the model write to a chunk of prompts. Raises: SweepError: it does not load, or has no room."""
    model = _loaded(author.path, author.dtype, author.device)
    known = model.generation_config.eos_token_id
    ends = {known} if isinstance(known, int) else {*(known or ())}
    settings = GenerationConfig(
        # The model as it is, without what its makers advise: no penalty, no token left out.
        do_sample=not author.is_greedy,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=author.n_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    torch.manual_seed(int(chunk_id[:15], 16))
    inputs = _side_by_side(prompts, model.device, model.dtype)
    try:
        found = model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :].tolist()
    except torch.OutOfMemoryError as error:
        raise SweepError(
            f"The GPU has no room for the model and {len(prompts)} answers of {author.n_tokens} tokens. "
            "Type a smaller dataset.answer_tokens or dataset.max_tokens, or cluster.device=cpu."
        ) from error
    return [_ended(ids, ends) for ids in found]


def _ended(ids: list[int], ends: set[int]) -> tuple[list[int], bool]:
    end = next((index for index, token in enumerate(ids) if token in ends), None)
    return ids[:end], end is None


def _side_by_side(prompts: Sequence[Sample], device: torch.device, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """Arguments of `generate`, each prompt padded on its left to the longest one."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    names = {name for prompt in prompts for name in prompt.arrays}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("input_ids", "attention_mask", *sorted(names))}
    for prompt in prompts:
        n_tokens = len(prompt.token_ids)
        empty = np.zeros(n_tokens, dtype=np.int64)
        own = {"input_ids": prompt.token_ids, "attention_mask": empty + 1, **prompt.arrays}
        for name, values in rows.items():
            values.append(np.pad(own.get(name, empty), (longest - n_tokens, 0)))
    tensors = {name: torch.from_numpy(np.stack(values)).to(device) for name, values in rows.items()}
    pictures = [picture for prompt in prompts for picture in prompt.pictures]
    return tensors | pictures_to(pictures, device, dtype)
