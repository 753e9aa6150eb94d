"""A recipe remembers where it came from, and what is typed wins over it."""

from dataclasses import replace
from pathlib import Path

import pytest

from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.recipe_context import config_of, context_of
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.exports import FORMATS, recipe_of
from tests.formats import group_format


@pytest.fixture
def recipe(tmp_path: Path) -> MixedRecipe:
    found = recipe_of([group_format("int4", *FORMATS["int4_groups_weight_only"])])
    samples = {
        "kind": "captions",
        "max_tokens": 48,
        "captions_path": "/data/a 'b', {c}.txt",
        "hub_id": None,
        "hub_split": None,
        "hub_column": None,
    }
    own = {"dataset": "coco2017_captions", "samples": samples, "dtype": "bfloat16", "store": str(tmp_path / "store")}
    return MixedRecipe.from_yaml(replace(found, **own).to_yaml(), "recipe.yaml")


def test_the_samples_precision_and_store_are_the_recipes(recipe: MixedRecipe, tmp_path: Path) -> None:
    config = config_of(recipe, [])
    assert (config.dataset.name, config.dataset.size) == ("coco2017_captions", "small")
    assert (config.dataset.captions_path, config.dataset.max_tokens) == ("/data/a 'b', {c}.txt", 48)
    assert config.model.dtype_on("cpu") == config.model.dtype_on("cuda") == "bfloat16"
    assert config.store.uri == str(tmp_path / "store")


def test_what_is_typed_wins(recipe: MixedRecipe, tmp_path: Path) -> None:
    typed = ["dataset.captions_path=other.txt", "model.dtype=float32", f"store.uri={tmp_path / 'other'}"]
    config = config_of(recipe, typed)
    assert (config.dataset.captions_path, config.dataset.max_tokens) == ("other.txt", 48)
    assert (config.model.dtype, config.store.uri) == ("float32", str(tmp_path / "other"))
    other = config_of(recipe, ["dataset=wordnet_glosses"]).dataset
    assert (other.name, other.captions_path, other.max_tokens) == ("wordnet_glosses", None, 512)


def test_a_recipe_of_an_earlier_program_is_read_as_before(recipe: MixedRecipe) -> None:
    config = config_of(replace(recipe, samples=None, dtype=None, store=None, dataset="wordnet_glosses"), [])
    assert (config.model.dtype, config.dataset.max_tokens) == ("auto", 512)


@pytest.mark.parametrize("kind", ["captions", "scenes", "scenes_chat", "chat"])
def test_a_data_set_may_have_a_name_of_its_own(recipe: MixedRecipe, kind: str) -> None:
    samples = {"kind": kind, "captions_path": "a b.txt" if kind == "captions" else None}
    samples |= {"path": "/data/a b.jsonl"} if kind == "chat" else {}
    config = config_of(replace(recipe, dataset="mine", samples=samples), [])
    assert (config.dataset.name, config.dataset.kind) == ("mine", kind)


def test_keys_of_samples_that_do_not_exist_are_refused(recipe: MixedRecipe) -> None:
    with pytest.raises(SweepError, match=r"dataset\.captions_pth.*Did you mean 'dataset\.captions_path'"):
        config_of(replace(recipe, samples={"captions_pth": "a.txt"}), [])


def test_a_size_inside_a_batch_has_the_batches_that_were_scored(recipe: MixedRecipe) -> None:
    model = Model(bundled_model_dir())
    config = config_of(replace(recipe, samples=None, dataset="wordnet_glosses"), [])
    scored = model.plan(samples_of(config.dataset, model, 128))
    context = context_of(replace(recipe, size="64", dataset_revision=scored.digest("64")), config)
    assert len(context.samples) == 64
    assert context.plan.n_predictions("64") == scored.n_predictions("64")
