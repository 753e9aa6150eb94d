"""Checkpoints in ModelOpt's format hold what ModelOpt's own exporter writes, and damage is seen."""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight

from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from sweep.formats.quantizer import Quantizer
from sweep.plan.model import Model
from tests.exports import FP8, INT4, INT8, MXFP4, MXFP8, NVFP4, PER_TOKEN, quants_of, recipe_of
from tests.formats import group_format
from workers.export.checkpoint import check_expressible, write_checkpoint
from workers.export.layout import Inexpressible
from workers.export.modelopt_layout import ModelOptLayout, ModelOptPacking, quant_algo_of
from workers.export.readback import check_export
from workers.model.loading import load
from workers.quant.calibration import calibrated_linears
from workers.quant.linear import LinearQuant

SOURCE = bundled_model_dir()
LINEARS = Model(SOURCE).structure.linears
LAYOUT = ModelOptLayout()
GROUPS = {"block_sizes": {-1: 64}}
# By ModelOpt's name of a format: weight and input attributes, `quant_algo`, and tensors beside `weight`.
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str, set[str]]] = {
    "fp8": (FP8, FP8, "FP8", {"weight_scale", "input_scale"}),
    "fp8_pc_pt": ({**FP8, "axis": 0}, {**FP8, **PER_TOKEN}, "FP8_PER_CHANNEL_PER_TOKEN", {"weight_scale"}),
    "fp8_pb_wo": (
        {**FP8, "block_sizes": {-1: 128, -2: 128}},
        {**FP8, "type": "dynamic", "block_sizes": {-1: 128}},
        "FP8_PB_WO",
        {"weight_scale"},
    ),
    "mxfp8": (MXFP8, MXFP8, "MXFP8", {"weight_scale"}),
    "int4_awq": ({**INT4, **GROUPS}, None, "W4A16_AWQ", {"weight_scale"}),
    "w4a8_awq": ({**INT4, **GROUPS}, FP8, "W4A8_AWQ", {"weight_scale", "weight_scale_2", "input_scale"}),
    "int8_wo": ({**INT8, "axis": 0}, None, "W8A16", {"weight_scale"}),
    "int8_sq": ({**INT8, "axis": 0}, INT8, "W8A8_SQ_PER_CHANNEL", {"weight_scale", "input_scale"}),
    "nvfp4": (NVFP4, NVFP4, "NVFP4", {"weight_scale", "weight_scale_2", "input_scale"}),
    "w4a16_nvfp4": (NVFP4, None, "W4A16_NVFP4", {"weight_scale", "weight_scale_2"}),
    "w4a8_nvfp4_fp8": (NVFP4, FP8, "W4A8_NVFP4_FP8", {"weight_scale", "weight_scale_2", "input_scale"}),
    "w4a8_mxfp4_fp8": (MXFP4, FP8, "W4A8_MXFP4_FP8", {"weight_scale", "input_scale"}),
}
MIXED = ["nvfp4", "fp8_pc_pt", "int4_awq", None, "mxfp8", "int8_sq", "fp8_pb_wo"]
Exported = tuple[Path, MixedRecipe, dict[str, LinearQuant]]


def format_called(name: str) -> GroupFormat:
    weight, inputs, _, _ = FORMATS[name]
    return group_format(name, weight, inputs)


@pytest.fixture(scope="module")
def base() -> Any:
    torch.set_num_threads(1)
    return load(SOURCE, dtype=torch.float32, device="cpu")


@pytest.fixture
def export(base: Any, tmp_path: Path) -> Callable[..., Exported]:
    @torch.no_grad()
    def write(*names: str | None) -> Exported:
        recipe = recipe_of([name and format_called(name) for name in names])
        quants = quants_of(recipe, base, torch.arange(64)[None])
        write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS, layout=LAYOUT)
        return tmp_path, recipe, quants

    return write


def quantization(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "hf_quant_config.json").read_text())["quantization"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_comes_back_and_is_called_by_its_name(export: Callable[..., Exported], name: str) -> None:
    directory, recipe, quants = export(name)
    check_export(directory, SOURCE, recipe, quants, LINEARS, layout=LAYOUT)
    config = quantization(directory)
    algo = config["quant_algo"]
    assert (algo.upper(), config["kv_cache_quant_algo"]) == (FORMATS[name][2], None)
    assert (algo == "fp8_pb_wo") == (name == "fp8_pb_wo")  # TensorRT-LLM knows it in small letters alone
    assert config["exclude_modules"] == ["lm_head", "model.visual*"]
    assert quant_algo_of(name, format_called(name)) == FORMATS[name][2]
    inner = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (inner["quant_method"], inner["quant_algo"], inner["ignore"]) == (
        "modelopt",
        algo,
        config["exclude_modules"],
    )


def test_each_module_of_a_mix_is_named_and_the_others_are_left_out(export: Callable[..., Exported]) -> None:
    directory, recipe, quants = export(*MIXED)
    check_export(directory, SOURCE, recipe, quants, LINEARS, layout=LAYOUT)
    config = quantization(directory)
    assert config["quant_algo"] == "MIXED_PRECISION"
    layers = {
        module: choice.format
        for choice in recipe.groups
        for module in choice.group.modules
        if choice.format is not None
    }
    named = {module: layer["quant_algo"].upper() for module, layer in config["quantized_layers"].items()}
    assert named == {module: FORMATS[label.partition("/")[0]][2] for module, label in layers.items()}
    assert set(config["exclude_modules"]) == {linear.name for linear in LINEARS} - layers.keys()
    inner = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert inner["quantized_layers"] == config["quantized_layers"]


def test_a_recipe_that_quantizes_nothing_is_a_plain_checkpoint(export: Callable[..., Exported]) -> None:
    directory, recipe, quants = export(None)
    check_export(directory, SOURCE, recipe, quants, LINEARS, layout=LAYOUT)
    assert not (directory / "hf_quant_config.json").exists()
    assert (directory / "config.json").read_text() == json.dumps(
        json.loads((SOURCE / "config.json").read_text()), indent=2
    ) + "\n"


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_tensors_are_those_of_modelopts_own_exporter(name: str) -> None:
    """Names, shapes, dtypes and values, but for the sign of zeros, and how W4A8_NVFP4_FP8 divides its two scales."""
    weight, inputs, _, beside = FORMATS[name]
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 384, bias=False), torch.randn(64, 256)
    chosen = group_format(name, weight, inputs)
    (quant,) = calibrated_linears({"a": linear.weight.detach()}, [x], chosen).values()
    packing = LAYOUT.packings(one_group(chosen), {"a": quant, "b": quant}, {})["a"]
    ours = packing.packed(linear.weight.detach(), quant, None, torch.float32)
    theirs = exported_by_modelopt(linear, x, name)
    assert ours.keys() == theirs.keys() == {"weight", *beside}
    assert {key: (each.dtype, each.shape) for key, each in ours.items()} == {
        key: (each.dtype, each.shape) for key, each in theirs.items()
    }
    if name == "w4a8_nvfp4_fp8":
        scale, their_scale = ours["weight_scale"].float(), theirs["weight_scale"].float()
        torch.testing.assert_close(
            scale * ours["weight_scale_2"], their_scale * theirs["weight_scale_2"], rtol=2**-3, atol=0
        )
        return
    torch.testing.assert_close(packing.unpacked(ours), packing.unpacked(theirs), rtol=1e-6, atol=0)
    if "input_scale" in ours:
        torch.testing.assert_close(ours["input_scale"], theirs["input_scale"], rtol=1e-6, atol=0)


def one_group(chosen: GroupFormat) -> MixedRecipe:
    """A recipe of which one group of two linears, a and b, counts."""
    recipe = recipe_of([chosen])
    group = replace(recipe.groups[0].group, name="a", modules=("a", "b"))
    return replace(recipe, groups=(replace(recipe.groups[0], group=group),))


def exported_by_modelopt(linear: nn.Linear, x: Tensor, name: str) -> Mapping[str, Tensor]:
    weight, inputs, _, _ = FORMATS[name]
    # Its name for INT4 weights under FP8 inputs asks for two quantizers, of which the second one has the second scale.
    own = [weight, FP8] if name == "w4a8_awq" else weight
    entries = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": own}]
    if inputs is not None:
        entries.append({"quantizer_name": "*input_quantizer", "cfg": inputs})
    model: Any = nn.Sequential(copy.deepcopy(linear))

    def calibrate(model: Any) -> None:  # its NVFP4 and MX kernels do not run on a CPU: no pass through the linear
        model[0].input_quantizer(x)
        model[0].weight_quantizer(model[0].weight)

    mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, calibrate)
    _export_quantized_weight(model[0], torch.float32)
    return {key: tensor for key, tensor in model[0].state_dict().items() if "quantizer" not in key}


def test_int4_of_single_linears_has_the_scale_that_tensorrt_llm_asks_for(export: Callable[..., Exported]) -> None:
    directory, _, _ = export("int4_awq")
    held = load_file(directory / "model.safetensors")
    scaled = {key.rsplit(".", 2)[1] for key in held if key.endswith(".pre_quant_scale")}
    assert scaled == {"o_proj", "down_proj"}  # it takes none of fused linears
    ones = held["model.language_model.layers.0.mlp.down_proj.pre_quant_scale"]
    original = load_file(SOURCE / "model.safetensors")["model.language_model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(ones, torch.ones(original.shape[1], dtype=original.dtype))


def test_linears_of_a_group_share_the_second_scale_of_w4a8(export: Callable[..., Exported]) -> None:
    """TensorRT-LLM asserts it; under it the INT4 weights are FP8 numbers of at most 448."""
    directory, _, quants = export("w4a8_awq")
    held = load_file(directory / "model.safetensors")
    prefix = "model.language_model.layers.1.self_attn."
    shared = {float(held[f"{prefix}{name}_proj.weight_scale_2"]) for name in "qkv"}
    amaxes = [quants[f"{prefix}{name}_proj"].weight_amax for name in "qkv"]
    assert len(shared) == 1
    assert shared.pop() == pytest.approx(max(float(amax.amax()) for amax in amaxes if amax is not None) / 448)


@pytest.mark.parametrize(
    ("weight", "inputs", "field"),
    [
        (FP8, None, "inputs: None"),
        ({**FP8, "axis": 0}, FP8, "inputs: "),
        ({**FP8, "block_sizes": {-1: 64}}, None, "weight.block_sizes: "),
        ({**INT8, "block_sizes": {-1: 128}}, None, "weight.axis: None"),
        ({**INT4, "axis": 0}, None, "weight."),
        (MXFP4, None, "inputs: None"),
        ({**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 32}}, None, "weight.block_sizes: "),
        ({"num_bits": (5, 2)}, None, "weight.num_bits: (5, 2)"),
        (None, FP8, "weight.num_bits: 16"),
    ],
)
def test_what_the_format_has_no_name_for_is_refused_by_label_and_field(
    weight: dict[str, Any] | None, inputs: dict[str, Any] | None, field: str
) -> None:
    with pytest.raises(Inexpressible) as caught:
        check_expressible(SOURCE, recipe_of([group_format("odd", weight, inputs)]), LINEARS, LAYOUT)
    message = str(caught.value)
    assert f"a ModelOpt checkpoint can't express {field}" in message
    assert "of format 'odd/default'" in message
    assert "Choose another format for these groups, or --format compressed-tensors." in message


def test_a_block_scale_too_small_for_w4a8_nvfp4_is_refused() -> None:
    weight_OI = torch.full((2, 32), 1e-4)
    weight_OI[:, :16] = 1.0
    packing = ModelOptPacking(format="w4a8_nvfp4_fp8", group_size=16)
    quant = LinearQuant(
        weight=Quantizer(NVFP4),
        inputs=Quantizer(FP8),
        weight_amax=torch.tensor(1.0),
        input_amax=torch.tensor(1.0),
        pre_quant_scale=None,
    )
    with pytest.raises(Inexpressible, match="the scale of some block is under"):
        packing.packed(weight_OI, quant, None, torch.float32)


def doubled(tensors: dict[str, Tensor], prefix: str) -> None:
    tensors[f"{prefix}.weight_scale"] = tensors[f"{prefix}.weight_scale"] * 2


def surplus(tensors: dict[str, Tensor], prefix: str) -> None:
    tensors[f"{prefix}.weight_scale_2"] = torch.ones(())


def lacking(tensors: dict[str, Tensor], prefix: str) -> None:
    del tensors[f"{prefix}.weight_scale"]


def other_input(tensors: dict[str, Tensor], prefix: str) -> None:
    tensors[f"{prefix}.input_scale"] = tensors[f"{prefix}.input_scale"] * 2


def scaled(tensors: dict[str, Tensor], prefix: str) -> None:
    tensors[f"{prefix}.pre_quant_scale"] = tensors[f"{prefix}.pre_quant_scale"] * 2


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("fp8", doubled, "are not the recipe's"),
        ("fp8", surplus, "does not decompress: ValueError: it holds input_scale, weight, weight_scale, weight_scale_2"),
        ("fp8", lacking, "does not decompress"),
        ("fp8", other_input, "calibrated was"),
        ("int4_awq", scaled, "pre_quant_scale is not 1"),
    ],
)
def test_damage_is_named(
    export: Callable[..., Exported], name: str, damage: Callable[[dict[str, Tensor], str], None], message: str
) -> None:
    directory, recipe, quants = export(name)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    damage(tensors, "model.language_model.layers.2.mlp.down_proj")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SweepError, match=message) as caught:
        check_export(directory, SOURCE, recipe, quants, LINEARS, layout=LAYOUT)
    assert "layers.2.mlp.down_proj" in str(caught.value)


def test_documents_that_contradict_each_other_are_refused(export: Callable[..., Exported]) -> None:
    directory, recipe, quants = export("fp8")
    path = directory / "hf_quant_config.json"
    path.write_text(path.read_text().replace('"FP8"', '"MXFP8"'))
    with pytest.raises(SweepError, match=r"config.json does not say what hf_quant_config.json says"):
        check_export(directory, SOURCE, recipe, quants, LINEARS, layout=LAYOUT)


def test_another_format_than_the_recipes_is_named(export: Callable[..., Exported]) -> None:
    directory, recipe, quants = export("nvfp4")
    others = {"w4a16_nvfp4": format_called("w4a16_nvfp4")}
    other = replace(
        recipe,
        formats={each.label: each for each in others.values()},
        groups=tuple(replace(choice, format=others["w4a16_nvfp4"].label) for choice in recipe.groups),
    )
    with pytest.raises(Inexpressible, match="would be read as"):
        check_export(directory, SOURCE, other, quants, LINEARS, layout=LAYOUT)
