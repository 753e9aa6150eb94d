"""Samples of her own data: read, prepared in parallel, and kept on disk, so that the next run reads no picture."""

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress, track

from sweep.config.schema import DatasetConfig, SweepConfig
from sweep.core.batches import Picture, Sample
from sweep.core.cache import read_entry, write_entry
from sweep.core.errors import SweepError
from sweep.core.machine import Device, n_cores, n_gpus
from sweep.core.screen import say
from sweep.plan.model import Model
from sweep.store.store import Store
from workers.data.conversations import CaptionedPicture, Conversation, PictureSource
from workers.data.decode import decoded
from workers.data.own import read_captioned, read_conversations, read_texts
from workers.data.pictures import picture_file
from workers.data.rows import files_of
from workers.data.samples import text_samples
from workers.data.scene_chats import scene_conversations
from workers.model.checkpoint import file_key, settings_files

if TYPE_CHECKING:
    from workers.model.processing import Processor

Array = npt.NDArray[np.generic]

_VERSION = 3  # of what is kept; 2: samples with pictures have positions; 3: transparent pictures are put on white
_LIBRARIES = ("transformers", "pillow", "datasets")  # whose versions may change a sample
# Keys of a data set on which its first samples depend, beside its files.
_KEYS = ("kind", "split", "column", "max_tokens", "loss", "answers", "answer_tokens", "max_pixels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What the unquantized model writes answers with, where it does (dataset.answers), and where they are kept."""

    store_uri: str
    device: Device
    dtype: Literal["float32", "bfloat16"]

    @classmethod
    def of(cls, config: SweepConfig) -> "Writing":
        """That of a config: a GPU of this machine, unless it has none or the config says otherwise."""
        device = "cuda" if n_gpus() and config.cluster.device != "cpu" else "cpu"
        return cls(store_uri=config.store.uri, device=device, dtype=config.model.dtype_on(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """Prepared samples as they are kept, with the keys of the picture files that they were made of."""

    samples: list[Sample]
    files: list[list[str | int]]  # file_key of each

    def is_current(self) -> bool:
        """Whether no picture has changed since, and the prepared ones are still there."""
        try:
            unchanged = all(file_key(Path(str(key[0]))) == key for key in self.files)
        except SweepError:
            return False
        contents = {picture.content for sample in self.samples for picture in sample.pictures}
        return unchanged and all(picture_file(content).is_file() for content in contents)


def own_samples(
    dataset: DatasetConfig, model: Model, n_least: int, n_most: int, writing: Writing | None
) -> list[Sample]:
    """The first samples of texts, pictures with captions or conversations.

    Args:
        dataset: of kind text, images, chat or scenes_chat.
        model: its tokenizer or processor reads them.
        n_least: samples that there must be.
        n_most: samples that are read if there are so many.
        writing: needed where the model writes the answers.

    Raises: SweepError: they cannot be read, are too few, or the model cannot read them.
    """
    read = cache(lambda: _Items.read(dataset, n_least, n_most))
    files = [] if dataset.path is None else files_of(dataset.path)
    source = [file_key(file) for file in files] or hashlib.sha256(repr(read()).encode()).hexdigest()
    key = [
        [_VERSION, *map(version, _LIBRARIES)],
        [getattr(dataset, name) for name in _KEYS],
        [n_least, n_most],
        source,
        [file_key(file) for file in (model.path / "config.json", *settings_files(model.path))],
        [model.revision, writing and asdict(writing)] if dataset.answers != "file" else None,
    ]
    kept = read_entry("samples", key)
    if kept is not None and (entry := _unpacked(kept)) is not None and entry.is_current():
        return entry.samples
    items = read()
    samples = items.samples(dataset, model, writing)
    paths = [picture.path for picture in items.pictures if picture.path is not None]
    entry = _Entry(samples=samples, files=[file_key(path) for path in dict.fromkeys(paths)])
    write_entry("samples", key, msgspec.msgpack.encode(entry, enc_hook=_plain))
    return samples


@dataclass(frozen=True, slots=True, kw_only=True)
class _Items:
    """What a data set holds, of one of three kinds, before the model's tokenizer or processor."""

    texts: Sequence[tuple[str, str]] = ()  # and their places
    captioned: Sequence[CaptionedPicture] = ()
    conversations: Sequence[Conversation] = ()

    @staticmethod
    def read(dataset: DatasetConfig, n_least: int, n_most: int) -> "_Items":
        """Read a data set. Raises: SweepError: as `own_samples`."""
        if dataset.path is None:
            return _Items(conversations=scene_conversations(n_most))
        where = (dataset.path, dataset.split, dataset.column, n_least, n_most)
        if dataset.kind == "text":
            return _Items(texts=read_texts(*where))
        if dataset.kind == "images":
            return _Items(captioned=read_captioned(*where))
        return _Items(conversations=read_conversations(*where, answered=dataset.answers == "file"))

    @property
    def pictures(self) -> list[PictureSource]:
        """All pictures, in order."""
        found = [each.picture for each in self.captioned]
        return found + [picture for each in self.conversations for picture in each.pictures]

    def samples(self, dataset: DatasetConfig, model: Model, writing: Writing | None) -> list[Sample]:
        """As the model reads them. Raises: SweepError: as `own_samples`."""
        if self.texts:
            texts, origins = zip(*self.texts, strict=True)
            source = hashlib.sha256(repr(texts).encode()).hexdigest()
            return text_samples(model.tokenize(source, texts), dataset.max_tokens, origins)
        from workers.model.processing import Processor

        processor = Processor(model.path, dataset.max_pixels)
        pictures = prepared(processor, self.pictures)
        if self.captioned:
            pairs = zip(pictures, self.captioned, strict=True)
            return [processor.captioned(each, it.caption, max_tokens=dataset.max_tokens) for each, it in pairs]
        left = iter(pictures)
        own = [[*islice(left, len(each.pictures))] for each in self.conversations]
        if dataset.answers != "file":
            assert writing is not None  # whoever reads such a data set knows its store
            return _answered(self.conversations, own, processor, dataset, model, writing)
        return [
            processor.sample(each, found, loss=dataset.loss, max_tokens=dataset.max_tokens)
            for each, found in zip(self.conversations, own, strict=True)
        ]


def _answered(
    conversations: Sequence[Conversation],
    pictures: Sequence[Sequence[Picture]],
    processor: "Processor",
    dataset: DatasetConfig,
    model: Model,
    writing: Writing,
) -> list[Sample]:
    """Samples whose last answers the model has written or writes now, with a progress display on a terminal."""
    from workers.model.answers import Author, answered_samples

    author = Author(
        path=model.path,
        revision=model.revision,
        dtype=writing.dtype,
        device=writing.device,
        is_greedy=dataset.answers == "model_greedy",
        n_tokens=dataset.answer_tokens,
    )
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Writing answers", total=len(conversations))

        is_said = console.is_terminal

        def show(n_there: int) -> None:
            nonlocal is_said
            if not is_said and n_there < len(conversations):
                is_said = True
                say(console, f"The unquantized model writes answers: {n_there} of {len(conversations)} are there.")
            progress.update(bar, completed=n_there)

        return answered_samples(
            conversations,
            pictures,
            processor,
            author,
            Store(writing.store_uri),
            loss=dataset.loss,
            max_tokens=dataset.max_tokens,
            on_written=show,
        )


def prepared(processor: "Processor", sources: Sequence[PictureSource]) -> list[Picture]:
    """Pictures decoded and prepared on all cores, in order, with a progress display on a terminal.

    Raises: SweepError: the first that cannot be; names its place.
    """

    def prepare(source: PictureSource) -> Picture:
        picture = decoded(source)
        try:
            return processor.prepare(picture)
        except SweepError as error:
            raise SweepError(f"A picture of {source.origin}: {error}") from error

    console = Console(stderr=True)
    first = [prepare(source) for source in sources[:1]]  # loads what the others then share
    pool = ThreadPoolExecutor(n_cores())
    try:
        shown: Iterable[Picture] = track(
            pool.map(prepare, sources[1:]),
            description="Preparing pictures",
            total=len(sources) - 1,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        return [*first, *shown]
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, too, without waiting for the rest


def _plain(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    return array.dtype.str, array.shape, array.tobytes()


def _array(_kind: type, plain: tuple[str, Sequence[int], bytes]) -> Array:
    dtype, shape, values = plain
    return np.frombuffer(values, dtype).reshape(shape)


def _unpacked(kept: bytes) -> _Entry | None:
    """The entry; None: it is torn, or of other types."""
    try:
        return msgspec.msgpack.decode(kept, type=_Entry, dec_hook=_array)
    except (msgspec.DecodeError, ValueError):
        return None
