"""Scales of packed integers are values of bfloat16: a reader that holds them in the model's dtype changes nothing."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sweep.core.batches import Batch, Plan
from sweep.core.pairs import Algorithm
from sweep.core.paths import bundled_model_dir
from sweep.plan.model import Model
from tests.exports import FORMATS, recipe_of
from tests.formats import group_format
from workers.data.batches import make_plan
from workers.data.samples import Sample
from workers.export.checkpoint import write_checkpoint
from workers.export.compressed import schemes_of
from workers.export.readback import check_export
from workers.export.weights import unpacked
from workers.model.forward import batch_to, labels_of
from workers.model.loading import load
from workers.quant.applied import calibrated_model
from workers.quant.calibration import fake_quantized
from workers.scoring.validation import Validator, measurer

SOURCE = bundled_model_dir()
MODEL = Model(SOURCE)
LINEARS = MODEL.structure.linears
# of the groups q/k/v, o, gate/up, down in turn
RECIPES: dict[str, list[tuple[str, Algorithm]]] = {
    "int4_groups": [("int4_groups_weight_only", "max")],
    "int4_channel": [("int4_channel_weight_only", "mse")],
    "int8_channel": [("int8_channel_weight_only", "max")],
    "int8_groups": [("int8_groups_weight_only", "max")],
    "int4_fp8": [("int4_groups_fp8_token", "max")],
    # down_proj's pre-quantization scale goes into up_proj's, and the product is rounded
    "awq_lite": [
        ("int4_groups_weight_only", "awq_lite"),
        ("int4_groups_weight_only", "max"),
        ("int8_groups_weight_only", "max"),
        ("int4_groups_weight_only", "awq_lite"),
    ],
}


def samples(first: int, last: int) -> Plan:
    texts = (SOURCE / "wordnet_glosses.txt").read_text().splitlines()[first:last]
    return make_plan(
        [Sample(token_ids=np.array(ids)) for ids in MODEL.tokenize(f"rounded-{first}", texts)], packed=True
    )


@pytest.fixture(scope="module")
def base() -> Any:
    torch.set_num_threads(1)
    return load(SOURCE, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", RECIPES)
@torch.no_grad()
def test_an_export_whose_scales_are_rounded_as_it_is_loaded_is_what_was_measured(
    tmp_path: Path, base: Any, name: str
) -> None:
    formats = [group_format(each, *FORMATS[each], algorithm, "fused") for each, algorithm in RECIPES[name]]
    recipe, plan = recipe_of(formats), samples(0, 16)
    calibration, held_out = list(plan.batches("small")), list(samples(16, 32).batches("small"))
    quants = calibrated_model(base, calibration, recipe)
    write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS)
    check_export(tmp_path, SOURCE, recipe, quants, LINEARS)

    tensors, schemes = load_file(tmp_path / "model.safetensors"), schemes_of(recipe)
    own = {
        module: schemes[choice.format] for choice in recipe.groups if choice.format for module in choice.group.modules
    }
    served = copy.deepcopy(base)
    for module, scheme in own.items():
        prefix = f"{module}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        scale = state["weight_scale"]
        assert torch.equal(scale, scale.bfloat16().float())
        state["weight_scale"] = scale.bfloat16().float()  # as the reader holds it
        weight = unpacked(state, scheme)
        served.get_parameter(f"{module}.weight").data = weight
        if name != "awq_lite":
            torch.testing.assert_close(weight, fake_quantized(quants[module], base.get_parameter(f"{module}.weight")))
    for key in tensors:  # norms take pre-quantization scales
        if "norm" in key:
            served.get_parameter(key).data = tensors[key].float()

    measure = measurer(base, [choice.group for choice in recipe.groups], [recipe], calibration)
    measured = measure(recipe, Validator(base, held_out)).mean_kl
    if FORMATS[RECIPES[name][0][0]][1] is None:
        assert kl_of(base, served, held_out) == pytest.approx(measured, rel=1e-4)
    private = recipe_of([group_format(each, *FORMATS[each], algorithm) for each, algorithm in RECIPES[name]])
    assert measured != pytest.approx(
        Validator(base, held_out).measure(calibrated_model(base, calibration, private)).mean_kl
    )


def kl_of(base: Any, served: Any, batches: Sequence[Batch]) -> float:
    """Nats a prediction."""
    total, n = 0.0, 0
    for batch in batches:
        inputs, kept = batch_to(batch, torch.device("cpu"), torch.float32), labels_of(batch).flatten() != -100
        models = (base, served)
        logits = [model(**inputs, use_cache=False).logits.flatten(0, 1)[kept].double() for model in models]
        p, q = (each.log_softmax(1) for each in logits)
        total, n = total + float((p.exp() * (p - q)).sum()), n + len(p)
    return total / n
