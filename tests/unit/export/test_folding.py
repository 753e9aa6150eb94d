"""Pre-quantization scales in an export: folded exactly into the module before, or refused with the way out."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM

from sweep.config.compose import expand
from sweep.core.batches import Plan, Sample
from sweep.core.errors import SweepError
from sweep.core.groups import Linear
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.exports import FP8, INT4, INT8, NVFP4, apply, apply_as_reader, kl, loaded, recipe_of
from tests.floors import SUMS, given_our_inputs
from tests.formats import group_format
from tests.models import random_model, random_samples
from tests.recipes import recipe_of as recipe_over
from workers.data.batches import make_plan
from workers.export.checkpoint import check_expressible, write_checkpoint
from workers.export.folding import check_folds, folding_modules, output_scales
from workers.export.layout import Inexpressible
from workers.export.readback import check_export
from workers.model.loading import load
from workers.quant.applied import calibrated_model
from workers.quant.linear import LinearQuant

SOURCE = bundled_model_dir()
MODEL = Model(SOURCE)
LINEARS = MODEL.structure.linears
READERS = [linear.name for linear in LINEARS if "visual" not in linear.name]
KL, GIVEN_KL = 1e-4, 1e-5  # nats a prediction; left alone, and given our inputs

GROUPED, CHANNEL = {**INT4, "block_sizes": {-1: 128}}, {**INT8, "axis": 0}
PLAIN = group_format("int4", GROUPED, None)
AWQ = group_format("int4", GROUPED, None, "awq_lite", "fused")
SMOOTHED = group_format("int8", CHANNEL, INT8, "smoothquant", "fused")
AWQ_FP4, PLAIN_FP4 = group_format("fp4", NVFP4, NVFP4, "awq_lite", "fused"), group_format("fp4", NVFP4, NVFP4)
# q/k/v, o, gate/up, down of each layer
RECIPES: dict[str, Sequence[GroupFormat | None]] = {
    "awq_lite": [AWQ, PLAIN, AWQ, AWQ],
    "smoothquant": [SMOOTHED, group_format("int8", CHANNEL, INT8), SMOOTHED, SMOOTHED],
    "smoothquant_over_awq": [AWQ, None, AWQ, SMOOTHED],
    "awq_lite_nvfp4": [AWQ_FP4, None, AWQ_FP4, PLAIN_FP4],
}
Made = tuple[MixedRecipe, dict[str, LinearQuant]]


@pytest.fixture(scope="module")
def base() -> Any:
    torch.set_num_threads(1)
    return load(SOURCE, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def plan() -> Plan:
    texts = (SOURCE / "wordnet_glosses.txt").read_text().splitlines()[:16]
    return make_plan([Sample(token_ids=np.array(ids)) for ids in MODEL.tokenize("test-folding", texts)], packed=True)


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    texts = (SOURCE / "wordnet_glosses.txt").read_text().splitlines()[16:24]
    return torch.cat([torch.tensor(ids) for ids in MODEL.tokenize("test-folding-held-out", texts)])[None]


@pytest.fixture(scope="module")
def made(base: Any, plan: Plan) -> Callable[[str], Made]:
    done: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in done:
            recipe = recipe_of(RECIPES[name])
            done[name] = recipe, calibrated_model(base, list(plan.batches("small")), recipe)
        return done[name]

    return make


def linears_of(model: nn.Module) -> list[Linear]:
    return [
        Linear(name=name, n_inputs=module.in_features, n_outputs=module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def logits(model: Any, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids, use_cache=False).logits


@pytest.mark.parametrize("name", RECIPES)
def test_each_linear_reads_in_transformers_what_it_reads_in_our_model(
    tmp_path: Path,
    base: Any,
    token_ids: Tensor,
    made: Callable[[str], Made],
    name: str,
) -> None:
    """Ours multiplies each linear's inputs, as ModelOpt does; the export's norms and rows do it instead.

    All that a linear gives is read by another, or by the head: so nothing of the export is left out.
    """
    recipe, quants = made(name)
    write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS)
    scales = {module: quant.pre_quant_scale for module, quant in quants.items() if quant.pre_quant_scale is not None}
    theirs, ours = loaded(tmp_path), apply_as_reader(copy.deepcopy(base), quants)
    strays, expected, found = given_our_inputs(ours, theirs, token_ids, READERS, scales)
    assert max(strays.values()) < SUMS
    torch.testing.assert_close(found, expected, rtol=SUMS, atol=SUMS)
    unscaled, _, _ = given_our_inputs(ours, theirs, token_ids, READERS)
    assert min(unscaled[module] for module in scales) > 0.01  # the scales are there at all
    in_modelopts_order = apply(copy.deepcopy(base), quants)
    _, expected, found = given_our_inputs(in_modelopts_order, theirs, token_ids, quants, scales)
    assert kl(found, expected) < GIVEN_KL


def test_left_alone_transformers_gives_the_logits_of_our_model(
    tmp_path: Path,
    base: Any,
    token_ids: Tensor,
    made: Callable[[str], Made],
) -> None:
    """Of a recipe that rounds no inputs: one that does drifts with the last bits of sums, static INT8 by 4e-4."""
    recipe, quants = made("awq_lite")
    write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS)
    expected = logits(apply(copy.deepcopy(base), quants), token_ids)
    assert kl(logits(loaded(tmp_path), token_ids), expected) < KL
    unscaled = {module: replace(quant, pre_quant_scale=None) for module, quant in quants.items()}
    assert kl(logits(apply(copy.deepcopy(base), unscaled), token_ids), expected) > KL  # the scales are there at all


@pytest.mark.parametrize("name", RECIPES)
def test_the_export_is_the_recipe_to_the_bit_in_the_readers_order(
    tmp_path: Path, base: Any, plan: Plan, token_ids: Tensor, made: Callable[[str], Made], name: str
) -> None:
    recipe, quants = made(name)
    scales = output_scales(recipe, quants, LINEARS)
    assert len(scales) == sum(
        choice.format is not None and "/default/" in choice.format for choice in recipe.groups
    )  # one for each group that has one
    check_folds(base, scales, LINEARS, plan.batches("small"))
    write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS)
    check_export(tmp_path, SOURCE, recipe, quants, LINEARS)
    expected = logits(apply_as_reader(copy.deepcopy(base), quants, scales), token_ids)
    assert torch.equal(logits(loaded(tmp_path), token_ids), expected)


def test_a_damaged_scale_is_seen_where_it_went(
    tmp_path: Path, base: Any, token_ids: Tensor, made: Callable[[str], Made]
) -> None:
    recipe, quants = made("awq_lite")
    write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS)
    expected = logits(apply(copy.deepcopy(base), quants), token_ids)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    layer = "model.language_model.layers.1"
    for key in (
        f"{layer}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight",
        f"{layer}.mlp.up_proj.weight_scale",
    ):
        save_file({**whole, key: whole[key] * 1.125}, file, metadata={"format": "pt"})
        with pytest.raises(SweepError, match=re.escape(key.removesuffix("_scale").removesuffix(".weight"))):
            check_export(tmp_path, SOURCE, recipe, quants, LINEARS)
        assert kl(logits(loaded(tmp_path), token_ids), expected) > KL


def test_every_layer_norm_of_the_vision_tower_takes_a_scale(base: Any) -> None:
    dataset = expand(["dataset=scenes"], multirun=False).points[0].dataset
    batches = make_plan(samples_of(dataset, MODEL, 16), packed=True).batches("small")
    norms = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.LayerNorm) and ".merger." not in name
    }
    generator = torch.Generator().manual_seed(0)
    scales = {name: 0.5 + torch.rand(norm.weight.shape, generator=generator) for name, norm in norms.items()}
    assert {name.rsplit(".", 1)[1] for name in scales} == {"norm1", "norm2", "norm"}
    assert all(norm.bias is not None for norm in norms.values())
    before = copy.deepcopy(base.state_dict())
    check_folds(base, scales, LINEARS, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())  # all put back


@pytest.mark.parametrize("n_value_heads", [4, 2])
def test_v_proj_takes_the_scale_of_o_proj_where_heads_do_not_share_it(n_value_heads: int) -> None:
    model = random_model("llama", num_key_value_heads=n_value_heads)
    linears = linears_of(model)
    recipe = recipe_over(model, [AWQ], covered="o_proj")
    batches = make_plan(random_samples(4), packed=True).batches("small")
    if n_value_heads == 2:
        with pytest.raises(
            Inexpressible,
            match=r"v_proj has 64 outputs for its 128 inputs.*"
            r"--pin o_proj=int4/default \(algorithm max\) or --exclude o_proj",
        ):
            folding_modules(recipe, linears)
        return
    assert [*folding_modules(recipe, linears)] == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    check_folds(model, dict.fromkeys(folding_modules(recipe, linears), torch.linspace(0.5, 2, 128)), linears, batches)


def test_a_norm_that_does_not_multiply_by_its_weight_is_seen() -> None:
    """Gemma's norms multiply by 1 + weight."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
    }
    model = GemmaForCausalLM(GemmaConfig(vocab_size=512, **sizes)).eval().requires_grad_(False)
    linears = linears_of(model)
    batches = make_plan(random_samples(4), packed=True).batches("small")
    with pytest.raises(
        Inexpressible, match=r"layers\.0\.self_attn\.q_proj: multiplying model\.layers\.0\.input_layernorm"
    ):
        check_folds(model, {"model.layers.0.input_layernorm": torch.linspace(0.5, 2, 128)}, linears, batches)


def test_another_reader_of_a_norm_is_seen() -> None:
    model = random_model("llama", num_hidden_layers=1)
    linears = linears_of(model)
    known = [
        linear for linear in linears if not linear.name.endswith("v_proj")
    ]  # as if nobody knew that v_proj reads it too
    batches = make_plan(random_samples(4), packed=True).batches("small")
    with pytest.raises(Inexpressible, match="something else reads these"):
        check_folds(model, {"model.layers.0.input_layernorm": torch.linspace(0.5, 2, 128)}, known, batches)


def test_a_linear_that_no_sample_reaches_is_seen(base: Any, plan: Plan) -> None:
    with pytest.raises(Inexpressible, match=r"blocks\.0\.attn\.qkv: no sample reaches it"):
        check_folds(base, {"model.visual.blocks.0.norm1": torch.linspace(0.5, 2, 128)}, LINEARS, plan.batches("small"))


def test_quantizers_of_another_recipe_are_not_taken(made: Callable[[str], Made]) -> None:
    recipe, quants = made("awq_lite")
    with pytest.raises(ValueError, match="algorithm does not give"):
        output_scales(recipe_of([PLAIN]), quants, LINEARS)
    name, quant = next(iter(quants.items()))
    assert quant.pre_quant_scale is not None
    with pytest.raises(ValueError, match="another scale"):
        output_scales(recipe, {**quants, name: replace(quant, pre_quant_scale=quant.pre_quant_scale * 2)}, LINEARS)


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (
            [replace(AWQ, scales="private"), PLAIN],
            r"q_proj: .* goes into .*input_layernorm, which 3 linears read.*sensitivity\.scales=fused",
        ),
        ([AWQ], r"o_proj: .*'awq_lite'.*v_proj has 128 outputs for its 256 inputs.*--pin o_proj=int4/default"),
        (
            [PLAIN, PLAIN, group_format("fp8", FP8, None), AWQ],
            r"down_proj: .*rows of .*up_proj would be multiplied, and its format 'fp8/default'",
        ),
        (
            [PLAIN, PLAIN, PLAIN_FP4, AWQ],
            r"down_proj: .*rows of .*up_proj would be multiplied, and its format 'fp4/default'",
        ),
        ([PLAIN, PLAIN, None, AWQ], r"down_proj: .*rows of .*up_proj would be multiplied, which is left in 16 bits"),
    ],
)
def test_what_nothing_takes_exactly_is_refused_by_name(formats: Sequence[GroupFormat | None], said: str) -> None:
    with pytest.raises(Inexpressible, match=said):
        check_expressible(SOURCE, recipe_of(formats), LINEARS)


@pytest.mark.parametrize(
    ("covered", "said"),
    [
        ("visual.blocks.0.attn.proj", "attention or an activation function between"),
        ("visual.merger.linear_fc2", "attention or an activation function between"),
        ("visual.merger.linear_fc1", r"no model\.visual\.merger\.norm\.weight of 512 channels, but of 128"),
    ],
)
def test_inputs_in_the_vision_tower_that_nothing_scales_are_refused(base: Any, covered: str, said: str) -> None:
    with pytest.raises(Inexpressible, match=said):
        check_expressible(SOURCE, recipe_over(base, [AWQ], covered=covered), LINEARS)
