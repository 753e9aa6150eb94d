"""A model spread over two GPUs: the same bits as on one, in one capture and in windows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sweep.compose import expand
from sweep.paths import bundled_model_dir
from sweep.planning import plan_sweep
from sweep.store import Store
from workers import modeling
from workers.capture import capture
from workers.scorer import Scorer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]
GRID = ["quant_pair=wfp8_afp8,wint8_aint8,wint4_afp16,wfp4_afp16", "quant_granularity=default,recipe_match_channel_token", "dataset.size=small,medium"]


def scores(root: Path, n_gpus: int, *, windows: bool = False) -> dict[str, bytes]:
    """Every cell's file, as one worker leaves it."""
    plan = plan_sweep(expand([*GRID, "sensitivity.coverage=all_layers", "sensitivity.lm_head=true"], multirun=True).points, "cuda")
    scorer = Scorer(str(root), "cuda", n_gpus=n_gpus)
    if windows:
        scorer._halvings = 20  # of the room: a window a layer
    for plan_id in {task.plan_id for task in plan.tasks.values()}:
        list(scorer.score([task for task in plan.tasks.values() if task.plan_id == plan_id], plan.plans[plan_id]))
    store = Store(str(root))
    return {cell: store.files.read(f"scores/cell={cell}/scores.parquet") for task in plan.tasks.values() for cell in task.cells.values()}


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return scores(tmp_path_factory.mktemp("one"), 1)


def test_layers_are_captured_where_their_weights_are(tmp_path: Path) -> None:
    model = modeling.load(bundled_model_dir(), dtype=torch.bfloat16, device="cuda", n_gpus=2)
    (task, *_), plans = (lambda plan: ([*plan.tasks.values()], plan.plans))(plan_sweep(expand(GRID, multirun=True).points, "cuda"))
    names = [name for group in task.groups for name in group.modules]
    rows = capture(model, plans[task.plan_id].segments[:1], names)
    places = {name: model.get_submodule(name).weight.device for name in names}
    assert len(set(places.values())) == 2
    assert {name: seen.x_TI.device for name, seen in rows.items()} == places
    assert {name: seen.g_TO.device for name, seen in rows.items()} == places


@pytest.mark.parametrize("windows", [False, True])
def test_scores_are_the_bits_of_one_gpu(windows: bool, on_one: dict[str, bytes], tmp_path: Path) -> None:
    assert len(on_one) == 16
    assert scores(tmp_path, 2, windows=windows) == on_one


def test_a_second_model_takes_the_place_of_the_first(tmp_path: Path) -> None:
    plan = plan_sweep(expand(["quant_pair=wint8_aint8", "dataset.size=small"], multirun=False).points, "cuda")
    (task,) = plan.tasks.values()
    scorer = Scorer(str(tmp_path), "cuda", n_gpus=2)
    scorer.load(task.model)
    scorer.load(replace(task.model, revision="other"))
    (*_, last) = scorer.score([task], plan.plans[task.plan_id])
    assert (last.failure, scorer.model_loads) == (None, 3)
