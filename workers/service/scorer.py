"""One worker's work, without Ray: hold a model and its capture, score tasks together, put finished parts into the store."""

import math
import socket
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sweep.core.batches import Plan
from sweep.core.errors import SweepError, Unfit
from sweep.core.groups import GroupSpec, Part, parts_of
from sweep.core.machine import Gpu, Hardware, has_compiler, memory_gb, n_cores
from sweep.store.store import Store
from workers.model import loading, memory
from workers.quant.modelopt import auto_quantize_scores
from workers.scoring.capture import Rows, capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.kl import KlEngine
from workers.scoring.scores import Measured, NotFinite, Scores
from workers.scoring.windows import captures
from workers.service.clock import Clock
from workers.service.node import first_alone
from workers.service.parts import Book
from workers.service.rows import Ledger
from workers.service.writers import Writers
from workers.task import ModelSpec, Progress, Task, part_names

_MAX_HALVINGS = 8
_WRITERS = 8  # at most, that put parts on disk while the next layer is scored

_Waiting = Callable[[], list[Scores] | None]  # see Engine.score_group
_Start = Callable[[GroupSpec, Sequence[Job]], _Waiting]


@dataclass(frozen=True, slots=True)
class _Captured:
    plan_id: str
    n_segments: int
    modules: frozenset[str]
    rows: Mapping[str, Rows]


class Scorer:
    """Scores tasks; loads a model only when tasks need another one, and captures only what no earlier task had captured."""

    def __init__(
        self,
        store_uri: str,
        device: str,
        *,
        memory_gb: float | None = None,
        n_workers: int = 1,
        n_gpus: int = 1,
        n_halvings: int = 0,
        on_timed: Callable[[str, float], None] | None = None,
    ) -> None:
        """Prepare an empty worker.

        Args:
            store_uri: absolute path or URL of the store.
            device: "cpu" or "cuda".
            memory_gb: memory to use on each device, 1e9 bytes; None: what is free on the GPU, or an even share of the machine's.
            n_workers: workers that share the machine.
            n_gpus: that a model is spread over.
            n_halvings: of the room for x and g, since an earlier process was killed for want of memory.
            on_timed: called after each load and capture, see workers.service.clock.Clock.
        """
        if device == "cuda" and memory_gb is not None:
            for index in range(n_gpus):
                torch.cuda.set_per_process_memory_fraction(
                    min(1.0, memory_gb * 1e9 / torch.cuda.mem_get_info(index)[1]), index
                )
        self._memory_gb, self._n_workers, self._n_gpus = memory_gb, n_workers, n_gpus
        self._halvings = n_halvings  # of the room for x and g, after running out of memory
        self.store = Store(store_uri)
        self.device = torch.device(device)
        self.model_loads = 0
        self._clock = Clock(on_timed)
        self._model: Any = None
        self._model_spec: ModelSpec | None = None
        self._engines: dict[torch.device, Engine] = {}  # one for each device that holds layers
        self._captured: _Captured | None = None
        self._divergence: tuple[tuple[str, int, tuple[str, ...]], KlEngine] | None = None
        # Beside a GPU, threads would wait for Python's lock as long as the GPU scores, and it for them.
        self._writers = Writers(max(1, min(_WRITERS, n_cores() // n_workers - 1)), processes=device == "cuda")

    @staticmethod
    def is_device_fault(error: BaseException) -> bool:
        """Whether the process' CUDA context is lost, with all that it will ever compute."""
        return isinstance(error, torch.AcceleratorError) or (
            isinstance(error, RuntimeError) and "CUDA error" in str(error)
        )

    def info(self) -> dict[str, Any]:
        """What it has done so far.

        Returns: `model_loads`; seconds: `load_seconds`, `capture_seconds` (the unquantized model's passes), `busy_seconds`
            (with tasks, captures included); `first_at` and `last_at`: when it was first and last busy, seconds since 1970;
            `peak_gb`: the most memory that was allocated, in 1e9 bytes, over all its GPUs; None on a CPU.
        """
        peak_gb = (
            sum(torch.cuda.max_memory_allocated(index) for index in range(self._n_gpus)) / 1e9
            if self.device.type == "cuda"
            else None
        )
        return {"model_loads": self.model_loads, "peak_gb": peak_gb, **self._clock.figures()}

    def hardware(self) -> Hardware:
        """What its own GPUs can do, and this machine."""
        gpus: list[Gpu] = []
        for index in range(self._n_gpus if self.device.type == "cuda" else 0):
            found = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(found.name, found.total_memory / 1e9, (found.major, found.minor)))
        return Hardware(host=socket.gethostname(), gpus=tuple(gpus), has_nvcc=has_compiler(), memory_gb=memory_gb())

    def gpu_memory(self) -> tuple[int, int] | None:
        """Bytes of its GPUs that are used, and that they have; None on a CPU."""
        if self.device.type == "cpu":
            return None
        free, total = (
            sum(values)
            for values in zip(*(torch.cuda.mem_get_info(index) for index in range(self._n_gpus)), strict=True)
        )
        return total - free, total

    def load(self, spec: ModelSpec) -> None:
        """Hold this model, and no other."""
        if self.device.type == "cpu":  # here, since it is a setting of the thread that computes
            torch.set_num_threads(1)  # more threads beside other workers cost 60x, and would change bits
        if spec == self._model_spec:
            return
        self._model, self._model_spec, self._captured, self._divergence = None, None, None, None
        self._engines.clear()
        with self._clock.timed("load_seconds"), first_alone(Path(spec.path)):
            try:
                self._model = loading.load(
                    Path(spec.path), dtype=getattr(torch, spec.dtype), device=str(self.device), n_gpus=self._n_gpus
                )
            except SweepError as error:
                raise Unfit(str(error)) from error
        self._model_spec = spec
        self.model_loads += 1

    def score(self, tasks: Sequence[Task], plan: Plan, names: Iterable[str] | None = None) -> Iterator[Progress]:
        """Score what the tasks' cells lack, layer by layer; each part is on disk before its progress is yielded.

        Args:
            tasks: of one model, plan, method, engine and set of layer groups; a layer is visited once for all of them.
            plan: theirs.
            names: of the parts to score, asked for one by one; None: all. Whoever finds that a cell has all its parts completes it.

        Yields: progress of each task; a task that meets a NaN or an infinity ends with a failure, the others go on.
        """
        with self._clock.timed("busy_seconds"), self._writers.tidied():
            yield from self._score(tasks, plan, names)

    def _score(self, tasks: Sequence[Task], plan: Plan, names: Iterable[str] | None) -> Iterator[Progress]:
        first = tasks[0]
        self.load(first.model)
        whole = parts_of(first.groups)
        books = {task.task_id: Book(task, plan, whole, self.store) for task in tasks}
        parts = _Parts(whole, part_names(first) if names is None else names, books.values())
        for book in books.values():
            n_predictions = {size: plan.n_predictions(size) for size in book.task.cells}
            self._writers.open(Ledger(book.task, n_predictions, whole, self.store.uri))
            yield book.progress()
        while True:
            try:
                yield from self._written(books, self._measured_parts(books, plan, parts))
                break
            except torch.OutOfMemoryError as error:  # what is in the store stays; go on with half the window
                traceback.clear_frames(error.__traceback__)  # they hold the memory
                self._captured = self._divergence = None
                torch.cuda.empty_cache()
                if self._halvings == _MAX_HALVINGS:
                    raise SweepError(
                        f"{_out_of_memory(error)} Choose a smaller dataset.size or dataset.max_tokens, or a larger GPU."
                    ) from error
                self._halvings += 1
                warning = f"{_out_of_memory(error)} Going on with a window of 1/{2**self._halvings} of the room."
                yield replace(next(iter(books.values())).progress(), warning=warning)
        for book, done in [
            (book, self._writers.close(task_id, complete=book.failure is None)) for task_id, book in books.items()
        ]:
            done.result()
            yield book.progress()

    def _written(
        self, books: Mapping[str, Book], measured: Iterable[tuple[Part, dict[str, Measured]]]
    ) -> Iterator[Progress]:
        """Put parts into the store while the next ones are scored."""
        writing: deque[tuple[Book, str, Collection[str], Future[None]]] = (
            deque()
        )  # a book, a part's name, and the sizes that have it then

        def written() -> Progress:
            book, name, sizes, done = writing.popleft()
            done.result()
            for size in sizes:
                book.done[size].add(name)
            return book.progress()

        for part, found in measured:
            for task_id, scores in found.items():
                book = books[task_id]
                if isinstance(scores, NotFinite):
                    book.failure = book.failure or str(self._explained(scores))
                    yield book.progress()
                elif book.failure is None:
                    writing.append((book, part.name, scores.keys(), self._writers.write(task_id, part.name, scores)))
            # Wait for the layer before: so no more than one that was scored is lost with this process.
            while writing and (writing[0][3].done() or writing[0][1] != part.name):
                yield written()
        while writing:
            yield written()

    def _measured_parts(
        self, books: Mapping[str, Book], plan: Plan, parts: "_Parts"
    ) -> Iterator[tuple[Part, dict[str, Measured]]]:
        task = next(iter(books.values())).task
        if task.engine == "modelopt":
            return self._stock(books, plan, parts)
        return self._ahead(
            books,
            self._divergences(books, plan, parts) if task.method == "kl_div" else self._layerwise(books, plan, parts),
        )

    def _ahead(
        self, books: Mapping[str, Book], starting: Iterable[tuple[Part, _Start]]
    ) -> Iterator[tuple[Part, dict[str, Measured]]]:
        """Start the groups of each part. On a GPU a part is started before the one before it is waited for: it always has work."""
        started: deque[tuple[Part, list[Book], list[_Waiting]]] = deque()
        for part, start in starting:
            asking = [book for book in books.values() if book.wants(part)]
            if asking:
                jobs = [book.job(part) for book in asking]
                started.append((part, asking, [start(group, jobs) for group in part.groups]))
            if len(started) > (self.device.type == "cuda"):
                yield _measured(*started.popleft())
        for rest in started:
            yield _measured(*rest)

    def _layerwise(self, books: Mapping[str, Book], plan: Plan, parts: "_Parts") -> Iterator[tuple[Part, _Start]]:
        """method=gradient: each part, and what starts the scoring of one of its groups."""
        for window, rows in self._windows(books, plan, parts):

            def start(group: GroupSpec, jobs: Sequence[Job], rows: Mapping[str, Rows] = rows) -> _Waiting:
                weights = self._weights(group)
                device = next(iter(weights.values())).device
                if device not in self._engines:
                    self._engines[device] = Engine(device)
                return self._engines[device].score_group(weights, rows, jobs)

            for part in window:
                yield part, start

    def _divergences(self, books: Mapping[str, Book], plan: Plan, parts: "_Parts") -> Iterator[tuple[Part, _Start]]:
        """method=kl_div: the same, from one pass of the unquantized model, which is kept for later tasks."""
        task, n_segments = next(iter(books.values())).task, max(book.n_segments for book in books.values())
        key = (task.plan_id, n_segments, modules_of(parts.whole))
        for part in parts.wanted():
            self._captured = None
            if self._divergence is None or self._divergence[0] != key:
                self._divergence = None  # frees its memory first
                with self._clock.timed("capture_seconds"):
                    self._divergence = key, KlEngine(self._model, plan.segments[:n_segments], key[2])
            engine = self._divergence[1]
            yield part, lambda group, jobs, engine=engine: engine.score_group(group.modules, jobs)

    def _windows(
        self, books: Mapping[str, Book], plan: Plan, parts: "_Parts"
    ) -> Iterator[tuple[Sequence[Part], Mapping[str, Rows]]]:
        """The parts that are wanted, as they are taken, with what their linears saw.

        If memory holds all that the cells lack, that is captured, for other leases too. Else an even share of the parts is taken at once,
        and captured in as many windows as it needs.
        """
        tasks, plan_id = [book.task for book in books.values()], next(iter(books.values())).task.plan_id
        n_segments = max(book.n_segments for book in books.values())
        work = memory.workload(
            tasks, plan, n_segments, self._model_bytes(), self._model.config.get_text_config().vocab_size
        )

        def windows(several: Sequence[Part]) -> Sequence[Sequence[Part]]:
            sizes = [memory.capture_bytes(part.groups, work) for part in several]
            room = (
                self._memory_bytes() - memory.fixed_bytes([group for part in several for group in part.groups], work)
            ) / 2**self._halvings
            return memory.windows(several, sizes, room)

        wanted = parts.wanted()
        lacking = [part for part in parts.whole if any(book.lacks(part) for book in books.values())]
        held = self._captured is not None and {*modules_of(lacking)} <= self._captured.modules
        if held or not lacking or len(windows(lacking)) == 1:
            for part in wanted:  # lacking, unless its file was damaged
                yield (
                    [part],
                    self._rows(plan_id, plan, n_segments, modules_of(lacking if part in lacking else [*lacking, part])),
                )
            return
        while several := list(islice(wanted, math.ceil(len(parts.whole) / self._n_workers))):
            if len(found := windows(several)) == 1:
                yield several, self._rows(plan_id, plan, n_segments, modules_of(several))
                continue
            self._captured = self._divergence = None
            passes = captures(self._model, plan.segments[:n_segments], [modules_of(window) for window in found])
            for index, rows in self._clock.timed_items("capture_seconds", passes):
                yield found[index], rows

    def _memory_bytes(self) -> float:
        """Of one device: a window's layers may all lie there."""
        if self._memory_gb is not None:
            return self._memory_gb * 1e9
        if self.device.type == "cuda":
            return min(
                torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) for index in range(self._n_gpus)
            )
        return memory_gb() * 1e9 / self._n_workers

    def _model_bytes(self) -> int:
        """Of one device, over which the model is spread evenly."""
        return (
            sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters()) // self._n_gpus
        )

    def _rows(self, plan_id: str, plan: Plan, n_segments: int, modules: tuple[str, ...]) -> Mapping[str, Rows]:
        """Capture, or what an earlier capture of at least as much left."""
        if (
            (held := self._captured) is None
            or held.plan_id != plan_id
            or held.n_segments < n_segments
            or not set(modules) <= held.modules
        ):
            self._captured = self._divergence = held = None  # frees its memory first
            with self._clock.timed("capture_seconds"):
                rows = capture(self._model, plan.segments[:n_segments], modules)
            self._captured = held = _Captured(plan_id, n_segments, frozenset(modules), rows)
        return held.rows

    def _weights(self, group: GroupSpec) -> dict[str, torch.Tensor]:
        return {name: self._model.get_submodule(name).weight.detach() for name in group.modules}

    def _explained(self, error: NotFinite) -> NotFinite:
        """Name the broken weight if there is one: a NaN travels forward and backward, and first shows in another layer's score."""
        broken = (name for name, parameter in self._model.named_parameters() if not torch.isfinite(parameter).all())
        name = next(broken, None)
        return (
            error
            if name is None or name.removesuffix(".weight") in str(error)
            else NotFinite(f"{error} The checkpoint's {name} holds NaN or infinite values.")
        )

    def _stock(
        self, books: Mapping[str, Book], plan: Plan, parts: "_Parts"
    ) -> Iterator[tuple[Part, dict[str, Measured]]]:
        """The cross-check: ModelOpt's own searcher, one recipe and size at a time."""
        wanted = list(parts.wanted())
        for task_id, book in books.items() if wanted else ():
            task = book.task
            covered = [name for group in task.groups for name in group.modules]
            scores: dict[str, dict[str, float | None]] = {}
            for size in task.cells:
                with _calls(self._model, covered) as called:
                    try:
                        found = auto_quantize_scores(
                            self._model, task.quant_cfg, task.algorithm, list(plan.batches(size)), covered
                        )
                    except AssertionError as error:  # ModelOpt's calibrator met a NaN
                        yield wanted[0], {task_id: NotFinite(f"{task.label}: ModelOpt {error}.")}
                        break
                scores[size] = {
                    group.name: found.get(group.name) if called & {*group.modules} else None for group in task.groups
                }
            for part in wanted if len(scores) == len(task.cells) else ():
                yield part, {task_id: _stock_scores(part, task.label, scores)}


class _Parts:
    """The parts of a lease, taken as they are asked for; from the first again after running out of memory."""

    def __init__(self, whole: tuple[Part, ...], names: Iterable[str], books: Iterable[Book]) -> None:
        self.whole = whole
        self._names, self._books, self._taken = iter(names), list(books), list[Part]()
        self._by_name = {part.name: part for part in whole}

    def wanted(self) -> Iterator[Part]:
        """Those that some task still wants scored."""
        yield from [part for part in self._taken if self._is_wanted(part)]
        for name in self._names:
            self._taken.append(part := self._by_name[name])
            for book in self._books:
                book.take(part)
            if self._is_wanted(part):
                yield part

    def _is_wanted(self, part: Part) -> bool:
        return any(book.wants(part) for book in self._books)


def modules_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of the linears of all parts."""
    return tuple(name for part in parts for group in part.groups for name in group.modules)


def _out_of_memory(error: torch.OutOfMemoryError) -> str:
    return (
        "Out of GPU memory: "
        + str(error).partition("Tried to allocate")[2].partition(". ")[0].strip()
        + " more were needed."
    )


def _measured(part: Part, books: Sequence[Book], waiting: Sequence[_Waiting]) -> tuple[Part, dict[str, Measured]]:
    """Wait for a part's groups: the scores of each task, by size; or what went wrong."""
    by_group = [wait() for wait in waiting]
    result: dict[str, Measured] = {}
    for index, book in enumerate(books):
        found = [None if scores is None else scores[index] for scores in by_group]
        broken = next((scores for scores in found if isinstance(scores, NotFinite)), None)
        sizes = book.job(part).sizes
        whole = [scores for scores in found if not isinstance(scores, NotFinite)]
        result[book.task.task_id] = broken or {
            size: [None if scores is None else scores[size] for scores in whole] for size in sizes
        }
    return part, result


@contextmanager
def _calls(model: torch.nn.Module, modules: Sequence[str]) -> Generator[set[str]]:
    """Collect which of the modules a copy of the model, made meanwhile, calls: ModelOpt scores 0 what never ran."""
    called: set[str] = set()
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in modules
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _stock_scores(part: Part, label: str, scores: Mapping[str, Mapping[str, float | None]]) -> Measured:
    """A part's scores by size, from ModelOpt's by size and layer group."""
    for group in part.groups:
        if not all(math.isfinite(found[group.name] or 0.0) for found in scores.values()):
            return NotFinite(f"Layer group {group.name} under {label}: its score is NaN or infinite.")
    return {size: [found[group.name] for group in part.groups] for size, found in scores.items()}
