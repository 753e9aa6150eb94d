"""The work, the memory and the rows of tasks that share a capture, counted as the engines do them."""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from sweep.core.batches import ANSWER, Batch, Plan
from sweep.core.groups import Linear, Part, ShapedGroup, is_vision, part_of, parts_of
from sweep.core.machine import Workers
from sweep.core.sizes import n_samples_of
from sweep.plan.costs import COSTS, FILE_BYTES, ROW_BYTES, SAMPLE_BYTES, SEARCHES, STOCK_PASSES, Work
from sweep.plan.model import Model
from sweep.plan.trials import SweepPlan
from workers.model import memory
from workers.task import Task

_BACKWARD: Final = 2.5  # of attention, in forward passes; of a linear it costs as much as its forward pass
_UNITS_EACH: Final = 4  # pieces of work a worker, at least: see sweep.run.task_queue
_GPU_SHARE: Final = 0.97  # of a GPU's memory that is free for a worker


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    """One pass of a recipe over rows: of every size, or of one if each has its own range of the inputs."""

    task: Task
    size: str  # the largest of its sizes
    key: tuple[str, str]  # of the quantized inputs: equal for equal ones


class Family:
    """Tasks that share a capture, and what is known of their model, data and workers."""

    def __init__(self, tasks: Sequence[Task], plan: SweepPlan, workers: Workers) -> None:
        self.tasks, self._workers = tasks, workers
        self._costs = COSTS[workers.device]
        self._first = first = tasks[0]
        self._plan: Plan = plan.plans[first.plan_id]
        self._groups, self._parts = first.groups, parts_of(first.groups)
        self._structure = Model(Path(first.model.path)).structure
        self._typed_gb = plan.trials[0].config.sensitivity.memory_gb
        self._n_rows: dict[tuple[str, bool], int] = {}  # by size, and whether they are of pictures
        self._sizes = {size for task in tasks for size in task.samples}
        self.revision, self.dtype = first.model.revision, first.model.dtype
        self._largest = max(self._sizes, key=n_samples_of)

    @property
    def model_bytes(self) -> int:
        """Of the weights, in the dtype of the sweep."""
        return self._structure.parameters * memory.itemsize_of(self.dtype)

    @property
    def typical(self) -> tuple[int, tuple[int, int]]:
        """Rows of the largest batch, and inputs and outputs of the linear that a product is measured with."""
        covered = [linear for linear in self._linears if part_of(linear.name)[1] is not None] or self._linears
        widest = max(covered, key=lambda linear: linear.n_inputs * linear.n_outputs)
        return max(sum(batch.lengths) for batch in self._batches(self._largest)), (widest.n_inputs, widest.n_outputs)

    # Time

    @cached_property
    def capture(self) -> Work:
        """Of each worker: the passes of the unquantized model that it makes before, or between, scores."""
        if self._first.engine == "modelopt":
            return Work()
        if self._first.method == "kl_div":
            return self._passes()
        work = self._passes(backward=self._first.draws or 1)
        # Hidden states first, then each worker runs the layers from the top down to those that it scores.
        return work + self._passes() if len(self._windows) > 1 else work

    @cached_property
    def scoring(self) -> Work:
        """Of all workers together."""
        if self._first.engine == "modelopt":
            passes = [self._passes(size=size) for task in self.tasks for size in task.cells]
            return _total(passes).times(STOCK_PASSES) + self._rows_written
        if self._first.method == "kl_div":  # and each recipe runs the layers on the way to its groups
            work = _total(map(self._divergence, self._groups)) + self._passes().times(len(self.tasks))
            return work + self._rows_written
        return _total(map(self._group, self._groups)) + self._rows_written

    @property
    def share(self) -> float:
        """The largest share of the scoring that one worker does: layers are whole, few layers are split by recipes."""
        n_parts, count = len(self._parts), self._workers.count
        if self._first.engine == "modelopt":
            return math.ceil(len(self.tasks) / count) / len(self.tasks)
        n_slices = len(self.tasks)
        if self._first.method != "kl_div":
            n_slices = min(n_slices, 1 if count == 1 else math.ceil(_UNITS_EACH * count / n_parts))
        return math.ceil(n_parts * n_slices / count) / (n_parts * n_slices)

    def _passes(self, *, backward: int = 0, size: str | None = None) -> Work:
        """A forward pass of the model, with the loss, and so many backward passes."""
        costs, size = self._costs, size or self._largest
        batches = self._batches(size)
        vision_learns = any(is_vision(group.name) for group in self._groups)
        products = values = 0.0
        for linear in self._linears:
            n_rows, in_vision = self._rows(linear.name, size), is_vision(linear.name)
            passes = 1 + backward * (vision_learns or not in_vision)
            products += n_rows * linear.n_inputs * linear.n_outputs * passes
            values += n_rows * (linear.n_inputs + linear.n_outputs) * costs.activation * passes / 2
        attention = sum(map(_attended, batches)) * 2 * self._hidden * self._n_layers
        products += attention * costs.attention * (1 + backward * _BACKWARD)
        n_passes = 1 + backward
        work = Work(products, values, len(batches) * self._n_layers * costs.layer * n_passes / 2)
        return work + self._head(size, n_passes)

    def _head(self, size: str, n_passes: int) -> Work:
        """The output layer on every token, and the loss."""
        n_logits = self._rows("", size) * self._structure.vocabulary
        return Work(n_logits * self._hidden * n_passes, n_logits * self._costs.logit * n_passes / 2)

    def _columns(self) -> list[_Column]:
        found: list[_Column] = []
        for task in self.tasks:
            for size in task.cells if task.has_ranges_by_size else [max(task.cells, key=n_samples_of)]:
                ranges = (task.calibration or size) if task.format.calibrates_inputs else ""
                found.append(_Column(task=task, size=size, key=(task.format.input_id, ranges)))
        return found

    def _group(self, group: ShapedGroup) -> Work:
        """One layer group by gradients: x dW^T a weight format, dx Q(W)^T a recipe, and the sums of their squares."""
        costs, elements = self._costs, group.weight_elements
        weights: dict[str, tuple[Task, int]] = {}  # rows of each format of the weights
        inputs: dict[tuple[str, str], tuple[Task, int]] = {}
        work = Work()
        for column in self._columns():
            chosen, n_rows = column.task.format, self._rows(group.name, column.size)
            weight_key = chosen.weight_id if chosen.algorithm == "max" else f"{column.task.task_id} {column.size}"
            weights[weight_key] = column.task, max(n_rows, weights.get(weight_key, (column.task, 0))[1])
            if chosen.inputs is not None:
                inputs[column.key] = column.task, max(n_rows, inputs.get(column.key, (column.task, 0))[1])
                work += Work(n_rows * elements)
            # A column squares and sums two values an output; one a draw and one more, where labels are drawn.
            sums = 1.0 if self._first.draws is None else (1 + self._first.draws) / 2
            work += Work(0.0, n_rows * group.n_outputs * sums, len(group.modules) * costs.column)
        for task, n_rows in weights.values():
            n_quantized, n_products = SEARCHES[task.format.algorithm]
            each = (costs.quantized(task.format.weight) + costs.weight) * n_quantized
            searched = n_products * self._rows(group.name, task.calibration or max(task.cells, key=n_samples_of))
            products = elements * (searched + (0 if task.format.weight is None else n_rows))
            work += Work(products, elements * each, len(group.modules) * costs.visit * max(1.0, n_quantized / 6))
        for task, n_rows in inputs.values():
            work += Work(0.0, n_rows * group.n_inputs * costs.quantized(task.format.inputs), costs.visit)
        return work

    def _divergence(self, group: ShapedGroup) -> Work:
        """One layer group by KL divergence: each recipe runs the model again, from the group's layer on."""
        costs, work = self._costs, Work()
        first = 0 if group.layer_index is None or is_vision(group.name) else group.layer_index
        left = 1 - first / max(1, self._n_layers)
        for column in self._columns():
            passes = self._passes(size=column.size)
            head, n_predictions = self._head(column.size, 1), self._plan.n_predictions(column.size)
            n_logits = n_predictions * self._structure.vocabulary
            python = passes.python * costs.replayed
            layers = Work(passes.products - head.products, passes.values - head.values, python)
            work += layers.times(left) + Work(n_logits * self._hidden, n_logits * costs.divergence)
            chosen, n_rows = column.task.format, self._rows(group.name, column.size)
            values = group.weight_elements * costs.quantized(chosen.weight)
            work += Work(0.0, values + n_rows * group.n_inputs * costs.quantized(chosen.inputs))
            work += Work(python=len(group.modules) * costs.visit)
        return work

    @property
    def _rows_written(self) -> Work:
        return Work(python=sum(len(task.groups) * len(task.cells) for task in self.tasks) * self._costs.row)

    # Memory

    @cached_property
    def bytes(self) -> int:
        """The most memory of a worker on its device, but for the process itself."""
        work = self._workload
        if self._first.engine == "modelopt" or self._first.method == "kl_div":
            n_predictions = self._plan.n_predictions(self._largest)
            return memory.divergence_bytes(work, n_predictions, self._hidden)
        windows = self._windows
        states = (
            (len(windows) + work.n_gradients) * work.n_tokens * self._hidden * work.itemsize if len(windows) > 1 else 0
        )
        captured = [memory.capture_bytes(_groups_of(window), work) for window in windows]
        return memory.fixed_bytes(self._groups, work, reserve=0.0) + max(captured) + states

    @cached_property
    def _windows(self) -> list[list[Part]]:
        return memory.part_windows(self._parts, self._workload, self._room)

    @property
    def _room(self) -> float:
        """Bytes that a worker may use: see workers.service.scorer."""
        if self._typed_gb is not None:
            return self._typed_gb * 1e9
        nodes = [node for node in self._workers.nodes if node.unknown is None]
        if self._workers.device == "cpu":
            return min((node.memory_gb for node in nodes), default=math.inf) * 1e9 / self._workers.count
        sizes = [gpu.memory_gb for node in nodes for gpu in node.gpus]
        return min(sizes, default=math.inf) * self._workers.gpus_each * _GPU_SHARE * 1e9

    @cached_property
    def _workload(self) -> memory.Workload:
        return memory.workload(
            self._plan,
            self._plan.segments_of(self._largest),
            n_inputs=len(frozenset[tuple[str, str | None]]().union(*(task.inputs for task in self.tasks))),
            dtype=self.dtype,
            model_bytes=self.model_bytes,
            vocabulary=self._structure.vocabulary,
            draws=self._first.draws,
        )

    # Store

    @property
    def store_bytes(self) -> int:
        """Bytes of its cells: scores of samples, of all tokens and of each kind but prompts, which are the rest.

        Projections have as many bytes a sample and draw.
        """
        batches = self._batches(self._largest)
        has_pictures = any(batch.all_pictures for batch in batches)
        of_text = 2 + has_pictures + any(bool((batch.kinds == ANSWER).any()) for batch in batches)
        kinds = sum(2 if is_vision(group.name) else of_text for group in self._groups)  # of all rows of a cell
        kinds += len(self._groups) * (self._first.draws or 0)
        sizes = [n_samples_of(size) for task in self.tasks for size in task.cells]
        by_cell = FILE_BYTES + len(self._groups) * ROW_BYTES
        return round(len(sizes) * by_cell + sum(sizes) * kinds * SAMPLE_BYTES)

    # Shapes

    @cached_property
    def _linears(self) -> list[Linear]:
        """Linears of the model but for its output layer."""
        others = self._structure.other_head
        return [each for each in self._structure.linears if not each.name.endswith("lm_head") and each.name != others]

    @cached_property
    def _hidden(self) -> int:
        return min(linear.n_inputs for linear in self._linears if not is_vision(linear.name))

    @cached_property
    def _n_layers(self) -> int:
        return len({part_of(linear.name) for linear in self._linears if part_of(linear.name)[1] is not None})

    def _batches(self, size: str) -> list[Batch]:
        return [batch for segment in self._plan.segments[: self._plan.segments_of(size)] for batch in segment]

    def _rows(self, module: str, size: str) -> int:
        """Rows that a linear is called on: tokens or patches of the segments that hold a size."""
        key = size, is_vision(module)
        if key not in self._n_rows:
            batches = self._batches(size)
            self._n_rows[key] = sum(sum(batch.patch_counts if key[1] else batch.lengths) for batch in batches)
        return self._n_rows[key]


def families(tasks: Iterable[Task], plan: SweepPlan, workers: Workers) -> list[Family]:
    """Tasks in families of one model, data set, method, engine and set of groups: a worker captures once for each."""
    found: dict[tuple[Hashable, ...], list[Task]] = {}
    for task in tasks:
        found.setdefault(task.captured, []).append(task)
    return [Family(family, plan, workers) for family in found.values()]


def _total(works: Iterable[Work]) -> Work:
    return sum(works, start=Work())


def _attended(batch: Batch) -> int:
    """Pairs of tokens that attention multiplies: of whole rows, whatever samples are in them."""
    n_rows, length = batch.tensors["input_ids"].shape
    return n_rows * length**2


def _groups_of(parts: Iterable[Part]) -> list[ShapedGroup]:
    return [group for part in parts for group in part.groups]
