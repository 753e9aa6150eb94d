"""A checkpoint that is quantized is named before it is loaded, whichever place says so, and with what can be done."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from sweep.core.errors import SweepError
from tests.weights import PLAIN, Tensors, write_checkpoint
from workers.model.checkpoint import Fp8Source, check_checkpoint, fp8_source

Q = "model.layers.0.self_attn.q_proj"
PROSE = "Give the checkpoint that it was made from: model.path=DIR."
CODES: Tensors = {**PLAIN, f"{Q}.weight": ("U8", [4, 4])}


def said_of(path: Path) -> str:
    with pytest.raises(SweepError) as error:
        check_checkpoint(path)
    return str(error.value)


SECTION = "quantization_config"
CONFIGS: list[tuple[Mapping[str, object], str]] = [
    *(
        ({SECTION: {"quant_method": method}}, f"{method}, by {SECTION} of config.json")
        for method in (
            *("compressed-tensors", "gptq", "awq", "modelopt", "torchao", "hqq", "quanto", "eetq", "aqlm", "vptq"),
            *("spqr", "higgs", "fbgemm_fp8", "mxfp4", "bitnet", "auto-round", "mxfp8", "of next year"),
        )
    ),
    ({SECTION: {"quant_method": "bitsandbytes", "load_in_4bit": True}}, f"bitsandbytes, by {SECTION} of config.json"),
    ({SECTION: {"load_in_8bit": True}}, f"bitsandbytes, by {SECTION} of config.json"),
    ({SECTION: {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}}, f"modelopt, by {SECTION} of config.json"),
    ({SECTION: {"config_groups": {}}}, f"compressed-tensors, by {SECTION} of config.json"),
    ({SECTION: {}}, f"unknown method, by {SECTION} of config.json"),
    ({SECTION: "int8"}, f"unknown method, by {SECTION} of config.json"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors, by compression_config of co"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "mlx, by quantization of config.json"),
    ({"text_config": {SECTION: {"quant_method": "GPTQ"}}}, f"gptq, by {SECTION} of text_config of config.json"),
    ({"language_config": {SECTION: {"quant_method": "awq"}}}, f"awq, by {SECTION} of language_config of config.json"),
    (
        {"thinker_config": {"text_config": {SECTION: {"quant_method": "awq"}}}},
        f"awq, by {SECTION} of text_config of thinker_config of config.json",
    ),
    (
        {SECTION: {"quant_method": "fp8"}, "llm_config": {SECTION: {"quant_method": "awq"}}},
        f"fp8, by {SECTION} of config.json; awq, by {SECTION} of llm_config of config.json",
    ),
]


@pytest.mark.parametrize(("config", "said"), CONFIGS)
def test_a_section_of_the_configuration_names_the_method(
    config: Mapping[str, object], said: str, tmp_path: Path
) -> None:
    message = said_of(write_checkpoint(tmp_path / "model", config, CODES))
    assert message.startswith(f"The checkpoint {tmp_path / 'model'} is quantized already ({said}")
    assert PROSE in message


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": True}, "gptq"),
        ("quantize_config.json", {"quant_method": "awq"}, "awq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4}, "awq"),
        ("quantization_config.json", {"quant_method": "auto-round"}, "auto-round"),
        ("quanto_qmap.json", {Q: {"weights": "qint8"}}, "quanto"),
        ("quant_config.json", [], "awq"),
    ],
)
def test_a_quantizers_own_file_names_the_method(name: str, content: object, method: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tensors=CODES)
    (path / name).write_text(json.dumps(content))
    assert f"is quantized already ({method}, by {name})" in said_of(path)


TENSORS: dict[str, Tensors] = {
    "compressed-tensors": {f"{Q}.weight_packed": ("I32", [4, 1]), f"{Q}.weight_scale": ("BF16", [4, 1])},
    "gptq": {f"{Q}.qweight": ("I32", [1, 4]), f"{Q}.qzeros": ("I32", [1, 1]), f"{Q}.g_idx": ("I32", [8])},
    "awq": {f"{Q}.qweight": ("I32", [8, 1]), f"{Q}.qzeros": ("I32", [1, 1]), f"{Q}.scales": ("F16", [1, 8])},
    "bitsandbytes": {
        f"{Q}.weight": ("U8", [8, 1]),
        f"{Q}.weight.absmax": ("F32", [1]),
        f"{Q}.weight.quant_state.bitsandbytes__nf4": ("U8", [81]),
    },
    "bitsandbytes ": {f"{Q}.weight": ("I8", [4, 4]), f"{Q}.SCB": ("F32", [4])},
    "modelopt": {
        f"{Q}.weight": ("U8", [4, 8]),
        f"{Q}.weight_scale": ("F8_E4M3", [4, 1]),
        f"{Q}.weight_scale_2": ("F32", []),
    },
    "mxfp4": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": ("U8", [2, 4, 1, 16]),
        "model.layers.0.mlp.experts.gate_up_proj_scales": ("U8", [2, 4, 1]),
    },
    "aqlm": {f"{Q}.codes": ("I16", [4, 1, 1]), f"{Q}.codebooks": ("F16", [1, 16, 1, 8])},
    "vptq": {f"{Q}.indices": ("I32", [1, 4, 2]), f"{Q}.centroids.weight": ("F16", [1, 64])},
    "spqr": {f"{Q}.dense_weights": ("I64", [16]), f"{Q}.row_offsets": ("I32", [5])},
    "hqq": {f"{Q}.W_q": ("U8", [4, 4]), f"{Q}.scale": ("F16", [4, 1]), f"{Q}.zero": ("F16", [4, 1])},
    "torchao": {f"{Q}._weight_qdata": ("I8", [4, 4]), f"{Q}._weight_scale": ("F32", [4, 1])},
    "quanto": {f"{Q}.weight._data": ("I8", [4, 4]), f"{Q}.weight._scale": ("F32", [4, 1])},
    "eetq": {f"{Q}.weight": ("I8", [4, 4]), f"{Q}.weight_scales": ("F16", [4])},
    "higgs": {f"{Q}.weight": ("I16", [4, 4]), f"{Q}.tables2": ("F16", [4, 2]), f"{Q}.scales": ("F16", [4, 1])},
    "mlx": {f"{Q}.weight": ("U32", [4, 1]), f"{Q}.scales": ("BF16", [4, 1]), f"{Q}.biases": ("BF16", [4, 1])},
    "fp8": {f"{Q}.weight": ("F8_E4M3", [4, 4]), f"{Q}.weight_scale_inv": ("F32", [1, 1])},
    "unknown method": {f"{Q}.weight": ("F8_E5M2", [4, 4]), f"{Q}.weight_scale": ("F32", [1])},
    "unknown method ": {f"{Q}.weight": ("I8", [4, 4])},
    "unknown method  ": {
        "model.layers.0.experts.up_proj": ("I8", [2, 4]),
        "model.layers.0.experts.up_proj_scale": ("F32", [2]),
    },
    "unknown method   ": {"model.layers.0.experts.up_proj": ("F4", [2, 4])},
}


@pytest.mark.parametrize("method", TENSORS)
def test_codes_are_found_where_the_configuration_says_nothing(method: str, tmp_path: Path) -> None:
    tensors = TENSORS[method]
    codes, (dtype, _) = min(
        (name, header) for name, header in tensors.items() if header[0] not in ("F32", "F16", "BF16")
    )
    path = write_checkpoint(tmp_path / "model", {SECTION: None}, {**PLAIN, **tensors})
    message = said_of(path)
    assert f"is quantized already ({method.strip()}, by tensor {codes}, {dtype}): " in message
    assert PROSE in message
    assert "hold plain values" not in message


def test_integers_that_are_no_weights_are_left_alone(tmp_path: Path) -> None:
    """GPT-2's masks, BERT's positions, Swin's table: plain models have them."""
    buffers: Tensors = {
        "h.0.attn.bias": ("U8", [1, 1, 4, 4]),
        "h.0.attn.mask": ("BOOL", [4, 4]),
        "embeddings.position_ids": ("I64", [1, 8]),
        "layers.0.relative_position_index": ("I64", [4, 4]),
        "layers.0.logit_scale": ("F32", [2, 1, 1]),
        "layers.0.attn.q_a_proj.weight": ("BF16", [4, 4]),
    }
    check_checkpoint(write_checkpoint(tmp_path / "model", tensors={**PLAIN, **buffers}))


@pytest.mark.parametrize("config", [{SECTION: None}, {"compression_config": None}, {"quantization": {"dim": 8}}])
def test_a_section_that_says_nothing_is_no_mark(config: Mapping[str, object], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", config)
    check_checkpoint(path)
    assert fp8_source(path) is None


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("bitsandbytes", "Merge an adapter that was trained on it (QLoRA) into the 16-bit checkpoint"),
        ("mxfp4", "Mxfp4Config(dequantize=True)"),
        ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)"),
        ("mlx", "mlx_lm.convert --hf-path DIR --mlx-path OUT --dequantize"),
        ("bitnet", "trained with ternary weights"),
    ],
)
def test_some_methods_have_another_way_out(method: str, advice: str, tmp_path: Path) -> None:
    assert advice in said_of(write_checkpoint(tmp_path / "model", {SECTION: {"quant_method": method}}))


@pytest.mark.parametrize("marked", ["config", "file"])
def test_a_mark_on_plain_values_can_be_deleted(marked: str, tmp_path: Path) -> None:
    """As trainers leave it in config.json when they merge an adapter into 16 bits."""
    config = {SECTION: {"quant_method": "gptq"}} if marked == "config" else {}
    path = write_checkpoint(tmp_path / "model", config)
    if marked == "file":
        (path / "quant_config.json").write_text("{}")
    place = f"{SECTION} of config.json" if marked == "config" else "quant_config.json"
    said = said_of(path)
    assert (
        f"is marked as quantized ({'gptq' if marked == 'config' else 'awq'}, by {place}), but all its tensors " in said
    )
    assert f"hold plain values (BF16). If these are the whole weights, delete {place}. If not, give the check" in said


@pytest.mark.parametrize(
    "card", ["---\nlicense: mit\nbase_model: org/big-1.5\n---\n# x\n", "---\nbase_model:\n- org/big-1.5\n---\n"]
)
def test_the_model_card_names_what_to_type(card: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", {SECTION: {"quant_method": "awq"}}, CODES)
    (path / "README.md").write_text(card)
    assert "made from: model.path=org/big-1.5 (the base model by its README.md)." in said_of(path)


@pytest.mark.parametrize("tensor", ["lora_A.weight", "lora_B.default.weight", "base_layer.weight"])
def test_an_adapter_that_is_not_merged_is_named(tensor: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", tensors={**PLAIN, f"{Q}.{tensor}": ("BF16", [4, 4])})
    message = said_of(path)
    assert f"holds an adapter's weights beside the model's ({Q}.{tensor})" in message
    assert "merge_and_unload" in message


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCKS: Tensors = {f"{Q}.weight": ("F8_E4M3", [256, 128]), f"{Q}.weight_scale_inv": ("F32", [2, 1])}


@pytest.mark.parametrize(
    ("section", "tensors", "block"),
    [
        ({"weight_block_size": [128, 128]}, BLOCKS, (128, 128)),
        ({"weight_block_size": [128, 128]}, {**BLOCKS, f"{Q}.weight_scale_inv": ("F8_E8M0", [2, 1])}, (128, 128)),
        ({"weight_block_size": None}, {**BLOCKS, f"{Q}.weight_scale_inv": ("BF16", [])}, None),
        (
            {"activation_scheme": "static"},
            {**BLOCKS, f"{Q}.weight_scale": ("F32", []), f"{Q}.input_scale": ("F32", [])},
            None,
        ),
    ],
)
def test_fp8_of_the_official_layout_is_told_from_plain_weights(
    section: Mapping[str, object], tensors: Tensors, block: tuple[int, int] | None, tmp_path: Path
) -> None:
    config = {"text_config": {"dtype": "float16"}, SECTION: {**FP8, **section}}
    path = write_checkpoint(tmp_path / "model", config, {**PLAIN, **tensors})
    assert fp8_source(path) == Fp8Source(block=block, dtype="float16")


@pytest.mark.parametrize(
    ("section", "tensors", "found"),
    [
        ({"fmt": "e5m2"}, {}, "by fmt=e5m2"),
        ({}, {f"{Q}.weight": ("F8_E5M2", [4, 4])}, f"by {Q}.weight is F8_E5M2"),
        ({"expert_dtype": "fp4"}, {"experts.0.w1.weight": ("I8", [4, 4])}, "by experts.0.w1.weight is I8"),
    ],
)
def test_other_codes_under_the_name_of_fp8_are_refused(
    section: Mapping[str, object], tensors: Tensors, found: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", {SECTION: {**FP8, **section}}, {**BLOCKS, **tensors})
    assert f"codes that are not E4M3, {found})" in said_of(path)


def test_a_damaged_section_of_fp8_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", {SECTION: {**FP8, "weight_block_size": "128"}}, BLOCKS)
    assert f"{SECTION} of config.json, of {path}, is damaged: " in said_of(path)


def test_fp8_that_the_configuration_does_not_name_can_be_named(tmp_path: Path) -> None:
    assert '"quantization_config": {"quant_method": "fp8"' in said_of(write_checkpoint(tmp_path / "model", {}, BLOCKS))
