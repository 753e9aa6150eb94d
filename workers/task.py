"""Tasks, progress and pictures of a sweep: the plain values that driver and workers exchange."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final, Literal

from sweep.core.groups import ShapedGroup
from sweep.core.machine import Needs
from sweep.core.sizes import SIZES, n_samples_of
from sweep.formats.format import Format
from sweep.formats.recipe import Entry

_VISIT_COST: Final = 0.3  # of a task's quantizing and summing, in units of one product (GEMM)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model by content and precision. A worker keeps the last one that it loaded."""

    path: str  # checkpoint directory on the worker's machine
    revision: str  # hash of weights and config.json
    dtype: Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One recipe on one model and data set, in every calibration size that still lacks scores."""

    task_id: str
    label: str  # "wfp8_afp8/default", for people
    model: ModelSpec
    plan_id: str  # digest of the plan's largest size: equal ids share a capture
    method: Literal["gradient", "fisher", "kl_div"]
    engine: Literal["layerwise", "modelopt"]
    draws: int | None = None  # of method=fisher: labels drawn at each prediction
    quant_cfg: tuple[Entry, ...]  # ModelOpt's ordered entries
    format: Format  # of the groups' linears
    groups: tuple[ShapedGroup, ...]  # in the model's order
    cells: Mapping[str, str]  # cell id by size
    calibration: str | None = None  # size that finds the inputs' ranges; None: each size its own
    needs: Needs  # of the GPU that scores it

    @property
    def n_steps(self) -> int:
        """Layer groups to score, over all cells: the unit of progress."""
        return len(self.groups) * len(self.cells)

    @property
    def samples(self) -> tuple[str, ...]:
        """Sizes whose samples it needs, those that calibrate included."""
        return (*self.cells, *([self.calibration] if self.calibration is not None else []))

    @property
    def has_ranges_by_size(self) -> bool:
        """Whether each size has ranges of the inputs of its own."""
        return self.format.calibrates_inputs and self.calibration is None

    @property
    def cost(self) -> float:
        """Roughly its time on a part, scored together with other tasks, in products of all rows of the largest size."""
        sizes = [n_samples_of(size) / max(SIZES.values()) for size in self.cells]
        products = 0.0 if self.format.inputs is None else sum(sizes) if self.has_ranges_by_size else max(sizes)
        return _VISIT_COST + products

    @property
    def extensions(self) -> frozenset[str]:
        """ModelOpt's CUDA extensions needed on a GPU: none for NVFP4, nor for our own engine's integers and FP8."""
        needed: set[str] = {"integers", "fp8"} if self.engine == "modelopt" else set()
        if any(each.has_dynamic_blocks and not each.is_nvfp4 for each in self.format.quantizers):
            needed.add("mx")
        return frozenset(needed)

    @property
    def inputs(self) -> frozenset[tuple[str, str | None]]:
        """Identities of the quantized inputs that scoring keeps, with their size where each has ranges of its own."""
        if self.format.inputs is None:
            return frozenset()
        sizes = self.cells if self.has_ranges_by_size else (None,)
        return frozenset((self.format.input_id, size) for size in sizes)

    def shares_capture_with(self, other: "Task") -> bool:
        """Whether a worker can score both tasks from one capture, layer by layer."""
        return self.captured == other.captured and self.engine == "layerwise"

    @property
    def captured(self) -> tuple[Hashable, ...]:
        """What tasks have in common that share a capture."""
        return self.model, self.plan_id, self.groups, self.engine, self.method, self.draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A worker's progress with a task; the layer groups that it counts are on disk already."""

    task_id: str
    done: int  # layer groups of the parts assigned so far, over all cells of the task
    found: int  # of these the ones that were in the store before
    assignment: int = 0  # number of the assignment: several workers may score parts of one task
    failure: str | None = None  # why the task has ended without all its scores
    warning: str | None = None  # for the user

    def after(self, earlier: "Progress | None") -> "Progress":
        """This progress, with the warning of an earlier one that has not been reported yet."""
        return self if earlier is None or self.warning is not None else replace(self, warning=earlier.warning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The progress of a whole sweep, for displays and metrics."""

    trials: Mapping[str, int]  # of the grid, by state: planned, running, done, failed, skipped
    groups_done: int  # layer groups of this run, over all cells
    groups_total: int
    groups_scored: int  # of those done, the ones that were not in the store before
    failed_trials: int  # in this run
    queue: int  # trials that wait for a worker
    models: int  # distinct models of this run's tasks
    eta_seconds: float | None
    trial_seconds: tuple[float, ...]  # of the trials that have ended since the last picture


def part_names(task: Task) -> tuple[str, ...]:
    """Names of a task's parts, in the model's order."""
    parts = [group.part for group in task.groups]
    return tuple(name for name, _ in groupby(parts))
