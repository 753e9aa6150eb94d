"""Tensors of a checkpoint as its model has them: FP8 by hand arithmetic, and shapes against the configuration."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.plan.model import Model
from tests.fp8 import quantize
from tests.models import EXPERTS, random_model, save_checkpoint
from workers.model import loading
from workers.model.tensors import dequantized, open_tensors

E4M3 = torch.float8_e4m3fn
NAME = "model.layers.1.mlp.up_proj.weight"  # [256, 128]


def read(path: Path) -> dict[str, Tensor]:
    with ExitStack() as stack:
        return {name: held.read() for name, held in open_tensors(path, stack).items()}


def test_a_block_at_the_edge_is_cut() -> None:
    codes = torch.ones(3, 5).to(E4M3)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    expected = [[1.0, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert dequantized(codes, scale, (2, 2)).tolist() == expected
    stacked = dequantized(codes.expand(2, 3, 5), torch.stack([scale, 10 * scale]), (2, 2))  # experts
    assert stacked[1].tolist() == (10 * torch.tensor(expected)).tolist()


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_a_scale_of_one_number_is_every_codes(scale: Tensor) -> None:
    codes = torch.tensor([[1.0, -448.0], [0.001953125, 3.5]]).to(E4M3)
    for block in (None, (128, 128)):
        assert dequantized(codes, scale, block).tolist() == [[0.5, -224.0], [0.0009765625, 1.75]]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_scale_a_row(shape: tuple[int, ...]) -> None:
    codes = torch.ones(2, 3).to(E4M3)
    assert dequantized(codes, torch.tensor([2.0, 3.0]).reshape(shape), None).tolist() == [[2.0] * 3, [3.0] * 3]


@pytest.mark.parametrize("block", [[128, 128], [64, 96], None])
@pytest.mark.parametrize("ending", ["_scale_inv", "_scale"])
def test_the_model_of_an_fp8_checkpoint_has_the_dequantized_weights(
    block: list[int] | None, ending: str, tmp_path: Path
) -> None:
    """Bit for bit those of a checkpoint that holds these products in bfloat16; nothing else is a tensor of its own."""
    path = save_checkpoint(tmp_path / "fp8", "qwen3")
    plain = load_file(path / "model.safetensors")
    meant = quantize(path, block, ending)
    held = read(path)
    assert held.keys() == plain.keys()
    for name, tensor in held.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, meant.get(name, plain[name])), name
    assert 0 < (held[NAME].float() - plain[NAME].float()).norm() < 0.05 * plain[NAME].float().norm()
    loaded = loading.load(path, dtype=torch.float32, device="cpu")
    assert {type(module).__name__ for name, module in loaded.named_modules() if name.endswith("up_proj")} == {"Linear"}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, meant.get(name, plain[name]).float()), name
    found = Model(path).structure
    assert (found.missing, found.mismatched, found.unused) == ((), (), ())
    assert found.from_fp8 == sum(tensor.numel() for tensor in meant.values())
    assert "FP8, dequantized" in (Model(path).source_note or "")


def test_scales_of_inputs_and_caches_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "fp8", "qwen3")
    names = read(path).keys()
    quantize(path, None, "_scale")
    file = path / "model.safetensors"
    module, attention = NAME.removesuffix(".weight"), "model.layers.1.self_attn"
    extra = {f"{module}.{name}": torch.tensor(0.25) for name in ("input_scale", "k_scale", "v_scale")}
    extra |= {f"{attention}.{name}": torch.tensor(0.25) for name in ("k_scale", "v_scale", "attn.q_scale")}
    extra["model.layers.7.mlp.up_proj.weight_scale"] = torch.tensor(0.25)  # of a weight that is not there
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    assert read(path).keys() == names


def test_a_scale_may_lie_in_another_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "fp8", "qwen3")
    meant = quantize(path, [128, 128], "_scale_inv")
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in weights.items():
        shards["b.safetensors" if name.endswith("_scale_inv") else "a.safetensors"][name] = tensor
    for shard, tensors in shards.items():
        save_file(tensors, path / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(read(path)[NAME], meant[NAME])


def test_scales_that_are_powers_of_two_in_eight_bits(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "fp8", "qwen3")
    quantize(path, [128, 128], "_scale_inv", round_up=True)
    held, file = read(path)[NAME], path / "model.safetensors"
    weights = load_file(file)
    save_file(
        {name: each.to(torch.float8_e8m0fnu) if name.endswith("_inv") else each for name, each in weights.items()},
        file,
        metadata={"format": "pt"},
    )
    assert torch.equal(read(path)[NAME], held)


def without_scale(weights: dict[str, Tensor]) -> None:
    del weights[f"{NAME}_scale_inv"]


def other_grid(weights: dict[str, Tensor]) -> None:
    weights[f"{NAME}_scale_inv"] = torch.ones(3, 1)


def cut_grid(weights: dict[str, Tensor]) -> None:
    weights[f"{NAME}_scale_inv"] = weights[f"{NAME}_scale_inv"][:1]


def plain_beside_scale(weights: dict[str, Tensor]) -> None:
    weights[NAME] = weights[NAME].bfloat16()


def bytes_for_scales(weights: dict[str, Tensor]) -> None:
    weights[f"{NAME}_scale_inv"] = torch.ones(2, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_scale, f"{NAME} in FP8 without a scale"),
        (other_grid, r"sizes \[3, 1\] in float32, which fits no layout of .* \[256, 128\]"),
        (cut_grid, r"sizes \[1, 1\] in float32, which fits no layout of .* \[256, 128\]"),
        (plain_beside_scale, f"holds a scale, {NAME}_scale_inv, of a weight in bfloat16: whether"),
        (bytes_for_scales, rf"codes that are not E4M3, by {NAME}_scale_inv is U8"),
    ],
)
def test_fp8_whose_values_are_not_known_is_refused(
    change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "fp8", "qwen3")
    quantize(path, [128, 128], "_scale_inv")
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SweepError, match=said) as caught:
        _ = Model(path).structure
    assert "model.path=DIR" in str(caught.value)


def cut(weights: dict[str, Tensor]) -> None:
    weights[NAME] = weights[NAME][:, :-8].contiguous()


def drop(weights: dict[str, Tensor]) -> None:
    del weights[NAME], weights["model.norm.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, rf"do not fit: {NAME} \[256, 120\], not \[256, 128\], which config.json asks for. Download both again"),
        (drop, f"lacks 2 weights, the first '{NAME}': they would be random"),
    ],
)
def test_headers_are_compared_with_the_configuration(
    change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SweepError, match=said):
        _ = Model(path).structure


def test_tensors_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    weights = load_file(path / "model.safetensors")
    extra = {f"mtp.layers.0.{name}.weight": torch.ones(4, 4) for name in "abcd"}
    save_file(weights | extra, path / "model.safetensors", metadata={"format": "pt"})
    model = Model(path)
    assert model.structure.unused == tuple(sorted(extra))
    (note,) = model.notes([])
    assert "holds 4 tensors that transformers' model does not have (mtp.layers.0.a.weight, " in note
    assert "and 1 more" in note


def test_a_structure_is_found_anew_when_a_weight_file_changes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    assert Model(path).structure.unused == ()
    weights: dict[str, Any] = load_file(path / "model.safetensors")
    save_file(weights | {"extra.weight": torch.ones(2)}, path / "model.safetensors", metadata={"format": "pt"})
    assert Model(path).structure.unused == ("extra.weight",)


def test_names_on_disk_are_found_through_transformers_mapping(tmp_path: Path) -> None:
    """Llama without its prefix, as a base model is saved; a tied head has no tensor of its own."""
    path = tmp_path / "base"
    random_model("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(stripped, path / "model.safetensors", metadata={"format": "pt"})
    model = Model(path)
    on_disk = model.structure.on_disk
    assert on_disk["model.layers.0.mlp.up_proj"] == "layers.0.mlp.up_proj"
    assert model.linears.keys() - on_disk.keys() == {"lm_head"}
    (note,) = model.notes([model.groups["lm_head"]])
    assert "lm_head: scored, but exports must leave it in 16 bits" in note


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"  # [32, 128], of four


def without_an_experts_matrix(weights: dict[str, Tensor]) -> None:
    del weights[EXPERT]


def with_a_smaller_expert(weights: dict[str, Tensor]) -> None:
    weights[EXPERT] = weights[EXPERT][:-8].contiguous()


@pytest.mark.parametrize(
    ("change", "said"),
    [(without_an_experts_matrix, "3 of [32, 128]"), (with_a_smaller_expert, "3 of [32, 128], 1 of [24, 128]")],
)
def test_experts_of_which_one_does_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3_moe", **EXPERTS)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SweepError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is made of equally many") as caught:
        _ = Model(path).structure
    assert f"model.layers.*.mlp.experts.*.up_proj.weight: {said}" in str(caught.value)
    assert "model.layers.*.mlp.experts.*.gate_proj.weight: 4 of [32, 128]" in str(caught.value)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_may_lie_in_the_checkpoint_too(equal: bool, tmp_path: Path) -> None:
    """As transformers loads it: one parameter if both have the same values, else two, which is said."""
    path = save_checkpoint(tmp_path / "model", "qwen3", tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * (1 if equal else 2)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    found, loaded = Model(path).structure, loading.load(path, dtype=torch.float32, device="cpu")
    assert found.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert found.elements["lm_head"] == (0 if equal else 512 * 128)
    assert ("lm_head" in found.on_disk) is not equal
    notes = [note for note in Model(path).notes([]) if "ties lm_head.weight to other" in note]
    assert len(notes) == (0 if equal else 1)


def test_a_parameter_under_two_names_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    weights = load_file(path / "model.safetensors")
    weights[NAME.removeprefix("model.")] = 2 * weights[NAME]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SweepError, match=f"holds {NAME} twice, as .* Remove one") as caught:
        _ = Model(path).structure
    assert f" {NAME.removeprefix('model.')}" in str(caught.value)


def test_weights_that_no_model_builds_are_no_part_of_its_share_in_fp8(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model", "qwen3")
    quantize(path, [128, 128], "_scale_inv")
    before, weights = Model(path).structure, load_file(path / "model.safetensors")
    for ending in ("", "_scale_inv"):
        weights[f"{NAME.replace('.1.', '.2.')}{ending}"] = weights[f"{NAME}{ending}"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    found = Model(path).structure
    assert (found.from_fp8, found.unused) == (before.from_fp8, (NAME.replace(".1.", ".2."),))
