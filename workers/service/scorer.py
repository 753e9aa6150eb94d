"""A worker without Ray: it holds a model and its capture, scores tasks together, and stores finished parts."""

import math
import socket
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from torch import nn

from sweep.core.batches import Plan
from sweep.core.errors import SweepError, Unfit
from sweep.core.groups import Part, ShapedGroup, parts_of
from sweep.core.machine import Gpu, Hardware, has_compiler, memory_gb, n_cores
from sweep.core.sizes import n_samples_of
from sweep.store.store import Store
from workers.model import loading, memory
from workers.model.hooks import inputs_seen
from workers.quant.modelopt import auto_quantize_scores
from workers.scoring.capture import Rows, capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.kl import KlEngine
from workers.scoring.scores import GroupScore, Measured, NotFinite, Scores
from workers.scoring.windows import captures
from workers.service.clock import Clock
from workers.service.node import first_alone
from workers.service.rows import TaskWriter
from workers.service.shared_pictures import fetch_pictures
from workers.service.task_state import TaskState
from workers.service.writers import Writers
from workers.task import ModelSpec, Progress, Task

_MAX_HALVINGS = 8
_MAX_WRITERS = 8  # that put parts on disk while the next layer is scored

_Waiting = Callable[[], list[Scores] | None]  # see Engine.score_group
_Start = Callable[[ShapedGroup, Sequence[Job]], _Waiting]
_MeasuredPart = tuple[Part, Sequence[tuple[TaskState, Measured]]]  # of each task that still wanted the part


@dataclass(frozen=True, slots=True)
class _Captured:
    """A capture that is kept for later tasks."""

    plan_id: str
    draws: int | None
    n_segments: int
    modules: frozenset[str]
    rows: Mapping[str, Rows]

    def holds(self, task: Task, n_segments: int, modules: Collection[str]) -> bool:
        """Whether these linears' rows are there, of a task's data and draws in that many segments."""
        is_alike = (self.plan_id, self.draws) == (task.plan_id, task.draws)
        return is_alike and n_segments <= self.n_segments and self.modules.issuperset(modules)


class Scorer:
    """Scores tasks; loads a model only when tasks need another one, and captures only what no earlier task captured."""

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
            memory_gb: memory to use on each device, 1e9 bytes; None: what is free on the GPU, or an even share of the
                machine's.
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
        self._model = nn.Module()  # none yet
        self._model_spec: ModelSpec | None = None
        self._vocabulary = 0
        self._engines: dict[torch.device, Engine] = {}  # one for each device that holds layers
        self._captured: _Captured | None = None
        self._divergence: tuple[tuple[str, int, tuple[str, ...], frozenset[int]], KlEngine] | None = None
        # Beside a GPU, threads would wait for Python's lock as long as the GPU scores, and it for them.
        self._writers = Writers(max(1, min(_MAX_WRITERS, n_cores() // n_workers - 1)), processes=device == "cuda")

    @staticmethod
    def is_device_fault(error: BaseException) -> bool:
        """Whether the process' CUDA context is lost, with all that it will ever compute."""
        return isinstance(error, torch.AcceleratorError) or (
            isinstance(error, RuntimeError) and "CUDA error" in str(error)
        )

    def info(self) -> dict[str, float | None]:
        """The worker's figures so far.

        Returns: `model_loads`; seconds: `load_seconds`, `capture_seconds` (the unquantized model's passes),
            `busy_seconds` (with tasks, captures included); `first_at` and `last_at`: when it was first and last busy,
            seconds since 1970;
            `peak_gb`: the most memory, in 1e9 bytes, that was allocated over all its GPUs; on a CPU, that was resident.
        """
        peak_gb = (
            sum(torch.cuda.max_memory_allocated(index) for index in range(self._n_gpus)) / 1e9
            if self.device.type == "cuda"
            else getrusage(RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        )
        return {"model_loads": self.model_loads, "peak_gb": peak_gb, **self._clock.figures()}

    def hardware(self) -> Hardware:
        """Capabilities of its own GPUs, and of this machine."""
        gpus: list[Gpu] = []
        for index in range(self._n_gpus if self.device.type == "cuda" else 0):
            found = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(found.name, found.total_memory / 1e9, (found.major, found.minor)))
        return Hardware(host=socket.gethostname(), gpus=tuple(gpus), has_nvcc=has_compiler(), memory_gb=memory_gb())

    def gpu_memory(self) -> tuple[int, int] | None:
        """Bytes of its GPUs that are used, and that they have; None on a CPU."""
        if self.device.type == "cpu":
            return None
        memories = [torch.cuda.mem_get_info(index) for index in range(self._n_gpus)]
        total = sum(total for _, total in memories)
        return total - sum(free for free, _ in memories), total

    def load(self, spec: ModelSpec) -> None:
        """Hold this model, and no other."""
        if self.device.type == "cpu":  # here, since it is a setting of the thread that computes
            torch.set_num_threads(1)  # more threads beside other workers cost 60x, and would change bits
        if spec == self._model_spec:
            return
        self._model, self._model_spec, self._captured, self._divergence = nn.Module(), None, None, None
        self._engines.clear()
        with self._clock.timed("load_seconds"), first_alone(Path(spec.path)):
            try:
                model = loading.load(
                    Path(spec.path), dtype=getattr(torch, spec.dtype), device=str(self.device), n_gpus=self._n_gpus
                )
            except SweepError as error:
                raise Unfit(str(error)) from error
        self._model, self._model_spec = model, spec
        self._vocabulary = model.config.get_text_config().vocab_size
        self.model_loads += 1

    def score(self, tasks: Sequence[Task], plan: Plan, names: Iterable[str] | None = None) -> Iterator[Progress]:
        """Score the parts that the tasks' cells lack, layer by layer; each is on disk before its progress is yielded.

        Args:
            tasks: of one model, plan, method, engine and set of layer groups; a layer is scored for all of them at a
                time.
            plan: of the tasks' data set.
            names: of the parts to score, asked for one by one; None: all. The worker that finds all parts of a cell in
                the store completes it.

        Yields: progress of each task; a task that meets a NaN or an infinity ends with a failure, the others go on.
        """
        with self._clock.timed("busy_seconds"), self._writers.tidied():
            yield from self._score(tasks, plan, names)

    def _score(self, tasks: Sequence[Task], plan: Plan, names: Iterable[str] | None) -> Iterator[Progress]:
        self.load(tasks[0].model)
        fetch_pictures(plan, self.store)
        assigned = _Assignment(tasks, plan, names, self.store)
        for state in assigned.states:
            sample_predictions = {size: plan.sample_predictions(size) for size in state.task.cells}
            self._writers.open(TaskWriter(state.task, sample_predictions, assigned.whole, self.store.uri))
            yield state.progress()
        while True:
            try:
                yield from self._written(self._measured_parts(assigned))
                break
            except torch.OutOfMemoryError as error:  # what is in the store stays; go on with half the window
                traceback.clear_frames(error.__traceback__)  # they hold the memory
                self._captured = self._divergence = None
                torch.cuda.empty_cache()
                text = f"Out of GPU memory: {_allocation(error)} more were needed."
                if self._halvings == _MAX_HALVINGS:
                    advice = "Choose a smaller dataset.size or dataset.max_tokens, or a larger GPU."
                    raise SweepError(f"{text} {advice}") from error
                self._halvings += 1
                warning = f"{text} Going on with a window of 1/{2**self._halvings} of the room."
                yield replace(assigned.states[0].progress(), warning=warning)
        closed = [self._writers.close(state.task.task_id, complete=state.failure is None) for state in assigned.states]
        for state, done in zip(assigned.states, closed, strict=True):
            done.result()
            yield state.progress()

    def _written(self, measured: Iterable[_MeasuredPart]) -> Iterator[Progress]:
        """Put parts into the store while the next ones are scored."""
        # A task, a part's name, and the sizes that have the part once it is written.
        writing: deque[tuple[TaskState, str, Collection[str], Future[None]]] = deque()

        def written() -> Progress:
            state, name, sizes, done = writing.popleft()
            done.result()
            for size in sizes:
                state.done[size].add(name)
            return state.progress()

        for part, found in measured:
            for state, scores in found:
                if isinstance(scores, NotFinite):
                    state.failure = state.failure or str(self._explained(scores))
                    yield state.progress()
                elif state.failure is None:
                    done = self._writers.write(state.task.task_id, part.name, scores)
                    writing.append((state, part.name, scores.keys(), done))
            # Wait for the layer before: so at most one scored layer is lost with this process.
            while writing and (writing[0][3].done() or writing[0][1] != part.name):
                yield written()
        while writing:
            yield written()

    def _measured_parts(self, assigned: "_Assignment") -> Iterator[_MeasuredPart]:
        """Start the groups of each part, and wait for their scores.

        On a GPU a part is started before the scores of the part before are waited for, so that the GPU always has work.
        """
        task = assigned.states[0].task
        if task.engine == "modelopt":
            yield from self._auto_quantize(assigned)
            return
        started: deque[tuple[Part, list[TaskState], list[_Waiting]]] = deque()
        for part, start in (self._divergences if task.method == "kl_div" else self._layerwise)(assigned):
            wanting = [state for state in assigned.states if state.wants(part)]
            if wanting:
                jobs = [state.job(part) for state in wanting]
                started.append((part, wanting, [start(group, jobs) for group in part.groups]))
            if len(started) > (self.device.type == "cuda"):
                yield _measured(*started.popleft())
        for rest in started:
            yield _measured(*rest)

    def _layerwise(self, assigned: "_Assignment") -> Iterator[tuple[Part, _Start]]:
        """method=gradient and fisher: each part, and a function that starts the scoring of one of its groups."""
        for window, rows in self._windows(assigned):

            def start(group: ShapedGroup, jobs: Sequence[Job], rows: Mapping[str, Rows] = rows) -> _Waiting:
                weights = {name: self._model.get_parameter(f"{name}.weight").detach() for name in group.modules}
                device = weights[group.name].device
                if device not in self._engines:
                    self._engines[device] = Engine(device)
                return self._engines[device].score_group(weights, rows, jobs)

            for part in window:
                yield part, start

    def _divergences(self, assigned: "_Assignment") -> Iterator[tuple[Part, _Start]]:
        """method=kl_div: the same, from one pass of the unquantized model, which is kept for later tasks."""
        sizes = frozenset(n_samples_of(size) for state in assigned.states for size in state.task.samples)
        key = (assigned.states[0].task.plan_id, len(assigned.segments), modules_of(assigned.whole), sizes)
        for part in assigned.wanted():
            self._captured = None
            if self._divergence is None or self._divergence[0] != key:
                self._divergence = None  # frees its memory first
                with self._clock.timed("capture_seconds"):
                    self._divergence = key, KlEngine(self._model, assigned.segments, key[2], sizes)
            engine = self._divergence[1]
            yield part, lambda group, jobs, engine=engine: engine.score_group(group.modules, jobs)

    def _windows(self, assigned: "_Assignment") -> Iterator[tuple[Sequence[Part], Mapping[str, Rows]]]:
        """The parts still to be scored, as they are assigned, with the captured rows of their linears.

        If memory holds all parts that the cells lack, these are captured, for later assignments too. Else an even share
        of the parts is taken at once, and captured in as many windows as it needs.
        """
        tasks, plan = [state.task for state in assigned.states], assigned.plan
        work = memory.workload(
            plan,
            len(assigned.segments),
            n_inputs=len(frozenset().union(*(task.inputs for task in tasks))),
            dtype=tasks[0].model.dtype,
            model_bytes=self._model_bytes(),
            vocabulary=self._vocabulary,
            draws=tasks[0].draws,
        )

        def windows(parts: Sequence[Part]) -> list[list[Part]]:
            return memory.part_windows(parts, work, self._memory_bytes(), self._halvings)

        wanted = assigned.wanted()
        lacking = assigned.lacking()
        captured, n_segments = self._captured, len(assigned.segments)
        held = captured is not None and captured.holds(tasks[0], n_segments, modules_of(lacking))
        if held or not lacking or len(windows(lacking)) == 1:
            for part in wanted:  # among those lacking, unless its file was damaged
                yield [part], self._rows(assigned, modules_of(lacking if part in lacking else [*lacking, part]))
            return
        while several := list(islice(wanted, math.ceil(len(assigned.whole) / self._n_workers))):
            if len(found := windows(several)) == 1:
                yield several, self._rows(assigned, modules_of(several))
                continue
            self._captured = self._divergence = None
            named = [modules_of(window) for window in found]
            passes = captures(self._model, assigned.segments, named, tasks[0].draws)
            for index, rows in self._clock.timed_items("capture_seconds", passes):
                yield found[index], rows

    def _memory_bytes(self) -> float:
        """Bytes that scoring may use on one device: a window's layers may all lie there."""
        if self._memory_gb is not None:
            return self._memory_gb * 1e9
        if self.device.type == "cuda":
            return min(
                torch.cuda.mem_get_info(index)[0] + torch.cuda.memory_reserved(index) for index in range(self._n_gpus)
            )
        return memory_gb() * 1e9 / self._n_workers

    def _model_bytes(self) -> int:
        """Bytes of the weights on one device: the model is spread evenly."""
        n_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())
        return n_bytes // self._n_gpus

    def _rows(self, assigned: "_Assignment", modules: tuple[str, ...]) -> Mapping[str, Rows]:
        """The captured rows of these modules at least, from the kept capture if it holds them."""
        task, n_segments, held = assigned.states[0].task, len(assigned.segments), self._captured
        if held is None or not held.holds(task, n_segments, modules):
            self._captured = self._divergence = held = None  # frees its memory first
            with self._clock.timed("capture_seconds"):
                rows = capture(self._model, assigned.segments, modules, task.draws)
            self._captured = held = _Captured(task.plan_id, task.draws, n_segments, frozenset(modules), rows)
        return held.rows

    def _explained(self, error: NotFinite) -> NotFinite:
        """The error, naming the broken weight if there is one.

        A NaN travels forward and backward, and first shows in another layer's score.
        """
        broken = (name for name, parameter in self._model.named_parameters() if not torch.isfinite(parameter).all())
        name = next(broken, None)
        if name is None or name.removesuffix(".weight") in str(error):
            return error
        return NotFinite(f"{error} The checkpoint's {name} holds NaN or infinite values.")

    def _auto_quantize(self, assigned: "_Assignment") -> Iterator[_MeasuredPart]:
        """The cross-check: ModelOpt's own searcher, one recipe and size at a time."""
        wanted = list(assigned.wanted())
        for state in assigned.states if wanted else ():
            task = state.task
            covered = [name for group in task.groups for name in group.modules]
            scores: dict[str, dict[str, float | None]] = {}
            for size in task.cells:
                called: set[str] = set()  # by the copy of the model that ModelOpt makes: it scores 0 for the others
                with inputs_seen(self._model, covered, lambda name, _, called=called: called.add(name)):
                    try:
                        batches = list(assigned.plan.batches(size))
                        found = auto_quantize_scores(
                            self._model, task.quant_cfg, task.format.algorithm, batches, covered
                        )
                    except AssertionError as error:  # ModelOpt's calibrator met a NaN
                        yield wanted[0], [(state, NotFinite(f"{task.label}: ModelOpt {error}."))]
                        break
                scores[size] = {group.name: _joined(found, group, called) for group in task.groups}
            for part in wanted if len(scores) == len(task.cells) else ():
                yield part, [(state, _auto_quantize_scores(part, task.label, scores))]


class _Assignment:
    """Tasks and their parts, taken as they are asked for; from the first again after running out of memory."""

    def __init__(self, tasks: Sequence[Task], plan: Plan, names: Iterable[str] | None, store: Store) -> None:
        """Look up what the store has; see Scorer.score."""
        self.plan, self.whole = plan, parts_of(tasks[0].groups)
        self.states = [TaskState(task, plan, self.whole, store) for task in tasks]
        self.segments = plan.segments[: max(state.n_segments for state in self.states)]
        self._by_name = {part.name: part for part in self.whole}
        self._names, self._taken = iter(self._by_name if names is None else names), list[Part]()

    def wanted(self) -> Iterator[Part]:
        """The parts that are still to be scored for some task."""
        yield from [part for part in self._taken if self._is_wanted(part)]
        for name in self._names:
            self._taken.append(part := self._by_name[name])
            for state in self.states:
                state.take(part)
            if self._is_wanted(part):
                yield part

    def lacking(self) -> list[Part]:
        """All parts of the model that a cell of some task lacks, assigned or not."""
        return [part for part in self.whole if self._is_lacking(part)]

    def _is_lacking(self, part: Part) -> bool:
        return any(state.lacks(part) for state in self.states)

    def _is_wanted(self, part: Part) -> bool:
        return any(state.wants(part) for state in self.states)


def modules_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of the linears of all parts."""
    return tuple(name for part in parts for group in part.groups for name in group.modules)


def _allocation(error: torch.OutOfMemoryError) -> str:
    """The size that could not be allocated."""
    return str(error).partition("Tried to allocate")[2].partition(". ")[0].strip()


def _measured(part: Part, states: Sequence[TaskState], waiting: Sequence[_Waiting]) -> _MeasuredPart:
    """Wait for a part's groups: the scores of each task by size, or NotFinite."""
    by_group = [wait() for wait in waiting]
    result: list[tuple[TaskState, Measured]] = []
    for index, state in enumerate(states):
        found = [None if scores is None else scores[index] for scores in by_group]
        broken = next((scores for scores in found if isinstance(scores, NotFinite)), None)
        whole = [scores for scores in found if not isinstance(scores, NotFinite)]
        by_size: dict[str, list[GroupScore | float | None]] = {}
        for size in state.job(part).sizes:
            by_size[size] = [None if scores is None else scores[size] for scores in whole]
        result.append((state, broken or by_size))
    return part, result


def _joined(scores: Mapping[str, float], group: ShapedGroup, called: Collection[str]) -> float | None:
    """A layer group's score: the sum of those of ModelOpt's groups that it joins, None where no module was called."""
    return None if set(called).isdisjoint(group.modules) else sum(scores.get(name, 0.0) for name in group.modules)


def _auto_quantize_scores(part: Part, label: str, scores: Mapping[str, Mapping[str, float | None]]) -> Measured:
    """A part's scores by size, from ModelOpt's by size and layer group."""
    names = [group.name for group in part.groups]
    for name in names:
        if not all(math.isfinite(found[name] or 0.0) for found in scores.values()):
            return NotFinite.of(name, label, "its score is NaN or infinite.")
    return {size: list(map(found.__getitem__, names)) for size, found in scores.items()}
