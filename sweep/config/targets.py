"""Targets: the recipes that a runtime on one kind of hardware runs, with the runtime's names for them.

The facts are those of ``conf/target``, with their sources. A checkpoint that loads is not yet served as it was scored:
a runtime may keep the weights' format and leave the inputs in 16 bits. So a recipe runs as itself, as another recipe,
or not at all.
"""

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Self

import msgspec
import yaml

from sweep.config.schema import TargetConfig
from sweep.config.speeds import Speed, Speeds, speeds_of
from sweep.core.errors import SweepError, require_known
from sweep.core.pairs import ALGORITHMS, Scales
from sweep.core.parallel import RankPart, parts_fit
from sweep.core.paths import conf_dir
from sweep.core.typed import hints_of

CheckpointFormat = Literal["compressed-tensors", "modelopt-checkpoint"]
# By checkpoint format, the key under which a target has a recipe's name in it: its `format`, its `quant_algo`.
EXPORTS: Final[Mapping[CheckpointFormat, str]] = {
    "compressed-tensors": "compressed_tensors",
    "modelopt-checkpoint": "modelopt",
}

LIKELIEST: Final = 20  # log probabilities a token that `validate --served` asks for; vLLM gives as many by default
_TP: Final = " tp="  # between a target's name and the number of ranks
StatusKind = Literal["native", "runs_as", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """How a target runs one recipe: as itself, as another one, or not at all."""

    kind: StatusKind
    runs_as: str | None = None  # "pair/granularity" that it really computes
    reader_name: str | None = None  # the runtime's name for it
    # By checkpoint format, the name that the format has for it; empty: no exporter writes it.
    export: Mapping[str, str] = field(default_factory=dict[str, str])
    source: str | None = None  # where this was read
    reason: str | None = None  # why it does not run, or what differs from what was scored

    @property
    def words(self) -> str:
        """For tables: ``native``, ``as wfp4_afp16/default``, ``none``."""
        return f"as {self.runs_as}" if self.kind == "runs_as" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecipe:
    """One recipe that a target runs."""

    quant_pair: str
    quant_granularity: str
    reader_name: str
    source: str
    also: tuple[str, ...] = ()  # granularities under which this pair resolves to the same recipe
    algorithms: tuple[str, ...] = ("max",)  # calibration algorithms whose results the runtime can hold
    runs_as: str | None = None  # None: as itself
    export: Mapping[str, str] = field(default_factory=dict[str, str])
    note: str | None = None

    @property
    def name(self) -> str:
        """``wfp8_afp8/default``."""
        return f"{self.quant_pair}/{self.quant_granularity}"

    @property
    def granularities(self) -> tuple[str, ...]:
        """Every granularity that names this recipe, its usual one first."""
        return (self.quant_granularity, *self.also)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The command that serves a checkpoint; the defaults are vLLM's."""

    command: str = "vllm serve"
    longest: str = "--max-model-len"  # option: tokens of the longest prompt and its answer together
    parallel: str = "--tensor-parallel-size"  # option: number of ranks
    likeliest: str = "--max-logprobs"  # option: log probabilities a token that may be asked for; empty: there is none
    # Options without which a checkpoint that lacks the files to prepare images is not loaded; empty: none are needed.
    text_alone: str = """--limit-mm-per-prompt '{"image": 0, "video": 0}'"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The shapes that a kernel takes of what one rank has of a layer group."""

    source: str  # where this was read
    recipes: tuple[str, ...]  # that it computes: "pair/granularity"
    inputs: int = 1  # multiples of it
    outputs: int = 1  # see inputs
    each: bool = False  # outputs of each sub-projection, such as q, k and v; else of all together

    @property
    def words(self) -> str:
        """``inputs a multiple of 128, outputs of each sub-projection of 128``."""
        each = " of each sub-projection" if self.each else ""
        outputs = f", outputs{each} of {self.outputs}" if self.outputs > 1 else ""
        return f"inputs a multiple of {self.inputs}{outputs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One runtime on one kind of hardware."""

    name: str
    runtime: str  # for people
    checkpoint: CheckpointFormat  # that it is given
    server: Server
    scales: Scales  # whether it shares scales inside fused layer groups
    tp: int  # ranks that each linear is split over
    kernels: Mapping[str, Kernel]
    recipes: tuple[TargetRecipe, ...]
    speeds: Speeds | None  # None: none were measured

    @property
    def label(self) -> str:
        """As recipes name it: ``vllm_sm90``, ``vllm_sm90 tp=8``; see `target_called`."""
        return self.name if self.tp == 1 else f"{self.name}{_TP}{self.tp}"

    @property
    def slug(self) -> str:
        """As part of a file name: ``vllm_sm90``, ``vllm_sm90_tp8``."""
        return self.name if self.tp == 1 else f"{self.name}_tp{self.tp}"

    @classmethod
    def from_config(cls, config: TargetConfig) -> Self:
        """Read a target's facts.

        Raises: SweepError: a pair, granularity, algorithm, source or key that is not known (with the nearest spelling),
            a recipe listed twice, or one that runs as a recipe that the target does not run as itself.
        """
        where = f"target {config.name!r}"
        recipes = tuple(_recipe(config, name) for name in config.recipes)
        names = [f"{recipe.quant_pair}/{granularity}" for recipe in recipes for granularity in recipe.granularities]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise SweepError(f"{where} lists {doubled[0]} twice. Keep one of the two.")
        native = [recipe.name for recipe in recipes if recipe.runs_as is None]
        for recipe in recipes:
            if recipe.runs_as is not None:
                require_known(f"recipe that {where} would run {recipe.name} as", recipe.runs_as, native)
        for key in config.serve:
            require_known(f"key of serve in {where}", key, hints_of(Server))
        return cls(
            name=config.name,
            runtime=config.runtime,
            checkpoint=config.checkpoint,
            server=Server(**config.serve),
            scales=config.scales,
            tp=config.tp,
            kernels={name: _kernel(config, name) for name in config.kernels},
            recipes=recipes,
            speeds=speeds_of(config),
        )

    def status(self, quant_pair: str, quant_granularity: str, algorithm: str = "max") -> TargetStatus:
        """How the target runs a recipe; `none` for one that it does not know."""
        for recipe in self.recipes:
            if recipe.quant_pair == quant_pair and quant_granularity in recipe.granularities:
                if algorithm not in recipe.algorithms:
                    held = ", ".join(recipe.algorithms)
                    why = f"{self.name} runs {recipe.name}, but cannot hold what {algorithm} gives; it can: {held}"
                    return TargetStatus(kind="none", source=recipe.source, reason=why)
                return TargetStatus(
                    kind="native" if recipe.runs_as is None else "runs_as",
                    runs_as=recipe.runs_as,
                    reader_name=recipe.reader_name,
                    export=recipe.export,
                    source=recipe.source,
                    reason=recipe.note,
                )
        return TargetStatus(kind="none", reason=f"{self.name} has nothing that runs {quant_pair}/{quant_granularity}")

    def exports(self, quant_pair: str, quant_granularity: str, algorithm: str = "max") -> bool:
        """Whether a recipe has a name in the checkpoint format that the target is given."""
        return EXPORTS[self.checkpoint] in self.status(quant_pair, quant_granularity, algorithm).export

    def kernel_of(self, quant_pair: str, quant_granularity: str) -> str | None:
        """The kernel whose shapes a recipe's linears must have; None: any do."""
        recipe = self._listed(quant_pair, quant_granularity)
        return next((name for name, kernel in self.kernels.items() if recipe in kernel.recipes), None)

    def speed(self, quant_pair: str, quant_granularity: str) -> Speed | None:
        """What was measured of a recipe, under any of its names; None: nothing."""
        recipe = self._listed(quant_pair, quant_granularity)
        return None if self.speeds is None or recipe is None else self.speeds.recipes.get(recipe)

    def _listed(self, quant_pair: str, quant_granularity: str) -> str | None:
        """The name under which a recipe is listed; None: it is not."""
        own = (each for each in self.recipes if each.quant_pair == quant_pair)
        return next((each.name for each in own if quant_granularity in each.granularities), None)

    def misfit(self, kernel: str, parts: Sequence[RankPart]) -> str | None:
        """Why one of the target's kernels does not take what a rank has of a layer group; None: it does."""
        rule = self.kernels[kernel]
        return parts_fit(parts, rule.inputs, rule.outputs, each=rule.each)

    def points(
        self,
        *,
        pairs: Collection[str] | None = None,
        granularities: Collection[str] | None = None,
        algorithms: Collection[str] = ("max",),
    ) -> Iterator[tuple[str, str, str]]:
        """Pair, granularity and algorithm of each recipe that runs, under the first of its names that is asked for.

        Args:
            pairs: those asked for; None: all.
            granularities: see pairs.
            algorithms: those asked for.
        """
        for recipe in self.recipes:
            named = [name for name in recipe.granularities if granularities is None or name in granularities]
            if named and (pairs is None or recipe.quant_pair in pairs):
                yield from (
                    (recipe.quant_pair, named[0], algorithm)
                    for algorithm in algorithms
                    if algorithm in recipe.algorithms
                )


@functools.cache
def all_targets() -> tuple[Target, ...]:
    """Every target of ``conf/target``, by name."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((conf_dir() / "target").glob("*.yaml"))]
    return tuple(Target.from_config(TargetConfig.from_node("target", yaml.safe_load(text))) for text in texts)


def target_called(label: str | None) -> Target | None:
    """The target of ``conf/target`` that a recipe names; None: there is none of that name."""
    name, _, tp = (label or "").partition(_TP)
    found = next((target for target in all_targets() if target.name == name), None)
    return replace(found, tp=int(tp)) if found is not None and tp.isdigit() else found


def served_as(quant_pair: str, quant_granularity: str, algorithm: str) -> dict[str, dict[str, str | None]]:
    """One recipe under every target, as reports state it: status, recipe that really runs, and the runtime's name."""
    found = {target.name: target.status(quant_pair, quant_granularity, algorithm) for target in all_targets()}
    return {
        name: {"status": status.kind, "runs_as": status.runs_as, "reader_name": status.reader_name}
        for name, status in found.items()
    }


def _recipe(config: TargetConfig, name: str) -> TargetRecipe:
    where, node = f"target {config.name!r}, recipe {name!r}", config.recipes[name]
    for key in node:
        require_known(f"key in {where}", key, hints_of(TargetRecipe).keys() - {"quant_pair", "quant_granularity"})
    if missing := [key for key in ("reader_name", "source") if key not in node]:
        raise SweepError(f"{where} lacks {missing[0]!r}. Type its value.")
    pair, _, granularity = name.partition("/")
    require_known(f"source in {where}", str(node["source"]), config.sources)
    named = {"quant_pair": pair, "quant_granularity": granularity, "source": config.sources[str(node["source"])]}
    try:
        recipe = msgspec.convert({**node, **named}, TargetRecipe)
    except msgspec.ValidationError as error:
        raise SweepError(f"{where}: {error}. Type a list of names for also and algorithms.") from None
    require_known(f"quant_pair in {where}", pair, _options("quant_pair"))
    for one in recipe.granularities:
        require_known(f"quant_granularity in {where}", one, _options("quant_granularity"))
    for one in recipe.algorithms:
        require_known(f"algorithm in {where}", one, ALGORITHMS)
    for one in recipe.export:
        require_known(f"export format in {where}", one, EXPORTS.values())
    return recipe


def _kernel(config: TargetConfig, name: str) -> Kernel:
    where, node = f"target {config.name!r}, kernel {name!r}", config.kernels[name]
    for key in node:
        require_known(f"key in {where}", key, hints_of(Kernel))
    require_known(f"source in {where}", str(node.get("source")), config.sources)
    try:
        kernel = msgspec.convert({**node, "source": config.sources[str(node["source"])]}, Kernel)
    except msgspec.ValidationError as error:
        raise SweepError(f"{where}: {error}. Type whole numbers for inputs and outputs, a list for recipes.") from None
    for recipe in kernel.recipes:
        require_known(f"recipe in {where}", recipe, config.recipes)
    return kernel


@functools.cache
def _options(group: str) -> frozenset[str]:
    return frozenset(path.stem for path in (conf_dir() / group).glob("*.yaml"))
