"""Calibration algorithms, layer by layer on captured inputs, against stock ModelOpt on a whole model; fused scales."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import modelopt.torch.quantization as mtq
import msgspec
import numpy as np
import pytest
import torch
from modelopt.torch.export.quant_utils import preprocess_linear_fusion

from sweep.config.compose import expand
from sweep.core.batches import Plan
from sweep.core.errors import InvalidRecipe
from sweep.core.pairs import Algorithm, Scales
from sweep.plan.trials import plan_sweep, recipe_of
from tests.formats import format_of, job_of
from tests.models import overrides_of, place_at
from workers.model.forward import batch_to
from workers.model.loading import load
from workers.quant.block_formats import BACKEND
from workers.quant.calibration import calibrated_linears, fake_quantized, quantized_inputs
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine, Job

INT8, INT4 = {"num_bits": 8, "axis": 0}, {"num_bits": 4, "block_sizes": {-1: 32, "type": "static"}}
NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
RECIPES: Mapping[str, tuple[Any, Any]] = {
    "mse": (INT4, None),
    "mse, static inputs": (INT8, {"num_bits": 8, "axis": None}),
    "awq_lite": (INT4, None),
    "awq_lite, static inputs": (INT4, {"num_bits": (4, 3), "axis": None}),
    "awq_lite, nvfp4": (NVFP4, NVFP4),
    "smoothquant": (INT8, {"num_bits": 8, "axis": None}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return place_at(tmp_path_factory.mktemp("algorithms"))


@pytest.fixture(scope="module")
def captured(place: Any) -> tuple[Any, Plan, Mapping[str, Any], tuple[Any, ...]]:
    """The model, its samples, what its linears saw, its layer groups."""
    sweep = plan_sweep(expand([*overrides_of(place), "dataset.size=medium"], multirun=False).points, "cpu")
    (task,), (plan,) = sweep.tasks.values(), sweep.plans.values()
    model = load(place / "model", dtype=torch.float32, device="cpu")
    modules = [name for group in task.groups for name in group.modules]
    return model, plan, capture(model, plan.segments[:2], modules), task.groups


def algorithm_of(name: str) -> Algorithm:
    return msgspec.convert(name.partition(",")[0], Algorithm)


def job(name: str, scales: Scales = "private") -> Job:
    return job_of(name, *RECIPES[name], ("small", "medium"), algorithm_of(name), scales)


def stock(model: Any, plan: Plan, name: str, size: str, *, fused: bool = False) -> Any:
    """The whole model as ModelOpt quantizes it with samples of one size."""
    weight, inputs = RECIPES[name]
    weight, inputs = ({**cfg, "backend": BACKEND} if cfg is NVFP4 else cfg for cfg in (weight, inputs))
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*language_model*weight_quantizer", "cfg": dict(weight)},
    ]
    if inputs is not None:
        entries.append({"quantizer_name": "*language_model*input_quantizer", "cfg": dict(inputs)})
    entries.append(
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False}
    )  # as presets do: it would move what awq_lite sees

    def feed(network: Any) -> None:
        for batch in plan.batches(size):
            network(**batch_to(batch, torch.device("cpu"), torch.float32), use_cache=False)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(copy.deepcopy(model), {"quant_cfg": entries, "algorithm": name.partition(",")[0]}, feed)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("name", RECIPES)
def test_scores_are_those_of_the_linears_that_modelopt_has_calibrated_in_the_whole_model(
    name: str, size: str, captured: Any
) -> None:
    model, plan, rows, groups = captured
    quantized = stock(model, plan, name, size)
    end = {"small": 0, "medium": 1}[size]
    for group in groups:
        expected = 0.0
        for module in group.modules:
            last = rows[module].layout.ends[end]
            x, g = rows[module].x_TI[:last], rows[module].g_TO[:last]
            with torch.no_grad():
                dy = quantized.get_submodule(module)(x).double() - model.get_submodule(module)(x).double()
            expected += float((g.double() * dy).square().sum())
        weights = {module: model.get_submodule(module).weight.detach() for module in group.modules}
        found: Any = Engine(torch.device("cpu")).score_group(
            weights, {module: rows[module] for module in group.modules}, [job(name)]
        )()
        assert found[0][size].score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_bf16_models_score_as_in_float64(name: str, captured: Any) -> None:
    """Scaled weights and inputs are no bf16 numbers: rounding them must not count as quantization."""
    model, _, rows, groups = captured
    for group in (groups[0], groups[-1]):
        end = rows[group.name].layout.ends[0]
        weights = {module: model.get_submodule(module).weight.detach().bfloat16() for module in group.modules}
        x = rows[group.name].x_TI.bfloat16()
        own = {
            module: replace(rows[module], x_TI=x, g_DTO=rows[module].g_DTO.bfloat16(), input_ranges={})
            for module in group.modules
        }
        found: Any = Engine(torch.device("cpu")).score_group(weights, own, [replace(job(name), sizes={"small": 16})])()
        ends = [row for row in rows[group.name].layout.batch_ends if row <= end]
        chosen = format_of(*RECIPES[name], algorithm_of(name))
        quants = calibrated_linears(weights, [x[a:b] for a, b in pairwise(ends)], chosen)
        expected, changed, whole = 0.0, 0.0, 0.0
        for module, quant in quants.items():
            q_w, q_x, w = (
                fake_quantized(quant, weights[module]).double(),
                quantized_inputs(quant, x[:end]).double(),
                weights[module].double(),
            )
            dy = q_x @ q_w.T - x[:end].double() @ w.T
            expected += float((own[module].g_TO[:end].double() * dy).square().sum())
            changed += float(
                (q_w * (1.0 if quant.pre_quant_scale is None else quant.pre_quant_scale.double()) - w).square().sum()
            )
            whole += float(w.square().sum())
        score = found[0]["small"]
        assert score.score == pytest.approx(expected, rel=5e-3)
        assert score.dw_square_sum / score.w_square_sum == pytest.approx(changed / whole, rel=5e-3)  # in units of W


def test_recipes_of_several_algorithms_score_alike_alone_and_together(captured: Any) -> None:
    model, _, rows, groups = captured
    group = groups[0]
    weights = {module: model.get_submodule(module).weight.detach() for module in group.modules}
    own = {module: rows[module] for module in group.modules}
    plain = job_of("max", INT8, {"num_bits": 8, "axis": None}, ("small", "medium"))
    jobs = [
        job("mse"),
        plain,
        job("awq_lite"),
        job("mse, static inputs"),
        job("smoothquant"),
        job("smoothquant", "fused"),
    ]
    together: Any = Engine(torch.device("cpu")).score_group(weights, own, jobs)()
    for each, scores in zip(jobs, together, strict=True):
        (alone,) = Engine(torch.device("cpu")).score_group(weights, own, [each])() or ()
        for size in ("small", "medium"):
            assert scores[size].score == alone[size].score  # type: ignore[index]
            np.testing.assert_array_equal(scores[size].sample_scores, alone[size].sample_scores)  # type: ignore[index]


@pytest.mark.parametrize(
    ("weight", "shares"),
    [
        ({"num_bits": (4, 3), "axis": None}, True),
        ({"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}, True),
        ({"num_bits": (4, 3), "axis": 0}, False),
    ],
)
def test_fused_scales_are_the_largest_of_the_group_where_a_range_covers_a_tensor(
    weight: Any, shares: bool, captured: Any
) -> None:
    model, _, rows, groups = captured
    group = groups[0]
    weights = {module: model.get_submodule(module).weight.detach().clone() for module in group.modules}
    first = next(iter(weights))
    weights[first] *= 3.0
    own = {module: rows[module] for module in group.modules}
    jobs = [job_of("x", weight, None, ["small"], scales=scales) for scales in ("private", "fused")]
    assert [each.format.is_fused for each in jobs] == [False, shares]
    found: Any = Engine(torch.device("cpu")).score_group(weights, own, jobs)()
    private, fused = (scores["small"].score for scores in found)
    assert (fused != private) == shares
    if shares and weight["num_bits"] == (4, 3):  # by hand: every linear under the scale of the largest
        amax = max(float(w.abs().max()) for w in weights.values())
        end = own[first].layout.ends[0]
        expected = 0.0
        for module, w in weights.items():
            q = (w * (448 / amax)).to(torch.float8_e4m3fn).float() * (amax / 448)
            dy = own[module].x_TI[:end].double() @ (q - w).double().T
            expected += float((own[module].g_TO[:end].double() * dy).square().sum())
        assert fused == pytest.approx(expected, rel=1e-5)


def test_fused_scales_of_the_inputs_are_those_that_modelopts_export_gives(captured: Any) -> None:
    model, plan, rows, groups = captured
    quantized = stock(model, plan, "awq_lite", "small")
    group = groups[0]
    linears = [quantized.get_submodule(module) for module in group.modules]
    preprocess_linear_fusion(linears, resmooth_only=False)
    for linear in linears:  # scales are in bfloat16 where runtimes serve them
        linear.weight_quantizer.amax = (linear.weight_quantizer.amax / 7).bfloat16().float() * 7
    expected = 0.0
    for module, linear in zip(group.modules, linears, strict=True):
        end = rows[module].layout.ends[0]
        with torch.no_grad():
            dy = (
                linear(rows[module].x_TI[:end]).double() - model.get_submodule(module)(rows[module].x_TI[:end]).double()
            )
        expected += float((rows[module].g_TO[:end].double() * dy).square().sum())
    weights = {module: model.get_submodule(module).weight.detach() for module in group.modules}
    found: Any = Engine(torch.device("cpu")).score_group(
        weights, {module: rows[module] for module in group.modules}, [job("awq_lite", "fused")]
    )()
    assert found[0]["small"].score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant_pair=wfp4_afp16", "sensitivity.quant_algorithm=mse"], "mse searches ranges"),
        (["quant_pair=wfp8_afp8", "sensitivity.quant_algorithm=awq_lite"], "awq_lite needs weights in groups"),
        (
            ["quant_pair=wint4_afp8", "quant_granularity=a_per_token_dynamic", "sensitivity.quant_algorithm=awq_lite"],
            "awq_lite needs inputs",
        ),
        (["quant_pair=wint8_afp16", "sensitivity.quant_algorithm=smoothquant"], "smoothquant is for INT8"),
        (
            [
                "quant_pair=wint8_aint8",
                "quant_granularity=a_per_token_dynamic",
                "sensitivity.quant_algorithm=smoothquant",
            ],
            "smoothquant is for INT8",
        ),
    ],
)
def test_what_an_algorithm_cannot_calibrate_is_no_recipe(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        recipe_of(expand(overrides, multirun=False).points[0])


@pytest.mark.parametrize(
    ("pair", "granularity", "share"),
    [
        ("wfp8_afp8", "default", True),
        ("wfp4_afp4", "default", True),
        ("wfp8_afp8", "recipe_match_channel_token", False),
        ("wint4_afp16", "default", True),  # rounded to bfloat16, as runtimes hold them
    ],
)
def test_scales_are_part_of_a_cells_identity_only_where_they_change_it(
    pair: str, granularity: str, share: bool
) -> None:
    points = expand(
        [f"quant_pair={pair}", f"quant_granularity={granularity}", "sensitivity.scales=fused,private"], multirun=True
    ).points
    cells = {trial.cell_id for trial in plan_sweep(points, "cpu").trials}
    assert len(cells) == (2 if share else 1)
