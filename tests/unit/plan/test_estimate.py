"""What a sweep will take, by hand: products and values of each step, parts of the time, memory and bytes of store."""

from dataclasses import replace

import pytest

from sweep.config.compose import expand
from sweep.core.machine import Gpu, Hardware, Speed, Workers
from sweep.plan import costs
from sweep.plan.costs import COSTS, Work, known_speed
from sweep.plan.estimate import estimated
from sweep.plan.trials import SweepPlan, plan_sweep
from sweep.plan.work import Family, families
from tests.models import save_checkpoint, write_captions

ONE = Workers(device="cpu", count=1, gpus_each=1.0, nodes=(Hardware(host="h", memory_gb=64.0),))
SPEED = Speed(products=1e9, values=1e9, python=1.0)
FP8, INT8 = "quant_pair=wfp8_afp8", "quant_pair=wint8_aint8"
INT4_WEIGHTS = "quant_pair=wint4_afp16"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a random checkpoint and its captions."""
    folder = tmp_path_factory.mktemp("estimate")
    captions = write_captions(folder / "captions.txt", 140)
    checkpoint = save_checkpoint(folder / "model", "qwen3")
    typed = ["model=hf_causal_lm", f"model.path={checkpoint}", "dataset=coco2017_captions"]
    return [*typed, f"dataset.captions_path={captions}"]


def planned(own: list[str], *overrides: str) -> SweepPlan:
    return plan_sweep(expand([*own, *overrides], multirun=True).points, "cpu")


def family(plan: SweepPlan, workers: Workers = ONE, finished: tuple[str, ...] = ()) -> Family:
    (found,) = families(plan.pending(finished).values(), plan, workers)
    return found


def n_tokens(plan: SweepPlan, n_segments: int) -> int:
    (data,) = plan.plans.values()
    return sum(sum(batch.lengths) for segment in data.segments[:n_segments] for batch in segment)


def elements(plan: SweepPlan) -> int:
    return sum(group.weight_elements for group in next(iter(plan.tasks.values())).groups)


def test_a_weight_only_recipe_is_one_product_a_weight_and_quantized_inputs_another(own: list[str]) -> None:
    for overrides, n_products in (([INT4_WEIGHTS], 1), ([INT8], 2), ([f"{INT8},wint8_afp16"], 2)):
        plan = planned(own, *overrides)
        assert family(plan).scoring.products == n_products * n_tokens(plan, 1) * elements(plan)


def test_sizes_share_the_product_of_the_weights_and_each_has_its_own_of_calibrated_inputs(own: list[str]) -> None:
    plan = planned(own, INT8, "dataset.size=small,medium")
    small, medium = n_tokens(plan, 1), n_tokens(plan, 2)
    assert family(plan).scoring.products == (medium + small + medium) * elements(plan)
    dynamic = planned(own, INT8, "quant_granularity=a_per_token_dynamic", "dataset.size=small,medium")
    assert family(dynamic).scoring.products == 2 * medium * elements(plan)


def test_a_capture_multiplies_every_weight_twice_beside_attention_and_the_head(own: list[str]) -> None:
    plan = planned(own, INT8)
    (data,) = plan.plans.values()
    found = family(plan)
    shapes = [batch.tensors["input_ids"].shape for batch in data.segments[0]]
    groups = next(iter(plan.tasks.values())).groups
    hidden, n_layers = min(group.n_inputs for group in groups), len({group.part for group in groups})
    attention = sum(n * length**2 for n, length in shapes) * 2 * hidden * n_layers * 3.5 * COSTS["cpu"].attention
    vocabulary = 512
    linears = 2 * n_tokens(plan, 1) * (elements(plan) + hidden * vocabulary)
    assert found.capture.products == pytest.approx(linears + attention)


def test_windows_cost_one_forward_pass_more_and_less_memory(own: list[str]) -> None:
    plan = planned(own, INT8)
    whole = family(plan)
    tight = replace(ONE, nodes=(Hardware(host="h", memory_gb=whole.bytes * 0.9 / 1e9),))
    assert family(plan, tight).bytes < whole.bytes
    assert whole.capture.products < family(plan, tight).capture.products < 2 * whole.capture.products


def test_blocks_cost_more_values_than_floats_and_these_more_than_integers(own: list[str]) -> None:
    pairs = (INT8, FP8, "quant_pair=wfp4_afp4")
    integers, floats, blocks = (family(planned(own, pair)).scoring.values for pair in pairs)
    assert integers < floats < blocks


def test_divergences_run_the_model_again_for_every_recipe(own: list[str]) -> None:
    one, two = (
        family(planned(own, "sensitivity.method=kl_div", *overrides)).scoring.products
        for overrides in ([INT4_WEIGHTS], [f"{INT4_WEIGHTS},wint8_afp16"])
    )
    assert two == pytest.approx(2 * one)


def test_cells_that_are_done_cost_nothing(own: list[str]) -> None:
    plan = planned(own, f"{INT8},wfp8_afp8")
    first, second = (trial.cell_id for trial in plan.trials)
    assert first is not None
    assert second is not None
    assert family(plan, finished=(first,)).scoring == family(planned(own, FP8)).scoring
    assert families(plan.pending((first, second)).values(), plan, ONE) == []
    nothing = estimated(plan, [], ONE, 1, SPEED)
    assert (nothing.cells, nothing.store_mb, nothing.text("cpu")) == (0, 0.0, "nothing is left to score")


def test_workers_share_the_scoring_by_whole_layers(own: list[str]) -> None:
    plan = planned(own, f"{INT8},wfp8_afp8")
    n_layers = len({group.part for group in next(iter(plan.tasks.values())).groups})
    assert family(plan).share == 1.0
    many = replace(ONE, count=100)
    assert family(plan, many).share == 1 / (2 * n_layers)  # split by recipe, too


def test_the_stock_engine_runs_a_recipe_a_worker(own: list[str]) -> None:
    plan = planned(own, f"{INT8},wfp8_afp8", "sensitivity.engine=modelopt")
    assert (family(plan).share, family(plan, replace(ONE, count=2)).share) == (1.0, 0.5)
    assert family(plan).capture == Work()


def test_seconds_are_work_over_speed_and_python_scales(own: list[str]) -> None:
    plan = planned(own, INT8)
    found = families(plan.pending(()).values(), plan, ONE)
    parts = estimated(plan, found, ONE, 1, SPEED).seconds
    assert parts is not None
    work = found[0].scoring
    assert parts.scoring == pytest.approx(work.products / 1e9 + work.values / 1e9 + work.python)
    assert parts.start == COSTS["cpu"].start + costs.START
    slow = estimated(plan, found, replace(ONE, count=4), 2, replace(SPEED, python=2.0)).seconds
    assert slow is not None
    assert slow.start == COSTS["cpu"].start + 2 * (costs.START + costs.START_WORKER)  # a second wave of workers


def test_python_runs_beside_a_gpu_and_not_beside_a_cpu() -> None:
    work = Work(products=3e9, values=1e9, python=2.0)
    assert COSTS["cpu"].seconds(work, SPEED) == 6.0
    assert COSTS["cuda"].seconds(work, SPEED) == 4.0


def test_the_speed_of_a_gpu_elsewhere_is_known_by_its_name_or_not_at_all(own: list[str]) -> None:
    assert known_speed("NVIDIA H100 80GB HBM3") == known_speed("NVIDIA H100-SXM5")
    assert known_speed("NVIDIA T1000") is None
    plan = planned(own, INT8)
    workers = Workers(
        device="cuda", count=1, gpus_each=1.0, nodes=(Hardware(host="h", gpus=(Gpu("T1000", 8.0, (7, 5)),)),)
    )
    found = estimated(plan, families(plan.pending(()).values(), plan, workers), workers, 1, None)
    assert "seconds" not in found.figures
    assert "how long is not known" in found.text("cuda")


def test_the_store_has_two_scores_a_sample_of_a_text(own: list[str]) -> None:
    plan = planned(own, INT8)
    n_groups = len(next(iter(plan.tasks.values())).groups)
    by_row = costs.ROW_BYTES + 16 * 2 * costs.SAMPLE_BYTES
    assert family(plan).store_bytes == round(costs.FILE_BYTES + n_groups * by_row)


def test_memory_counts_the_process_and_its_capture(own: list[str]) -> None:
    plan = planned(own, INT8)
    found = families(plan.pending(()).values(), plan, ONE)
    assert estimated(plan, found, ONE, 1, None).worker_gb == COSTS["cpu"].process_gb + found[0].bytes / 1e9
