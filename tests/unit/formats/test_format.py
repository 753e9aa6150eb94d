"""Formats and quantizers are equal by what they compute, however they are written."""

from typing import Any

import pytest

from sweep.core.pairs import Algorithm, Scales
from sweep.formats.quantizer import ATTRIBUTE_DEFAULTS, Quantizer
from tests.formats import Fields, format_of, group_format

INT8: dict[str, Any] = {"num_bits": 8, "axis": None}
INT8_CHANNEL: dict[str, Any] = {"num_bits": 8, "axis": 0}
INT4: dict[str, Any] = {"num_bits": 4, "block_sizes": {-1: 128}}
FP8: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
NVFP4: dict[str, Any] = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        (INT8_CHANNEL, {"axis": 0, "num_bits": 8}),  # another order
        (INT8, {}),  # defaults left out
        (NVFP4, {**ATTRIBUTE_DEFAULTS, **NVFP4}),  # and spelled out
        (INT4, {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}),
        (NVFP4, {**NVFP4, "block_sizes": {"scale_bits": (4, 3), "type": "dynamic", -1: 16}}),
        (NVFP4, {**NVFP4, "effective_bits": 4.5}),  # a cost hint changes no number
    ],
)
def test_what_changes_no_number_changes_no_id(fields: Fields, same: Fields) -> None:
    assert Quantizer(fields).id == Quantizer(same).id
    assert Quantizer(fields).differing(Quantizer(same)) is None
    assert format_of(fields, fields).id == format_of(same, same).id


def test_lists_stand_for_tuples() -> None:
    lists = {"num_bits": [2, 1], "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": [4, 3]}}
    assert Quantizer.read(lists) == Quantizer(NVFP4)
    assert Quantizer.read(lists).id == Quantizer(lists).id == Quantizer(NVFP4).id  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "other", "attribute"),
    [
        (INT8, {**INT8, "num_bits": 4}, "num_bits"),
        (INT8, FP8, "num_bits"),
        (FP8, {**FP8, "num_bits": (5, 2)}, "num_bits"),
        (INT8, INT8_CHANNEL, "axis"),
        (INT8_CHANNEL, {**INT8, "axis": 1}, "axis"),
        (INT8, {**INT8, "type": "dynamic"}, "type"),
        (INT8, {**INT8, "narrow_range": True}, "narrow_range"),
        (INT4, {**INT4, "block_sizes": {-1: 64}}, "block_sizes"),
        (INT4, {**INT4, "block_sizes": {-2: 128}}, "block_sizes"),
        (INT4, {**INT4, "block_sizes": {-1: None}}, "block_sizes"),
        (INT4, {**INT4, "block_sizes": {"-1": 128}}, "block_sizes"),  # an axis is a number
        (NVFP4, {**NVFP4, "block_sizes": {**NVFP4["block_sizes"], "scale_bits": (8, 0)}}, "block_sizes"),
        (NVFP4, {**NVFP4, "block_sizes": {-1: 16, "scale_bits": (4, 3)}}, "block_sizes"),
    ],
)
def test_what_changes_a_number_changes_the_id_and_is_named(fields: Fields, other: Fields, attribute: str) -> None:
    assert Quantizer(fields).id != Quantizer(other).id
    assert Quantizer(fields).differing(Quantizer(other)) == attribute
    assert format_of(fields, None).id != format_of(other, None).id
    assert format_of(None, fields).id != format_of(None, other).id
    assert format_of(fields, None).weight_id != format_of(other, None).weight_id
    assert format_of(None, fields).input_id != format_of(None, other).input_id


def test_a_quantizer_of_weights_is_none_of_inputs() -> None:
    formats = [format_of(INT8, None), format_of(None, INT8), format_of(INT8, INT8), format_of(None, None)]
    assert len({each.id for each in formats}) == len(formats)


@pytest.mark.parametrize(
    ("weight", "inputs", "algorithm"),
    [(INT4, None, "mse"), (INT4, None, "awq_lite"), (INT8_CHANNEL, INT8, "smoothquant")],
)
def test_an_algorithm_is_another_format(weight: Fields, inputs: Fields | None, algorithm: Algorithm) -> None:
    plain, calibrated = format_of(weight, inputs), format_of(weight, inputs, algorithm)
    assert plain.id != calibrated.id
    assert plain.weight_id != calibrated.weight_id
    assert plain.input_id == calibrated.input_id


@pytest.mark.parametrize(
    ("weight", "inputs", "algorithm", "differ"),
    [
        (FP8, FP8, "max", True),
        (NVFP4, NVFP4, "max", True),  # its second scale covers the tensor
        (INT8_CHANNEL, INT8, "max", False),
        (INT8_CHANNEL, INT8, "mse", False),
        (None, INT8, "max", False),  # linears of a group read one tensor
        (INT4, None, "awq_lite", True),  # a pre-quantization scale
        (INT8_CHANNEL, INT8, "smoothquant", True),
    ],
)
def test_whose_scales_they_are_counts_only_where_it_makes_a_difference(
    weight: Fields | None, inputs: Fields | None, algorithm: Algorithm, differ: bool
) -> None:
    scales: tuple[Scales, Scales] = ("private", "fused")
    private, fused = (format_of(weight, inputs, algorithm, each) for each in scales)
    assert (private.is_fused, fused.is_fused) == (False, differ)
    assert (private.id != fused.id) == (private.weight_id != fused.weight_id) == differ
    assert private.input_id == fused.input_id


MX_INT8: Fields = {"num_bits": 8, "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}


@pytest.mark.parametrize(
    ("weight", "inputs", "rounds"),
    [
        (INT4, None, True),
        (INT8_CHANNEL, None, True),
        ({"num_bits": 8, "axis": None}, None, True),
        (INT4, INT8, True),  # CompressedTensorsW4A8Int, WNA8Int
        (INT4, FP8, True),  # CompressedTensorsW4A8Fp8
        (INT8_CHANNEL, INT8, False),  # CompressedTensorsW8A8Int8: a float32 parameter
        (FP8, None, False),
        (NVFP4, None, False),
        (MX_INT8, None, False),
        (None, INT8, False),
    ],
)
def test_scales_are_rounded_where_runtimes_hold_them_in_the_models_dtype(
    weight: Fields | None, inputs: Fields | None, rounds: bool
) -> None:
    assert format_of(weight, inputs, "max", "fused").rounds_scales == rounds
    assert not format_of(weight, inputs, "max", "private").rounds_scales
    weight_ids = {format_of(weight, inputs, "max", scales).weight_id for scales in ("private", "fused")}
    assert len(weight_ids) == (2 if rounds or (weight is not None and format_of(weight, inputs).shares_ranges) else 1)


def test_names_have_no_part_in_the_identity() -> None:
    assert group_format("a", INT4, None).id == group_format("b", INT4, None).id == format_of(INT4, None).id
    assert group_format("a", INT4, None).label == "a/default"
    assert group_format("a", INT4, None, "awq_lite").label == "a/default/awq_lite"
