"""The candidate formats that a store gives each layer group, and which trials may be put together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sweep.config.compose import expand
from sweep.config.targets import Target
from sweep.core.errors import SweepError
from sweep.formats.format import Format
from sweep.mixed_precision.candidates import Candidates, read_candidates, sized
from sweep.mixed_precision.recipe import recipe_of_choice
from sweep.mixed_precision.shapes import other_ranks_line
from sweep.plan.trials import recipe_of, score_version
from sweep.store.store import Store
from tests.scored import FP8, GROUPS, INT4, INT8, PREDICTED_KL, add, store_at


def found(path: Path, *overrides: str) -> Candidates:
    return read_candidates(Store(str(path)), [*overrides, f"store.uri={path}"])


def predicted_kl_of(candidates: Candidates) -> dict[str, list[float]]:
    return {candidate.format.label: candidate.predicted_kl.tolist() for candidate in candidates.formats}


def format_of(recipe: str) -> Format:
    pair, granularity = recipe.split("/")
    typed = [f"quant_pair={pair}", f"quant_granularity={granularity}", "sensitivity.scales=fused"]
    return recipe_of(expand(typed, multirun=False).points[0]).format


def test_every_finished_cell_is_an_option_of_every_group(tmp_path: Path) -> None:
    store_at(tmp_path)
    candidates = found(tmp_path)
    assert predicted_kl_of(candidates) == {label: list(each) for label, each in PREDICTED_KL.items()}
    assert {candidate.format.label: candidate.format.effective_bits for candidate in candidates.formats} == {
        INT4: 4.125,
        INT8: 8.0,
        FP8: 8.0,
    }
    assert [group.name for group in candidates.groups] == [group[0] for group in GROUPS]
    assert (candidates.weights.sum(), candidates.other_bytes) == (10_000, 2 * 15_000)
    int4 = next(candidate.format for candidate in candidates.formats if candidate.format.label == INT4)
    assert int4.weight is not None
    assert (int4.weight.num_bits, int4.weight.block_lengths[-1], int4.inputs) == (4, 128, None)


def test_samples_add_up_to_the_group(tmp_path: Path) -> None:
    store_at(tmp_path)
    for candidate in found(tmp_path).formats:
        assert candidate.sample_kl is not None
        np.testing.assert_allclose(candidate.sample_kl, candidate.predicted_kl[:, None] * [0.25, 0.75])


def test_the_kinds_of_token_that_are_named_count(tmp_path: Path) -> None:
    """Of every group's score the image has 1/2, the answer 1/8 times its number."""
    parts = {"image": (0.5,) * 5, "answer": (0, 0.125, 0.25, 0.375, 0.5), "prompt": (0.5, 0.375, 0.25, 0.125, 0)}
    store = store_at(tmp_path, {INT4: (0.1, None, 0.1, 0.1, 0.1)}, by_kind=parts)
    overrides = [f"store.uri={tmp_path}"]
    (whole,) = read_candidates(store, overrides).formats
    candidates = read_candidates(store, overrides, tokens=("image", "answer"))
    (some,) = candidates.formats
    assert candidates.tokens == ("image", "answer")
    assert some.predicted_kl == pytest.approx([0.05, np.inf, 0.075, 0.0875, 0.1])
    assert some.sample_kl is not None
    assert whole.sample_kl is not None
    np.testing.assert_allclose(some.sample_kl.sum(1)[[0, 2, 3, 4]], some.predicted_kl[[0, 2, 3, 4]], rtol=1e-6)
    np.testing.assert_allclose(some.sample_kl[0], whole.sample_kl[0] / 2, rtol=1e-6)
    assert some.sample_predictions is not None
    assert some.sample_predictions.tolist() == [10, 40]


def test_kinds_that_undo_others_add_nothing(tmp_path: Path) -> None:
    """Projections of a kind of token may have a negative part, and a knapsack has no use for a negative KL."""
    parts = {"image": (-0.25, 0.5, 0.5, 0.5, 0.5), "prompt": (1.25, 0.5, 0.5, 0.5, 0.5)}
    store = store_at(tmp_path, {INT4: (0.1,) * 5}, by_kind=parts)
    (image,) = read_candidates(store, [f"store.uri={tmp_path}"], tokens=("image",)).formats
    (prompt,) = read_candidates(store, [f"store.uri={tmp_path}"], tokens=("prompt",)).formats
    assert image.predicted_kl == pytest.approx([0, 0.05, 0.05, 0.05, 0.05])
    assert prompt.predicted_kl == pytest.approx([0.125, 0.05, 0.05, 0.05, 0.05])
    assert prompt.sample_kl is not None
    assert prompt.sample_kl.sum(1) == pytest.approx(prompt.predicted_kl)


def test_methods_and_numbers_of_draws_are_not_mixed(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    fisher = ("sensitivity.method=fisher", f"store.uri={tmp_path}")
    add(store, INT4, [0.1] * 5, *fisher, minute=1, draws=8)
    with pytest.raises(SweepError, match=r"sensitivity\.method=fisher or sensitivity\.method=gradient"):
        read_candidates(store, [f"store.uri={tmp_path}"])
    add(store, FP8, [0.1] * 5, *fisher, "sensitivity.draws=2", minute=2, draws=2)
    with pytest.raises(SweepError, match=r"sensitivity\.draws=2 or sensitivity\.draws=8"):
        read_candidates(store, [f"store.uri={tmp_path}", "sensitivity.method=fisher"])


def test_what_stands_beside_a_recipe_was_scored_by_its_method(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    fisher = ("sensitivity.method=fisher", f"store.uri={tmp_path}")
    add(store, INT4, [0.1] * 5, *fisher, minute=1, draws=8, versions='{"score": "1+fisher.1"}')
    for method, others in (("gradient", {INT4, INT8, FP8}), ("fisher", {INT4})):
        candidates = read_candidates(store, [f"store.uri={tmp_path}", f"sensitivity.method={method}"])
        recipe = recipe_of_choice(candidates, np.zeros(5, dtype=np.int64), "recipe", None)
        beside = read_candidates(store, [f"store.uri={tmp_path}"], beside=recipe)
        assert {each.format.label for each in beside.formats} == others
        assert beside.trial.method == method


@pytest.mark.parametrize(
    ("overrides", "way_out"),
    [([], "store.uri=DIR"), (["sensitivity.engine=modelopt"], "with sensitivity.engine=layerwise")],
)
def test_scores_without_kinds_are_refused_where_kinds_are_named(
    tmp_path: Path, overrides: list[str], way_out: str
) -> None:
    store = Store(str(tmp_path))
    add(store, INT4, [0.1] * 5, *overrides)
    with pytest.raises(SweepError, match=rf"{INT4} are not known by kind of token: .* Type the same .*{way_out}"):
        read_candidates(store, [f"store.uri={tmp_path}"], tokens=("image",))


def test_a_group_never_called_cannot_get_the_format(tmp_path: Path) -> None:
    store_at(tmp_path, {INT4: (0.1, None, 0.1, 0.1, 0.1)})
    assert predicted_kl_of(found(tmp_path)) == {INT4: [0.1, np.inf, 0.1, 0.1, 0.1]}


def test_overrides_narrow_the_recipes(tmp_path: Path) -> None:
    store_at(tmp_path)
    assert set(predicted_kl_of(found(tmp_path, "quant_pair=wint8_aint8,wfp8_afp8"))) == {INT8, FP8}
    assert set(predicted_kl_of(found(tmp_path, "quant_granularity=default"))) == {INT4, FP8}


def test_the_largest_size_counts_unless_one_is_typed(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    add(store, INT8, [0.5] * 5, "dataset.size=medium")
    assert predicted_kl_of(found(tmp_path)) == {INT8: [0.5] * 5}
    assert len(predicted_kl_of(found(tmp_path, "dataset.size=small"))) == 3


def test_a_recipe_scored_again_by_another_version_has_the_latest_predicted_kl(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    add(store, INT8, [0.5] * 5, minute=1)
    assert predicted_kl_of(found(tmp_path))[INT8] == [0.5] * 5
    add(store, FP8, [0.7] * 5, minute=2, versions='{"score": "2"}')
    assert predicted_kl_of(found(tmp_path)) == {FP8: [0.7] * 5}  # the others are scores of another kind


def test_a_target_has_the_scores_of_its_number_of_ranks(tmp_path: Path) -> None:
    """INT8 has a range a token; the other formats are every target's."""
    store, others = store_at(tmp_path), {INT4: list(PREDICTED_KL[INT4]), FP8: list(PREDICTED_KL[FP8])}
    without = found(tmp_path, "target.tp=2")
    assert (predicted_kl_of(without), without.other_ranks) == (others, (INT8,))
    line = other_ranks_line(Target.from_config(without.config.target), without)
    assert line is not None
    assert line.startswith(f"no {INT8}: ")
    assert line.endswith("the same sweep run with target.tp=2 scores them")
    split = [0.1, 0.2, 0.3, 0.4, 0.5]
    add(store, INT8, split, minute=1, tp=2)
    assert predicted_kl_of(found(tmp_path, "target.tp=2")) == {**others, INT8: split}
    assert {each.format.label: each.format.tp for each in found(tmp_path, "target.tp=2").formats}[INT8] == 2
    assert predicted_kl_of(found(tmp_path)) == {label: list(each) for label, each in PREDICTED_KL.items()}
    assert found(tmp_path).other_ranks == found(tmp_path, "target.tp=2").other_ranks == ()
    with pytest.raises(SweepError, match=r"scored for target\.tp=1, target\.tp=2: .*other ones on 4 ranks"):
        found(tmp_path, "target.tp=4", "quant_pair=wint8_aint8")


def test_only_formats_with_rounded_scales_must_be_of_todays_rounding(tmp_path: Path) -> None:
    """An INT4 cell of before is as if it had not been scored; with one scored again, all are solved together."""
    store = Store(str(tmp_path))
    for minute, recipe in enumerate(PREDICTED_KL):
        add(store, recipe, PREDICTED_KL[recipe], "sensitivity.scales=fused", minute=minute)
    others = {recipe: list(kl) for recipe, kl in PREDICTED_KL.items() if recipe != INT4}
    assert predicted_kl_of(found(tmp_path)) == others
    with pytest.raises(SweepError, match=r"no trial of qwen3_vl_tiny that this version scored.*`sweep run` again"):
        found(tmp_path, "quant_pair=wint4_afp16")
    now = f'{{"score": "{score_version(format_of(INT4), "gradient")}"}}'
    add(store, INT4, [0.3] * 5, "sensitivity.scales=fused", minute=9, versions=now)
    assert predicted_kl_of(found(tmp_path)) == {**others, INT4: [0.3] * 5}


@pytest.mark.parametrize(
    ("overrides", "changed", "message"),
    [
        (("model.name=other",), {}, r"model=other .* or model=qwen3_vl_tiny .*Type the one you mean"),
        ((), {"model_revision": "r2"}, r"model=qwen3_vl_tiny \(r1\) or model=qwen3_vl_tiny \(r2\)"),
        (("dataset=scenes",), {}, r"dataset=scenes or dataset=wordnet_glosses"),
        (
            ("sensitivity.method=kl_div",),
            {"versions": '{"score": "1+kl_div.1"}'},
            r"sensitivity.method=gradient or sensitivity.method=kl_div",
        ),
        (("sensitivity.scales=fused",), {}, r"sensitivity.scales=fused or sensitivity.scales=private"),
        (
            ("dataset.max_tokens=64",),
            {"dataset_revision": "d-other"},
            r"2 different sets of samples .* you mean: dataset\.max_tokens=512 or dataset\.max_tokens=64\.",
        ),
        (
            (),
            {"dataset_revision": "d-other"},
            r"you mean: a file that has changed since: sweep into another store\.uri",
        ),
        (("dataset=chat", "dataset.path=/data/c.jsonl"), {}, r"dataset\.name=c or dataset=wordnet_glosses"),
    ],
    ids=["model", "revision", "dataset", "method", "scales", "samples", "file", "own"],
)
def test_predicted_kl_of_different_kinds_is_not_mixed(
    overrides: tuple[str, ...], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    store = store_at(tmp_path)
    add(store, FP8, [0.1] * 5, *overrides, minute=1, **changed)
    with pytest.raises(SweepError, match=message):
        found(tmp_path)
    if overrides:
        assert predicted_kl_of(found(tmp_path, *overrides)) == {FP8: [0.1] * 5}


def test_files_of_one_name_are_told_apart_as_they_are_typed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for minute, directory in enumerate(("one", "two")):
        own = ("dataset=chat", f"dataset.path=/{directory}/c.jsonl")
        add(store, FP8, [0.1 + minute] * 5, *own, minute=minute, dataset_revision=directory)
    with pytest.raises(SweepError) as error:
        found(tmp_path)
    ways_out = str(error.value).removesuffix(".").rpartition("you mean: ")[2].split(" or ")
    assert ways_out == [f"dataset=chat dataset.path=/{directory}/c.jsonl" for directory in ("one", "two")]
    assert predicted_kl_of(found(tmp_path, *ways_out[1].split())) == {FP8: [1.1] * 5}


def test_ranges_of_a_recipe_are_of_one_number_of_samples(tmp_path: Path) -> None:
    """FP8 inputs have a calibrated range; INT4 weights have none, and go with any."""
    store = Store(str(tmp_path))
    add(store, INT4, [0.1] * 5)
    add(store, FP8, [0.2] * 5, "calibration.n_samples=64", minute=1)
    assert found(tmp_path).config.calibration.n_samples == 64
    assert found(tmp_path, "quant_pair=wint4_afp16").config.calibration.n_samples is None
    add(store, FP8, [0.3] * 5, "calibration.n_samples=32", minute=2)
    with pytest.raises(SweepError, match=r"mean: calibration\.n_samples=32 or calibration\.n_samples=64\."):
        found(tmp_path)
    assert predicted_kl_of(found(tmp_path, "calibration.n_samples=32")) == {FP8: [0.3] * 5}


def test_an_empty_store_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"holds no finished trial\. Type `sweep run` first"):
        found(tmp_path)


def test_a_value_that_no_trial_has_names_those_that_are_there(tmp_path: Path) -> None:
    store_at(tmp_path)
    with pytest.raises(SweepError, match="It has quant_pair=wfp8_afp8,wint4_afp16,wint8_aint8"):
        found(tmp_path, "quant_pair=wfp4_afp4")


def test_a_quantized_copy_of_tied_embeddings_comes_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25,000 parameters, 8,000 of them embeddings that lm_head shares: quantized, it is 8,000 weights of its own."""
    head = ("lm_head", ("lm_head",), None, 8000)
    monkeypatch.setattr("tests.scored.GROUPS", (*GROUPS, head))
    store_at(tmp_path, {INT4: [0.1] * 6})
    candidates = found(tmp_path)
    assert candidates.covers_lm_head
    assert candidates.other_bytes == 2 * (25_000 - 10_000)
    untied = tmp_path / "untied"
    store_at(untied, {INT4: [0.1] * 6}, {"parameters": 33_000, "embeddings": 8_000, "lm_head": 8_000})
    assert found(untied).other_bytes == 2 * (33_000 - 18_000)


def test_a_store_of_before_does_not_know_the_models_size(tmp_path: Path) -> None:
    store_at(tmp_path, elements=None)
    candidates = sized(found(tmp_path))  # the bundled model is another revision than r1
    with pytest.raises(SweepError, match="Type --bits instead of --gb"):
        _ = candidates.other_bytes


def test_the_checkpoint_says_its_size_if_the_store_does_not(tmp_path: Path) -> None:
    from sweep.core.paths import bundled_model_dir
    from sweep.plan.model import Model

    store = store_at(tmp_path, {}, elements=None)
    add(store, FP8, [0.1] * 5, model_revision=Model(bundled_model_dir()).revision)
    elements = sized(found(tmp_path)).elements
    assert elements is not None
    assert (elements["parameters"], elements["embeddings"], elements["lm_head"]) == (4797952, 1048576, 0)
    assert sum(elements.values()) == 2 * elements["parameters"]
