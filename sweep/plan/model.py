"""A checkpoint as a sweep sees it: revision, structure, tokenizer, batches; no weight is read.

Results that take seconds to compute (hashes, token ids, the model's structure) are cached on disk.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from sweep.config.schema import ModelConfig
from sweep.core import cache
from sweep.core.batches import Plan, Sample
from sweep.core.groups import LayerGroup, Linear, ModelStructure, ShapedGroup
from sweep.core.json import Json
from sweep.core.paths import bundled_model_dir
from sweep.core.text import count
from workers.data.batches import make_plan
from workers.model.checkpoint import (
    NOT_HELD,
    check_checkpoint,
    check_fit,
    checkpoint_names,
    file_key,
    key_value_heads,
    loaded_files,
    revision,
)
from workers.model.place import is_hub_id

if TYPE_CHECKING:
    from workers.model.loading import PreTrainedModel

_SHOWN_NAMES: Final = 3


@dataclass(frozen=True)
class Model:
    """A checkpoint: its revision, structure and tokenizer, without its weights."""

    path: Path

    @cached_property
    def revision(self) -> str:
        return revision(self.path)

    @cached_property
    def structure(self) -> ModelStructure:
        """Found without reading a weight.

        Raises: SweepError: the checkpoint makes no model, or its weights are not those of its config.json.
        """

        def compute() -> Json:
            from workers.model import loading

            return msgspec.to_builtins(loading.structure(self.path))

        files = [file_key(file) for file in (self.path / "config.json", *loaded_files(self.path))]
        key = [7, files, version("transformers")]
        found = msgspec.convert(cache.remember("model-structure", key, compute), ModelStructure)
        check_fit(self.path, found)
        return found

    @property
    def configured_linears(self) -> tuple[Linear, ...]:
        """Linears of the model that config.json builds, whatever the weight files hold: an export's, among others.

        Raises: SweepError: the configuration makes no model.
        """
        from workers.model import loading

        return loading.configured_linears(self.path)

    @cached_property
    def groups(self) -> dict[str, ShapedGroup]:
        """The layer groups of all linears but an output layer of unusual name, by name, in the model's order."""
        names = [name for name in self.linears if name != self.structure.other_head]

        def compute() -> list[list[str]]:
            from workers.quant import modelopt

            return [list(modules) for modules in modelopt.layer_groups(names).values()]

        key = [2, version("nvidia-modelopt"), names]
        found: dict[str, ShapedGroup] = {}
        for modules in cache.remember("layer-groups", key, compute):
            linears = [self.linears[module] for module in modules]
            found[modules[0]] = ShapedGroup(
                name=modules[0],
                modules=tuple(modules),
                weight_elements=sum(linear.n_inputs * linear.n_outputs for linear in linears),
                n_inputs=linears[0].n_inputs,
                n_outputs=sum(linear.n_outputs for linear in linears),
            )
        return found

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """By name."""
        return {linear.name: linear for linear in self.structure.linears}

    @property
    def source_note(self) -> str | None:
        """What the checkpoint's FP8 weights are read as; None: it holds none."""
        found = self.structure
        if not found.from_fp8:
            return None
        share = found.from_fp8 / found.parameters
        return (
            f"{share:.1%} of the weights of {self.path} are FP8, dequantized as they are read: scores, measured KL and "
            "exports are of these values, and exports hold nothing of the source's scales"
        )

    def without_weights(self, groups: Iterable[LayerGroup]) -> list[LayerGroup]:
        """Groups that no export can quantize: a weight of theirs is no tensor of its own in the checkpoint."""
        return [group for group in groups if not self.structure.on_disk.keys() >= {*group.modules}]

    def notes(self, groups: Iterable[LayerGroup]) -> list[str]:
        """What a user should know of a checkpoint before it is swept. Args: groups: that are scored."""
        found = self.structure
        notes = [] if self.source_note is None else [self.source_note]
        if found.unused:
            notes.append(
                f"{self.path} holds {count(len(found.unused), 'tensor')} that transformers' model does not have "
                f"({_first(found.unused)}): exports keep them as they are, in no layer group"
            )
        if found.untied:
            notes.append(
                f"config.json of {self.path} ties {_first(found.untied)} to other weights, but the files hold values "
                "of its own, which are scored: runtimes may not take them. Write tie_word_embeddings: false there"
            )
        if apart := [group.short_name for group in self.without_weights(groups)]:
            notes.append(
                f"{_first(apart)}: scored, but exports must leave it in 16 bits, since its weight in {self.path} is "
                f"{NOT_HELD}"
            )
        return notes

    @cached_property
    def kv_heads(self) -> int | None:
        """The language model's key-value heads; None: config.json does not say."""
        return key_value_heads(self.path)

    def tokenize(self, source: Json, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, cached by the texts' source and the tokenizer's files."""

        def compute() -> list[list[int]]:
            from workers.model import loading

            return loading.tokenize(self.path, texts)

        files = sorted(
            path
            for path in self.path.glob("*")
            if "token" in path.name or "vocab" in path.name or path.suffix in {".txt", ".model", ".jinja"}
        )
        return cache.remember(
            "token-ids", [source, [file_key(file) for file in files], version("transformers")], compute
        )

    def image_tokens(self) -> dict[str, int]:
        def compute() -> dict[str, int]:
            from workers.model import loading

            return loading.image_tokens(self.path)

        return cache.remember("image-tokens", [file_key(self.path / "config.json"), version("transformers")], compute)

    def file_names(self) -> list[str]:
        """Names of the files of a checkpoint that is written from this one, quantized."""
        return checkpoint_names(self.path)

    def plan(self, samples: Sequence[Sample]) -> Plan:
        """Batch samples as the model reads them."""
        return make_plan(samples, packed=self.structure.packable)

    def load(self, dtype: str, device: str) -> "PreTrainedModel":
        """Load the model with its weights into this process. Args: dtype: name of torch's; device: "cpu" or "cuda"."""
        import torch

        from workers.model import loading

        return loading.load(self.path, dtype=getattr(torch, dtype), device=device)


def checkpoint_dir(config: ModelConfig) -> Path:
    """The local directory of a configured model.

    Raises: SweepError: there is none, or it cannot be loaded safely.
    """
    path = bundled_model_dir() if config.path is None else Path(config.path).expanduser()
    if config.path is not None and is_hub_id(config.path):
        from workers.model import loading

        path = loading.local_checkpoint(config.path)
    check_checkpoint(path)
    return path.resolve()


def _first(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def checkpoint_gb(path: Path) -> float:
    """Size of the weight files that are loaded in GB (1e9 bytes)."""
    return sum(file.stat().st_size for file in loaded_files(path)) / 1e9
