"""Checks of quantizer fields from YAML files, before they reach ModelOpt, which would pad, guess or crash later."""

from collections.abc import Callable, Mapping
from typing import Final

from sweep.core.errors import SweepError, require_known
from sweep.core.typed import Plain

QUANTIZERS: Final = ("*weight_quantizer", "*input_quantizer")
_FLOATS: Final = ((4, 3), (2, 1), (5, 2), (3, 2), (2, 3))  # exponent and mantissa bits
_BLOCK_AXES: Final = (-1, -2)  # a linear's inputs and outputs; ModelOpt pads a block on axis 1 or 0 without being asked


def check_fields(quantizer: str, fields: Mapping[str, Plain], where: str) -> None:
    """Refuse fields that are wrong in every recipe.

    Args:
        quantizer: pattern that the fields are for.
        fields: ModelOpt's attributes, as YAML gives them.
        where: whose `quant_cfg_overrides` they are, for the message.

    Raises: SweepError: an unknown quantizer or field, a value that is not allowed, or `axis` beside `block_sizes`.
    """
    require_known(f"quantizer in {where}", quantizer, QUANTIZERS)
    for field, value in fields.items():
        require_known(f"field of {quantizer!r} in {where}", str(field), _ALLOWED)
        fits, allowed = _ALLOWED[field]
        if not fits(value):
            raise SweepError(f"{field}: {value!r} of {quantizer!r} in {where} is not allowed. Type {allowed}.")
    if fields.get("axis") is not None and fields.get("block_sizes") is not None:
        raise SweepError(
            f"{quantizer!r} in {where} has both axis and block_sizes, which exclude each other. Keep one of them."
        )


def _is_count(value: Plain, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_num_bits(value: Plain) -> bool:
    return _is_count(value, 2, 16) or (isinstance(value, list | tuple) and tuple(value) in _FLOATS)


def _is_axis(value: Plain) -> bool:
    return value is None or _is_count(value, -2, 1)


def _is_blocks(value: Plain) -> bool:
    return value is None or (
        isinstance(value, Mapping) and bool(value) and all(_is_block_item(key, item) for key, item in value.items())
    )


def _is_block_item(key: int | str, value: Plain) -> bool:
    if key == "type":
        return value in ("static", "dynamic")
    if key == "scale_bits":
        return isinstance(value, list | tuple) and tuple(value) in ((4, 3), (8, 0))
    return isinstance(key, int) and key in _BLOCK_AXES and (value is None or _is_count(value, 1, 1 << 20))


# ModelOpt's attributes whose scores are tested against ModelOpt's own; a rotation or a histogram would need more than a
# quantizer.
_ALLOWED: Final[Mapping[str, tuple[Callable[[Plain], bool], str]]] = {
    "num_bits": (_is_num_bits, "a whole number of bits from 2 to 16, or exponent and mantissa bits such as [4, 3]"),
    "axis": (_is_axis, "null (per tensor), 0 (per output channel) or 1 (per input channel)"),
    "block_sizes": (
        _is_blocks,
        "a mapping such as {-1: 64} (blocks along the inputs), "
        "with type and scale_bits beside it if the format has them",
    ),
    "type": (lambda value: value in ("static", "dynamic"), "static or dynamic"),
    "narrow_range": (lambda value: isinstance(value, bool), "true or false"),
}
