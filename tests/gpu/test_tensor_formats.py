"""Our kernel for integers and E4M3 against ModelOpt's CUDA kernels, bit for bit."""

from typing import Any

import pytest
import torch

from sweep.formats.quantizer import Quantizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

FORMATS: dict[str, dict[str, Any]] = {
    f"{name}_{where}": {"num_bits": bits, **ranges}
    for name, bits in (("int8", 8), ("int4", 4), ("fp8", (4, 3)))
    for where, ranges in (
        ("tensor", {"axis": None}),
        ("out_channel", {"axis": 0}),
        ("in_channel", {"axis": 1}),
        ("blocks64", {"block_sizes": {-1: 64}}),
        ("blocks128", {"block_sizes": {-1: 128}}),
        ("token", {"type": "dynamic", "block_sizes": {-1: None}}),
    )
}
FAMILIES = ("normal", "ties", "wide", "tiny", "huge", "zeros", "negative")


def values(family: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(1024, 1280, generator=generator)
    made = {
        "normal": normal,
        "ties": torch.randint(-32, 33, normal.shape, generator=generator) / 4,
        "wide": normal * torch.exp2(torch.randint(-30, 30, normal.shape, generator=generator).float()),
        "tiny": normal * 1e-9,
        "huge": normal * 1e30,
        "zeros": normal * (torch.rand(1024, 1, generator=generator) < 0.5),
        "negative": -normal.abs(),
    }
    return made[family].to(dtype).cuda()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_those_of_modelopts_kernels(name: str, family: str) -> None:
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    from workers.quant.modelopt import calibrate
    from workers.quant.tensor_formats import BACKEND, supports

    assert supports(Quantizer(FORMATS[name]))
    for dtype in (torch.float32, torch.bfloat16):
        given = values(family, dtype)
        stock, ours = (
            TensorQuantizer(QuantizerAttributeConfig(**FORMATS[name], **own)) for own in ({}, {"backend": BACKEND})
        )
        if FORMATS[name].get("type") != "dynamic":
            calibrate(stock, [given.float()])
            calibrate(ours, [given.float()])
        expected, found = stock(given.float()), ours(given)
        assert found.dtype == torch.float32
        unequal = (expected.view(torch.int32) != found.view(torch.int32)) & ~((expected == 0) & (found == 0))
        assert not unequal.any(), (
            f"{int(unequal.sum())} of {unequal.numel()} differ, e.g. {expected[unequal][:3]} and {found[unequal][:3]}"
        )
