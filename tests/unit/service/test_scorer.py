"""One worker's rows: the same bits whatever is asked beside them, NULL for what never ran, and NaN by name."""

import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sweep.config.compose import expand
from sweep.core.groups import is_vision
from sweep.plan.trials import SweepPlan, plan_sweep
from sweep.store.store import Store
from tests.families import save_family
from tests.models import overrides_of, place_at
from workers.model import memory
from workers.service.scorer import Scorer
from workers.task import Progress, Task

GRID = ["quant_pair=wint8_aint8,wfp8_afp8,wint4_afp16", "quant_granularity=default,recipe_match_channel_token"]
DOWN_1 = "model.language_model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place_at(tmp_path_factory.mktemp("scorer"))


def plan(place: Path, *overrides: str) -> SweepPlan:
    return plan_sweep(expand([*overrides_of(place), *overrides], multirun=True).points, "cpu")


def score(scorer: Scorer, wanted: SweepPlan, tasks: Sequence[Task] = ()) -> dict[str, Progress]:
    """Score tasks (all of the plan's, if none are given) in one visit; gives the last progress of each by label."""
    together = tasks or list(wanted.tasks.values())
    latest = {progress.task_id: progress for progress in scorer.score(together, wanted.plans[together[0].plan_id])}
    return {task.label: latest[task.task_id] for task in together}


def cells(store: Path) -> dict[str, bytes]:
    """The file of every finished cell."""
    return {path.parent.name: path.read_bytes() for path in store.glob("scores/*/scores.parquet")}


def rows(store: Path, wanted: SweepPlan) -> list[dict[str, Any]]:
    """The rows of a plan's only cell."""
    (task,) = wanted.tasks.values()
    (cell,) = task.cells.values()
    return Store(str(store)).scores(cell).to_pylist()


@pytest.fixture(scope="module")
def together(place: Path) -> dict[str, bytes]:
    """The cells of all recipes and two sizes, scored in one visit to each layer."""
    progress = score(Scorer(str(place / "together"), "cpu"), plan(place, *GRID, "dataset.size=small,medium"))
    assert {label: (one.done, one.found, one.failure) for label, one in progress.items()} == dict.fromkeys(
        progress, (16, 0, None)
    )
    assert not list((place / "together").glob("parts/*"))
    found = cells(place / "together")
    assert len(found) == 6 * 2
    return found


def one_by_one(scorer: Scorer, wanted: SweepPlan) -> None:
    for task in wanted.tasks.values():
        score(scorer, wanted, [task])


def last_first(scorer: Scorer, wanted: SweepPlan) -> None:
    score(scorer, wanted, [*wanted.tasks.values()][::-1])


def the_last_alone(scorer: Scorer, wanted: SweepPlan) -> None:
    score(scorer, wanted, [*wanted.tasks.values()][-1:])


@pytest.mark.parametrize("ask", [score, one_by_one, last_first, the_last_alone])
@pytest.mark.parametrize("sizes", ["small", "medium", "small,medium"])
def test_a_cells_bits_do_not_depend_on_what_is_asked_beside_it(
    ask: Callable[[Scorer, SweepPlan], object], sizes: str, place: Path, together: dict[str, bytes], tmp_path: Path
) -> None:
    ask(Scorer(str(tmp_path), "cpu"), plan(place, *GRID, f"dataset.size={sizes}"))
    found = cells(tmp_path)
    assert not list(tmp_path.glob("parts/*"))
    assert len(found) == (1 if ask is the_last_alone else 6) * (1 + sizes.count(","))
    assert found == {cell: together[cell] for cell in found}


FISHER = ["sensitivity.method=fisher", "sensitivity.draws=3"]


@pytest.fixture(scope="module")
def drawn(place: Path) -> dict[str, bytes]:
    """The cells of all recipes and two sizes with labels that the model draws."""
    score(Scorer(str(place / "drawn"), "cpu"), plan(place, *GRID, *FISHER, "dataset.size=small,64"))
    return cells(place / "drawn")


@pytest.mark.parametrize("way", ["one by one", "the smaller size alone", "windows", "two workers, last layer first"])
def test_projections_have_the_same_bits_however_they_are_scored(
    way: str, place: Path, drawn: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = "small" if way == "the smaller size alone" else "small,64"
    wanted, scorer = plan(place, *GRID, *FISHER, f"dataset.size={size}"), Scorer(str(tmp_path), "cpu")
    tasks = list(wanted.tasks.values())
    if way == "one by one":
        one_by_one(scorer, wanted)
    elif way == "two workers, last layer first":
        for layer in (1, 0):
            other = Scorer(str(tmp_path), "cpu")
            other_tasks = tasks[::-1]
            list(other.score(other_tasks, wanted.plans[tasks[0].plan_id], [f"model.language_model.layers.{layer}"]))
    else:
        if way == "windows":
            monkeypatch.setattr(memory, "part_windows", lambda parts, *_: [[part] for part in parts])
        score(scorer, wanted)
    found = cells(tmp_path)
    assert len(found) == 6 * (1 + size.count(","))
    assert found == {cell: drawn[cell] for cell in found}


def test_a_row_of_projections_has_its_score(place: Path, tmp_path: Path) -> None:
    wanted = plan(place, "quant_pair=wint4_afp16", *FISHER, "dataset.size=small")
    score(Scorer(str(tmp_path), "cpu"), wanted)
    for row in rows(tmp_path, wanted):
        u = np.array(row["projections"], dtype=np.float64).reshape(row["n_samples"], 3)
        np.testing.assert_allclose(row["sample_scores"], np.square(u).mean(1), rtol=1e-6)
        assert row["score"] == pytest.approx(np.square(u).mean(1).sum(), rel=1e-6)
        assert row["predicted_kl"] == row["score"] / (2 * row["n_predictions"])
        parts = [row[f"score_{kind}"] for kind in ("first_token", "image", "prompt", "answer")]
        assert sum(parts) == pytest.approx(row["score"], rel=1e-9)
        assert row["score_top_token"] > 0
        assert row["output_rel_error"] > 0


def test_another_methods_capture_is_replaced(place: Path, drawn: dict[str, bytes], tmp_path: Path) -> None:
    """And so is one of other draws, by a worker that goes on with the next task."""
    scorer = Scorer(str(tmp_path), "cpu")
    pair = "quant_pair=wint4_afp16"
    for method in ([], [FISHER[0], "sensitivity.draws=2"], FISHER):
        score(scorer, plan(place, pair, *method, "dataset.size=small,64"))
    found = cells(tmp_path)
    assert len(found) == 3 * 2
    assert len(found.keys() & drawn.keys()) == 2
    assert all(found[cell] == drawn[cell] for cell in found.keys() & drawn.keys())


def test_a_capture_that_is_too_small_is_replaced(place: Path, together: dict[str, bytes], tmp_path: Path) -> None:
    scorer = Scorer(str(tmp_path), "cpu")
    for size in ("small", "medium", "small,medium"):
        score(scorer, plan(place, *GRID, f"dataset.size={size}"))
    assert cells(tmp_path) == together
    assert scorer.model_loads == 1


def test_a_cell_is_complete_when_the_last_of_its_parts_is_there(
    place: Path, together: dict[str, bytes], tmp_path: Path
) -> None:
    wanted = plan(place, *GRID, "dataset.size=small,medium")
    tasks = list(wanted.tasks.values())
    for layer in (1, 0):
        assert cells(tmp_path) == {}
        *_, last = Scorer(str(tmp_path), "cpu").score(
            tasks, wanted.plans[tasks[0].plan_id], [f"model.language_model.layers.{layer}"]
        )
        assert (last.done, last.found) == (8, 0)
    assert cells(tmp_path) == together
    assert not list(tmp_path.glob("parts/*"))


@pytest.mark.parametrize("n_reports", [7, 10, 15])
def test_a_worker_that_is_cut_short_leaves_parts_that_the_next_one_keeps(
    n_reports: int, place: Path, together: dict[str, bytes], tmp_path: Path
) -> None:
    wanted = plan(place, *GRID, "dataset.size=small,medium")
    tasks = list(wanted.tasks.values())
    scorer = Scorer(str(tmp_path), "cpu")
    reports = list(islice(scorer.score(tasks, wanted.plans[tasks[0].plan_id]), n_reports))
    scorer._writers.shutdown()  # what is under way reaches the disk
    assert cells(tmp_path) == {}
    left = sorted(tmp_path.glob("parts/*/*.parquet"))
    assert (
        len(left) >= 2 * sum(report.done > 0 for report in reports) > 0
    )  # two sizes a report; counted parts are on disk
    times = {path: path.stat().st_mtime_ns for path in left}
    left[0].write_bytes(left[0].read_bytes()[:-9])
    left[-1].unlink()
    scorer = Scorer(str(tmp_path), "cpu")
    list(
        islice(scorer.score(tasks, wanted.plans[tasks[0].plan_id]), len(tasks) + 1)
    )  # looks at what is there, and drops the damaged part
    scorer._writers.shutdown()
    assert not left[0].exists() or left[0].stat().st_mtime_ns > times[left[0]]
    assert all(path.stat().st_mtime_ns == times[path] for path in left[1:-1])
    score(Scorer(str(tmp_path), "cpu"), wanted)
    assert cells(tmp_path) == together
    assert not list(tmp_path.glob("parts/*"))


def test_a_finished_part_is_not_scored_again(place: Path, tmp_path: Path) -> None:
    wanted = plan(place)
    (task,) = wanted.tasks.values()
    (cell,) = task.cells.values()
    score(Scorer(str(tmp_path), "cpu"), wanted)
    store = Store(str(tmp_path))
    first = store.scores(cell).slice(0, 4)  # the first decoder layer
    store.write_part(
        cell,
        "model.language_model.layers.0",
        first.set_column(first.schema.get_field_index("input_amax"), "input_amax", [[12345.0] * 4]),
    )
    shutil.rmtree(tmp_path / "scores")
    progress = list(Scorer(str(tmp_path), "cpu").score([task], wanted.plans[task.plan_id]))
    assert (progress[0].done, progress[-1].done, progress[-1].found) == (0, 8, 4)
    amaxes = store.scores(cell)["input_amax"].to_pylist()
    assert amaxes[:4] == [12345.0] * 4
    assert max(amaxes[4:]) < 100


@pytest.mark.usefixtures("together")
def test_columns_follow_from_the_score(place: Path) -> None:
    """Predictions are counted from the captions file: one token a word, the first is not predicted."""
    lines = (place / "captions.txt").read_text().splitlines()
    for trial in plan(place, *GRID, "dataset.size=small,medium").trials:
        n_samples = {"small": 16, "medium": 128}[trial.config.dataset.size]
        n_predictions = sum(len(line.split()) - 1 for line in lines[:n_samples])
        for row in Store(str(place / "together")).scores(str(trial.cell_id)).to_pylist():
            assert (row["n_samples"], row["n_predictions"], len(row["sample_scores"])) == (
                n_samples,
                n_predictions,
                n_samples,
            )
            assert row["score"] > 0
            assert row["sensitivity"] == row["score"] / n_predictions
            assert row["predicted_kl"] == row["score"] / (2 * n_predictions)
            assert sum(row["sample_scores"]) == pytest.approx(row["score"], rel=1e-6)  # float32 a sample
            assert row["output_sqnr_db"] == pytest.approx(-20 * np.log10(row["output_rel_error"]))


@pytest.mark.usefixtures("together")
def test_a_smaller_sizes_sample_scores_are_the_larger_ones_where_nothing_is_calibrated_on_samples(place: Path) -> None:
    store = Store(str(place / "together"))
    trials = {trial.name: str(trial.cell_id) for trial in plan(place, *GRID, "dataset.size=small,medium").trials}
    for name, same in (
        ("wint4_afp16/default", True),
        ("wint8_aint8/recipe_match_channel_token", True),
        ("wint8_aint8/default", False),
    ):
        small, medium = (
            store.scores(trials[f"{name}/{size}"])["sample_scores"].to_pylist() for size in ("small", "medium")
        )
        assert (small == [row[:16] for row in medium]) == same


@pytest.mark.parametrize("engine", ["layerwise", "modelopt"])
def test_a_module_that_is_never_called_has_a_row_without_a_score(engine: str, place: Path, tmp_path: Path) -> None:
    wanted = plan(place, "sensitivity.coverage=all_layers", f"sensitivity.engine={engine}")
    score(Scorer(str(tmp_path), "cpu"), wanted)
    found = rows(tmp_path, wanted)
    assert len(found) == 8 + 2 * 4 + 3 * 2  # decoder layers, vision blocks, mergers
    never = (
        "score",
        "sensitivity",
        "predicted_kl",
        "output_rel_error",
        "output_sqnr_db",
        "weight_rel_error",
        "input_amax",
        "sample_scores",
    )
    for row in found:
        assert (row["score"] is None) == is_vision(row["group"])
        assert row["weight_elements"] > 0
        if is_vision(row["group"]):
            assert [row[key] for key in never] == [None] * len(never)


# On the same batches, so all linears read the same bits. ModelOpt's outputs, subtracted, cancel: 3e-6 of an INT8 score.
@pytest.mark.parametrize(("pair", "tolerance"), [("wint4_afp16", 1e-5), ("wint8_aint8", 2e-5)])
def test_scenes_reach_the_vision_tower_and_stock_auto_quantize_agrees(
    pair: str,
    tolerance: float,
    place: Path,
    tmp_path: Path,
) -> None:
    own = ["dataset=scenes", "dataset.captions_path=null", "sensitivity.coverage=all_layers", f"quant_pair={pair}"]
    ours, stock = (plan(place, *own, f"sensitivity.engine={engine}") for engine in ("layerwise", "modelopt"))
    for wanted in (ours, stock):
        score(Scorer(str(tmp_path), "cpu"), wanted)
    mine, theirs = rows(tmp_path, ours), rows(tmp_path, stock)
    assert [row["group"] for row in mine] == [row["group"] for row in theirs]
    assert sum(is_vision(row["group"]) for row in mine) == 14
    assert all(row["score"] > 0 for row in mine)
    for key in ("score", "sensitivity", "predicted_kl"):
        np.testing.assert_allclose([row[key] for row in theirs], [row[key] for row in mine], rtol=tolerance)


@pytest.mark.usefixtures("together")
def test_the_cross_check_stores_the_same_scores(place: Path, tmp_path: Path) -> None:
    own = ["quant_pair=wint4_afp16,wfp8_afp8", "dataset.size=small,medium"]
    stock = plan(place, *own, "sensitivity.engine=modelopt")
    one_by_one(Scorer(str(tmp_path), "cpu"), stock)
    ours = {trial.name: str(trial.cell_id) for trial in plan(place, *own).trials}
    for trial in stock.trials:
        mine, theirs = (
            Store(str(place / "together")).scores(ours[trial.name]),
            Store(str(tmp_path)).scores(str(trial.cell_id)),
        )
        assert mine["group"] == theirs["group"]
        np.testing.assert_allclose(theirs["score"], mine["score"], rtol=1e-5)
        assert theirs["n_predictions"] == mine["n_predictions"]


def changed(place: Path, to: Path, name: str, change: Callable[[torch.Tensor], object]) -> Path:
    """A copy of the checkpoint with one tensor changed, beside the same captions."""
    shutil.copytree(place / "model", to / "model")
    shutil.copy(place / "captions.txt", to)
    weights = load_file(to / "model" / "model.safetensors")
    change(weights[name])
    save_file(weights, to / "model" / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("engine", ["layerwise", "modelopt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_and_finished_parts_stay(
    engine: str, value: float, place: Path, tmp_path: Path
) -> None:
    broken = changed(place, tmp_path, f"{DOWN_1}.weight", lambda weight: weight[3, 4].fill_(value))
    wanted = plan(broken, "sensitivity.coverage=all_layers", f"sensitivity.engine={engine}")
    (progress,) = score(Scorer(str(tmp_path / "store"), "cpu"), wanted).values()
    assert progress.failure is not None
    assert DOWN_1 in progress.failure
    assert "wint8_aint8/default" in progress.failure
    assert cells(tmp_path / "store") == {}
    if engine == "layerwise":  # the vision tower was never called, so its rows hold
        assert len(list((tmp_path / "store").glob("parts/*/model.visual.*.parquet"))) == 5
        assert progress.done == 14


def test_a_broken_input_names_the_layer_group_the_recipe_and_the_sample(place: Path, tmp_path: Path) -> None:
    """Token 9 (word w7) has an infinite embedding, and only samples 5 and 9 hold it."""
    broken = changed(
        place, tmp_path, "model.language_model.embed_tokens.weight", lambda weight: weight[9].fill_(float("inf"))
    )
    lines: list[str] = []
    for i in range(16):
        words = [f"w{10 + i + j}" for j in range(3 + i)]
        lines.append(" ".join(words))
    lines[5] = lines[9] = "w20 w7 w21 w22"
    (broken / "captions.txt").write_text("\n".join(lines))
    wanted = plan(broken, "quant_pair=wint8_aint8,wint4_afp16")
    group = "Layer group model.language_model.layers.0.self_attn.q_proj"
    failures = {
        label: progress.failure for label, progress in score(Scorer(str(tmp_path / "store"), "cpu"), wanted).items()
    }
    assert list(failures) == ["wint8_aint8/default", "wint4_afp16/default"]
    for label, failure in failures.items():
        assert str(failure).startswith(f"{group} under {label}: the input of sample 5 is NaN or infinite.")


def test_a_recipe_whose_scores_overflow_fails_alone(place: Path, tmp_path: Path) -> None:
    """Logits so large that (g dy)^2 of one token passes 3.4e38 under INT4 and stays below it under INT8."""
    pairs = ["quant_pair=wint4_aint4,wint8_aint8", "quant_granularity=w_per_tensor"]
    probe = changed(place, tmp_path / "probe", "lm_head.weight", lambda weight: weight.mul_(1e12))
    wanted = plan(probe, *pairs)
    score(Scorer(str(tmp_path / "probe" / "store"), "cpu"), wanted)
    coarse, fine = (
        Store(str(tmp_path / "probe" / "store")).scores(str(trial.cell_id))["score"].to_numpy()
        for trial in wanted.trials
    )
    factor = np.sqrt(3e38 / fine.max())  # scores grow with the square of the logits
    n_rows = sum(len(line.split()) for line in (place / "captions.txt").read_text().splitlines()[:16])
    assert coarse.max() * factor**2 > 4e38 * n_rows
    wanted = plan(
        changed(place, tmp_path / "huge", "lm_head.weight", lambda weight: weight.mul_(1e12).mul_(factor)), *pairs
    )
    progress = score(Scorer(str(tmp_path / "store"), "cpu"), wanted)
    assert "under wint4_aint4/w_per_tensor: the score of sample" in str(progress["wint4_aint4/w_per_tensor"].failure)
    assert (progress["wint8_aint8/w_per_tensor"].failure, progress["wint8_aint8/w_per_tensor"].done) == (None, 8)
    assert list(cells(tmp_path / "store")) == [f"cell={wanted.trials[1].cell_id}"]


def test_a_cell_that_was_finished_meanwhile_is_not_scored_again(place: Path, tmp_path: Path) -> None:
    """Its worker was killed while it dropped the parts; the task goes to another one."""
    wanted = plan(place)
    (task,) = wanted.tasks.values()
    (cell,) = task.cells.values()
    score(Scorer(str(tmp_path), "cpu"), wanted)
    before = cells(tmp_path)
    Store(str(tmp_path)).write_part(
        cell, "model.language_model.layers.0", Store(str(tmp_path)).scores(cell).slice(0, 4)
    )
    again = Scorer(str(tmp_path), "cpu")
    reports = list(again.score([task], wanted.plans[task.plan_id]))
    assert (reports[-1].done, reports[-1].found) == (task.n_steps, task.n_steps)
    assert again.info()["capture_seconds"] == 0
    assert cells(tmp_path) == before
    assert not list(tmp_path.glob("parts/*"))


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
    ],
)
def test_only_a_lost_cuda_context_ends_the_process(error: BaseException, is_fault: bool) -> None:
    assert Scorer.is_device_fault(error) == is_fault


def test_stock_auto_quantize_agrees_where_runtimes_fuse_what_it_scores_apart(tmp_path: Path) -> None:
    """Latent attention: `q_a_proj` and `kv_a_proj_with_mqa` are one layer group here, and two in ModelOpt."""
    save_family(tmp_path / "model", "deepseek_v3")
    own = ["dataset=wordnet_glosses", "dataset.captions_path=null", "quant_pair=wint4_afp16"]
    found: list[list[dict[str, Any]]] = []
    for engine in ("layerwise", "modelopt"):
        wanted = plan(tmp_path, *own, "dataset.size=small", f"sensitivity.engine={engine}")
        score(Scorer(str(tmp_path / "store"), "cpu"), wanted)
        found.append(rows(tmp_path / "store", wanted))
    assert [row["group"].rpartition(".")[2] for row in found[0][:4]] == ["q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"]
    assert all(row["score"] > 0 for row in found[0])
    np.testing.assert_allclose([row["score"] for row in found[1]], [row["score"] for row in found[0]], rtol=1e-5)
