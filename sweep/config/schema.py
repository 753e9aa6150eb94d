"""The configuration as types: frozen dataclasses inside, mappings only at the gate, checks before anything runs."""

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal, Self, TypeVar

import msgspec

from sweep.core.errors import SweepError
from sweep.core.groups import Coverage
from sweep.core.json import Json
from sweep.core.machine import Device
from sweep.core.pairs import GranularityConfig, PairConfig, Scales
from sweep.core.sizes import n_samples_of
from sweep.core.text import count, override
from sweep.core.typed import Plain, Section

_NAME = re.compile(r"[a-z0-9_]+")
_SINCE: Mapping[str, Mapping[str, Plain]] = {  # of keys that earlier configs lack
    "dataset": {
        "path": None,
        "split": None,
        "column": None,
        "loss": "all",
        "answers": "file",
        "answer_tokens": 256,
        "max_pixels": None,
    },
    "calibration": {"n_samples": None},
    "sensitivity": {"scales": "private", "draws": None},
    "cluster": {"address": "local", "dashboard": "auto"},
}
_Item = TypeVar("_Item", str, str | None)
# Labels that method=fisher draws. Bundled model, 128 samples: the score of a group has a standard deviation of 5 % from
# as many draws, and of 5.5 % from the samples themselves.
DRAWS: Final = 8
_MOST_DRAWS: Final = 256
OWN_KINDS = ("text", "images", "chat")  # of data sets that users bring


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Section):
    """The checkpoint that is measured."""

    name: str | None  # [a-z0-9_]+, in published paths; None: a slug of the path
    path: str | None  # directory or hub id; None: the bundled model
    dtype: Literal["auto", "float32", "bfloat16"]  # of the computation; auto: float32 on a CPU, bfloat16 on a GPU

    def dtype_on(self, device: Device) -> Literal["float32", "bfloat16"]:
        """The dtype that the model computes in on a device."""
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if device == "cuda" else "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig(Section):
    """The samples that calibrate and score."""

    name: str | None  # [a-z0-9_]+, in published paths; None: a slug of the path
    # Texts shipped with the bundled model; drawn pictures, with captions or with questions and answers; captions of a
    # file or a hub data set; texts, pictures with captions, or conversations of her own.
    kind: Literal["bundled", "scenes", "scenes_chat", "captions", "text", "images", "chat"]
    size: str  # small, medium, large: 16, 128, 512 samples; or a number of them; each a prefix of the next
    max_tokens: int  # tokens; longer samples are cut
    captions_path: str | None  # of captions: text file, one caption a line; wins over the hub
    hub_id: str | None  # of captions: Hugging Face data set
    hub_split: str | None
    hub_column: str | None  # text, or list of texts of which the first counts
    path: str | None  # of text, images, chat: file, directory or hub id
    split: str | None  # of a hub id
    column: str | None  # of text, images: that holds the text; of chat: the messages; None: the usual names
    loss: Literal["all", "answers"]  # tokens that are predicted: all, or the assistant's
    # Of chat: the file's own, or the last of each conversation written by the unquantized model, drawn or greedy.
    answers: Literal["file", "model", "model_greedy"]
    answer_tokens: int  # tokens; the longest answer that the model writes
    max_pixels: int | None  # of a picture, which is scaled down to them; None: as the model's processor has it

    def __post_init__(self) -> None:
        n_samples_of(self.size)
        if self.max_tokens < 2:
            raise SweepError(
                f"dataset.max_tokens={self.max_tokens} leaves no token to predict. Type at least 2; 512 is the default."
            )
        has_hub = None not in (self.hub_id, self.hub_split, self.hub_column)
        if self.kind == "captions" and self.captions_path is None and not has_hub:
            raise SweepError(
                f"Data set {self.name!r} names no source. "
                "Type dataset.captions_path=FILE, or dataset.hub_id, hub_split and hub_column."
            )
        if self.kind in OWN_KINDS and self.path is None:
            raise SweepError(f"dataset={self.kind} reads files of yours. Type dataset.path=PATH.")
        if self.kind not in OWN_KINDS and self.path is not None:
            raise SweepError(
                f"dataset.path={self.path} is no key of data set {self.name!r}. "
                f"Type dataset={', dataset='.join(OWN_KINDS)}, whichever it holds."
            )
        is_chat = self.kind in ("chat", "scenes_chat")
        for key, value, usual in (("loss", self.loss, "all"), ("answers", self.answers, "file")):
            if not is_chat and value != usual:
                raise SweepError(
                    f"dataset.{key}={value} is about conversations; data set {self.name!r} has none. "
                    f"Type dataset.{key}={usual}, or dataset=chat."
                )
        for key, number in (("answer_tokens", self.answer_tokens), ("max_pixels", self.max_pixels)):
            if number is not None and number < 1:
                raise SweepError(f"dataset.{key}={number} is not allowed. Type a number above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig(Section):
    """The samples that find calibration ranges, where they are others than those that are scored."""

    n_samples: int | None  # leading ones of the data set, at least as many as are scored; None: those of dataset.size

    def __post_init__(self) -> None:
        if self.n_samples is not None and self.n_samples < 2:
            raise SweepError(f"calibration.n_samples={self.n_samples} is not allowed. Type at least 2, or null.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityConfig(Section):
    """The score that is measured, and of which layers."""

    # Sum of (dLoss/dy * dy)^2; or of (sum of dLoss/dy * dy)^2 under labels that the model draws; or
    # KL(unquantized || one group quantized), measured.
    method: Literal["gradient", "fisher", "kl_div"]
    draws: int | None  # of method=fisher: labels drawn at each prediction; None: of other methods
    engine: Literal["layerwise", "modelopt"]  # ours, or stock mtq.auto_quantize as a cross-check
    coverage: Coverage
    lm_head: bool  # score lm_head as well
    quant_algorithm: str  # ModelOpt's calibration algorithm
    # fused: linears of a layer group share calibration ranges per tensor, as in runtimes; private: each has its own.
    scales: Scales
    # Memory that a worker may use, 1e9 bytes; None: what is free on its GPU, or its share of the machine's.
    memory_gb: float | None

    def __post_init__(self) -> None:
        if self.quant_algorithm != "max" and (self.engine != "layerwise" or self.method == "kl_div"):
            raise SweepError(
                f"sensitivity.quant_algorithm={self.quant_algorithm} is scored by engine=layerwise, "
                "method=gradient or method=fisher only. "
                "Type sensitivity.quant_algorithm=max, or leave engine and method out."
            )
        if self.draws is not None and self.method != "fisher":
            raise SweepError(
                f"sensitivity.draws={self.draws} is about labels that method=fisher draws; method={self.method} has "
                "none. Type sensitivity.method=fisher, or leave sensitivity.draws out."
            )
        if self.draws is not None and not 1 <= self.draws <= _MOST_DRAWS:
            raise SweepError(f"sensitivity.draws={self.draws} is not allowed. Type 1 to {_MOST_DRAWS}.")
        if self.engine == "modelopt" and self.method != "gradient":
            raise SweepError(
                "sensitivity.engine=modelopt cross-checks method=gradient only. "
                "Type sensitivity.method=gradient, or engine=layerwise."
            )
        if (self.engine, self.scales) == ("modelopt", "fused"):
            raise SweepError(
                "sensitivity.engine=modelopt gives every linear its own scales. "
                "Type sensitivity.scales=private, or engine=layerwise."
            )
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise SweepError(
                f"sensitivity.memory_gb={self.memory_gb:g} is not allowed. Type a number of GB above 0, or null."
            )

    @classmethod
    def from_node(cls, section: str, node: Mapping[str, Plain]) -> Self:
        """As every section; null draws are the usual number where labels are drawn. Raises: SweepError: as there."""
        if node.get("method") == "fisher" and node.get("draws", DRAWS) is None:
            node = {**node, "draws": DRAWS}
        # By name: with slots the class is another than the one that super() alone would look up.
        return super(SensitivityConfig, cls).from_node(section, node)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig(Section):
    """The recipes that one runtime on one kind of hardware runs; see `sweep.config.targets`.

    Of it scores depend on `tp` alone, and only those of inputs with a range a token: see `Format.on_ranks`.
    """

    name: str  # [a-z0-9_]+
    runtime: str  # its name and hardware, for people
    scales: Scales  # whether it shares scales inside fused layer groups
    checkpoint: Literal["compressed-tensors", "modelopt-checkpoint"]  # export format of which it is given checkpoints
    serve: Mapping[str, str]  # the command that serves one, and options of it: `sweep.config.targets.Server`
    tp: int  # tensor-parallel size: ranks that each linear is split over
    sources: Mapping[str, str]  # where its facts were read: project, version or commit, file
    # By name, the shapes that a kernel takes: `sweep.config.targets.Kernel`.
    kernels: Mapping[str, Mapping[str, str | int | bool | list[str]]]
    # By "pair/granularity"; what is not listed does not run.
    recipes: Mapping[str, Mapping[str, str | list[str] | Mapping[str, str] | None]]
    # Measured speeds: `sweep.config.speeds.Speeds`; empty: none were measured.
    speeds: Mapping[str, str | Mapping[str, Mapping[str, float]]]

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise SweepError(f"target.tp={self.tp} is no number of ranks. Type 1, 2, 4 or 8.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig(Section):
    """The samples on which a recipe's KL is measured."""

    n_samples: int  # after those of the data set that calibrated and scored
    captions_path: str | None  # or the first of this text file, one caption a line
    # Or the first of other data sets: options of the group `dataset`, with their paths, place by place.
    dataset: str | list[str] | None
    path: str | list[str | None] | None

    def __post_init__(self) -> None:
        if not 2 <= self.n_samples <= 512:
            raise SweepError(f"validation.n_samples={self.n_samples} is not allowed. Type a number from 2 to 512.")
        sources = self.sources
        if self.captions_path is not None and sources:
            raise SweepError(
                "validation.captions_path and validation.dataset both say what to validate on. Type the file as one "
                f"of the latter: validation.dataset=coco2017_captions {override('validation.path', self.captions_path)}"
            )

    @property
    def sources(self) -> list[tuple[str, str | None]]:
        """Options of the group `dataset`, each with its path; none: other samples of the data set that calibrated.

        Raises: SweepError: not one path for each.
        """
        names = _listed(self.dataset)
        paths = [None] * len(names) if self.path is None else _listed(self.path)
        if len(names) != len(paths):
            raise SweepError(
                f"validation.dataset names {count(len(names), 'data set')}, "
                f"validation.path {count(len(paths), 'path')}. Type one path for each, null where a data set has none: "
                "validation.dataset=[chat,wordnet_glosses] validation.path=[chats.jsonl,null]"
            )
        return list(zip(names, paths, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig(Section):
    """Where reports go."""

    name: Literal["tmp", "publish"]
    root: str  # directory; {run_id} names the grid
    overwrite: bool  # replace folders of another model revision or data set content


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(Section):
    """The workers, and the Ray cluster that they run on."""

    # Of a Ray cluster, host:port; local: one of this run's own, on this machine; null: $RAY_ADDRESS.
    address: str | None
    dashboard: bool | Literal["auto"]  # of a cluster of this run's own; auto: where there is a GPU
    device: Literal["auto", "cpu", "cuda"]  # auto: cuda where there is a GPU
    # auto: one a GPU (or share of one), else one a CPU core; on a cluster more when nodes join.
    workers: int | Literal["auto"]
    # A fraction: several workers share a GPU; 2 or more: a worker spreads the model over so many.
    gpus_per_worker: float
    retry_failed: bool  # try trials again that failed for their own reason

    def __post_init__(self) -> None:
        if self.workers != "auto" and self.workers < 1:
            raise SweepError(f"cluster.workers={self.workers} leaves nobody to work. Type at least 1, or auto.")
        share = self.gpus_per_worker
        if not (0 < share <= 1 or (1 < share < math.inf and share == int(share))):  # refuses NaN as well
            raise SweepError(
                f"cluster.gpus_per_worker={share:g} is not allowed. Type a fraction up to 1, or a whole number."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig(Section):
    """Where scores are kept."""

    uri: str  # absolute local path or fsspec URL

    def __post_init__(self) -> None:
        if not self.uri.strip():
            raise SweepError("store.uri is empty. Type store.uri=DIR, or the URL of an object store.")
        if self.uri.startswith("memory:"):
            raise SweepError(
                f"store.uri={self.uri} lives in one process only; workers are others. "
                "Type a local directory, or the URL of an object store."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """One point of a grid, composed."""

    model: ModelConfig
    dataset: DatasetConfig
    calibration: CalibrationConfig
    quant_pair: PairConfig
    quant_granularity: GranularityConfig
    sensitivity: SensitivityConfig
    target: TargetConfig
    validation: ValidationConfig
    output_layout: OutputConfig
    cluster: ClusterConfig
    store: StoreConfig

    def __post_init__(self) -> None:
        named = (self.model, self.dataset, self.quant_pair, self.quant_granularity, self.target)
        for section, node in zip(("model", "dataset", "quant_pair", "quant_granularity", "target"), named, strict=True):
            if node.name is None or not _NAME.fullmatch(node.name):
                raise SweepError(
                    f"{section}.name={node.name!r} is no name. It becomes part of paths: "
                    "use lower-case letters, digits and _ only."
                )
        n_samples = self.calibration.n_samples
        if n_samples is not None and n_samples < n_samples_of(self.dataset.size):
            raise SweepError(
                f"calibration.n_samples={n_samples} are fewer than dataset.size={self.dataset.size} scores "
                f"({n_samples_of(self.dataset.size)}). Type at least that many, or null."
            )
        if n_samples is not None and self.sensitivity.engine == "modelopt":
            raise SweepError(
                f"sensitivity.engine=modelopt calibrates on what it scores, not on calibration.n_samples={n_samples}. "
                "Type calibration.n_samples=null, or sensitivity.engine=layerwise."
            )
        for key, value, other in (("method", "kl_div", "gradient"), ("engine", "modelopt", "layerwise")):
            if self.cluster.gpus_per_worker > 1 and getattr(self.sensitivity, key) == value:
                raise SweepError(
                    f"sensitivity.{key}={value} runs the model on one GPU, "
                    f"cluster.gpus_per_worker={self.cluster.gpus_per_worker:g} spreads it over several. "
                    f"Type cluster.gpus_per_worker=1, or sensitivity.{key}={other}."
                )


SECTIONS: Mapping[str, type[Section]] = typing.get_type_hints(SweepConfig)


def _listed(value: _Item | list[_Item] | None) -> list[_Item]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def to_plain(config: SweepConfig) -> dict[str, Json]:
    """The composed config as JSON can hold it, always in the same order."""
    return msgspec.to_builtins(config, str_keys=True)


def to_record(config: SweepConfig) -> dict[str, Json]:
    """The plain config for a trial's record: without validation, on which no score depends, and target.

    What a score depends on of the target is a column of the row, `tp`.
    """
    return {section: node for section, node in to_plain(config).items() if section not in ("target", "validation")}


def from_record(
    document: Mapping[str, Mapping[str, Plain]], target: TargetConfig, validation: ValidationConfig
) -> SweepConfig:
    """Read back from a store the config that `to_record` gave.

    Keys that are newer than the record get the value that it was composed under.

    Raises: SweepError: it was edited into something else.
    """
    nodes = {section: {**_SINCE.get(section, {}), **document.get(section, {})} for section in SECTIONS}
    for section in ("quant_pair", "quant_granularity"):
        nodes[section] = {key: _revived(value) for key, value in nodes[section].items()}
    return from_nodes(nodes | {"target": asdict(target), "validation": asdict(validation)})


def from_nodes(nodes: Mapping[str, Mapping[str, Plain]]) -> SweepConfig:
    """The config of plain sections, by name. Raises: SweepError: a key or value that is not allowed."""
    sections = {section: kind.from_node(section, nodes[section]) for section, kind in SECTIONS.items()}
    return SweepConfig(**sections)  # pyright: ignore[reportArgumentType]


def _revived(value: Plain) -> Plain:
    """JSON has texts as keys: axes of blocks are numbers."""
    if isinstance(value, Mapping):
        return {int(key) if str(key).lstrip("-").isdigit() else key: _revived(item) for key, item in value.items()}
    return value
