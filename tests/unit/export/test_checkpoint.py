"""Exported checkpoints are what transformers and compressed-tensors compute with, and damage is seen."""

import copy
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.plan.model import Model
from tests.exports import (
    FORMATS,
    FP8,
    INT4,
    INT8,
    MXFP4,
    NVFP4,
    PER_TOKEN,
    apply,
    apply_as_reader,
    kl,
    loaded,
    quants_of,
    recipe_of,
)
from tests.floors import SUMS, given_our_inputs
from tests.formats import group_format
from workers.export.checkpoint import check_expressible, write_checkpoint
from workers.export.compressed import quantization_config, read_schemes
from workers.export.layout import Inexpressible
from workers.export.readback import check_export
from workers.model.checkpoint import checkpoint_names
from workers.model.loading import load
from workers.quant.applied import calibrated_model
from workers.quant.linear import LinearQuant

SOURCE = bundled_model_dir()
LINEARS = Model(SOURCE).structure.linears
MIXED = ["nvfp4", "fp8_channel_token", "int4_groups_weight_only", None, "mxfp8", "int8_channel_static"]
EACH_AND_MIXED: list[list[str | None]] = [*[[name] for name in FORMATS], MIXED]
DYNAMIC_INT8 = {"int8_channel_token", "int4_groups_int8_token"}  # amax / 127.5 in the reader, amax / 127 in ModelOpt
OF_MODELOPTS_RANGES = [names for names in EACH_AND_MIXED if not DYNAMIC_INT8.issuperset(names)]
READERS = [linear.name for linear in LINEARS if "visual" not in linear.name]
KL, GIVEN_KL = 1e-4, 1e-5  # nats a prediction; left alone, and given our inputs


def name_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "mixed"


@pytest.fixture(scope="module")
def base() -> Any:
    torch.set_num_threads(1)
    return load(SOURCE, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    texts = (SOURCE / "wordnet_glosses.txt").read_text().splitlines()[:8]
    return torch.cat([torch.tensor(ids) for ids in Model(SOURCE).tokenize("test-export", texts)])[None]


def exported(
    directory: Path, base: nn.Module, token_ids: Tensor, names: list[str | None]
) -> tuple[MixedRecipe, dict[str, LinearQuant]]:
    recipe = recipe_of([name and group_format(name, *FORMATS[name]) for name in names])
    quants = quants_of(recipe, base, token_ids)
    write_checkpoint(SOURCE, directory, recipe, quants, LINEARS)
    return recipe, quants


@pytest.mark.parametrize("names", EACH_AND_MIXED, ids=name_of)
@torch.no_grad()
def test_each_linear_reads_in_transformers_what_it_reads_in_our_model(
    tmp_path: Path,
    base: Any,
    token_ids: Tensor,
    names: list[str | None],
) -> None:
    """Our model divides where the reader does here, so every format agrees to float32's last bits, dynamic INT8 too."""
    recipe, quants = exported(tmp_path, base, token_ids, names)
    check_export(tmp_path, SOURCE, recipe, quants, LINEARS)
    ours = apply_as_reader(copy.deepcopy(base), quants)
    strays, expected, found = given_our_inputs(ours, loaded(tmp_path), token_ids, READERS)
    assert max(strays.values()) < SUMS
    torch.testing.assert_close(found, expected, rtol=SUMS, atol=SUMS)
    assert kl(base(input_ids=token_ids, use_cache=False).logits, expected) > KL  # the quantization is there at all


@torch.no_grad()
def test_a_range_a_token_and_rank_is_one_a_token_in_the_checkpoint(tmp_path: Path, base: Any) -> None:
    """Each rank that loads its part of it finds its own."""
    whole = group_format("int8_channel_token", *FORMATS["int8_channel_token"])
    configs: list[str] = []
    for chosen in (whole, whole.on_ranks(2)):
        recipe, directory = recipe_of([chosen]), tmp_path / str(chosen.tp)
        directory.mkdir()
        quants = calibrated_model(base, [], recipe)
        lengths = {name: quant.inputs and quant.inputs.block_lengths[-1] for name, quant in quants.items()}
        down_proj = next(name for name in lengths if name.endswith("down_proj"))
        assert lengths[down_proj] == {1: None, 2: 192}[chosen.tp]
        write_checkpoint(SOURCE, directory, recipe, quants, LINEARS)
        check_export(directory, SOURCE, recipe, quants, LINEARS)
        configs.append((directory / "config.json").read_text())
    assert configs[0] == configs[1]


@pytest.mark.parametrize("names", OF_MODELOPTS_RANGES, ids=name_of)
@torch.no_grad()
def test_transformers_computes_what_the_recipe_says(
    tmp_path: Path,
    base: Any,
    token_ids: Tensor,
    names: list[str | None],
) -> None:
    """In ModelOpt's order, each quantized linear of the export is given what the same linear of our model reads.

    0 to 9 of 860,160 inputs lie so near a tie that `x * (1 / s)` and `x / s` round them to different sides, and that
    cannot grow here: KL 0 to 6e-9, and 1.5e-6 where the reader rounds NVFP4's weights to bfloat16. Dynamic INT8 inputs
    are left out: their other range makes a KL of 0.97e-4 to 1.01e-4, with the order of sums.
    """
    _, quants = exported(tmp_path, base, token_ids, names)
    _, expected, found = given_our_inputs(apply(copy.deepcopy(base), quants), loaded(tmp_path), token_ids, quants)
    assert kl(found, expected) < GIVEN_KL


@pytest.mark.parametrize("names", EACH_AND_MIXED, ids=name_of)
@torch.no_grad()
def test_left_alone_the_export_gives_the_logits_of_our_model(
    tmp_path: Path, base: Any, token_ids: Tensor, names: list[str | None]
) -> None:
    """In the reader's order the two take the same products in the same shapes: equal to the bit in any order of sums.

    In ModelOpt's order they part at the first element that lies within 1e-7 of a tie, and from there everywhere: KL
    8e-4 (FP8 a tensor), 1.8e-3 (FP8 a token), 4e-2 (NVFP4, whose weights the reader rounds to bfloat16). Our own model
    parts as far from itself with embeddings that differ by 1e-7 (FP8: 6e-4, 2.7e-3) or by 1e-4 (NVFP4: 4e-2; INT8:
    2.4e-3; unquantized: 2e-8). Such a KL says nothing of an export.
    """
    _, quants = exported(tmp_path, base, token_ids, names)
    expected = apply_as_reader(copy.deepcopy(base), quants)(input_ids=token_ids, use_cache=False).logits
    assert torch.equal(loaded(tmp_path)(input_ids=token_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "name",
    ["fp8_tensor_static", "fp8_channel_token", "nvfp4", "mxfp8", "int8_channel_static", "int4_groups_weight_only"],
)
@torch.no_grad()
def test_only_what_reads_a_damaged_linear_strays(tmp_path: Path, base: Any, token_ids: Tensor, name: str) -> None:
    _, quants = exported(tmp_path, base, token_ids, [name])
    file = tmp_path / "model.safetensors"
    whole, key = load_file(file), "model.language_model.layers.2.mlp.down_proj.weight_scale"
    scale = whole[key]
    off = scale + 1 if scale.dtype == torch.uint8 else (scale.float() * 1.125).to(scale.dtype)
    save_file({**whole, key: off}, file, metadata={"format": "pt"})
    ours = apply_as_reader(copy.deepcopy(base), quants)
    strays, _, _ = given_our_inputs(ours, loaded(tmp_path), token_ids, READERS)
    behind = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    readers = {f"model.language_model.layers.3.{one}" for one in behind} | {"lm_head"}  # of the residual stream
    assert {module for module, stray in strays.items() if stray > SUMS} == readers


@pytest.mark.parametrize("name", [name for name, (_, inputs) in FORMATS.items() if inputs is None])
@torch.no_grad()
def test_weight_only_exports_give_our_logits_without_help(
    tmp_path: Path, base: Any, token_ids: Tensor, name: str
) -> None:
    _, quants = exported(tmp_path, base, token_ids, [name])
    expected = apply(copy.deepcopy(base), quants)(input_ids=token_ids, use_cache=False).logits
    assert kl(loaded(tmp_path)(input_ids=token_ids, use_cache=False).logits, expected) < KL


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_damaged_scale_is_seen(tmp_path: Path, base: Any, token_ids: Tensor, name: str) -> None:
    """Every scale of one linear in turn, off by an eighth, or by one where it is an exponent."""
    recipe, quants = exported(tmp_path, base, token_ids, [name])
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    scales = [key for key in whole if "layers.2.mlp.down_proj" in key and "scale" in key]
    assert scales
    for key in scales:
        scale = whole[key]
        off = scale + 1 if scale.dtype == torch.uint8 else (scale.float() * 1.125).to(scale.dtype)
        save_file({**whole, key: off}, file, metadata={"format": "pt"})
        with pytest.raises(SweepError, match=r"layers\.2\.mlp\.down_proj"):
            check_export(tmp_path, SOURCE, recipe, quants, LINEARS)


def test_damage_elsewhere_is_seen(tmp_path: Path, base: Any, token_ids: Tensor) -> None:
    recipe, quants = exported(tmp_path, base, token_ids, MIXED)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    norm = "model.language_model.norm.weight"
    save_file({**whole, norm: whole[norm] * 2}, file, metadata={"format": "pt"})
    with pytest.raises(SweepError, match=r"norm\.weight is not what"):
        check_export(tmp_path, SOURCE, recipe, quants, LINEARS)
    save_file({**whole, "extra": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(SweepError, match="holds extra"):
        check_export(tmp_path, SOURCE, recipe, quants, LINEARS)


def test_another_scheme_in_config_json_is_seen(tmp_path: Path, base: Any, token_ids: Tensor) -> None:
    recipe, quants = exported(tmp_path, base, token_ids, ["int4_groups_weight_only"])
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"group_size": 128', '"group_size": 64'))
    with pytest.raises(Inexpressible, match=r"layers\.0\.self_attn\.q_proj"):
        check_export(tmp_path, SOURCE, recipe, quants, LINEARS)


def test_a_layer_whose_keys_are_its_values_names_both() -> None:
    """As Gemma 4 has it: there is no `v_proj`, and vLLM gives q/k/v a scheme only if all three are named."""
    recipe = recipe_of([name and group_format(name, *FORMATS[name]) for name in MIXED])
    linears = [linear for linear in LINEARS if not linear.name.endswith("layers.1.self_attn.v_proj")]
    (index,) = (i for i, each in enumerate(recipe.groups) if each.group.name.endswith("layers.1.self_attn.q_proj"))
    groups = list(recipe.groups)
    groups[index] = replace(groups[index], group=replace(groups[index].group, modules=groups[index].group.modules[:2]))
    config = quantization_config(replace(recipe, groups=tuple(groups)), linears)
    assert config == quantization_config(recipe, LINEARS)


def test_every_linear_is_a_target_or_ignored() -> None:
    recipe = recipe_of([name and group_format(name, *FORMATS[name]) for name in MIXED])
    config = quantization_config(recipe, LINEARS)
    named = [target for group in config["config_groups"].values() for target in group["targets"]] + config["ignore"]
    assert sorted(named) == sorted([*(linear.name for linear in LINEARS), "re:.*visual.*"])
    assert (config["quant_method"], config["format"], config["quantization_status"]) == (
        "compressed-tensors",
        "mixed-precision",
        "compressed",
    )
    assert {group["format"] for group in config["config_groups"].values()} == {
        "nvfp4-pack-quantized",
        "float-quantized",
        "pack-quantized",
        "mxfp8-quantized",
        "int-quantized",
    }


def test_shards_keep_their_names_and_sizes_add_up(tmp_path: Path, base: Any, token_ids: Tensor) -> None:
    source, directory = tmp_path / "source", tmp_path / "export"
    directory.mkdir()
    base.to(torch.bfloat16).save_pretrained(source, max_shard_size="1MB")
    base.to(torch.float32)
    (source / "sweep_manifest.json").write_text("of what was exported there")
    recipe = recipe_of([group_format("int4", {**INT4, "block_sizes": {-1: 64}}, None)], source)
    quants = quants_of(recipe, base, token_ids)
    write_checkpoint(source, directory, recipe, quants, LINEARS)
    check_export(directory, source, recipe, quants, LINEARS)
    names = {path.name for path in directory.iterdir()}
    assert names == set(checkpoint_names(source)) == {path.name for path in source.iterdir()} - {"sweep_manifest.json"}
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert shards == sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 1
    assert len(read_schemes(directory, LINEARS)) == 28


def test_all_that_belongs_to_a_checkpoint_travels_and_no_second_copy_of_its_weights(
    tmp_path: Path, base: Any, token_ids: Tensor
) -> None:
    """Linears that transformers does not build are kept, and named: a runtime that builds them looks for them."""
    source, directory = tmp_path / "source", tmp_path / "export"
    base.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    extra = {
        "mtp.fc.weight": torch.ones(4, 8),
        "mtp.norm.weight": torch.ones(4),
        "mtp.embed_tokens.weight": torch.ones(4, 8),
    }
    save_file({**tensors, **extra}, source / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "model.safetensors", source / "consolidated.safetensors")
    texts = ("LICENSE", "Notice.md", "chat_template.jinja", "preprocessor_config.json")
    for name in (*texts, "consolidated.safetensors.index.json", "train.py"):
        (source / name).write_text("{}")
    directory.mkdir()
    recipe = recipe_of([group_format("int4", {**INT4, "block_sizes": {-1: 64}}, None)], source)
    quants = quants_of(recipe, base, token_ids)
    before = os.umask(0o027)
    try:
        write_checkpoint(source, directory, recipe, quants, LINEARS)
    finally:
        os.umask(before)
    check_export(directory, source, recipe, quants, LINEARS)
    names = {path.name for path in directory.iterdir()}
    assert names == {*texts, "config.json", "generation_config.json", "model.safetensors"}
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o640}
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert [name for name in config["ignore"] if name.startswith("mtp")] == ["mtp.fc"]
    assert extra.keys() <= load_file(directory / "model.safetensors").keys()


def test_a_source_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("layer-analysis"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(
        SweepError, match=r"marked as quantized \(gptq, by quantization_config of config.json\).*model.path=DIR"
    ):
        check_expressible(source, recipe_of([group_format("int4", INT4, None)]), LINEARS)


@pytest.mark.parametrize(
    ("weight", "inputs", "said"),
    [
        ({**FP8, "axis": 1}, None, r"weight\.axis: 1"),
        (FP8, {**INT8, **PER_TOKEN}, r"inputs\.num_bits"),
        ({**INT8, "axis": 0}, {**FP8, **PER_TOKEN}, r"inputs\.num_bits"),
        ({**INT8, "axis": 0}, {**INT8, "block_sizes": {-1: 128}}, r"inputs\.block_sizes"),
        ({**INT4, "axis": 0}, {**INT4, **PER_TOKEN}, r"inputs\.num_bits: 4"),
        ({**NVFP4, "block_sizes": {**NVFP4["block_sizes"], -1: 64}}, None, r"weight\.block_sizes"),
        (MXFP4, MXFP4, r"inputs\.num_bits: \(2, 1\)"),
        ({**INT4, "block_sizes": {-1: 64}, "narrow_range": True}, None, r"weight\.narrow_range: True"),
        (None, FP8, r"weight\.num_bits: 16"),
    ],
)
def test_what_the_format_cannot_express_is_refused_by_name(weight: Any, inputs: Any, said: str) -> None:
    recipe = recipe_of([None, group_format("odd", weight, inputs)])
    with pytest.raises(Inexpressible, match=said) as caught:
        quantization_config(recipe, LINEARS)
    assert recipe.groups[1].group.name in str(caught.value)
    assert "odd/default" in str(caught.value)
