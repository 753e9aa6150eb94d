"""A model spread over two GPUs: the same bits as on one, in one capture and in windows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sweep.config.compose import expand
from sweep.plan.trials import SweepPlan, plan_sweep
from sweep.store.store import Store
from tests.models import overrides_of, place_at
from workers.model import loading
from workers.scoring.capture import capture
from workers.service.scorer import Scorer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]
GRID = [
    "quant_pair=wfp8_afp8,wint8_aint8,wint4_afp16,wfp4_afp16",
    "quant_granularity=default,recipe_match_channel_token",
    "dataset.size=small,medium",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with decoder layers enough for both, and captions."""
    return place_at(tmp_path_factory.mktemp("several"), num_hidden_layers=24)


def planned(place: Path) -> SweepPlan:
    return plan_sweep(expand([*GRID, *overrides_of(place), "sensitivity.lm_head=true"], multirun=True).points, "cuda")


def scores(place: Path, root: Path, n_gpus: int, *, windows: bool = False) -> dict[str, bytes]:
    """Every cell's file, as one worker leaves it."""
    plan = planned(place)
    scorer = Scorer(str(root), "cuda", n_gpus=n_gpus)
    if windows:
        scorer._halvings = 30  # of the room: a window a layer
    ((plan_id, samples),) = plan.plans.items()
    tasks = [task for task in plan.tasks.values() if task.plan_id == plan_id]
    assert {progress.failure for progress in scorer.score(tasks, samples)} == {None}
    store = Store(str(root))
    return {
        cell: store.files.read(f"scores/cell={cell}/scores.parquet")
        for task in plan.tasks.values()
        for cell in task.cells.values()
    }


@pytest.fixture(scope="module")
def on_one(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return scores(place, tmp_path_factory.mktemp("one"), 1)


def test_layers_are_captured_where_their_weights_are(place: Path) -> None:
    model = loading.load(place / "model", dtype=torch.bfloat16, device="cuda", n_gpus=2)
    plan = planned(place)
    task = next(iter(plan.tasks.values()))
    names = [name for group in task.groups for name in group.modules]
    rows = capture(model, plan.plans[task.plan_id].segments[:1], names)
    places = {name: model.get_submodule(name).weight.device for name in names}
    assert len(set(places.values())) == 2
    assert {name: seen.x_TI.device for name, seen in rows.items()} == places
    assert {name: seen.g_TO.device for name, seen in rows.items()} == places


@pytest.mark.parametrize("windows", [False, True])
def test_scores_are_the_bits_of_one_gpu(windows: bool, place: Path, on_one: dict[str, bytes], tmp_path: Path) -> None:
    assert len(on_one) == 14
    assert scores(place, tmp_path, 2, windows=windows) == on_one


def test_a_second_model_takes_the_place_of_the_first(place: Path, tmp_path: Path) -> None:
    plan = planned(place)
    task = next(iter(plan.tasks.values()))
    scorer = Scorer(str(tmp_path), "cuda", n_gpus=2)
    scorer.load(task.model)
    scorer.load(replace(task.model, revision="other"))
    (*_, last) = scorer.score([task], plan.plans[task.plan_id])
    assert (last.failure, scorer.model_loads) == (None, 3)
