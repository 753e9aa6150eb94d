"""Dynamic block formats on the CPU: small cases by hand, and outputs of ModelOpt's CUDA kernels.

`block_formats.npz` holds what ModelOpt 0.47 (torch 2.11, CUDA 13.0, Triton 3.6) computed on an H100 in fp32:
`input/<family>`, three rows each, `amax/<family>` of the 256x256 tensor that the rows come from, and
`<format>/<family>`. The rows are those where a correctly rounded division gives other values, if any do.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor

from sweep.core.errors import SweepError
from workers.quant.block_formats import BACKEND, _reciprocal, e4m3_scaled_cpu, mx_cpu, nvfp4_cpu, register

E2M1, E4M3, E8M0 = (2, 1), (4, 3), (8, 0)
GOLDEN = {
    name: torch.from_numpy(array) for name, array in np.load(Path(__file__).with_name("block_formats.npz")).items()
}
FAMILIES = [name.removeprefix("input/") for name in GOLDEN if name.startswith("input/")]
FORMATS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{f"nvfp4_{block}": lambda x, amax, block=block: nvfp4_cpu(x, amax, block) for block in (16, 32, 64, 128)},
    **{
        f"mx_e{e}m{m}": lambda x, _, bits=(e, m): mx_cpu(x, 32, bits)
        for e, m in ((4, 3), (5, 2), (3, 2), (2, 3), (2, 1))
    },
    "mx_int8": lambda x, _: mx_cpu(x, 32, 8),
    "mx_e2m1_16": lambda x, _: mx_cpu(x, 16, E2M1),
    "e4m3_s43_16": lambda x, amax: e4m3_scaled_cpu(x, amax, 16, E4M3),
}
REGISTERED = {"num_bits": E2M1, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E4M3}, "backend": BACKEND}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether all values agree to the bit, signs of zeros too; which of the NaNs one holds does not count."""
    both_nan = left.isnan() & right.isnan()
    return left.dtype == right.dtype and bool(
        (both_nan | (left.float().view(torch.int32) == right.float().view(torch.int32))).all()
    )


def padded(values: list[float], length: int) -> Tensor:
    return torch.tensor(values + [0.0] * (length - len(values)))


def quantizer_of(attributes: dict[str, Any]) -> TensorQuantizer:
    register()
    return TensorQuantizer(QuantizerAttributeConfig(**attributes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_equals_the_cuda_kernel_to_the_bit(name: str, family: str) -> None:
    assert same_bits(FORMATS[name](GOLDEN[f"input/{family}"], GOLDEN[f"amax/{family}"]), GOLDEN[f"{name}/{family}"])


def test_reciprocal_equals_the_gpu_for_every_mantissa() -> None:
    mantissas = torch.arange(1 << 23, dtype=torch.int32)
    ours = (_reciprocal((mantissas + (127 << 23)).view(torch.float32)) * 2**24).int()
    # of the H100's 2^23 results, as little-endian 32-bit integers
    assert (
        hashlib.sha256(ours.numpy().astype("<i4").tobytes()).hexdigest()
        == "6738fed66ac3938e70bbdd4bd049433a7daee9dca539705339d2223986bbe04c"
    )


def test_nvfp4_rounds_ties_to_even_in_units_of_the_block_scale() -> None:
    amax = torch.tensor(6.0 * 448.0)  # a tensor scale of 1; the block's scale is 48 / 6 = 8, which E4M3 has
    x = padded([48.0, -48.0, 2.0, 2.1, 6.0, 10.0, -14.0, 20.0, 28.0, 40.0, 41.0, -1e-3], 16)
    expected = padded([48.0, -48.0, 0.0, 4.0, 8.0, 8.0, -16.0, 16.0, 32.0, 32.0, 48.0], 16)
    assert torch.equal(nvfp4_cpu(x, amax, 16), expected)


def test_nvfp4_scale_is_rounded_to_e4m3() -> None:
    amax = torch.tensor(6.0 * 448.0)
    assert nvfp4_cpu(padded([61.0], 16), amax, 16)[0] == 60.0  # 61 / 6 = 10.17 becomes 10
    assert nvfp4_cpu(padded([64.0], 16), amax, 16)[0] == 66.0  # 64 / 6 = 10.67 becomes 11, and 64 / 11 = 5.8 becomes 6
    assert nvfp4_cpu(padded([1e30], 16), amax, 16)[0] == 6.0 * 448.0  # beyond the tensor's amax: saturates


def test_nvfp4_zeroes_a_block_whose_scale_is_under_1e_5() -> None:
    lone = torch.cat([padded([5e-5], 16), padded([1.0], 16)])  # 5e-5 / 6 = 8e-6
    assert torch.equal(nvfp4_cpu(lone, torch.tensor(1.0), 16).nonzero().flatten(), torch.tensor([16]))
    assert nvfp4_cpu(torch.full((16,), 1e-30), torch.tensor(1e-30), 16).count_nonzero() == 0


def test_nvfp4_blocks_have_the_length_that_is_asked_for() -> None:
    x = torch.cat([padded([48.0], 16), padded([1.0], 16)])
    amax = torch.tensor(6.0 * 448.0)
    assert nvfp4_cpu(x, amax, 16)[16] != 0.0
    assert nvfp4_cpu(x, amax, 32)[16] == 0.0  # 1 / 8 is nearer to 0 than to 0.5


@pytest.mark.parametrize(
    ("num_bits", "x", "expected"),
    [
        (
            E4M3,
            [448.0, 433.0, -17.0, 2.0**-9, 2.0**-10, 449.0 / 1024],
            [448.0, 448.0, -16.0, 2.0**-9, 0.0, 0.4375],
        ),  # scale 1
        (E4M3, [449.0, 17.0], [448.0, 16.0]),  # 449 does not fit: scale 2, steps of 32 and 2
        ((5, 2), [57344.0, 9.0, 11.0], [57344.0, 8.0, 12.0]),
        ((3, 2), [28.0, 27.0, 26.0, 0.03125, 0.04], [28.0, 28.0, 24.0, 0.0, 0.0625]),
        ((2, 3), [7.5, -7.25, 0.0625, 0.1875], [7.5, -7.0, 0.0, 0.25]),
        (E2M1, [6.0, 5.0, 3.5, 2.5, 1.75, 0.75, -0.25], [6.0, 4.0, 4.0, 2.0, 2.0, 1.0, 0.0]),
        (E2M1, [7.0, 1.0, -0.5], [8.0, 1.0, 0.0]),  # scale 2: 3.5 is a tie and becomes 4
        (8, [127.0, 0.5, 1.5, -2.5, 0.4], [127.0, 0.0, 2.0, -2.0, 0.0]),
        (8, [128.0, 3.0], [128.0, 4.0]),  # scale 2
    ],
)
def test_mx_scale_is_the_least_power_of_two_that_fits(num_bits: Any, x: list[float], expected: list[float]) -> None:
    for power in (1.0, 2.0**40, 2.0**-40):
        assert torch.equal(mx_cpu(power * padded(x, 32), 32, num_bits), power * padded(expected, 32))


def test_mx_takes_subnormals_for_zero() -> None:
    assert mx_cpu(padded([1e-38, -1e-45], 32), 32, 8).count_nonzero() == 0


def test_e4m3_scales_of_e4m3_elements() -> None:
    amax = torch.tensor(
        448.0 * 448.0
    )  # a tensor scale of 1; the block's is 896 / 448 = 2, but for 1e-7 of approximate division
    found = e4m3_scaled_cpu(padded([896.0, 33.0, -39.0], 16), amax, 16, E4M3)
    torch.testing.assert_close(found, padded([896.0, 32.0, -40.0], 16), rtol=2e-7, atol=0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zero(name: str) -> None:
    assert FORMATS[name](torch.zeros(2, 128), torch.tensor(0.0)).count_nonzero() == 0


@pytest.mark.parametrize("name", FORMATS)
def test_negative_is_the_mirror_image(name: str) -> None:
    x = GOLDEN["input/random"]
    assert torch.equal(FORMATS[name](-x, x.abs().amax()), -FORMATS[name](x, x.abs().amax()))


@pytest.mark.parametrize("name", FORMATS)
def test_a_last_block_that_is_not_full_counts_as_padded_with_zeros(name: str) -> None:
    x, amax = GOLDEN["input/random"][:, :136], GOLDEN["amax/random"]
    assert same_bits(FORMATS[name](x, amax), FORMATS[name](torch.nn.functional.pad(x, (0, 120)), amax)[:, :136])


@pytest.mark.parametrize("name", FORMATS)
def test_bf16_is_quantized_in_fp32_and_rounded_once(name: str) -> None:
    x, amax = GOLDEN["input/random"].bfloat16().view(3, 2, 128), GOLDEN["amax/random"].bfloat16()
    assert same_bits(FORMATS[name](x, amax), FORMATS[name](x.float(), amax.float()).bfloat16())


def test_tensor_quantizer_calls_the_backend_with_the_recipes_block_length() -> None:
    x = GOLDEN["input/random"]
    quantizer = quantizer_of(REGISTERED)
    quantizer.amax = torch.tensor(5.0)
    assert same_bits(quantizer(x), nvfp4_cpu(x, torch.tensor(5.0), 32))
    mx = quantizer_of(REGISTERED | {"num_bits": E4M3, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": E8M0}})
    assert same_bits(mx(x), mx_cpu(x, 32, E4M3))
    both_e4m3 = quantizer_of(
        REGISTERED | {"num_bits": E4M3, "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": E4M3}}
    )
    both_e4m3.amax = torch.tensor(5.0)
    assert same_bits(both_e4m3(x), e4m3_scaled_cpu(x, torch.tensor(5.0), 16, E4M3))


def test_gradient_passes_straight_through() -> None:
    x = GOLDEN["input/random"].clone().requires_grad_()
    quantizer_of(REGISTERED)(x).backward(torch.full_like(x, 3.0))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


def test_registering_again_changes_nothing() -> None:
    register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ModelOpt warns when a backend is overwritten
        register()


@pytest.mark.parametrize(
    ("num_bits", "scale_bits", "block", "message"),
    [
        (E2M1, E4M3, 48, "powers of two"),
        (E4M3, E8M0, 64, "8, 16 or 32"),
        (E4M3, E4M3, 128, "8, 16 or 32"),
        ((1, 2), E8M0, 32, "Choose one of"),
    ],
)
def test_what_no_kernel_takes_is_refused(num_bits: Any, scale_bits: Any, block: int, message: str) -> None:
    quantizer = quantizer_of(
        REGISTERED | {"num_bits": num_bits, "block_sizes": {-1: block, "type": "dynamic", "scale_bits": scale_bits}}
    )
    with pytest.raises(SweepError, match=message):
        quantizer(torch.ones(1, 384))
