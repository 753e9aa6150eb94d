"""A quantizer as ModelOpt reads it: its attributes, their defaults and meaning, and whether ModelOpt can run them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import msgspec

from sweep.core.errors import InvalidRecipe

# Values of ModelOpt's QuantizerAttributeConfig: `num_bits` is a number or exponent and mantissa bits, `block_sizes` has
# the length of a block by axis, and `type` and `scale_bits` beside them.
NumBits = int | tuple[int, int]
BlockValue = bool | int | str | tuple[int, ...] | None
Attribute = bool | int | float | str | tuple[int, ...] | Mapping[int | str, BlockValue] | None
Attributes = Mapping[str, Attribute]
Canonical = bool | int | float | str | list["Canonical"] | None  # plain JSON without mappings

# ModelOpt 0.47, QuantizerAttributeConfig; a test compares. `effective_bits` is a cost hint and changes no number.
ATTRIBUTE_DEFAULTS: Final[Attributes] = {
    "num_bits": 8,
    "axis": None,
    "fake_quant": True,
    "unsigned": False,
    "narrow_range": False,
    "learn_amax": False,
    "type": "static",
    "block_sizes": None,
    "bias": None,
    "trt_high_precision_dtype": "Float",
    "calibrator": "max",
    "rotate": False,
    "pass_through_bwd": True,
    "backend": None,
    "backend_extra_args": None,
    "use_constant_amax": False,
    "constant_amax": None,
}
COST_HINT: Final = "effective_bits"
UNQUANTIZED_BITS: Final = 16.0  # of a weight that is left as it is
_FP4, _FP8 = (2, 1), (4, 3)
_E8M0: Final = (8, 0)
KERNEL_BLOCKS: Final = (8, 16, 32)  # of the MX extension, which quantizes all dynamic blocks but NVFP4
_MX_INTEGER_BITS: Final = 8
_DEFAULT_SCALE_BITS = 16  # a block's scale where the format names none


@dataclass(frozen=True)
class Quantizer:
    """The attributes of one quantizer of a linear, and their meaning."""

    attributes: Attributes  # fields of ModelOpt's QuantizerAttributeConfig as given, in that order

    @classmethod
    def read(cls, node: object) -> "Quantizer":
        """A quantizer from plain data, in which lists stand for tuples.

        Raises: msgspec.ValidationError: not a mapping of ModelOpt's attributes.
        """
        return cls(msgspec.convert(node, Attributes))

    @property
    def num_bits(self) -> NumBits:
        """Bits of an integer, or exponent and mantissa bits of a float."""
        found = self.attributes.get("num_bits", 8)
        if isinstance(found, tuple):
            exponent, mantissa = found
            return exponent, mantissa
        if isinstance(found, int):
            return found
        raise InvalidRecipe(f"num_bits is {found!r}: ModelOpt has numbers of bits, or exponent and mantissa bits.")

    @property
    def axis(self) -> Attribute:
        """The axis whose every index has a range of its own; None: one range, or blocks."""
        return self.attributes.get("axis")

    @property
    def is_dynamic(self) -> bool:
        """Whether ranges are found anew in each call instead of by calibration; says nothing of dynamic blocks."""
        return self.attributes.get("type", "static") == "dynamic"

    @property
    def block_sizes(self) -> Mapping[int | str, BlockValue]:
        """Block length by axis, with the blocks' `type` and `scale_bits`; empty without blocks."""
        found = self.attributes.get("block_sizes")
        return found if isinstance(found, Mapping) else {}

    @property
    def block_lengths(self) -> dict[int, int | None]:
        """Elements of a block by axis: -1 along a linear's inputs, -2 along its outputs; None: all of that axis."""
        return {
            axis: length if isinstance(length, int) else None
            for axis, length in self.block_sizes.items()
            if isinstance(axis, int)
        }

    @property
    def block_elements(self) -> int:
        """Elements that share a scale, 0 without blocks."""
        elements = 0
        for length in self.block_lengths.values():
            elements = elements if length is None else max(elements, 1) * length
        return elements

    @property
    def is_per_token(self) -> bool:
        """Whether each row has a dynamic range over all of its elements."""
        return self.is_dynamic and self.block_lengths == {-1: None}

    def with_blocks(self, length: int) -> "Quantizer":
        """The same with blocks of that length along a linear's inputs."""
        return Quantizer({**self.attributes, "block_sizes": {**self.block_sizes, -1: length}})

    @property
    def scale_bits(self) -> BlockValue:
        """Exponent and mantissa bits of the blocks' scales; None: float32."""
        return self.block_sizes.get("scale_bits")

    @property
    def has_dynamic_blocks(self) -> bool:
        """NVFP4 and the MX formats, whose kernels are CUDA's."""
        return self.block_sizes.get("type") == "dynamic"

    @property
    def has_e8m0_blocks(self) -> bool:
        """FP8 in static blocks, or in those of a row, under power-of-two scales: ours, where MX is ModelOpt's."""
        return not self.has_dynamic_blocks and self.scale_bits == _E8M0

    @property
    def is_nvfp4(self) -> bool:
        """FP4 in dynamic blocks with FP8 scales."""
        return self.has_dynamic_blocks and self.num_bits == _FP4 and self.scale_bits == _FP8

    @property
    def is_calibrated(self) -> bool:
        """Whether the range comes from calibration data.

        NVFP4 has dynamic blocks under a calibrated second-level scale.
        """
        is_mx = self.has_dynamic_blocks and self.scale_bits == _E8M0
        return not self.is_dynamic and not is_mx

    @property
    def is_per_tensor(self) -> bool:
        """Whether one calibrated range covers the whole tensor; NVFP4's second-level scale is one."""
        blocks = not self.has_dynamic_blocks and bool(self.block_lengths)
        return self.is_calibrated and self.axis is None and not blocks

    @property
    def effective_bits(self) -> float:
        """Bits an element, with its share of the block's scale."""
        bits = self.num_bits if isinstance(self.num_bits, int) else 1 + sum(self.num_bits)
        if not self.block_elements:
            return float(bits)
        is_byte = self.has_dynamic_blocks and self.scale_bits is not None  # E8M0 scales of FP8 are stored in float32
        return bits + (8 if is_byte else _DEFAULT_SCALE_BITS) / self.block_elements

    @property
    def canonical(self) -> Canonical:
        """Every field, defaults filled in, in one order."""
        fields = {**ATTRIBUTE_DEFAULTS, **{key: value for key, value in self.attributes.items() if key != COST_HINT}}
        if isinstance(blocks := fields["block_sizes"], Mapping):
            fields["block_sizes"] = {key: value for key, value in blocks.items() if (key, value) != ("type", "static")}
        return _canonical(fields)

    @cached_property
    def id(self) -> str:
        """The quantizer's identity: equal for equal quantizers, however their attributes are written."""
        return json.dumps(self.canonical)

    def differing(self, other: "Quantizer") -> str | None:
        """The first attribute in which two quantizers differ, None where they are the same."""
        if self.id == other.id:
            return None
        mine, others = ({**ATTRIBUTE_DEFAULTS, **each.attributes, COST_HINT: None} for each in (self, other))
        return next((key for key in mine if mine[key] != others.get(key)), "block_sizes")


def check_format(name: str, quantizer: Quantizer) -> None:
    """Refuse attributes that ModelOpt has no arithmetic for.

    Args:
        name: what is quantized, "weights" or "activations".
        quantizer: with, defaults and overlays included.

    Raises: InvalidRecipe: says what the format needs.
    """
    if quantizer.axis is not None and quantizer.block_sizes:
        raise InvalidRecipe(f"The {name} have both axis and block_sizes, which exclude each other.")
    if quantizer.num_bits == _FP4 and not quantizer.block_elements:
        raise InvalidRecipe(
            f"FP4 {name} need blocks: ModelOpt has no FP4 per tensor or per channel. "
            "Choose a granularity that keeps or sets block_sizes."
        )
    if isinstance(quantizer.num_bits, tuple) and quantizer.num_bits != _FP8 and not quantizer.has_dynamic_blocks:
        raise InvalidRecipe(
            f"ModelOpt has E{quantizer.num_bits[0]}M{quantizer.num_bits[1]} {name} in dynamic blocks only. "
            "Give block_sizes type: dynamic."
        )
    if quantizer.has_dynamic_blocks and isinstance(quantizer.num_bits, int) and quantizer.num_bits != _MX_INTEGER_BITS:
        raise InvalidRecipe(
            f"ModelOpt's kernel for dynamic blocks has no {quantizer.num_bits}-bit integers ({name}). "
            "Choose static blocks, or 8 bits."
        )
    is_fp8_e8m0 = (quantizer.num_bits, quantizer.scale_bits) == (_FP8, _E8M0) and quantizer.block_elements > 0
    if quantizer.scale_bits is not None and not quantizer.has_dynamic_blocks and not is_fp8_e8m0:
        raise InvalidRecipe(
            f"Blocks of {name} that are not dynamic have scale_bits [8, 0] if they are FP8, and none otherwise: "
            f"num_bits {quantizer.num_bits} has {dict(quantizer.block_sizes)}. "
            "Choose a pair with FP8 there, or a granularity without scale_bits."
        )
    n = quantizer.block_elements
    if quantizer.has_dynamic_blocks and n and not (n & (n - 1) == 0 if quantizer.is_nvfp4 else n in KERNEL_BLOCKS):
        allowed = "powers of two" if quantizer.is_nvfp4 else ", ".join(map(str, KERNEL_BLOCKS))
        raise InvalidRecipe(f"ModelOpt's kernel for these {name} has no blocks of {n}. Allowed: {allowed}.")
    if quantizer.has_dynamic_blocks and (
        set(quantizer.block_sizes) != {-1, "type", "scale_bits"} or not quantizer.block_elements
    ):
        raise InvalidRecipe(
            f"Dynamic blocks of {name} are of the form {{-1: 16, type: dynamic, scale_bits: [4, 3]}}, "
            "with a length along the inputs and no other axis."
        )


def _canonical(value: Attribute | Mapping[str, Attribute] | list[Attribute]) -> Canonical:
    """Plain JSON with one order: mappings as pairs sorted by `str(key)`, so that -1 and "-1" stay apart."""
    if isinstance(value, Mapping):
        return [[key, _canonical(item)] for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))]
    return [_canonical(item) for item in value] if isinstance(value, list | tuple) else value
