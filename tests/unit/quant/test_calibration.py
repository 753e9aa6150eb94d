"""One layer group calibrated alone, against stock mtq.quantize on linears in a row, each fed with the output before."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
from modelopt.torch.export.quant_utils import preprocess_linear_fusion
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from sweep.core.pairs import Algorithm
from tests.formats import format_of
from workers.quant.block_formats import BACKEND
from workers.quant.calibration import calibrated_linears, fake_quantized, quantized_inputs, smoothed_weight
from workers.quant.linear import LinearQuant, rounded_range

PER_TOKEN: dict[str, Any] = {"type": "dynamic", "block_sizes": {-1: None}}
INT4: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
INT8, INT8_CHANNEL = {"num_bits": 8, "axis": None}, {"num_bits": 8, "axis": 0}
FP8: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
FP8_BLOCKS: dict[str, Any] = {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}}
NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
MXFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}
MXFP8: dict[str, Any] = MXFP4 | {"num_bits": (4, 3)}

RECIPES: Sequence[tuple[Algorithm, dict[str, Any], dict[str, Any] | None]] = [
    ("max", FP8_BLOCKS, None),
    ("max", MXFP8, MXFP8),
    ("max", MXFP4, None),
    ("max", MXFP4, MXFP8),
    ("max", NVFP4, NVFP4),
    ("max", FP8, FP8 | PER_TOKEN),
    ("mse", INT4, None),
    ("mse", FP8_BLOCKS, FP8 | PER_TOKEN),
    ("mse", FP8, FP8),
    ("awq_lite", INT4, None),
    ("awq_lite", INT4, FP8),
    ("awq_lite", NVFP4, NVFP4),
    ("smoothquant", INT8_CHANNEL, INT8),
]


def x_batches(n_inputs: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    outliers = torch.ones(n_inputs)
    outliers[::31] = 20.0
    return [torch.randn(rows, n_inputs, generator=generator) * outliers for rows in (3, 40, 17)]


def weights(*n_outputs: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {f"layer.{i}": torch.randn(n, 256, generator=generator) * 0.1 * (i + 1) for i, n in enumerate(n_outputs)}


def stock(
    linears: nn.Module,
    algorithm: str,
    weight: Mapping[str, Any],
    inputs: Mapping[str, Any] | None,
    batches: Sequence[Tensor],
) -> Any:
    """The linears quantized by ModelOpt.

    Its dynamic blocks have no kernel for a CPU: they take ours, which test_block_formats compares with a GPU's output.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, cfg in (("*weight_quantizer", weight), ("*input_quantizer", inputs)):
        if cfg is not None:
            dynamic_blocks = (cfg.get("block_sizes") or {}).get("type") == "dynamic"
            entries.append(
                {"quantizer_name": name, "cfg": {**cfg, "backend": BACKEND} if dynamic_blocks else dict(cfg)}
            )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return mtq.quantize(
            linears, {"quant_cfg": entries, "algorithm": algorithm}, lambda network: [network(x) for x in batches]
        )


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return made


class Fork(nn.Module):
    """Linears that read one tensor."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [one(x) for one in self.linears]


def same(quant: LinearQuant, theirs: Any, weight: Tensor, x: Tensor) -> None:
    ours = torch.nn.functional.linear(quantized_inputs(quant, x), fake_quantized(quant, weight))
    torch.testing.assert_close(ours, theirs(x), rtol=1e-5, atol=1e-5)
    for own, stock_amax in ((quant.weight_amax, theirs.weight_quantizer), (quant.input_amax, theirs.input_quantizer)):
        if own is not None:
            torch.testing.assert_close(own, stock_amax.amax, rtol=1e-5, atol=0)
    assert (quant.pre_quant_scale is None) == (theirs.input_quantizer.pre_quant_scale is None)
    if quant.pre_quant_scale is not None:
        torch.testing.assert_close(quant.pre_quant_scale, theirs.input_quantizer.pre_quant_scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("algorithm", "weight", "inputs"), RECIPES)
def test_a_linear_calibrated_alone_is_the_one_that_modelopt_gives_behind_another(
    algorithm: Algorithm, weight: dict[str, Any], inputs: dict[str, Any] | None
) -> None:
    first, second = (linear(w) for w in weights(256, 384).values())
    batches = x_batches()
    with torch.no_grad():
        read = [batches, [first(x) for x in batches]]
    own = [first.weight.clone(), second.weight.clone()]
    model = stock(nn.Sequential(first, second), algorithm, weight, inputs, batches)
    for place in range(2):
        found = calibrated_linears({"only": own[place]}, read[place], format_of(weight, inputs, algorithm))["only"]
        same(found, model[place], own[place], read[place][1])


@pytest.mark.parametrize(
    ("algorithm", "weight", "inputs"),
    [
        ("max", FP8, FP8),
        ("max", INT8_CHANNEL, INT8),
        ("mse", FP8, FP8),
        ("awq_lite", INT4, None),
        ("awq_lite", NVFP4, NVFP4),
        ("smoothquant", INT8_CHANNEL, INT8),
    ],
)
def test_fused_scales_are_those_of_modelopts_export(
    algorithm: Algorithm, weight: dict[str, Any], inputs: dict[str, Any] | None
) -> None:
    own, batches = weights(256, 128, 128), x_batches()
    model = stock(Fork([linear(w) for w in own.values()]), algorithm, weight, inputs, batches)
    private = calibrated_linears(own, batches, format_of(weight, inputs, algorithm, "private"))
    for (name, quant), theirs in zip(private.items(), model.linears, strict=True):
        same(quant, theirs, own[name], batches[0])
    with torch.no_grad():
        preprocess_linear_fusion(list(model.linears))
    fused = calibrated_linears(own, batches, format_of(weight, inputs, algorithm, "fused"))
    for (name, quant), theirs in zip(fused.items(), model.linears, strict=True):
        if weight is INT4:  # ModelOpt's export stores its scales in the model's dtype, after codes were chosen
            theirs.weight_quantizer.amax = (theirs.weight_quantizer.amax / 7).bfloat16().float() * 7
        same(quant, theirs, own[name], batches[0])


@pytest.mark.parametrize("num_bits", [4, 8])
def test_a_rounded_range_gives_the_nearest_bfloat16_scale_back_to_the_bit(num_bits: int) -> None:
    """In the division that exports take; in ModelOpt's product with 1 / (largest / range) to one unit in float32."""
    generator, largest = torch.Generator().manual_seed(0), 2 ** (num_bits - 1) - 1
    amax = torch.exp2(torch.rand(1 << 20, generator=generator) * 40 - 30)
    amax = torch.cat([amax, torch.zeros(1), torch.tensor([1e-30, 448.0, 2.0**-133])])
    rounded = rounded_range(amax, num_bits)
    scale = (amax.double() / largest).float().bfloat16().float()
    assert torch.equal(rounded / largest, scale)
    assert torch.equal(rounded.double(), scale.double() * largest)  # nothing is lost in the product
    of_modelopt = 1 / (largest / rounded[amax > 1e-20])
    torch.testing.assert_close(of_modelopt, scale[amax > 1e-20], rtol=2**-23, atol=0)
    normal = amax > 1e-20
    assert float(((rounded - amax) / amax)[normal].abs().max()) <= 2**-8 * (1 + 2**-20)


@pytest.mark.parametrize(
    ("algorithm", "weight"),
    [("max", INT4), ("mse", INT4), ("awq_lite", INT4), ("max", INT8_CHANNEL), ("mse", INT8_CHANNEL)],
)
def test_scales_of_packed_integers_are_rounded_before_codes_are_chosen(
    algorithm: Algorithm, weight: dict[str, Any]
) -> None:
    """A reader that rounds scales to bfloat16 as it loads them changes nothing."""
    own, batches, largest = weights(256, 128), x_batches(), 2 ** (weight["num_bits"] - 1) - 1
    for name, quant in calibrated_linears(own, batches, format_of(weight, None, algorithm, "fused")).items():
        assert quant.weight_amax is not None
        scale = quant.weight_amax / largest
        assert torch.equal(scale, scale.bfloat16().float())
        blocks = smoothed_weight(quant, own[name]).reshape(scale.numel(), -1)
        held = scale.reshape(-1, 1).bfloat16().float()
        codes = (blocks / held).round().clamp(-largest - 1, largest)
        served, ours = codes * held, fake_quantized(quant, own[name]).reshape(blocks.shape)
        off = (ours - served).abs()
        assert float((off > 1e-6 * served.abs()).float().mean()) < 1e-5  # ties that x * (1 / s) and x / s part
        assert float((off / held).max()) < 1.001
    private = calibrated_linears(own, batches, format_of(weight, None, algorithm, "private"))
    for quant in private.values():
        assert quant.weight_amax is not None
        assert not quant.rounds_scales
        scale = quant.weight_amax / largest
        assert not torch.equal(scale, scale.bfloat16().float())


def test_blocks_of_128_inputs_get_a_range_each_token_whatever_the_number_of_rows() -> None:
    """By hand: E4M3 with the block's largest magnitude at 448.

    ModelOpt's own quantizer takes tensors of one shape only.
    """
    inputs: dict[str, Any] = {"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: 128}}
    quant = calibrated_linears(weights(128), [], format_of(FP8_BLOCKS, inputs))["layer.0"]
    assert quant.input_amax is None
    for x in x_batches():
        blocks = x.view(len(x), 2, 128)
        scale = 448.0 / blocks.abs().amax(dim=-1, keepdim=True)
        expected = ((blocks * scale).to(torch.float8_e4m3fn).float() / scale).view_as(x)
        torch.testing.assert_close(quantized_inputs(quant, x), expected, rtol=1e-6, atol=0)
        first_time = TensorQuantizer(QuantizerAttributeConfig(**inputs))
        assert torch.equal(quantized_inputs(quant, x), first_time(x))
