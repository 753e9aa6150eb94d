"""Recipe files come back as they were, and no edit by hand ends in anything but a recipe or one message."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml

from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision.checks import check_recipe
from sweep.plan.model import Model
from tests.exports import FORMATS, recipe_of
from tests.formats import group_format

MODEL = Model(bundled_model_dir())
NAMES = ["nvfp4", "fp8_tensor_static", "int4_groups_weight_only", None, "fp8_blocks", "int8_channel_token"]
VALUES: list[Any] = [None, "x", -1, 0, [], {}, 1.5, True, float("nan")]


@pytest.fixture(scope="module")
def recipe() -> MixedRecipe:
    return recipe_of([name and group_format(name, *FORMATS[name]) for name in NAMES])


@pytest.fixture
def document(recipe: MixedRecipe) -> dict[str, Any]:
    """Of two layer groups."""
    found = yaml.safe_load(recipe.to_yaml())
    return found | {"groups": found["groups"][:2]}


def read(document: dict[str, Any]) -> MixedRecipe:
    found = MixedRecipe.from_yaml(yaml.safe_dump(document), "mine.yaml")
    check_recipe(found, MODEL)
    return found


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all that a document holds."""
    if path:
        yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


def put(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


def test_a_recipe_comes_back(recipe: MixedRecipe) -> None:
    assert read(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_kl_of_a_whole_mix_comes_back_unless_the_mix_was_edited(recipe: MixedRecipe) -> None:
    joint = replace(recipe, joint_kl=0.25)
    text = joint.to_yaml()
    assert MixedRecipe.from_yaml(text, "f") == joint
    assert joint.predicted_kl == 0.25
    label = next(choice.format for choice in recipe.groups if choice.format is not None)
    edited = MixedRecipe.from_yaml(text.replace(f"  format: {label}\n", "  format: null\n", 1), "f")
    assert (edited.joint_kl, edited.predicted_kl) == (None, edited.linear_kl)
    for value in ("-1", ".nan", "text"):
        with pytest.raises(SweepError, match="joint_kl"):
            MixedRecipe.from_yaml(text.replace("joint_kl: 0.25", f"joint_kl: {value}"), "f")


def test_a_format_for_several_ranks_says_so_and_others_say_nothing() -> None:
    each = [group_format(name, *FORMATS[name]).on_ranks(2) for name in ("fp8_tensor_static", "int8_channel_token")]
    made = recipe_of(each)
    document = yaml.safe_load(made.to_yaml())
    assert [node.get("tp") for node in document["formats"].values()] == [None, 2]
    assert read(document) == made
    for tp, said in ((0, "tp is 0, no number of ranks"), (5, r"target\.tp=5: 5 do not divide the")):
        with pytest.raises(SweepError, match=said):
            read(put(document, ("formats", each[1].label, "tp"), tp))


def test_any_value_in_any_place_gives_a_recipe_or_one_message(document: dict[str, Any]) -> None:
    """A recipe that is read can be written again and has a size; anything but a SweepError fails the test."""
    refused = 0
    for path in places(document):
        for value in VALUES:
            try:
                found = read(put(document, path, value))
            except SweepError:
                refused += 1
                continue
            assert 0 < found.effective_bits <= 16
            assert found.predicted_kl >= 0
            assert found.to_yaml()
    assert refused > 500


def test_whatever_is_taken_away_gives_a_recipe_or_one_message(document: dict[str, Any]) -> None:
    for path in places(document):
        if path[0] == "totals":
            continue
        changed = copy.deepcopy(document)
        node: Any = changed
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]
        if path[0] in ("samples", "calibration_samples", "dtype", "store"):  # files of earlier programs lack them
            assert read(changed)
        elif len(path) == 1 or (path[0] == "groups" and len(path) == 3):
            with pytest.raises(SweepError, match=r"lacks|no recipe file"):
                read(changed)
        else:
            try:
                assert 0 < read(changed).effective_bits <= 16
            except SweepError as error:
                assert str(error)  # noqa: PT017 -- some may be left out, some not


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("size",), "huge", r"mine\.yaml: size='huge' is no size\. Type small, medium, large \(.*\), or a number"),
        (("size",), "1", r"mine\.yaml: size='1' is no size\. .* a number of samples from 2 to 1,000,000\."),
        (("calibration_samples",), 15, r"calibration_samples is 15\. It is null, or at least the 16 samples of"),
        (("tokens",), ["images"], r"Unknown kind of token in mine\.yaml 'images'\. Did you mean 'image'\?"),
        (("coverage",), "some", r"coverage is 'some'\. Allowed: lm_only, all_layers\."),
        (("model_revision",), 7, r"model_revision is 7\. Allowed: text\."),
        (
            ("formats", "nvfp4/default", "algorithm"),
            "awq_light",
            r"Unknown calibration algorithm .* 'awq_light'\. Did you mean 'awq_lite'\?",
        ),
        (("formats", "nvfp4/default", "scales"), "mine", r"scales is 'mine'\. Allowed: fused, private\."),
        (
            ("formats", "nvfp4/default", "weight", "num_bits"),
            [3, 9],
            r"num_bits: \[3, 9\] .* Type a whole number of bits",
        ),
        (
            ("formats", "nvfp4/default", "weight", "block_size"),
            {-1: 16},
            r"Unknown field .*'block_size'\. Did you mean 'block_sizes'\?",
        ),
        (("formats", "int8_channel_token/default", "weight", "axis"), 5, r"axis: 5 .* Type null \(per tensor\), 0"),
        (("groups", 0, "modules"), "q_proj", r"modules is 'q_proj'\. Allowed: a list, each item text\."),
        (("groups", 0, "weight_elements"), 5, r"has 131072 weights; the recipe says 5\."),
        (("groups", 0, "predicted_kl"), -0.5, r"predicted_kl is -0\.5\. It is a number of 0 or more\."),
        (("groups", 0, "format"), "nvfp5/default", r"Did you mean 'nvfp4/default'\?"),
    ],
)
def test_what_cannot_be_meant_is_named_with_what_may_stand_there(
    document: dict[str, Any], path: tuple[Any, ...], value: Any, message: str
) -> None:
    with pytest.raises(SweepError, match=message):
        read(put(document, path, value))
