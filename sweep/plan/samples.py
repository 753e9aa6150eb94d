"""The samples of a data set, as a model's tokenizer or processor reads them."""

import hashlib
from pathlib import Path

from sweep.config.schema import DatasetConfig
from sweep.core.batches import Sample
from sweep.core.errors import SweepError
from sweep.core.json import Json
from sweep.core.paths import bundled_model_dir
from sweep.core.sizes import boundaries
from sweep.plan.model import Model
from sweep.plan.own_samples import Writing, own_samples
from workers.data.own import check_captions
from workers.data.samples import read_captions, read_hub_captions, scene_captions, text_samples, with_scenes
from workers.model.checkpoint import file_key


def samples_of(dataset: DatasetConfig, model: Model, n_samples: int, writing: Writing | None = None) -> list[Sample]:
    """The first `n_samples` of a data set, as the model's tokenizer or processor reads them.

    Args:
        dataset: it.
        model: that reads it.
        n_samples: at least 2.
        writing: needed where the model writes the answers (dataset.answers).

    Raises: SweepError: they cannot be read, are too few or too short, or the tokenizer is another model's.
    """
    return _checked(_read(dataset, model, n_samples, n_samples, writing), model)


def samples_to_boundary(
    dataset: DatasetConfig, model: Model, n_samples: int, writing: Writing | None = None
) -> list[Sample]:
    """The first `n_samples` of a data set, and those up to the next boundary of sizes, as far as it has them.

    Batches that hold the last of them are then those of larger sizes. Args and errors: as `samples_of`.
    """
    return _checked(_read(dataset, model, n_samples, boundaries(n_samples)[-1], writing), model)


def _read(dataset: DatasetConfig, model: Model, n_least: int, n_most: int, writing: Writing | None) -> list[Sample]:
    if dataset.path is not None or dataset.kind == "scenes_chat":
        return own_samples(dataset, model, n_least, n_most, writing)
    if dataset.kind == "scenes":
        captions = scene_captions(n_most)
        source: Json = ["scenes", n_most, hashlib.sha256("\n".join(captions).encode()).hexdigest()]
        return with_scenes(text_samples(model.tokenize(source, captions), dataset.max_tokens), **model.image_tokens())
    if dataset.kind == "bundled" or dataset.captions_path is not None:
        path = (
            Path(dataset.captions_path).expanduser()
            if dataset.captions_path is not None
            else bundled_model_dir() / f"{dataset.name}.txt"
        )
        check_captions(path)
        texts = read_captions(path, n_least, n_most)
        return text_samples(model.tokenize([file_key(path), len(texts)], texts), dataset.max_tokens)
    assert dataset.hub_id is not None  # DatasetConfig has checked
    assert dataset.hub_split is not None
    assert dataset.hub_column is not None
    texts = read_hub_captions(dataset.hub_id, dataset.hub_split, dataset.hub_column, n_least, n_most)
    source = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    return text_samples(model.tokenize(source, texts), dataset.max_tokens)


def _checked(samples: list[Sample], model: Model) -> list[Sample]:
    largest = max(int(sample.token_ids.max()) for sample in samples)
    if largest >= model.structure.vocabulary:
        raise SweepError(
            f"The tokenizer in {model.path} gives token {largest}, "
            f"but the model has {model.structure.vocabulary} tokens: the two do not belong together. "
            "Copy the model's own tokenizer files there."
        )
    return samples
