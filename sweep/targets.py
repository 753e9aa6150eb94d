"""Where a recipe runs: natively, as another one, or nowhere; by runtime and hardware. Facts are in conf/target, with their sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import yaml

from sweep.errors import SweepError, require_known
from sweep.mixed import GroupFormat
from sweep.paths import conf_dir
from sweep.schemes import scheme_of

_KEYS: Final = ("weights", "inputs", "runs_as", "name", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What becomes of a recipe on a target."""

    kind: Literal["native", "runs_as", "none"]
    runs_as: str | None  # pair and granularity: what it is computed as
    name: str | None  # the runtime's own
    source: str | None  # project, version, file
    reason: str | None  # why it does not run

    def __str__(self) -> str:
        """For tables: ``native``, ``runs as wfp4_afp16/default``, ``none``."""
        return f"runs as {self.runs_as}" if self.kind == "runs_as" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime on one kind of GPU."""

    name: str
    runtime: str  # project and version that were looked at
    algorithms: tuple[str, ...]  # calibration algorithms whose results its files can hold
    entries: Mapping[tuple[str, str], Status]  # by scheme of weights and inputs

    def status(self, weight: Mapping[str, Any] | None, inputs: Mapping[str, Any] | None, algorithm: str) -> Status:
        """What becomes of a recipe. Args: as GroupFormat's fields."""
        if algorithm not in self.algorithms:
            return Status(kind="none", runs_as=None, name=None, source=None, reason=f"no file format of {self.name} is written with scales of {algorithm}")
        scheme = scheme_of(weight, inputs)
        none = Status(kind="none", runs_as=None, name=None, source=None, reason=f"{self.runtime} has no kernel for weights {scheme[0]} with inputs {scheme[1]}")
        return self.entries.get(scheme, none)

    def of(self, chosen: GroupFormat) -> Status:
        """What becomes of a format."""
        return self.status(chosen.weight, chosen.inputs, chosen.algorithm)

    def runs(self, chosen: GroupFormat) -> bool:
        """Whether it is computed as it was scored: what runs as another format has another damage."""
        return self.of(chosen).kind == "native"

    def check_runs_some(self, formats: Sequence[GroupFormat]) -> None:
        """Raises: SweepError: the target runs none of the formats; says what it does with each."""
        if not any(self.runs(each) for each in formats):
            found = "; ".join(f"{each.label}: {self.of(each)}" for each in formats[:6])
            raise SweepError(
                f"target={self.name} runs none of the {len(formats)} scored recipes as they are ({found}). "
                f"Score what it runs: sweep run -m grid=deployable target={self.name}"
            )


def load_target(name: str) -> Target:
    """A target of conf/target.

    Raises: SweepError: unknown, or a file that is not one.
    """
    require_known("target", name, target_names())
    return _load(name)


@cache
def target_names() -> tuple[str, ...]:
    """All targets."""
    return tuple(sorted(path.stem for path in (conf_dir() / "target").glob("*.yaml")))


@cache
def _load(name: str) -> Target:
    path = conf_dir() / "target" / f"{name}.yaml"
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries: dict[tuple[str, str], Status] = {}
    for node in document["schemes"]:
        for key in node:
            require_known(f"key in {path.name}", key, _KEYS)
        runs_as = node.get("runs_as")
        status = Status(kind="runs_as" if runs_as else "native", runs_as=runs_as, name=node["name"], source=document["sources"][node["source"]], reason=None)
        for weights in _words(node["weights"]):
            for inputs in _words(node["inputs"]):
                if (weights, inputs) in entries:
                    raise SweepError(f"{path.name} says twice what becomes of weights {weights} with inputs {inputs}.")
                entries[weights, inputs] = status
    return Target(name=document["name"], runtime=document["runtime"], algorithms=tuple(document["algorithms"]), entries=entries)


def _words(node: str | list[str]) -> list[str]:
    return [node] if isinstance(node, str) else node
