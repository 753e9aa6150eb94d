"""From composed points to trials (as asked for), cells (by content) and tasks (the work that scores them).

Needs no GPU and, once its facts are cached on disk, no heavy import: a run that finds nothing left to do takes one
second.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as cached
from importlib import metadata
from typing import Any, Final

from sweep.config.schema import ModelConfig, SweepConfig
from sweep.core import cache
from sweep.core.batches import Plan
from sweep.core.coverage import ModelCoverage, coverage_of, linear_kind, percent
from sweep.core.errors import InvalidRecipe, SweepError
from sweep.core.groups import ShapedGroup, parts_of
from sweep.core.json import Json
from sweep.core.machine import Device, Hardware, Needs
from sweep.core.sizes import n_samples_of, size_name
from sweep.formats.format import Format
from sweep.formats.recipe import Recipe, quantizer_for, resolve
from sweep.plan.model import Model, checkpoint_dir
from sweep.plan.own_samples import Writing
from sweep.plan.samples import samples_to_boundary
from workers.data.batches import make_plan
from workers.model import memory
from workers.task import ModelSpec, Task

# 1: summed loss, delta form, canonical plan of at most 2,048 tokens a batch, logits of 512 rows at a time.
SCORE_VERSION: Final = 1
# Of formats whose weights' scales are rounded to bfloat16 (Format.rounds_scales), beside SCORE_VERSION, which all have.
# 1: rounded before the codes are chosen; until then they were float32, and a runtime rounded them as it loaded them.
ROUNDED_SCALES_VERSION: Final = 1
# Of method=fisher, beside those: how labels are drawn and projections summed (workers.scoring.labels).
# 1: Philox numbers by sample, draw and position; softmax in fp32, in steps of 2^-46.
DRAWING_VERSION: Final = 1
# Of method=kl_div, beside those. 1: layers in few kernels on a GPU (workers.model.fused), batches of a segment in one
# pass; until then transformers' layers, with other roundings. A CPU's scores stay, but a cell does not name its device.
KL_VERSION: Final = 1

_NVFP4_CAPABILITY: Final = (8, 9)  # of ModelOpt's kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTrial:
    """One point of the grid: its config, its identity, and the cell that answers it."""

    trial_id: str
    config: SweepConfig
    model_revision: str
    dataset_revision: str
    dtype: str  # that the model computes in: float32, bfloat16
    tp: int  # of its format: see Format.on_ranks
    calibration: int | None  # leading samples that find ranges of the inputs; None: those scored, or none
    cell_id: str | None  # None: no valid recipe, see reason
    task_id: str | None
    reason: str | None
    score_version: str  # by score_version

    @property
    def name(self) -> str:
        """For people: ``wfp8_afp8/default/large``, ``wint4_afp16/w_group128/awq_lite/fused/large``."""
        return f"{_label(self.config)}/{self.config.dataset.size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Everything a run needs to know before it starts."""

    trials: tuple[PlannedTrial, ...]  # in the order asked for
    tasks: Mapping[str, Task]  # by task id, with the cells of every size asked for
    plans: Mapping[str, Plan]  # by Task.plan_id
    windowed: frozenset[str]  # plans whose capture does not fit in a worker's memory at once
    # Elements of each model, by revision: all `parameters`, and by kind (sweep.core.coverage), which add up to them.
    models: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]  # what a user should know of the checkpoints

    @property
    def coverages(self) -> tuple[tuple[str, ModelCoverage], ...]:
        """What the trials cover of their models, each once, behind the model and its option: ``tiny, lm_only``."""
        found: list[tuple[str, ModelCoverage]] = []
        for trial in self.trials:
            if trial.task_id is None:
                continue
            option = trial.config.sensitivity.coverage
            groups = {group.name: group.weight_elements for group in self.tasks[trial.task_id].groups}
            covered = coverage_of(self.models[trial.model_revision], groups, option)
            found.append((f"{trial.config.model.name}, {option}", covered))
        return tuple(dict.fromkeys(found))

    def pending(self, finished: Iterable[str]) -> dict[str, Task]:
        """Tasks that still lack cells, each with only those."""
        done = set(finished)
        left: dict[str, Task] = {}
        for task_id, task in self.tasks.items():
            cells = {size: cell for size, cell in task.cells.items() if cell not in done}
            if cells:
                left[task_id] = replace(task, cells=cells)
        return left


def plan_sweep(points: Sequence[SweepConfig], device: Device, nodes: Sequence[Hardware] = ()) -> SweepPlan:
    """Resolve every point of a grid. What this machine can do does not matter: the workers may be on others.

    Args:
        points: composed configs.
        device: what the workers compute on; it decides the default precision.
        nodes: machines that have room for workers: they decide which recipes can run, and whether captures need
            windows. None: they are not known, and no recipe is refused on their account.

    Raises: SweepError: wrong input, or not one point of the grid makes a valid recipe.
    """
    planner = _Planner(points, device, nodes)
    trials = tuple(planner.trial(point) for point in points)
    if all(trial.cell_id is None for trial in trials):
        reasons = list(dict.fromkeys(f"{trial.name}: {trial.reason}" for trial in trials))
        raise SweepError(
            "Nothing can be scored.\n"
            + "\n".join(reasons[:10])
            + (f"\nand {len(reasons) - 10} more" if len(reasons) > 10 else "")
        )
    return SweepPlan(
        trials=trials,
        tasks=planner.tasks,
        plans=planner.plans,
        windowed=frozenset(planner.windowed),
        models=planner.elements(),
        notes=tuple(planner.notes()),
    )


@cached  # reading a package's metadata takes a millisecond
def version(package: str) -> str:
    """The installed version."""
    return metadata.version(package)


def score_version(chosen: Format, method: str) -> str:
    """The version of the arithmetic of a format's scores: ``1``, ``1+bf16_scales.1``, ``1+fisher.1``, ``1+kl_div.1``.

    What stands before the plus is every format's: scores that differ there are never mixed
    (sweep.store.integrity.revisions). What follows is that of the formats and the method concerned, alone.
    """
    own = [f"bf16_scales.{ROUNDED_SCALES_VERSION}"] if chosen.rounds_scales else []
    own += [f"fisher.{DRAWING_VERSION}"] if method == "fisher" else []
    own += [f"kl_div.{KL_VERSION}"] if method == "kl_div" else []
    return "+".join([str(SCORE_VERSION), *own])


def versions(score: str) -> dict[str, str]:
    """Versions of what can change a score. Args: score: by `score_version`."""
    return {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers", "ray", "pyarrow")} | {
        "score": score
    }


_DataKey = tuple[str | None, str]  # checkpoint, and data set without its size


class _Planner:
    """Finds each fact once, however many points ask for it."""

    def __init__(self, points: Sequence[SweepConfig], device: Device, nodes: Sequence[Hardware]) -> None:
        self.device: Device = device
        self.nodes = nodes
        self.tasks: dict[str, Task] = {}
        self.plans: dict[str, Plan] = {}
        self.windowed: set[str] = set()
        self._largest: dict[_DataKey, int] = {}
        for point in points:
            key = _data_key(point)
            needed = max(n_samples_of(point.dataset.size), point.calibration.n_samples or 0)
            self._largest[key] = max(self._largest.get(key, 0), needed)
        self._models: dict[str | None, Model] = {}
        self._data: dict[_DataKey, tuple[str, Plan]] = {}
        self._digests: dict[tuple[str, str], str] = {}
        self._coverage: dict[str, tuple[ShapedGroup, ...]] = {}

    def trial(self, point: SweepConfig) -> PlannedTrial:
        """Identify one point and enter its cell into the task of its recipe."""
        model = self._model(point.model)
        plan_id, plan = self._plan(point, model)
        digest = self._digest(plan_id, plan, point.dataset.size)
        cell_id, task_id, reason = None, None, None
        try:
            cell_id, task_id = self._enter(point, model, plan_id, digest)
        except InvalidRecipe as error:
            reason = str(error)
        asked = [
            point.model.name,
            model.revision,
            digest,
            point.dataset.name,
            point.dataset.size,
            point.quant_pair.name,
            point.quant_granularity.name,
        ]
        sensitivity = point.sensitivity
        asked += [
            sensitivity.coverage,
            sensitivity.lm_head,
            sensitivity.method,
            sensitivity.engine,
            point.model.dtype_on(self.device),
            cell_id,
        ]
        asked += _variant(point)
        calibration = None if task_id is None else self.tasks[task_id].calibration
        if calibration is not None:
            asked.append(f"calibrated on {calibration}")
        if sensitivity.draws is not None:
            asked.append(f"{sensitivity.draws} draws")
        name = f"{point.quant_pair.name}-{point.quant_granularity.name}-{point.dataset.size}"
        format_ = None if task_id is None else self.tasks[task_id].format
        return PlannedTrial(
            trial_id=f"{name}-{_hash(asked)[:10]}",
            config=point,
            model_revision=model.revision,
            dataset_revision=digest,
            dtype=point.model.dtype_on(self.device),
            tp=1 if format_ is None else format_.tp,
            calibration=None if calibration is None else n_samples_of(calibration),
            cell_id=cell_id,
            task_id=task_id,
            reason=reason,
            score_version=str(SCORE_VERSION) if format_ is None else score_version(format_, sensitivity.method),
        )

    def elements(self) -> dict[str, dict[str, int]]:
        """Elements of each model, by revision; see SweepPlan."""
        return {model.revision: elements_of(model) for model in self._models.values()}

    def notes(self) -> Iterator[str]:
        """What a user should know of each checkpoint; see Model.notes."""
        for model in self._models.values():
            tasks = [task for task in self.tasks.values() if task.model.revision == model.revision]
            groups = {group.name: group for task in tasks for group in task.groups}
            yield from model.notes(groups.values())

    def _enter(self, point: SweepConfig, model: Model, plan_id: str, digest: str) -> tuple[str, str]:
        recipe = recipe_of(point)
        groups = self._covered(model, recipe)
        _check_ranks(point, recipe.format, model, groups)
        _check_block_size(recipe.format, model, groups)
        dtype = point.model.dtype_on(self.device)
        common = {
            "score_version": SCORE_VERSION,
            "modelopt": version("nvidia-modelopt"),
            "model": model.revision,
            "recipe": recipe.id,
            "groups": [list(group.modules) for group in groups],
            "coverage": point.sensitivity.coverage,
            "method": point.sensitivity.method,
            "engine": point.sensitivity.engine,
            "dtype": dtype,
        }
        if recipe.format.is_fused:
            common["scales"] = "fused"
        if (own := score_version(recipe.format, point.sensitivity.method)) != str(SCORE_VERSION):
            common["score_version"] = own
        if point.sensitivity.draws is not None:
            common["draws"] = point.sensitivity.draws
        if recipe.format.tp > 1:
            common["tp"] = recipe.format.tp
        calibration = calibration_of(point, recipe.format)
        if calibration is not None:
            common["calibration"] = self._digest(plan_id, self.plans[plan_id], calibration)
        cell_id = _hash(common | {"data": digest})[:20]
        task_id = _hash(common | {"plan": plan_id})[:20]
        task = self.tasks.get(task_id)
        if task is None:
            task = Task(
                task_id=task_id,
                label=_label(point),
                model=ModelSpec(path=str(model.path), revision=model.revision, dtype=dtype),
                plan_id=plan_id,
                method=point.sensitivity.method,
                engine=point.sensitivity.engine,
                draws=point.sensitivity.draws,
                quant_cfg=recipe.quant_cfg,
                format=recipe.format,
                groups=groups,
                cells={},
                calibration=calibration,
                needs=Needs(),
            )
        needs = self._needs(point, replace(task, cells={point.dataset.size: cell_id}), model)
        needs = replace(needs, gpu_gb=max(needs.gpu_gb, task.needs.gpu_gb))  # of the other sizes
        self._check_nodes(needs)
        cells = {**task.cells, point.dataset.size: cell_id}
        ordered = {size: cells[size] for size in sorted(cells, key=n_samples_of)}
        self.tasks[task_id] = replace(task, cells=ordered, needs=needs)
        return cell_id, task_id

    def _needs(self, point: SweepConfig, task: Task, model: Model) -> Needs:
        """Requirements of a task on a GPU and its machine."""
        gpu_gb = self._gpu_gb(point, task, model)
        if self.device == "cpu":
            return Needs()
        blocks = [each for each in task.format.quantizers if each.has_dynamic_blocks]
        return Needs(
            capability=_NVFP4_CAPABILITY if any(each.is_nvfp4 for each in blocks) else (0, 0),
            nvcc=not all(each.is_nvfp4 for each in blocks),
            gpu_gb=gpu_gb,
        )

    def _gpu_gb(self, point: SweepConfig, task: Task, model: Model) -> float:
        """Memory that a GPU must have for one decoder layer at a time, or 0; note what does not fit at once.

        Raises: InvalidRecipe: it is more than the user lets a worker have.
        """
        typed_gb, share = point.sensitivity.memory_gb, point.cluster.gpus_per_worker
        if (typed_gb is None and self.device == "cpu") or task.engine == "modelopt" or task.method == "kl_div":
            return 0.0
        plan = self.plans[task.plan_id]
        parts = [part.groups for part in parts_of(task.groups)]
        model_bytes = model.structure.parameters * memory.itemsize_of(task.model.dtype)
        work = memory.workload(
            plan,
            max(map(plan.segments_of, task.samples)),
            n_inputs=len(task.inputs),
            dtype=task.model.dtype,
            model_bytes=model_bytes,
            vocabulary=model.structure.vocabulary,
            draws=task.draws,
        )
        # Of unlike GPUs the smallest decides about windows: taken for kept where it is not, a capture costs that GPU
        # seconds an assignment; taken for not kept where it is, only the first result comes later. Whether a task is
        # possible at all the largest decides: workers on the others leave the task to it (sweep.run.task_queue).
        sizes = [gpu.memory_gb for node in self.nodes for gpu in node.gpus]
        room_gb = min(sizes, default=math.inf) * share if typed_gb is None else typed_gb
        if memory.whole_bytes(task.groups, work) > room_gb * 1e9:
            self.windowed.add(task.plan_id)
        needed_gb = memory.needed_bytes(parts, work) / 1e9
        if typed_gb is None:
            return needed_gb / share
        if needed_gb > typed_gb:
            raise InvalidRecipe(
                f"{typed_gb:g} GB are too little for one decoder layer at a time: "
                f"a model of {model_bytes / 1e9:.1f} GB and {work.n_tokens} tokens need about {needed_gb:.1f} GB. "
                f"Type sensitivity.memory_gb={needed_gb + 0.5:.0f} or more, or a smaller dataset.size."
            )
        return 0.0

    def _check_nodes(self, needs: Needs) -> None:
        """Refuse what no machine with room for a worker can run, before hours are spent on the rest."""
        refusals = [why for node in self.nodes if (why := node.refusal(needs)) is not None]
        if self.nodes and len(refusals) == len(self.nodes):
            several = f"None of the {len(refusals)} nodes can run it. " if len(refusals) > 1 else ""
            raise InvalidRecipe(several + refusals[0])

    def _model(self, config: ModelConfig) -> Model:
        if config.path not in self._models:
            self._models[config.path] = Model(checkpoint_dir(config))
        return self._models[config.path]

    def _plan(self, point: SweepConfig, model: Model) -> tuple[str, Plan]:
        key = _data_key(point)
        if key not in self._data:
            # Before the tokenizer, which would blame itself for a broken config.json.
            packable = model.structure.packable
            samples = samples_to_boundary(point.dataset, model, self._largest[key], Writing.of(point))
            plan = make_plan(samples, packed=packable)
            plan_id = plan.digest(plan.size)
            self._data[key] = plan_id, plan
            self.plans[plan_id] = plan
        return self._data[key]

    def _digest(self, plan_id: str, plan: Plan, size: str) -> str:
        if (plan_id, size) not in self._digests:
            self._digests[plan_id, size] = plan.digest(size)
        return self._digests[plan_id, size]

    def _covered(self, model: Model, recipe: Recipe) -> tuple[ShapedGroup, ...]:
        """Groups that the recipe quantizes; decided by its patterns, not by its formats."""
        skeleton = [
            [each.quantizer_name, each.parent_class, each.enable, each.cfg is None] for each in recipe.quant_cfg
        ]
        key = _hash([model.revision, skeleton])
        if key not in self._coverage:
            self._coverage[key] = _covered_groups(model, recipe)
        return self._coverage[key]


def calibration_of(point: SweepConfig, format_: Format) -> str | None:
    """The size that finds a format's ranges of the inputs; None: it has none, or they are of the samples scored."""
    n_samples = point.calibration.n_samples
    if n_samples in (None, n_samples_of(point.dataset.size)) or not format_.calibrates_inputs:
        return None
    return size_name(n_samples)


def recipe_of(point: SweepConfig) -> Recipe:
    """The recipe of a point, for every linear. Raises: InvalidRecipe, SweepError: see sweep.formats.recipe.resolve."""

    def compute() -> dict[str, Any]:
        from workers.quant import modelopt

        return modelopt.preset(point.quant_pair.format_name)

    preset = cache.remember("preset", [1, version("nvidia-modelopt"), point.quant_pair.format_name], compute)
    return resolve(
        point.quant_pair,
        point.quant_granularity,
        preset,
        coverage=point.sensitivity.coverage,
        lm_head=point.sensitivity.lm_head,
        algorithm=point.sensitivity.quant_algorithm,
        scales=point.sensitivity.scales,
        tp=point.target.tp,
    )


def elements_of(model: Model) -> dict[str, int]:
    """Elements of a model, as SweepPlan.models has them."""
    return {"parameters": model.structure.parameters, **model.structure.elements}


def _variant(point: SweepConfig) -> list[str]:
    """Algorithm and scales, where they are not those that go without saying."""
    return [
        value
        for value, usual in ((point.sensitivity.quant_algorithm, "max"), (point.sensitivity.scales, "private"))
        if value != usual
    ]


def _label(point: SweepConfig) -> str:
    return "/".join([point.quant_pair.name, point.quant_granularity.name, *_variant(point)])


def _covered_groups(model: Model, recipe: Recipe) -> tuple[ShapedGroup, ...]:
    def is_covered(module: str) -> bool:
        places = ("weight_quantizer", "input_quantizer")
        return any(quantizer_for(recipe.quant_cfg, module, place, "nn.Linear") is not None for place in places)

    groups = tuple(group for group in model.groups.values() if all(map(is_covered, group.modules)))
    elements = model.structure.elements
    if elements.get("conv1d") and not any(linear_kind(group.name) == "linears" for group in groups):
        share = percent(elements["conv1d"] / model.structure.parameters)
        raise SweepError(
            f"{model.path}: its linears are transformers' Conv1D ({share} of its weights), which is not scored. "
            "Choose another model: model.path=DIR."
        )
    if not groups:
        raise SweepError(f"{model.path} has no linear that the recipe covers. {_other_choice(elements)}")
    return groups


def _other_choice(elements: Mapping[str, int]) -> str:
    """What to type for a model whose recipe covers nothing: an option that covers something, else another model."""
    options = {
        "vision_linears": "sensitivity.coverage=all_layers covers its vision tower",
        "lm_head": "sensitivity.lm_head=true covers its lm_head",
    }
    found = [words for kind, words in options.items() if elements.get(kind)]
    experts = "Its experts are not scored yet. " if elements.get("experts") else ""
    return experts + ("; ".join(found) or "Choose another model: model.path=DIR") + "."


def _check_ranks(point: SweepConfig, format_: Format, model: Model, groups: Sequence[ShapedGroup]) -> None:
    """Refuse ranges a token and rank that are not scored.

    Raises:
        InvalidRecipe: engine=modelopt, which has one format for all linears.
        SweepError: the ranks do not divide the inputs of a linear.
    """
    if format_.tp > 1 and point.sensitivity.engine == "modelopt":
        raise InvalidRecipe(
            f"sensitivity.engine=modelopt has one range a token for all inputs of a linear; target.tp={format_.tp} "
            "has one a token and rank. Type target.tp=1, or sensitivity.engine=layerwise."
        )
    for module in (module for group in groups for module in group.modules):
        format_.of_linear(module, model.linears[module].n_inputs)


def _check_block_size(format_: Format, model: Model, groups: Sequence[ShapedGroup]) -> None:
    modules = [module for group in groups for module in group.modules]
    for block in format_.block_lengths:
        bad = [module for module in modules if model.linears[module].n_inputs % block]
        if bad:
            common = math.gcd(*(model.linears[module].n_inputs for module in modules))
            allowed = [str(size) for size in (16, 32, 64, 128) if common % size == 0]
            advice = (
                f"Sizes that divide every layer: {', '.join(allowed)}."
                if allowed
                else "Choose a granularity without groups."
            )
            raise InvalidRecipe(
                f"Groups of {block} do not divide the {model.linears[bad[0]].n_inputs} inputs of {bad[0]} "
                f"({len(bad)} such layers): ModelOpt would pad silently. {advice}"
            )
    rows = format_.block_rows
    if rows is not None and (bad := [module for module in modules if model.linears[module].n_outputs % rows]):
        raise InvalidRecipe(
            f"Blocks of {rows} rows do not divide the {model.linears[bad[0]].n_outputs} outputs of {bad[0]} "
            f"({len(bad)} such layers): ModelOpt would pad silently. Choose a granularity without blocks on axis -2."
        )


def _data_key(point: SweepConfig) -> _DataKey:
    dataset = {key: value for key, value in asdict(point.dataset).items() if key != "size"}
    return (point.model.path, json.dumps(dataset, sort_keys=True))


def _hash(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
