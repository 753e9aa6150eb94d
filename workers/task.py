"""What the driver asks of a worker: plain values that travel between processes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final, Literal

from sweep.core.groups import GroupSpec
from sweep.core.machine import Needs
from sweep.core.sizes import SIZES

_VISIT_COST: Final = 0.3  # of a task's quantizing and summing beside one product


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model, by content and precision. A worker keeps the last one it loaded."""

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
    method: Literal["gradient", "kl_div"]
    engine: Literal["layerwise", "modelopt"]
    quant_cfg: tuple[Mapping[str, Any], ...]  # ModelOpt's ordered entries
    algorithm: str
    fused: bool  # linears of a group share ranges of whole tensors and scales of the inputs; False too where it makes no difference
    weight_attributes: Mapping[str, Any] | None  # ModelOpt's QuantizerAttributeConfig fields; None: left unquantized
    input_attributes: Mapping[str, Any] | None
    calibrates_inputs: bool  # the input quantizer has a static range: scores depend on the calibration size
    effective_bits: float  # bits a weight, block scales counted
    groups: tuple[GroupSpec, ...]  # in the model's order
    cells: Mapping[str, str]  # cell id by size
    needs: Needs  # of the GPU that scores it

    @property
    def n_steps(self) -> int:
        """Layer groups to score, over all cells: the unit of progress."""
        return len(self.groups) * len(self.cells)

    @property
    def cost(self) -> float:
        """About its time on a part beside others, in products of all rows of the largest size."""
        sizes = [SIZES[size] / max(SIZES.values()) for size in self.cells]
        products = 0.0 if self.input_attributes is None else sum(sizes) if self.calibrates_inputs else max(sizes)
        return _VISIT_COST + products

    @property
    def extensions(self) -> frozenset[str]:
        """ModelOpt's CUDA extensions that a GPU needs for it; NVFP4 and our own engine's integers and FP8 need none."""
        needed: set[str] = {"integers", "fp8"} if self.engine == "modelopt" else set()
        for attributes in (self.weight_attributes, self.input_attributes):
            blocks: Mapping[Any, Any] = (attributes or {}).get("block_sizes") or {}
            if (
                attributes is not None
                and blocks.get("type") == "dynamic"
                and (attributes.get("num_bits"), blocks.get("scale_bits")) != ((2, 1), (4, 3))
            ):
                needed.add("mx")
        return frozenset(needed)

    def shares_capture_with(self, other: "Task") -> bool:
        """Whether a worker can score both in one visit to each layer."""
        mine, others = ((task.model, task.plan_id, task.groups, task.engine, task.method) for task in (self, other))
        return mine == others and self.engine == "layerwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a worker is with a task; what it counts is on disk already."""

    task_id: str
    done: int  # layer groups of the parts that it took, over all cells of the task
    found: int  # of them those that were in the store before
    lease: int = 0  # under which: several workers may be at one task
    failure: str | None = None  # why the task has ended without all its scores
    warning: str | None = None  # what the person who watches should know

    def after(self, earlier: "Progress | None") -> "Progress":
        """This progress, with an earlier one's warning if that was not told yet."""
        return self if earlier is None or self.warning is not None else replace(self, warning=earlier.warning)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """How far a sweep is: what a person wants to know of it at a glance."""

    trials: Mapping[str, int]  # of the grid, by state: planned, running, done, failed, skipped
    groups_done: int  # layer groups of this run, over all cells
    groups_total: int
    groups_scored: int  # of those done, the ones that were not in the store before
    failed_trials: int  # in this run
    queue: int  # trials that wait for a worker
    models: int  # that this run's tasks are of
    eta_seconds: float | None
    trial_seconds: tuple[float, ...]  # of the trials that have ended since the last picture


def part_names(task: Task) -> tuple[str, ...]:
    """Names of a task's parts, in the model's order."""
    return tuple(name for name, _ in groupby(group.part for group in task.groups))
