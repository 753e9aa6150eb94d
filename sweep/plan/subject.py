"""The subject of a sweep: a checkpoint, and the samples of a data set as its tokenizer reads them.

Results that take seconds to compute (hashes, token ids, the model's structure) are cached on disk.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweep.config.schema import DatasetConfig, ModelConfig
from sweep.core import cache
from sweep.core.batches import Plan, Sample
from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from workers.data.batches import make_plan
from workers.data.samples import read_captions, read_hub_captions, scene_captions, text_samples, with_scenes
from workers.model.checkpoint import (
    check_checkpoint,
    check_weights,
    checkpoint_names,
    file_key,
    revision,
    weight_files,
)


@dataclass(frozen=True)
class Model:
    """A checkpoint: its revision, structure and tokenizer, without its weights."""

    path: Path

    @cached_property
    def revision(self) -> str:
        return revision(self.path)

    @cached_property
    def structure(self) -> dict[str, Any]:
        """As workers.model.loading.structure; and `groups`: modules of each layer group, by the first of them."""
        key = [3, file_key(self.path / "config.json"), version("transformers"), version("nvidia-modelopt")]
        return cache.remember("model-structure", key, self._read_structure)

    def _read_structure(self) -> dict[str, Any]:
        from workers.model import loading
        from workers.quant import modelopt

        found = loading.structure(self.path)
        groups = modelopt.layer_groups(name for name, _, _ in found["linears"])
        return {**found, "groups": {first: list(modules) for first, modules in groups.items()}}

    @cached_property
    def inputs(self) -> dict[str, int]:
        """Number of inputs of each linear, by module."""
        return {name: n_inputs for name, n_inputs, _ in self.structure["linears"]}

    def tokenize(self, source: object, texts: Sequence[str]) -> list[list[int]]:
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
        return make_plan(samples, packed=self.structure["packable"])

    def load(self, dtype: str, device: str) -> Any:
        """Load the model with its weights into this process. Args: dtype: name of torch's; device: "cpu" or "cuda"."""
        import torch

        from workers.model import loading

        if device == "cpu":
            torch.set_num_threads(1)  # as a sweep's workers: more would change bits, and crawl beside them
        return loading.load(self.path, dtype=getattr(torch, dtype), device=device)


def checkpoint_dir(config: ModelConfig) -> Path:
    """The local directory of a configured model.

    Raises: SweepError: there is none, or it cannot be loaded safely.
    """
    path = bundled_model_dir() if config.path is None else Path(config.path).expanduser()
    if (
        not path.exists()
        and config.path is not None
        and config.path.count("/") == 1
        and not config.path.startswith((".", "~"))
    ):
        from workers.model import loading

        path = loading.local_checkpoint(config.path)
    check_checkpoint(path)
    check_weights(path)
    return path.resolve()


def checkpoint_gb(path: Path) -> float:
    """Size of the weight files in GB (1e9 bytes)."""
    return sum(file.stat().st_size for file in weight_files(path)) / 1e9


def samples_of(dataset: DatasetConfig, model: Model, n_samples: int) -> list[Sample]:
    """The first `n_samples` of a data set, as the model's tokenizer reads them.

    Raises: SweepError: they cannot be read, are too few or too short, or the tokenizer is another model's.
    """
    samples = _read(dataset, model, n_samples)
    _check_vocabulary(samples, model)
    return samples


def _read(dataset: DatasetConfig, model: Model, n_samples: int) -> list[Sample]:
    if dataset.kind == "scenes":
        captions = scene_captions(n_samples)
        source: object = ["scenes", n_samples, hashlib.sha256("\n".join(captions).encode()).hexdigest()]
        return with_scenes(text_samples(model.tokenize(source, captions), dataset.max_tokens), **model.image_tokens())
    if dataset.kind == "bundled" or dataset.captions_path is not None:
        path = (
            Path(dataset.captions_path).expanduser()
            if dataset.captions_path is not None
            else bundled_model_dir() / f"{dataset.name}.txt"
        )
        texts = read_captions(path, n_samples)
        return text_samples(model.tokenize([file_key(path), n_samples], texts), dataset.max_tokens)
    assert dataset.hub_id is not None  # DatasetConfig has checked
    assert dataset.hub_split is not None
    assert dataset.hub_column is not None
    texts = read_hub_captions(dataset.hub_id, dataset.hub_split, dataset.hub_column, n_samples)
    source = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return text_samples(model.tokenize(source, texts), dataset.max_tokens)


def _check_vocabulary(samples: Sequence[Sample], model: Model) -> None:
    largest = max(int(sample.token_ids.max()) for sample in samples)
    if largest >= model.structure["vocabulary"]:
        raise SweepError(
            f"The tokenizer in {model.path} gives token {largest}, "
            f"but the model has {model.structure['vocabulary']} tokens: the two do not belong together. "
            "Copy the model's own tokenizer files there."
        )
