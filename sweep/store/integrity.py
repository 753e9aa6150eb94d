"""`sweep doctor --store`: read every file of a store, repair what can be, and name the rest."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from sweep.core.errors import SweepError
from sweep.core.text import count
from sweep.store.records import TrialRow
from sweep.store.store import Store

_ID: Final = r"[A-Za-z0-9_-]+"
_SCORES: Final = re.compile(rf"scores/cell=({_ID})/scores\.parquet")
_PART: Final = re.compile(rf"parts/cell=({_ID})/([A-Za-z0-9_.-]+)\.parquet")
_TRIALS: Final = re.compile(rf"trials/((?:run|compact)-{_ID})\.parquet")
_VALIDATION: Final = re.compile(rf"validations/({_ID})\.parquet")
_ANSWERS: Final = re.compile(rf"answers/({_ID})\.parquet")
_PICTURE: Final = re.compile(rf"pictures/({_ID})\.npy")
_RUN: Final = re.compile(rf"runs/({_ID})\.json")
_FOLDERS: Final = ("scores", "parts", "trials", "validations", "answers", "pictures", "runs")
_TEMPORARY: Final = re.compile(r"(?:.*/)?\.[^/]+\.tmp")
_TEMPORARY_SECONDS: Final = 600.0  # a writer holds one for less than a second; on a slow network file system for longer
_SILENT_SECONDS: Final = 600.0  # a run whose heartbeat is older is over


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one file, trial or other subject."""

    subject: str
    verdict: Literal["ok", "warning", "error"]
    text: str
    figures: dict[str, float] = field(default_factory=dict[str, float])  # of the text, for programs; see the subject


def check_store(store: Store) -> list[Finding]:
    """Verify every file of a store.

    Damaged and foreign files are moved into its quarantine; half-written files of killed writers are removed.

    Returns: one finding a file that was not as it should be, and at the end one with the contents of the store. Errors
        are those of things that were left as they are: a newer program's file, or a store that cannot be written.
    """
    found: list[Finding] = []
    try:
        found.extend(_findings(store))
    except SweepError as error:
        found.append(Finding("store", "error", str(error)))
    except OSError as error:
        found.append(Finding("store", "error", f"Cannot write to the store {store.uri}: {error.strerror or error}."))
    return found


def _findings(store: Store) -> Iterator[Finding]:
    # Listed before the trials are read: a trial is recorded before any of its parts is written.
    paths = [path for path in store.files.walk() if not path.startswith("quarantine/")]
    counts: Counter[str] = Counter()
    sound: set[str] = set()
    for path in paths:
        if (finding := _look(store, path)) is not None:
            yield finding
        elif not _TEMPORARY.fullmatch(path):
            counts[path.partition("/")[0]] += 1
            sound.add(path)
    yield from _join_trials(store)
    trials = store.trials()
    yield from _parts(store, sound, trials)
    yield from _missing(sound, trials)
    yield from revisions(trials)
    n_aside = len(store.files.names("quarantine"))
    text = (
        f"{counts['scores']} cells, {counts['parts']} parts, {len(trials)} trials, "
        f"{counts['validations']} validations, {counts['runs']} runs verified"
    )
    text += f", and answers of the model ({count(counts['answers'], 'file')})" if counts["answers"] else ""
    text += f", and {count(counts['pictures'], 'picture')} for workers" if counts["pictures"] else ""
    aside = f"; {count(n_aside, 'file')} in {store.uri}/quarantine" if n_aside else ""
    yield Finding("store", "ok", text + aside)


def _look(store: Store, path: str) -> Finding | None:
    """Read one file. None: it is as it was written, or gone since it was listed."""
    if store.files.is_link(path):
        return _aside(store, path, "a symbolic link, where the file itself belongs")
    if _TEMPORARY.fullmatch(path):
        if store.files.age_seconds(path) < _TEMPORARY_SECONDS:
            return None
        store.files.remove(path)
        return Finding(path, "warning", "dropped: a killed writer left it half written")
    if path.partition("/")[0] not in _FOLDERS or "/" not in path:
        return Finding(path, "warning", "not a file of this program; left where it is, nobody reads it")
    try:
        if not _read(store, path):
            return _aside(store, path, "not a file of this program")
    except FileNotFoundError:
        return None
    except SweepError as error:
        if path not in store.damage:
            return Finding(path, "error", str(error))
    return Finding(path, "warning", f"set aside: {store.damage[path]}") if path in store.damage else None


def _read(store: Store, path: str) -> bool:
    """Read a file as commands do, which set it aside if it is damaged. Returns whether this program has such files."""
    if found := _SCORES.fullmatch(path):
        store.whole_scores(found[1])
    elif found := _PART.fullmatch(path):
        store.has_part(found[1], found[2])
    elif found := _TRIALS.fullmatch(path):
        store.read_trials(f"{found[1]}.parquet")
    elif found := _VALIDATION.fullmatch(path):
        store.validation(found[1])
    elif found := _ANSWERS.fullmatch(path):
        store.answers(found[1])
    elif found := _PICTURE.fullmatch(path):
        store.picture(found[1])
    elif _RUN.fullmatch(path):
        store.run_record(path)
    else:
        return False
    return True


def _aside(store: Store, path: str, reason: str) -> Finding:
    store.set_aside(path, reason)
    return Finding(path, "warning", f"set aside: {reason}")


def _join_trials(store: Store) -> Iterator[Finding]:
    """Join the trial tables of runs that were killed before they could."""
    alive = {name for name, run in store.runs().items() if run.is_alive(_SILENT_SECONDS)}
    names = {
        name.removeprefix("run-").removesuffix(".parquet")
        for name in store.files.names("trials")
        if name.startswith("run-")
    }
    before = len(store.files.names("trials"))
    store.compact_trials(names - alive)
    if (joined := before - len(store.files.names("trials"))) > 0:
        yield Finding("trials", "ok", f"{joined + 1} tables of ended runs joined into one")


def _parts(store: Store, sound: set[str], trials: dict[str, TrialRow]) -> Iterator[Finding]:
    """Drop the parts of finished cells; set aside those that no trial wants."""
    wanted = {row.cell_id for row in trials.values()}
    for path in sorted(sound):
        if (found := _PART.fullmatch(path)) is None:
            continue
        if store.is_finished(found[1]):
            store.files.remove(path)
            yield Finding(path, "warning", "dropped: its cell is finished")
        elif found[1] not in wanted:
            yield _aside(store, path, "a part of a cell that no trial wants")


def _missing(sound: set[str], trials: dict[str, TrialRow]) -> Iterator[Finding]:
    finished = {found[1] for path in sound if (found := _SCORES.fullmatch(path))}
    for row in trials.values():
        if row.state == "done" and row.cell_id not in finished:
            yield Finding(
                row.trial_id, "warning", f"its cell {row.cell_id} has no scores; the same sweep run again scores it"
            )


def revisions(trials: dict[str, TrialRow]) -> Iterator[Finding]:
    """Findings where trials of one name have different contents.

    These are another checkpoint, another data set, or another score version.
    """
    by_name: dict[str, Counter[str]] = {}
    for row in trials.values():
        data = f"dataset {row.dataset}/{row.size} as {row.model} reads it"
        for name, revision in ((f"model {row.model}", row.model_revision), (data, row.dataset_revision)):
            by_name.setdefault(name, Counter())[revision] += 1
    for name, found in by_name.items():
        if len(found) > 1:
            listed = ", ".join(f"{revision[:12]} ({count(n, 'trial')})" for revision, n in found.most_common())
            yield Finding(name, "warning", f"the store holds {len(found)} revisions: {listed}; they are never mixed")
    versions: Counter[str] = Counter()
    for text, n in Counter(row.versions for row in trials.values() if row.versions.startswith("{")).items():
        versions[str(json.loads(text).get("score")).partition("+")[0]] += n  # the rest is of some formats alone
    if len(versions) > 1:
        listed = ", ".join(f"{version} ({count(n, 'trial')})" for version, n in versions.most_common())
        yield Finding("score version", "warning", f"the store holds {len(versions)}: {listed}; they are never mixed")
