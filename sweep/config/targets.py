"""Targets: the recipes that a runtime on one kind of hardware runs, with the runtime's names for them.

The facts are those of ``conf/target``, with their sources. A checkpoint that loads is not yet served as it was scored:
a runtime may keep the weights' format and leave the inputs in 16 bits. So a recipe runs as itself, as another recipe,
or not at all.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, Self

import yaml

from sweep.config.schema import TargetConfig
from sweep.core.errors import SweepError, require_known
from sweep.core.pairs import ALGORITHMS
from sweep.core.paths import conf_dir

EXPORTS: Final = ("compressed_tensors", "modelopt")  # checkpoint formats: their `format`, their `quant_algo`

StatusKind = Literal["native", "runs_as", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetStatus:
    """How a target runs one recipe: as itself, as another one, or not at all."""

    kind: StatusKind
    runs_as: str | None  # "pair/granularity" that it really computes
    reader_name: str | None  # what the runtime calls it
    export: Mapping[str, str]  # by checkpoint format, the name that the format has for it; empty: no exporter writes it
    source: str | None  # where this was read
    reason: str | None  # why it does not run, or what differs from what was scored

    @property
    def words(self) -> str:
        """For tables: ``native``, ``as wfp4_afp16/default``, ``none``."""
        return f"as {self.runs_as}" if self.kind == "runs_as" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecipe:
    """One recipe that a target runs."""

    quant_pair: str
    quant_granularity: str
    also: tuple[str, ...]  # granularities under which this pair resolves to the same recipe
    algorithms: tuple[str, ...]  # calibration algorithms whose results the runtime can hold
    runs_as: str | None  # None: as itself
    reader_name: str
    export: Mapping[str, str]
    source: str
    note: str | None

    @property
    def name(self) -> str:
        """``wfp8_afp8/default``."""
        return f"{self.quant_pair}/{self.quant_granularity}"

    @property
    def granularities(self) -> tuple[str, ...]:
        """Every granularity that names this recipe, its usual one first."""
        return (self.quant_granularity, *self.also)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One runtime on one kind of hardware."""

    name: str
    runtime: str  # for people
    scales: Literal["fused", "private"]  # whether it shares scales inside fused layer groups
    recipes: tuple[TargetRecipe, ...]

    @classmethod
    def from_config(cls, config: TargetConfig) -> Self:
        """Read a target's facts.

        Raises: SweepError: a pair, granularity, algorithm, source or key that is not known (with the nearest spelling),
            a recipe listed twice, or one that runs as a recipe that the target does not run as itself.
        """
        where = f"target {config.name!r}"
        recipes = tuple(_recipe(name, node, config.sources, where) for name, node in config.recipes.items())
        names = [f"{recipe.quant_pair}/{granularity}" for recipe in recipes for granularity in recipe.granularities]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise SweepError(f"{where} lists {doubled[0]} twice. Keep one of the two.")
        native = [recipe.name for recipe in recipes if recipe.runs_as is None]
        for recipe in recipes:
            if recipe.runs_as is not None:
                require_known(f"recipe that {where} would run {recipe.name} as", recipe.runs_as, native)
        return cls(name=config.name, runtime=config.runtime, scales=config.scales, recipes=recipes)

    def status(self, quant_pair: str, quant_granularity: str, algorithm: str = "max") -> TargetStatus:
        """How the target runs a recipe; `none` for one that it does not know."""
        for recipe in self.recipes:
            if recipe.quant_pair == quant_pair and quant_granularity in recipe.granularities:
                if algorithm not in recipe.algorithms:
                    held = ", ".join(recipe.algorithms)
                    return _none(
                        f"{self.name} runs {recipe.name}, but cannot hold what {algorithm} gives; it can: {held}",
                        recipe.source,
                    )
                return TargetStatus(
                    kind="native" if recipe.runs_as is None else "runs_as",
                    runs_as=recipe.runs_as,
                    reader_name=recipe.reader_name,
                    export=recipe.export,
                    source=recipe.source,
                    reason=recipe.note,
                )
        return _none(f"{self.name} has nothing that runs {quant_pair}/{quant_granularity}", None)

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


def served_as(quant_pair: str, quant_granularity: str, algorithm: str) -> dict[str, dict[str, str | None]]:
    """One recipe under every target, as reports state it: status, recipe that really runs, and the runtime's name."""
    found = {target.name: target.status(quant_pair, quant_granularity, algorithm) for target in all_targets()}
    return {
        name: {"status": status.kind, "runs_as": status.runs_as, "reader_name": status.reader_name}
        for name, status in found.items()
    }


def _none(reason: str, source: str | None) -> TargetStatus:
    return TargetStatus(kind="none", runs_as=None, reader_name=None, export={}, source=source, reason=reason)


_OPTIONAL: Final[Mapping[str, Any]] = {"also": [], "algorithms": ["max"], "runs_as": None, "export": {}, "note": None}
_KEYS: Final = tuple(
    field.name for field in fields(TargetRecipe) if field.name not in ("quant_pair", "quant_granularity")
)


def _recipe(name: str, node: Mapping[str, Any], sources: Mapping[str, str], where: str) -> TargetRecipe:
    where = f"{where}, recipe {name!r}"
    for key in node:
        require_known(f"key in {where}", str(key), _KEYS)
    values: dict[str, Any] = {**_OPTIONAL, **node}
    for key in _KEYS:
        if key not in values:
            raise SweepError(f"{where} lacks {key!r}. Type its value.")
    pair, _, granularity = name.partition("/")
    also, algorithms = (_texts(values[key], f"{key} in {where}") for key in ("also", "algorithms"))
    require_known(f"quant_pair in {where}", pair, _options("quant_pair"))
    for one in (granularity, *also):
        require_known(f"quant_granularity in {where}", one, _options("quant_granularity"))
    for one in algorithms:
        require_known(f"algorithm in {where}", one, ALGORITHMS)
    for one in values["export"]:
        require_known(f"export format in {where}", str(one), EXPORTS)
    require_known(f"source in {where}", str(values["source"]), sources)
    values |= {
        "quant_pair": pair,
        "quant_granularity": granularity,
        "also": also,
        "algorithms": algorithms,
        "source": sources[values["source"]],
    }
    return TargetRecipe(**values)


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SweepError(f"{what} is {value!r}. Type a list of names.")
    return tuple(value)


@functools.cache
def _options(group: str) -> frozenset[str]:
    return frozenset(path.stem for path in (conf_dir() / group).glob("*.yaml"))
