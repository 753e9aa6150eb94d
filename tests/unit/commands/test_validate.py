"""`sweep validate`: rows are kept and found again; samples that prove nothing and impossible recipes exit with 2."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from sweep.cli import main
from sweep.commands.validate import wanted
from sweep.config.compose import expand
from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import Format
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision import measured
from sweep.mixed_precision.candidates import Candidate, Candidates
from sweep.mixed_precision.measured import (
    _identity,
    held_out,
    measured_samples,
    random_mixes,
    uniform_recipes,
    validate,
)
from sweep.mixed_precision.recapture import recaptured_kl
from sweep.mixed_precision.recipe_context import RecipeContext, config_of, context_of
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from sweep.store.records import TrialRow
from sweep.store.store import Store
from tests.exports import FORMATS, apply, recipe_of
from tests.floors import sample_logits
from tests.formats import group_format
from tests.scored import FP8, INT8, add, store_at
from workers.data.batches import make_plan
from workers.model.loading import load
from workers.quant.applied import calibrated_model

MODEL = Model(bundled_model_dir())
NAMES = ["int4_groups_weight_only", "int8_tensor_static", None, "fp8_channel_token"]
WEIGHTS_ALONE = ["int4_groups_weight_only", "int8_channel_weight_only", None, "fp8_weight_only"]
CONFIG = expand(["dataset.size=small", "cluster.device=cpu", "validation.n_samples=16"], multirun=False).points[0]


@pytest.fixture(scope="module")
def recipe() -> MixedRecipe:
    found = recipe_of([name and group_format(name, *FORMATS[name]) for name in NAMES])
    samples = samples_of(CONFIG.dataset, MODEL, 16)
    return replace(found, dataset_revision=make_plan(samples, packed=True).digest("small"))


@pytest.fixture
def run(tmp_path: Path, recipe: MixedRecipe) -> Callable[..., int]:
    def validated(*rest: str, edited: Callable[[str], str] = lambda text: text) -> int:
        path = tmp_path / "mixed.yaml"
        path.write_text(edited(recipe.to_yaml()))
        return main(
            [
                "validate",
                str(path),
                f"store.uri={tmp_path / 'store'}",
                "cluster.device=cpu",
                "validation.n_samples=16",
                *rest,
            ]
        )

    return validated


@pytest.fixture(scope="module")
def candidates(recipe: MixedRecipe) -> Candidates:
    """Two formats for every group, one of which was not measured in the first."""
    groups = tuple(choice.group for choice in recipe.groups)
    kl = np.linspace(0.001, 0.002, len(groups))
    formats = [
        Candidate(
            format=group_format(name, *FORMATS[name]),
            cell_id=f"cell-{name}",
            predicted_kl=np.where(kl <= least, np.inf, kl),
            sample_kl=None,
        )
        for name, least in (("int8_tensor_static", 0.0), ("int4_groups_weight_only", 0.001))
    ]
    words = dict.fromkeys(
        (
            "trial_id",
            "cell_id",
            "method",
            "engine",
            "quant_pair",
            "quant_granularity",
            "reason",
            *("algorithm", "scales", "dtype"),
            "config",
            "versions",
            "run_id",
        ),
        "",
    )
    facts = {
        "model": recipe.model,
        "model_revision": recipe.model_revision,
        "dataset": recipe.dataset,
        "dataset_revision": recipe.dataset_revision,
    }
    row: dict[str, Any] = {
        **words,
        **facts,
        "size": "small",
        "coverage": "lm_only",
        "state": "done",
        "created_at": datetime.now(UTC),
    }
    return Candidates(trial=TrialRow(**row), config=CONFIG, groups=groups, formats=tuple(formats), elements=None)


def context_at(recipe: MixedRecipe, place: Path) -> RecipeContext:
    return context_of(recipe, replace(CONFIG, store=replace(CONFIG.store, uri=str(place / "store"))))


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_measured_equals_two_plain_forwards_of_each_held_out_sample(
    run: Callable[..., int],
    tmp_path: Path,
    recipe: MixedRecipe,
    alone: bool,
) -> None:
    """Of each sample alone where only weights are quantized, else in the batches that were measured.

    In other batches sums have other last bits, and one input that rounds the other way moves a sample's KL by 1 %.
    """
    weights = recipe_of([name and group_format(name, *FORMATS[name]) for name in WEIGHTS_ALONE])
    recipe = replace(weights, dataset_revision=recipe.dataset_revision) if alone else recipe
    assert run(edited=lambda _: recipe.to_yaml()) == 0
    (row,) = json.loads((tmp_path / "mixed.validation.json").read_text())
    model = load(MODEL.path, dtype=torch.float32, device="cpu")
    samples = samples_of(CONFIG.dataset, MODEL, 32)
    quants = calibrated_model(model, list(make_plan(samples[:16], packed=True).batches("small")), recipe)
    ids = [torch.from_numpy(sample.token_ids)[None] for sample in samples[16:]]

    @torch.no_grad()
    def log_probabilities() -> list[torch.Tensor]:
        of_each = sample_logits(model, make_plan(samples[16:], packed=True))
        if alone:
            of_each = [model(input_ids=one, use_cache=False).logits[0] for one in ids]
        return [logits[:-1].double().log_softmax(-1) for logits in of_each]

    base = log_probabilities()
    apply(model, quants)
    changed = log_probabilities()
    kl = [F.kl_div(new, old, log_target=True, reduction="sum").item() for new, old in zip(changed, base, strict=True)]
    losses = [
        F.nll_loss(new, one[0, 1:]) - F.nll_loss(old, one[0, 1:])
        for new, old, one in zip(changed, base, ids, strict=True)
    ]
    counts = [len(one[0]) - 1 for one in ids]
    assert (row["n_samples"], row["n_predictions"]) == (16, sum(counts))
    assert row["measured_kl"] == pytest.approx(sum(kl) / sum(counts), rel=1e-4)
    assert row["loss_change"] == pytest.approx(
        sum(loss.item() * n for loss, n in zip(losses, counts, strict=True)) / sum(counts), abs=1e-5
    )
    low, high = row["measured_kl_interval"]
    assert low < row["measured_kl"] < high
    assert row["predicted_kl"] == pytest.approx(recipe.predicted_kl)
    (file,) = (tmp_path / "store" / "validations").iterdir()
    assert pq.read_table(file)["kl"].to_pylist() == pytest.approx(kl, rel=1e-3)
    page = (tmp_path / "mixed.validation.md").read_text()
    assert page.startswith("# Predicted and measured: mixed, scales private, dtype float32\n")
    assert f"| mixed | {recipe.effective_bits:.3f} | {recipe.predicted_kl:.4g} | {row['measured_kl']:.4g}" in page


def test_a_finished_validation_is_found_whatever_the_recipe_is_called(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    first = json.loads((tmp_path / "mixed.validation.json").read_text())
    assert first[0]["recipe"] == "847ac1653e0e2e19b0ab"  # as in the stores of earlier versions
    monkeypatch.delattr("workers.model.loading.load")
    capsys.readouterr()
    assert run("--json", edited=lambda text: text.replace("name: mixed", "name: other", 1)) == 0
    (again,) = json.loads(capsys.readouterr().out)
    assert again == first[0] | {"name": "other"}


def test_a_validation_in_other_arithmetic_is_not_the_recipes(recipe: MixedRecipe, tmp_path: Path) -> None:
    """Fused scales of INT4 weights were float32 in earlier versions; recipes without such a format keep their ids."""

    def fused(*names: str) -> MixedRecipe:
        own = recipe_of([group_format(name, *FORMATS[name], "max", "fused") for name in names])
        return replace(own, dataset_revision=recipe.dataset_revision)

    int4, others = fused("int4_groups_weight_only"), fused("fp8_weight_only", "int8_channel_token")
    ids: dict[bool, list[str]] = {}
    for rounds in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not rounds:
                patch.setattr(Format, "rounds_scales", False)
            ids[rounds] = [_identity(each, "held out", "float32", "cpu") for each in (int4, others)]
    assert [one == other for one, other in zip(*ids.values(), strict=True)] == [False, True]


def test_a_validation_on_another_number_of_ranks_is_another(recipe: MixedRecipe) -> None:
    ids: list[set[str]] = []
    for name in ("int8_channel_token", "int8_channel_static"):
        formats = [group_format(name, *FORMATS[name]).on_ranks(tp) for tp in (1, 2, 4)]
        ids.append({_identity(recipe_of([each]), "held out", "float32", "cpu") for each in formats})
    assert list(map(len, ids)) == [3, 1]


def test_samples_that_calibrated_are_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (bundled_model_dir() / "wordnet_glosses.txt").read_text().splitlines()
    (tmp_path / "own.txt").write_text("\n".join([*lines[100:115], lines[7]]) + "\n")
    assert run(f"validation.captions_path={tmp_path / 'own.txt'}") == 2
    assert "1 of the 16 samples to validate on calibrated the recipe, the first is number 16" in capsys.readouterr().err
    (tmp_path / "own.txt").write_text("\n".join(lines[100:116]) + "\n")
    assert run(f"validation.captions_path={tmp_path / 'own.txt'}") == 0


def captions(place: Path, first: int) -> Path:
    """Sixteen glosses from that number on, in a file."""
    lines = (bundled_model_dir() / "wordnet_glosses.txt").read_text().splitlines()
    place.write_text("\n".join(lines[first : first + 16]) + "\n")
    return place


def test_each_data_set_has_its_own_rows(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn scenes, a file, and other samples of the data set that calibrated: alone and together the same figures."""
    monkeypatch.setenv("COLUMNS", "80")
    path = captions(tmp_path / "own.txt", 100)
    alone: list[dict[str, Any]] = []
    for typed in (["scenes"], ["coco2017_captions", f"validation.path={path}"], ["wordnet_glosses"]):
        assert run(f"validation.dataset={typed[0]}", *typed[1:]) == 0
        alone += json.loads((tmp_path / "mixed.validation.json").read_text())
    assert [row.pop("warning", "none")[:34] for row in alone] == ["none", "none", "Measured on other samples of what "]
    assert len(list((tmp_path / "store" / "validations").iterdir())) == 3
    capsys.readouterr()
    monkeypatch.delattr("workers.model.loading.load")  # every row is found in the store
    names, paths = "scenes,coco2017_captions,wordnet_glosses", f"null,{path},null"
    for form in ("[{}]", "{}"):
        assert run(f"validation.dataset={form.format(names)}", f"validation.path={form.format(paths)}") == 0
        assert json.loads((tmp_path / "mixed.validation.json").read_text()) == alone
    assert [row["dataset"] for row in alone] == ["scenes", "own.txt", "wordnet_glosses"]
    assert [row["calibrated"] for row in alone] == [False, False, True]
    page = (tmp_path / "mixed.validation.md").read_text()
    assert "| recipe | measured on | bits a weight | predicted KL | measured KL |" in page
    for row in alone:
        assert f"| mixed | {row['dataset']} | " in page
        assert f" | {row['measured_kl']:.4g} (" in page
        assert f"{row['dataset']}: 16 samples, {row['n_predictions']} predictions" in page
    out = capsys.readouterr().out
    assert "Measured on other samples of what calibrated it" not in page + out
    for name in (
        "scenes",
        "own.txt",
        "wordnet_glosses",
    ):  # a column, or a sentence where the figures are too wide for it
        assert re.search(rf"^(- measured on )?{re.escape(name)}[ ,]", out, re.M)
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80


def test_samples_that_found_ranges_are_not_measured_on(recipe: MixedRecipe) -> None:
    """16 samples were scored, 24 calibrated: the 16 after these are measured on."""
    context = context_of(replace(recipe, calibration_samples=24), CONFIG)
    assert sorted(sample for batch in context.calibration for sample in batch.order) == [*range(24)]
    (held,) = held_out(context)
    expected = samples_of(CONFIG.dataset, MODEL, 40)[24:]
    assert [sample.token_ids.tolist() for sample in held.samples] == [each.token_ids.tolist() for each in expected]


def test_other_samples_of_what_calibrated_are_said_to_be_that(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    words = "Measured on other samples of what calibrated it, wordnet_glosses: "
    assert words in capsys.readouterr().out
    assert words in (tmp_path / "mixed.validation.md").read_text()
    (row,) = json.loads((tmp_path / "mixed.validation.json").read_text())
    assert row["warning"].startswith(words)
    assert run(f"validation.captions_path={captions(tmp_path / 'own.txt', 100)}") == 0
    assert words not in capsys.readouterr().out


def test_equal_tokens_under_other_pictures_are_other_samples(
    tmp_path: Path, recipe: MixedRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_at(recipe, tmp_path)
    scenes = samples_of(expand(["dataset=scenes"], multirun=False).points[0].dataset, MODEL, 3)
    context = replace(context, samples=scenes[:2])
    others = [replace(scenes[0], pictures=scenes[2].pictures), scenes[2]]
    monkeypatch.setattr(measured, "samples_of", lambda *_: [*scenes[:2], *others] * 8)
    with pytest.raises(SweepError, match=r"16 of the 32 samples to validate on calibrated .* number 1 of scenes"):
        held_out(replace(context, config=replace(CONFIG, validation=replace(CONFIG.validation, dataset="scenes"))))
    monkeypatch.setattr(measured, "samples_of", lambda *_: others)
    (found,) = held_out(
        replace(context, config=replace(CONFIG, validation=replace(CONFIG.validation, dataset="scenes")))
    )
    assert found.samples == others


def test_a_recipe_that_counts_some_tokens_says_so(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(edited=lambda text: text.replace("target: ", "tokens: [image]\ntarget: ", 1)) == 0
    words = "Predicted KL counts errors at image tokens alone; measured KL counts all."
    assert words in capsys.readouterr().out
    assert words in (tmp_path / "mixed.validation.md").read_text()


def test_a_recipe_whose_predicted_kl_is_beyond_an_estimates_range_says_so(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(edited=lambda text: re.sub("predicted_kl: .*", "predicted_kl: 0.75", text, count=1)) == 0
    words = "Predicted KL above 0.5 is beyond what an estimate of small changes tells."
    assert words in " ".join(capsys.readouterr().out.split())
    assert words in (tmp_path / "mixed.validation.md").read_text()


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (
            ["validation.dataset=[scenes,text]"],
            "validation.dataset=text reads files of yours. Type validation.path=PATH",
        ),
        (["validation.dataset=scenes", "validation.path=a.txt"], "Type null in its place"),
        (["validation.path=a.txt"], "names 0 data sets, validation.path 1 path"),
        (["validation.dataset=[text,chat]", "validation.path=a.txt"], "names 2 data sets, validation.path 1 path"),
        (["validation.dataset=scene"], "Did you mean 'scenes'?"),
        (["validation.dataset=scenes", "validation.captions_path=a.txt"], "both say what to validate on"),
        (
            ["validation.dataset=coco2017_captions", "validation.path=none.txt"],
            "No 16 samples of none.txt to validate on",
        ),
    ],
)
def test_data_sets_that_cannot_be_meant_are_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], rest: list[str], words: str
) -> None:
    assert run(*rest) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("rest", "edit", "words"),
    [
        (["validation.n_samples=1"], None, "validation.n_samples=1 is not allowed"),
        (["dataset.max_tokens=5"], None, "Give the same samples"),
        (["--groups", "*nothing*"], None, "--groups '*nothing*' matches no layer group"),
        (["--random", "3"], None, "holds no finished trial"),
        ([], ("model_revision: ", "model_revision: 0"), "The recipe is for qwen3_vl_tiny of revision 0"),
        ([], ("layers.1.mlp.down_proj", "layers.1.mlp.up_project"), "layers.1.mlp.up_project"),
        ([], ("-1: 128", "-1: 96"), "Blocks of 96"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rest: list[str],
    edit: tuple[str, str] | None,
    words: str,
) -> None:
    assert run(*rest, edited=lambda text: text.replace(*edit) if edit else text) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
    assert not list(tmp_path.glob("*.validation.*"))


@pytest.mark.parametrize("name", ["mixed.validation.md", "mixed.validation.json"])
def test_files_of_someone_else_stay_and_nothing_is_measured(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (tmp_path / name).write_text("mine")
    assert run() == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / name} is not what this command writes there, and stays. Type mv -n" in said
    assert "Copy the recipe to another place, and validate it there." in said
    assert (tmp_path / name).read_text() == "mine"
    assert not (tmp_path / "store").exists()


def test_too_few_samples_are_refused_with_what_to_type(
    tmp_path: Path, recipe: MixedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    large = make_plan(samples_of(CONFIG.dataset, MODEL, 512), packed=True).digest("large")
    (tmp_path / "large.yaml").write_text(replace(recipe, size="large", dataset_revision=large).to_yaml())
    assert (
        main(["validate", str(tmp_path / "large.yaml"), f"store.uri={tmp_path / 'store'}", "validation.n_samples=129"])
        == 2
    )
    err = capsys.readouterr().err
    assert "too few samples for 129 after the 512 that calibrated and scored" in err
    assert "Type validation.dataset=NAME validation.path=PATH, a smaller validation.n_samples=N" in err


def test_mixes_are_the_same_for_the_same_options_and_uniform_ones_are_measured_everywhere(
    candidates: Candidates,
) -> None:
    mixes = random_mixes(candidates, 5)
    assert mixes == random_mixes(candidates, 5) == random_mixes(candidates, 6)[:5]
    assert len({mix.to_yaml() for mix in mixes}) == 5
    labels = {choice.format for mix in mixes for choice in mix.groups}
    assert labels == {None, "int8_tensor_static/default", "int4_groups_weight_only/default"}
    assert all(mix.groups[0].format != "int4_groups_weight_only/default" for mix in mixes)  # it was not measured there
    assert [each.name for each in uniform_recipes(candidates)] == ["uniform int8_tensor_static/default"]


def test_formats_are_calibrated_once_for_recipes_that_are_measured_together(
    tmp_path: Path, recipe: MixedRecipe, candidates: Candidates
) -> None:
    """Together or alone, a recipe's figures have the same bits."""
    mixes = random_mixes(candidates, 2)
    together = validate(
        context_at(recipe, tmp_path / "a"), [("recipe", recipe), *(("random", mix) for mix in mixes)], "cpu"
    )
    alone = validate(context_at(recipe, tmp_path / "b"), [("random", mixes[1])], "cpu")
    assert together[2] == alone[0]


def test_samples_that_are_measured_add_up_to_the_rows(
    tmp_path: Path, recipe: MixedRecipe, candidates: Candidates
) -> None:
    context, recipes = context_at(recipe, tmp_path), [recipe, *random_mixes(candidates, 1)]
    [(held, tables)] = measured_samples(context, recipes, "cpu")
    rows = validate(context, [("recipe", each) for each in recipes], "cpu")
    for table, row in zip(tables, rows, strict=True):
        kl, counts = (table[name].to_numpy() for name in ("kl", "n_predictions"))
        assert (held.name, len(kl), int(counts.sum())) == (row.dataset, row.n_samples, row.n_predictions)
        assert kl.sum() / counts.sum() == row.measured_kl


def test_recaptured_kl_has_the_shape_of_the_options(
    tmp_path: Path, recipe: MixedRecipe, candidates: Candidates
) -> None:
    kl = recaptured_kl(context_at(recipe, tmp_path), recipe, candidates, "cpu")
    assert kl.shape == (len(candidates.groups), 2)
    assert np.isinf(kl).sum() == np.isinf(kl[0, 1]) == 1
    assert (kl[np.isfinite(kl)] > 0).all()
    assert np.median(kl[1:, 1]) > np.median(kl[1:, 0])  # four bits hurt more than eight


@pytest.mark.parametrize("data", [[], ["dataset=chat", "dataset.path=my chats.jsonl"]], ids=["bundled", "own"])
def test_uniform_recipes_are_those_of_the_recipes_own_kind(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One store has private and fused scales, another model, and perhaps another data set."""
    monkeypatch.chdir(tmp_path)
    store = store_at(tmp_path / "store")
    for recipe, kl in ((FP8, 0.02), (INT8, 0.004)):
        add(store, recipe, [kl] * 5, "sensitivity.scales=fused", *data, minute=1, scales="fused")
    add(store, FP8, [0.5] * 5, "sensitivity.scales=fused", "model.name=other", minute=2, model="other")
    others = {"minute": 3, "dataset_revision": "other"}  # of the same name
    add(store, FP8, [0.6] * 5, "sensitivity.scales=fused", "dataset.max_tokens=64", *data, **others)
    add(store, FP8, [0.7] * 5, "sensitivity.scales=fused", "calibration.n_samples=64", *data, minute=4)
    typed = [f"store.uri={tmp_path / 'store'}", "sensitivity.scales=fused", "model.name=qwen3_vl_tiny", *data]
    typed += [f"dataset.max_tokens={4096 if data else 512}", "calibration.n_samples=null"]
    assert main(["solve", "--bits", "8", *typed, "--out", "mix.yaml"]) == 0
    capsys.readouterr()
    recipe = MixedRecipe.from_yaml(Path("mix.yaml").read_text(), "mix.yaml")
    context: Any = SimpleNamespace(recipe=recipe, config=config_of(recipe, []))
    request: Any = SimpleNamespace(n_random=0, uniform=True, groups=None, overrides=[])
    found = [each.predicted_kl for kind, each in wanted(context, request) if kind == "uniform"]
    assert sorted(found) == pytest.approx([0.02, 0.1])  # not those of private scales, 0.012 and 0.0155
    context.recipe = replace(recipe, dataset_revision="unknown")
    with pytest.raises(SweepError, match=r"or of other samples, than the recipe's\. Type store\.uri=DIR\."):
        wanted(context, request)


@pytest.mark.parametrize(("linear", "everywhere"), [(True, 5 * 0.01), (False, 0.01)], ids=["sum", "joint"])
def test_recipes_beside_one_are_predicted_as_it_is(
    linear: bool, everywhere: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five groups with a root KL of 0.1, of which two undo two others."""
    monkeypatch.chdir(tmp_path)
    store, fisher = Store(str(tmp_path / "store")), ("sensitivity.method=fisher", "sensitivity.draws=1")
    versions = '{"score": "1+fisher.1"}'
    add(store, FP8, [0.01] * 5, *fisher, signs=[1, -1, 1, -1, 1], draws=1, versions=versions)
    typed = ["solve", "--bits", "8", f"store.uri={store.uri}", "--out", "mix.yaml"]
    assert main(typed + ["--linear"] * linear) == 0
    recipe = MixedRecipe.from_yaml(Path("mix.yaml").read_text(), "mix.yaml")
    context: Any = SimpleNamespace(recipe=recipe, config=config_of(recipe, []))
    request: Any = SimpleNamespace(n_random=0, uniform=True, groups=None, overrides=[])
    (uniform,) = (each for kind, each in wanted(context, request) if kind == "uniform")
    assert uniform.predicted_kl == pytest.approx(everywhere, rel=1e-5)
    assert recipe.predicted_kl == pytest.approx(everywhere, rel=1e-5)
