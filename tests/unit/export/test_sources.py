"""Exports of checkpoints in FP8, and of those whose names on disk are not transformers'."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.plan.model import Model
from tests.exports import FORMATS, quants_of, recipe_of
from tests.formats import group_format
from tests.fp8 import quantize
from tests.models import random_model
from workers.export.checkpoint import COMPRESSED_TENSORS, check_expressible, write_checkpoint
from workers.export.layout import Layout
from workers.export.modelopt_layout import ModelOptLayout
from workers.export.names import aliases, linears_on_disk, recipe_on_disk
from workers.export.readback import check_export
from workers.model import loading
from workers.model.tensors import open_tensors

TOKENS = torch.arange(5, 37).reshape(2, 16)


def written(source: Path, directory: Path, recipe: MixedRecipe, layout: Layout = COMPRESSED_TENSORS) -> Path:
    """An export as the command makes it, read back."""
    structure = Model(source).structure
    names = structure.on_disk
    model = loading.load(source, dtype=torch.float32, device="cpu")
    quants = {names[name]: quant for name, quant in quants_of(recipe, model, TOKENS).items()}
    made, linears = recipe_on_disk(recipe, names), linears_on_disk(structure.linears, names)
    directory.mkdir()
    write_checkpoint(source, directory, made, quants, linears, layout=layout, aliases=aliases(names))
    check_export(directory, source, made, quants, linears, layout=layout)
    return directory


@pytest.mark.parametrize("layout", [COMPRESSED_TENSORS, ModelOptLayout()], ids=["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("block", [[128, 128], None])
def test_an_export_of_an_fp8_source_is_that_of_its_dequantized_weights(
    layout: Layout, block: list[int] | None, tmp_path: Path
) -> None:
    """Every tensor to the bit, and nothing else: no scale of the source, no word of it in config.json."""
    fp8, plain = tmp_path / "fp8", tmp_path / "plain"
    for path in (fp8, plain):
        shutil.copytree(bundled_model_dir(), path, ignore=shutil.ignore_patterns("layer-analysis"))
    meant = quantize(fp8, block, "_scale_inv", within="language_model.layers")
    weights = load_file(plain / "model.safetensors")
    save_file(weights | meant, plain / "model.safetensors", metadata={"format": "pt"})
    formats = [group_format("int8", *FORMATS["int8_channel_static"]), None]
    exports = [
        written(path, tmp_path / f"{path.name}-export", recipe_of(formats, path), layout) for path in (fp8, plain)
    ]
    found, expected = (load_file(path / "model.safetensors") for path in exports)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(found[name], tensor), name
    configs = [json.loads((path / "config.json").read_text()) for path in exports]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["quant_method"] in ("compressed-tensors", "modelopt")


@pytest.fixture
def renamed(tmp_path: Path) -> Path:
    """Qwen2 without the prefix of its base model, as one that was saved alone."""
    path = tmp_path / "renamed"
    random_model("qwen2", tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(path)
    weights = {name.removeprefix("model."): each for name, each in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_an_export_has_the_names_on_disk_and_every_other_tensor(renamed: Path, tmp_path: Path) -> None:
    """Biases among them; transformers loads it, and computes what the recipe says."""
    recipe = recipe_of([group_format("int8", *FORMATS["int8_groups_weight_only"])], renamed)
    export = written(renamed, tmp_path / "export", recipe)
    source, found = load_file(renamed / "model.safetensors"), load_file(export / "model.safetensors")
    quantized = {name for name in source if name.startswith("layers.") and name.endswith("proj.weight")}
    assert {name.removesuffix("_packed") for name in found if name.endswith("_packed")} == quantized
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items() if name not in quantized)
    config = json.loads((export / "config.json").read_text())["quantization_config"]
    targets = {name for group in config["config_groups"].values() for name in group["targets"]}
    assert targets == {name.removesuffix(".weight") for name in quantized} | {
        f"model.{name.removesuffix('.weight')}" for name in quantized
    }
    assert config["ignore"] == ["lm_head"]
    assert Model(export).configured_linears == Model(renamed).structure.linears  # as `validate --served` compares them
    theirs: Any = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    ours = loading.load(renamed, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        logits = [model(input_ids=TOKENS, use_cache=False).logits for model in (ours, theirs)]
    error = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert 1e-4 < error < 0.05  # INT8 groups


def test_a_weight_that_is_no_tensor_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tied"
    random_model("qwen3", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(path)
    recipe = recipe_of([group_format("int8", *FORMATS["int8_groups_weight_only"])], path)
    head = recipe.groups[-1].group
    chosen = recipe.groups[-1].format
    assert chosen is not None
    head = replace(head, name="lm_head", modules=("lm_head",))
    recipe = replace(recipe, groups=(*recipe.groups, replace(recipe.groups[-1], group=head)))
    with pytest.raises(SweepError, match=r"holds no lm_head.weight: it is tied to another module"):
        check_expressible(path, recipe, Model(path).structure.linears)


def test_values_of_an_fp8_source_are_as_near_to_its_original_as_fp8_is(tmp_path: Path) -> None:
    """E4M3 rounds to 3 bits: an error of 2^-4 at most of each value in range, 2.7 % of the norm on these weights."""
    path = tmp_path / "fp8"
    shutil.copytree(bundled_model_dir(), path, ignore=shutil.ignore_patterns("layer-analysis"))
    meant: dict[str, Tensor] = quantize(path, [128, 128], "_scale_inv", within="language_model.layers")
    with ExitStack() as stack:
        held, original = open_tensors(path, stack), open_tensors(bundled_model_dir(), stack)
        for name, tensor in meant.items():
            weight = original[name].read().float()
            assert torch.equal(held[name].read(), tensor)
            assert float((tensor.float() - weight).norm() / weight.norm()) < 0.03
