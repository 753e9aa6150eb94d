"""A quantizer as ModelOpt reads it: its attributes, their defaults and meaning, and whether ModelOpt can run them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sweep.core.errors import InvalidRecipe

# ModelOpt 0.47, QuantizerAttributeConfig; a test compares. `effective_bits` is a cost hint and changes no number.
ATTRIBUTE_DEFAULTS: Final[dict[str, Any]] = {
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
_KERNEL_BLOCKS: Final = (8, 16, 32)  # of the MX extension, which quantizes all dynamic blocks but NVFP4
_MX_INTEGER_BITS: Final = 8
_DEFAULT_SCALE_BITS = 16  # a block's scale where the format names none


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerSpec:
    """The attributes of one quantizer, and what follows from them."""

    attributes: Mapping[str, Any]  # QuantizerAttributeConfig fields as given; tuples and integer keys intact

    @property
    def num_bits(self) -> int | tuple[int, int]:
        """Bits of an integer, or exponent and mantissa bits of a float."""
        return self.attributes.get("num_bits", 8)

    @property
    def block_sizes(self) -> Mapping[Any, Any]:
        """Block length by axis, with the blocks' `type` and `scale_bits`; empty without blocks."""
        return self.attributes.get("block_sizes") or {}

    @property
    def block_elements(self) -> int:
        """Elements that share a scale, 0 without blocks."""
        lengths = [length for axis, length in self.block_sizes.items() if isinstance(axis, int) and length is not None]
        elements = 1
        for length in lengths:
            elements *= length
        return elements if lengths else 0

    @property
    def has_dynamic_blocks(self) -> bool:
        """NVFP4 and the MX formats, whose kernels are CUDA's."""
        return self.block_sizes.get("type") == "dynamic"

    @property
    def is_nvfp4(self) -> bool:
        """FP4 in dynamic blocks with FP8 scales."""
        return self.has_dynamic_blocks and self.num_bits == _FP4 and self.block_sizes.get("scale_bits") == _FP8

    @property
    def is_calibrated(self) -> bool:
        """Whether the range comes from calibration data.

        NVFP4 has dynamic blocks under a calibrated second-level scale.
        """
        is_mx = self.has_dynamic_blocks and self.block_sizes.get("scale_bits") == (8, 0)
        return self.attributes.get("type", "static") != "dynamic" and not is_mx

    @property
    def is_per_tensor(self) -> bool:
        """Whether one calibrated range covers the whole tensor; NVFP4's second-level scale is one."""
        blocks = not self.has_dynamic_blocks and any(isinstance(axis, int) for axis in self.block_sizes)
        return self.is_calibrated and self.attributes.get("axis") is None and not blocks

    @property
    def effective_bits(self) -> float:
        """Bits an element, with its share of the block's scale."""
        bits = self.num_bits if isinstance(self.num_bits, int) else 1 + sum(self.num_bits)
        if not self.block_elements:
            return float(bits)
        scale = self.block_sizes.get("scale_bits")
        return bits + (_DEFAULT_SCALE_BITS if scale is None else 8) / self.block_elements

    @property
    def canonical(self) -> Any:
        """The quantizer's identity: every field, defaults filled in, in one order."""
        fields = {**ATTRIBUTE_DEFAULTS, **{key: value for key, value in self.attributes.items() if key != COST_HINT}}
        if fields["block_sizes"] is not None:
            fields["block_sizes"] = {
                key: value for key, value in fields["block_sizes"].items() if (key, value) != ("type", "static")
            }
        return canonical_value(fields)


def check_format(name: str, spec: QuantizerSpec) -> None:
    """Refuse attributes that ModelOpt has no arithmetic for.

    Args:
        name: what is quantized, "weights" or "activations".
        spec: its quantizer, defaults and overlays included.

    Raises: InvalidRecipe: says what the format needs.
    """
    if spec.attributes.get("axis") is not None and spec.block_sizes:
        raise InvalidRecipe(f"The {name} have both axis and block_sizes, which exclude each other.")
    if spec.num_bits == _FP4 and not spec.block_elements:
        raise InvalidRecipe(
            f"FP4 {name} need blocks: ModelOpt has no FP4 per tensor or per channel. "
            "Choose a granularity that keeps or sets block_sizes."
        )
    if isinstance(spec.num_bits, tuple) and spec.num_bits != _FP8 and not spec.has_dynamic_blocks:
        raise InvalidRecipe(
            f"ModelOpt has E{spec.num_bits[0]}M{spec.num_bits[1]} {name} in dynamic blocks only. "
            "Give block_sizes type: dynamic."
        )
    if spec.has_dynamic_blocks and isinstance(spec.num_bits, int) and spec.num_bits != _MX_INTEGER_BITS:
        raise InvalidRecipe(
            f"ModelOpt's kernel for dynamic blocks has no {spec.num_bits}-bit integers ({name}). "
            "Choose static blocks, or 8 bits."
        )
    n = spec.block_elements
    if spec.has_dynamic_blocks and n and not (n & (n - 1) == 0 if spec.is_nvfp4 else n in _KERNEL_BLOCKS):
        allowed = "powers of two" if spec.is_nvfp4 else ", ".join(map(str, _KERNEL_BLOCKS))
        raise InvalidRecipe(f"ModelOpt's kernel for these {name} has no blocks of {n}. Allowed: {allowed}.")
    if spec.has_dynamic_blocks and (set(spec.block_sizes) != {-1, "type", "scale_bits"} or not spec.block_elements):
        raise InvalidRecipe(
            f"Dynamic blocks of {name} are of the form {{-1: 16, type: dynamic, scale_bits: [4, 3]}}, "
            "with a length along the inputs and no other axis."
        )


def canonical_value(value: Any) -> Any:
    """Plain JSON with one order: mappings as pairs sorted by `str(key)`, so that -1 and "-1" stay apart."""
    if isinstance(value, Mapping):
        return [[key, canonical_value(value[key])] for key in sorted(value, key=str)]
    return [canonical_value(item) for item in value] if isinstance(value, list | tuple) else value


def canonical_attributes(attributes: Mapping[str, Any] | None) -> Any:
    """A quantizer's identity, defaults filled in; None: left unquantized."""
    return None if attributes is None else QuantizerSpec(attributes=attributes).canonical


def tupled(value: Any) -> Any:
    """A deep copy in which lists are tuples: ModelOpt compares `num_bits` with tuples, YAML has lists."""
    if isinstance(value, Mapping):
        return {key: tupled(item) for key, item in value.items()}
    return tuple(tupled(item) for item in value) if isinstance(value, list | tuple) else value


def listed(value: Any) -> Any:
    """A deep copy in which tuples are lists, for YAML."""
    if isinstance(value, Mapping):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value
