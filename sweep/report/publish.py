"""Sync finished trials into the models directory: each folder whole or not at all, right ones untouched.

``<model>/layer-analysis/weight-<weight>-act-<activation>/<granularity>/<coverage>-<dataset>-<size>-<method>/``. Locally
a folder is built beside its destination, checked, and renamed into place; the next run repairs what a crash leaves
behind. Behind a URL the manifest goes first when a folder is replaced and comes last when it is written: no manifest,
no folder.
"""

import contextlib
import multiprocessing
import os
import re
import signal
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from sweep.core.errors import StoreFailed, SweepError
from sweep.core.json import Json
from sweep.core.machine import n_cores
from sweep.report.files import (
    FILES,
    LAYOUT_VERSION,
    MANIFEST,
    checksums,
    folder_of,
    manifest_identity,
    published_scores,
    render_files,
)
from sweep.report.index import GENERATED, Manifest, render_index
from sweep.store.files import Files
from sweep.store.outputs import locked, sync
from sweep.store.records import FinishedTrial, TrialRow

_NEW, _OLD = ".new-", ".old-"  # a folder being built; a folder being replaced
_FOLDERS_A_PROCESS = 32  # are worth the second or two that a process takes to start
_NAMES = "|".join(map(re.escape, (*FILES, "README.md")))
_PARTIAL = re.compile(rf"\.({_NAMES})\.\d+-[0-9a-f]+\.tmp")  # a file being written
_MOVE = "Files of someone else are never replaced: move them away (mv -n FILE ELSEWHERE), or publish elsewhere."
_HOW = (
    "Replace what is there: output_layout.overwrite=true (sweep run), --overwrite (sweep publish). "
    "Or publish elsewhere, or score under another name: dataset.name=NAME."
)

_CONTENT = ("model_revision", "dataset_revision", "cell_id")  # a folder that differs in them holds other content


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishResult:
    """The folders and pages that a sync wrote, kept or removed, by path or URL."""

    written: tuple[str, ...]  # folders new or replaced
    unchanged: tuple[str, ...]  # folders found right, not touched
    removed: tuple[str, ...]  # leftovers of an interrupted run, index pages with nothing below them
    pages: tuple[str, ...]  # README.md files written


def publish(finished: Iterable[FinishedTrial], root: Path | str, *, overwrite: bool = False) -> PublishResult:
    """Bring the tree under `root` up to date with `finished`; folders of other trials stay.

    Args:
        finished: trials that are done; a half-finished one must not be here.
        root: the models directory, or a URL that fsspec knows.
        overwrite: replace folders that hold other content. Files that are not ours are never replaced.

    Raises: SweepError: a name that is no path part, files of someone else in the way, or, unless `overwrite`, a folder
        of another model revision, data set or cell. Every conflict is listed and nothing is written.
        StoreFailed: the root cannot be written; what is there is whole, and the same call goes on.
    """
    url = str(root) if "://" in str(root) else str(Path(root).absolute())
    files = Files(url)
    wanted = _by_folder(finished, overwrite=overwrite)
    with _locked(url):
        _refuse_links(url, wanted)
        leftovers = _repair(url)
        published = dict(_published(files))
        changed = {
            folder: one for folder, one in wanted.items() if not _is_current(files, folder, one, published.get(folder))
        }
        pages = _page_paths({*wanted, *published})
        foreign = [*_foreign_files(files, changed), *_foreign_pages(files, pages)]
        conflicts = [] if overwrite else [*_conflicts(changed, published)]
        if found := [*conflicts, *foreign]:
            how = [*([_HOW] if conflicts else []), *([_MOVE] if foreign else [])]
            head = f"Not published, {len(found)} in the way under {url}:"
            raise SweepError("\n".join([head, *(f"  {line}" for line in found), *how]))
        for folder, content in _rendered(changed):
            if "://" not in url:
                _swap_folder(Path(url), folder, content)
            else:
                files.remove(f"{folder}/{MANIFEST}")
                for name, data in content.items():  # the manifest is last
                    files.write(f"{folder}/{name}", data)
            published[folder] = Manifest.from_json(content[MANIFEST])
        written_pages, stale_pages = _update_pages(files, published, pages)
    at = f"{url}/"
    return PublishResult(
        written=tuple(at + folder for folder in changed),
        unchanged=tuple(at + folder for folder in wanted if folder not in changed),
        removed=tuple(at + path for path in [*leftovers, *stale_pages]),
        pages=tuple(at + path for path in written_pages),
    )


def _rendered(changed: Mapping[str, FinishedTrial]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Each folder with its content; many are made on all cores, since one takes 50 ms at 144 layer groups."""
    n_processes = min(n_cores(), len(changed) // _FOLDERS_A_PROCESS)
    if n_processes < 2:
        yield from ((folder, render_files(one)) for folder, one in changed.items())
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # the parent handles them
    with ProcessPoolExecutor(n_processes, spawn, initializer=signal.signal, initargs=ignore_interrupts) as pool:
        yield from zip(changed, pool.map(render_files, changed.values(), chunksize=4), strict=True)


def check_ahead(root: str, wanted: Mapping[str, TrialRow]) -> None:
    """Refuse a sweep whose reports would not be published, before hours are spent on it.

    Args:
        root: the models directory, or a URL.
        wanted: each trial by its folder under the root.

    Raises: SweepError: names the folders that hold other content.
    """
    files = Files(root)
    conflicts: list[str] = []
    for folder, trial in wanted.items():
        if (there := _manifest(files, folder)) is None:
            continue
        conflicts += [
            f"{folder} holds other content: {key} {there.document.get(key)} there, {getattr(trial, key)} here"
            for key in _CONTENT
            if there.document.get(key) != getattr(trial, key)
        ][:1]
    if conflicts:
        raise SweepError(
            "\n".join([f"{len(conflicts)} in the way under {root}:", *(f"  {line}" for line in conflicts[:10]), _HOW])
        )


def _by_folder(finished: Iterable[FinishedTrial], *, overwrite: bool) -> dict[str, FinishedTrial]:
    """Each trial by the path of its folder under the root.

    With `overwrite` the latest of those that want the same folder.
    """
    wanted: dict[str, FinishedTrial] = {}
    for one in finished:
        trial = one.trial
        if trial.state != "done":
            raise SweepError(
                f"Trial {trial.trial_id} is {trial.state}; only finished trials are published. "
                "Run the sweep again to finish it."
            )
        parts = folder_of(trial)
        for part in parts:
            if not re.fullmatch(r"[a-z0-9_-][a-z0-9_.-]*", part) or ".." in part:
                raise SweepError(
                    f"{part!r} cannot be part of a published path. "
                    "Use lower-case letters, digits, _ and - in the names of the config."
                )
        folder = "/".join(parts)
        other = wanted.get(folder, one)
        if other.trial.cell_id != trial.cell_id and not overwrite:
            found = "; ".join(_differences(manifest_identity(other), manifest_identity(one)))
            raise SweepError(
                f"Two trials of this call belong in {folder}: {found}. "
                f"Publish one of them, or the later one with overwrite. {_HOW}"
            )
        wanted[folder] = max(other, one, key=lambda candidate: candidate.trial.created_at)
    return wanted


@contextlib.contextmanager
def _locked(url: str) -> Generator[None]:
    """Make the root and keep other publishers out of it.

    Object storage has no lock, and needs none for equal content.

    Raises: SweepError: there can be no such directory. StoreFailed: it cannot be written meanwhile.
    """
    with contextlib.ExitStack() as stack:
        try:
            if "://" not in url:
                Path(url).mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(Path(url)))
        except OSError as error:
            way_out = "Choose a writable directory: output_layout.root=DIR."
            raise SweepError(f"Cannot publish into {url}: {error.strerror}. {way_out}") from error
        try:
            yield
        except OSError as error:
            raise StoreFailed(f"Cannot publish into {url}: {error.strerror or error}.") from error


def _refuse_links(url: str, folders: Iterable[str]) -> None:
    if "://" in url:
        return
    root = Path(url).resolve()
    for folder in folders:
        target = root / folder
        if target.resolve() != target or (target.exists() and not target.is_dir()):
            raise SweepError(f"{target} is a link or a file, where a directory of this tree belongs. Move it away.")


def _repair(url: str) -> list[str]:
    """Undo what an interrupted run left: put back a folder whose replacement never came, drop the rest.

    Returns the paths that were dropped. A folder with anything that a run does not write is someone else's, and stays.
    """
    if "://" in url:
        return []
    root, dropped = Path(url), list[str]()
    for path in sorted(path for analysis in root.glob("*/layer-analysis") for path in analysis.rglob(".*")):
        if path.name.startswith((_NEW, _OLD)) and _is_ours(path):
            final = path.with_name(path.name.removeprefix(_OLD))
            if path.name.startswith(_OLD) and not final.exists():
                os.rename(path, final)
                continue
            _drop(path)
        elif _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink()
        else:
            continue
        dropped.append(str(path.relative_to(root)))
    return dropped


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder, no link to one, that holds nothing but what a folder with reports consists of."""
    return folder.is_dir() and not folder.is_symlink() and len(_own(folder)) == len(os.listdir(folder))


def _own(folder: Path) -> list[Path]:
    """The files that a folder with reports consists of, half-written ones too."""
    named = [path for path in folder.iterdir() if path.name in FILES or _PARTIAL.fullmatch(path.name)]
    return [path for path in named if path.is_file() and not path.is_symlink()]


def _drop(folder: Path) -> None:
    for path in _own(folder):
        path.unlink()
    with contextlib.suppress(OSError):  # someone else has just put something there
        folder.rmdir()


def _directories(files: Files) -> Iterator[str]:
    """Every directory of the tree, from ``<model>/layer-analysis`` down to the folders with reports."""
    for model in files.names(""):
        level = [f"{model}/layer-analysis"]
        for _ in range(4):
            yield from level
            level = [
                f"{directory}/{name}" for directory in level for name in files.names(directory) if name != "README.md"
            ]


def _published(files: Files) -> Iterator[tuple[str, Manifest]]:
    """Folders that are there, with their manifests; one without a readable manifest is not there."""
    for directory in _directories(files):
        if directory.count("/") == 4 and (manifest := _manifest(files, directory)) is not None:
            yield directory, manifest


class _Layout(msgspec.Struct):
    layout_version: int


def _manifest(files: Files, folder: str) -> Manifest | None:
    """A published folder's manifest; None if there is none that this program can have written.

    Raises: SweepError: a newer version of this program has written it.
    """
    try:
        data = files.read(f"{folder}/{MANIFEST}")
        if msgspec.json.decode(data, type=_Layout).layout_version > LAYOUT_VERSION:
            newer = "was published by a newer version of this program. Upgrade, or publish elsewhere."
            raise SweepError(f"{files.uri}/{folder} {newer}")
        return Manifest.from_json(data)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


def _is_current(files: Files, folder: str, one: FinishedTrial, manifest: Manifest | None) -> bool:
    """Whether the folder says what the trial says and all its bytes are as its manifest lists them."""
    if manifest is None:
        return False
    if {key: value for key, value in manifest.document.items() if key != "files"} != manifest_identity(one):
        return False
    content: dict[str, bytes] = {}
    for name in FILES:
        if name != MANIFEST:
            try:
                content[name] = files.read(f"{folder}/{name}")
            except FileNotFoundError:
                return False
    return manifest.document.get("files") == checksums(content) and _rows(content["scores.parquet"]).equals(
        published_scores(one)
    )


def _rows(data: bytes) -> pa.Table:
    # pq.read_table takes four times as long for a small file.
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def _conflicts(changed: Mapping[str, FinishedTrial], published: Mapping[str, Manifest]) -> Iterator[str]:
    for folder, one in changed.items():
        there, here = published.get(folder), manifest_identity(one)
        if there and any(there.document.get(key) != here[key] for key in _CONTENT):
            yield f"{folder} holds other content: {'; '.join(_differences(there.document, here))}"


def _foreign_files(files: Files, changed: Iterable[str]) -> Iterator[str]:
    """Messages about files of others in folders that would be replaced, or where a folder would be made."""
    for folder in changed:
        names = files.names(folder, hidden=True)
        if foreign := [name for name in names if name not in FILES or files.is_link(f"{folder}/{name}")]:
            yield f"{folder} holds files of someone else: {', '.join(foreign)}"
        parent, _, name = folder.rpartition("/")
        for beside in [] if "://" in files.uri else [f"{parent}/{prefix}{name}" for prefix in (_NEW, _OLD)]:
            if files.names(beside, hidden=True):
                yield f"{beside} was made by someone else"


def _differences(there: Mapping[str, Json], here: Mapping[str, Json]) -> list[str]:
    """The facts in which two contents differ, at most four: ``model_revision 0a1b there, 2c3d here``."""
    keys = (
        "model_revision",
        "dataset_revision",
        "engine",
        "quant_pair",
        "dtype",
        "config",
        "versions",
        "schema_version",
    )
    old = _flat({key: there.get(key) for key in keys})
    new = _flat({key: here.get(key) for key in keys})
    found = [
        f"{key} {str(old.get(key))[:40]} there, {str(new.get(key))[:40]} here"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
    return found[:4] or [f"cell {there.get('cell_id')} there, {here['cell_id']} here"]


def _flat(value: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    flat: dict[str, Json] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def _swap_folder(root: Path, folder: str, content: Mapping[str, bytes]) -> None:
    final = root / folder
    staging, old = final.with_name(_NEW + final.name), final.with_name(_OLD + final.name)
    for name, data in content.items():
        Files(str(staging)).write(name, data)  # fsynced
    if any((staging / name).read_bytes() != data for name, data in content.items()):
        raise OSError(f"{staging} reads back otherwise than it was written")
    sync(staging)
    if final.exists():
        os.rename(final, old)
    os.rename(staging, final)
    sync(final.parent)
    if old.exists():
        _drop(old)


def _page_paths(folders: Iterable[str]) -> list[str]:
    """The directories above published folders, each of which has an index page."""
    return sorted({folder.rsplit("/", depth)[0] for folder in folders for depth in (1, 2, 3)})


def _page(files: Files, directory: str) -> str | None:
    try:
        return files.read(f"{directory}/README.md").decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):  # a file, where directories are
        return None


def _foreign_pages(files: Files, pages: Iterable[str]) -> Iterator[str]:
    for directory in pages:
        text = _page(files, directory)
        if text is not None and not text.startswith(GENERATED):
            yield f"{directory}/README.md was written by someone else"


def _update_pages(
    files: Files, published: Mapping[str, Manifest], kept: Collection[str]
) -> tuple[list[str], list[str]]:
    """Write the index pages whose text changes, and remove ours that have no published folder below any more.

    Returns: paths of both.
    """
    written: list[str] = []
    for directory in _page_paths(published):
        below = {folder: manifest for folder, manifest in published.items() if folder.startswith(f"{directory}/")}
        if (text := render_index(directory, below)) != _page(files, directory):
            files.write(f"{directory}/README.md", text.encode())
            written.append(f"{directory}/README.md")
    above = [path for path in _directories(files) if path.count("/") < 4 and path not in kept]
    stale = [f"{path}/README.md" for path in above if (_page(files, path) or "").startswith(GENERATED)]
    for path in reversed(stale):
        files.remove(path)
    return written, stale
