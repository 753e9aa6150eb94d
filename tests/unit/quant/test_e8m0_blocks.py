"""FP8 blocks under power-of-two scales against a plain reference, and through everything that quantizes with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sweep.core.errors import SweepError
from sweep.core.paths import bundled_model_dir
from sweep.mixed_precision.text import to_modelopt
from sweep.plan.model import Model
from tests.exports import recipe_of
from tests.formats import format_of, group_format
from workers.data.batches import make_plan
from workers.data.samples import Sample
from workers.export.checkpoint import write_checkpoint
from workers.export.compressed import schemes_of
from workers.export.readback import check_export
from workers.export.weights import unpacked
from workers.model.loading import load
from workers.quant.applied import calibrated_model
from workers.quant.calibration import calibrated_linears, fake_quantized, quantized_inputs
from workers.quant.e8m0_blocks import scales_of
from workers.quant.linear import LinearQuant

WEIGHT: dict[str, Any] = {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128, "scale_bits": (8, 0)}}
INPUTS: dict[str, Any] = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: 128, "scale_bits": (8, 0)}}
SOURCE = bundled_model_dir()
LINEARS = Model(SOURCE).structure.linears


def reference(blocks: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Values and scales, in float64 and by the definition alone. Args: blocks: [..., elements of a block]."""
    amax = blocks.double().abs().amax(-1, keepdim=True)
    scale = torch.exp2(torch.ceil(torch.log2((amax / 448.0).clamp(min=least))))
    return (blocks.double() / scale).to(torch.float8_e4m3fn).double() * scale, scale


def tiles(weight: Tensor) -> Tensor:
    """[out, in] as [blocks, elements of a block]."""
    rows, columns = weight.shape[0] // 128, weight.shape[1] // 128
    return weight.reshape(rows, 128, columns, 128).transpose(1, 2).reshape(rows * columns, -1)


def families() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(256, 384, generator=generator)
    return {
        "random": normal,
        "wide": normal * torch.exp2(torch.randint(-40, 40, normal.shape, generator=generator).float()),
        "small": normal * 1e-6,
        "tiny": normal * 1e-30,
        "huge": normal * 1e30,
        "zero": torch.zeros_like(normal),
        "sparse": normal * (torch.rand(normal.shape, generator=generator) < 0.002),
        # the largest is 448 times a power of two: not one unit more
        "edge": torch.where(normal > 3, 448 * 2.0**-9, normal.clamp(-0.5, 0.5)),
        "powers": torch.exp2(torch.randint(-12, 12, normal.shape, generator=generator).float()),
    }


@pytest.fixture(scope="module")
def quant() -> LinearQuant:
    return calibrated_linears({"only": torch.ones(128, 384)}, [], format_of(WEIGHT, INPUTS))["only"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families())
def test_inputs_are_quantized_by_the_rule_to_the_bit(quant: LinearQuant, family: str, dtype: torch.dtype) -> None:
    """Groups of 128 of each token; the floor is the least power of two from 1e-10 up, as vLLM's kernel has it."""
    x = families()[family].to(dtype)
    expected, _ = reference(x.unflatten(-1, (-1, 128)), 1e-10)
    assert torch.equal(quantized_inputs(quant, x).double(), expected.flatten(-2))
    assert torch.equal(quantized_inputs(quant, x[:7])[None], quantized_inputs(quant, x[None, :7]))  # any shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families())
def test_weights_are_quantized_by_the_rule_and_quantizing_them_again_changes_nothing(
    family: str, dtype: torch.dtype
) -> None:
    """As vLLM does when it loads them. The floor is the least power of two from 1e-4 / 448 up."""
    weight = families()[family].to(dtype)
    found = calibrated_linears({"only": weight}, [], format_of(WEIGHT, None))["only"]
    once = fake_quantized(found, weight)
    expected, scale = reference(tiles(weight), 1e-4 / 448.0)
    assert torch.equal(tiles(once).double(), expected)
    assert found.weight_amax is not None
    assert torch.equal(scales_of(found.weight_amax, is_weight=True).flatten().double(), scale.flatten())
    assert (tiles(weight).double().abs() <= 448 * scale).all()
    again = fake_quantized(calibrated_linears({"only": once}, [], format_of(WEIGHT, None))["only"], once)
    assert torch.equal(again, once)
    # vLLM's own order: the clamp on the range, and the logarithm in float32
    theirs = torch.exp2(torch.ceil(torch.log2(tiles(once).abs().amax(-1, keepdim=True).clamp(1e-4) / 448.0)))
    assert torch.equal((tiles(once) * (1.0 / theirs)).to(torch.float8_e4m3fn).float() * theirs, tiles(once))


def test_what_is_not_finite_stays_so(quant: LinearQuant) -> None:
    """Else a model that a recipe breaks would look whole."""
    x = torch.ones(2, 384)
    x[0, 5], x[1, 200] = torch.inf, torch.nan
    found = quantized_inputs(quant, x).unflatten(-1, (3, 128))
    assert found.isnan().all(-1).tolist() == [[True, False, False], [False, True, False]]


@torch.no_grad()
def test_an_export_holds_powers_of_two_and_the_recipes_weights_and_damage_is_seen(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = load(SOURCE, dtype=torch.float32, device="cpu")
    texts = (SOURCE / "wordnet_glosses.txt").read_text().splitlines()[:16]
    ids = Model(SOURCE).tokenize("e8m0", texts)
    batches = list(make_plan([Sample(token_ids=np.array(one)) for one in ids], packed=True).batches("small"))
    recipe = recipe_of([group_format("fp8_e8m0", WEIGHT, INPUTS)])
    quants = calibrated_model(base, batches, recipe)
    write_checkpoint(SOURCE, tmp_path, recipe, quants, LINEARS)
    check_export(tmp_path, SOURCE, recipe, quants, LINEARS)
    file = tmp_path / "model.safetensors"
    tensors, (scheme,) = load_file(file), schemes_of(recipe).values()
    assert scheme.format == "float-quantized"
    for module, quant in quants.items():
        scale = tensors[f"{module}.weight_scale"]
        assert scale.dtype == torch.float32
        assert torch.equal(torch.exp2(scale.log2().round()), scale)
        state = {"weight": tensors[f"{module}.weight"], "weight_scale": scale}
        assert torch.equal(unpacked(state, scheme), fake_quantized(quant, base.get_parameter(f"{module}.weight")))
    key = f"{next(iter(quants))}.weight_scale"
    # the same weights, but not under a power of two: only the scale tells
    for off, message in (
        (tensors[key] * 1.0000005, "not of powers of two"),
        (tensors[key] * 2, "are not the recipe's"),
    ):
        save_file({**tensors, key: off}, file, metadata={"format": "pt"})
        with pytest.raises(SweepError, match=message):
            check_export(tmp_path, SOURCE, recipe, quants, LINEARS)


def test_a_modelopt_recipe_cannot_express_them() -> None:
    with pytest.raises(SweepError, match=r"q_proj: a ModelOpt recipe can't express power-of-two scales of FP8 blocks"):
        to_modelopt(recipe_of([group_format("fp8_e8m0", WEIGHT, INPUTS)]))
