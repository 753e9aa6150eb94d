"""Quant pair + granularity -> recipe: the overlay rules, as one pure function.

Knows ModelOpt's format and imports nothing of it. ModelOpt's `quant_cfg` is an ordered list (>= 0.44) in which an entry
with `cfg` replaces the whole quantizer and enables it. So an overlay is merged into the pair's own entry, in place;
appended, `{axis: 0}` would turn FP8 into INT8 and switch the vision tower on.
"""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from functools import cached_property
from typing import Any, Final

import msgspec

from sweep.core.errors import InvalidRecipe, SweepError
from sweep.core.groups import Coverage
from sweep.core.pairs import ALGORITHMS, Algorithm, GranularityConfig, PairConfig, Scales
from sweep.formats.fields import QUANTIZERS, check_fields
from sweep.formats.format import Format
from sweep.formats.quantizer import COST_HINT, Attributes, NumBits, Quantizer, check_format

# ModelOpt 0.47's, of awq_lite and of smoothquant.
_ALGORITHM_DEFAULTS: Final[Mapping[str, float]] = {"alpha_step": 0.1, "alpha": 1.0}
_VISION_PATTERNS = frozenset(
    {"*visual*", "*vision_tower*", "*vision_model*", "*embed_vision*", "*multi_modal_projector*"}
)
_LM_HEAD_PATTERNS = frozenset({"*lm_head*", "*output_layer*"})
_NUM_BITS: Final[Mapping[str, NumBits | None]] = {
    "int4": 4,
    "int8": 8,
    "fp4": (2, 1),
    "fp8": (4, 3),
    "fp16": None,
}


class Entry(msgspec.Struct, frozen=True):
    """One of ModelOpt's ordered `quant_cfg` entries: it sets the quantizers that a pattern names; later ones win."""

    quantizer_name: str  # pattern
    cfg: Attributes | None = None  # replaces the whole quantizer, and enables it
    enable: bool | None = None
    parent_class: str | None = None  # only in modules of this class

    def matches(self, quantizer: str, parent_class: str) -> bool:
        """Whether it sets a quantizer. Args: quantizer: its full name; parent_class: of its module."""
        return self.parent_class in (None, parent_class) and fnmatch(quantizer, self.quantizer_name)

    def to_modelopt(self) -> dict[str, Attributes | str | bool]:
        """As ModelOpt takes it."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in fields.items() if value is not None}


class Recipe(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A format on the linears of a model: ModelOpt's entries, and what they make of a covered linear."""

    quant_cfg: tuple[Entry, ...]
    format: Format

    @cached_property
    def id(self) -> str:
        """The recipe's identity, but for `scales`: equal recipes share one cell."""
        return json.dumps([*self.format.canonical, [list(switch) for switch in self._switches]])

    @property
    def _switches(self) -> list[tuple[str, str | None, bool]]:
        """Entries that only switch quantizers on or off, but for the first, which every recipe has."""
        return sorted(
            (entry.quantizer_name, entry.parent_class, bool(entry.enable))
            for entry in self.quant_cfg
            if entry.cfg is None and entry.quantizer_name not in ("*", *QUANTIZERS)
        )


def resolve(
    pair: PairConfig,
    granularity: GranularityConfig,
    preset: Mapping[str, Any],
    *,
    coverage: Coverage,
    lm_head: bool,
    algorithm: str,
    scales: Scales = "private",
    tp: int = 1,
) -> Recipe:
    """The recipe of one pair under one granularity.

    Args:
        pair: its `quant_cfg_overrides` replace quantizers of the preset.
        granularity: its `quant_cfg_overrides` are merged field by field, and never enable a quantizer that is off.
        preset: ModelOpt's, as plain data: `quant_cfg` entries and `algorithm`.
        coverage: "lm_only" keeps the preset's entries that disable the vision tower, "all_layers" drops them.
        lm_head: drops the entries that disable lm_head.
        algorithm: how ranges are found.
        scales: whether linears of a group share ranges.
        tp: ranks that linears are split over.

    Raises:
        InvalidRecipe: the two make no recipe that ModelOpt can run.
        SweepError: an override that is wrong whatever it is combined with, or an algorithm without a parity test.
    """
    if algorithm not in ALGORITHMS:
        raise SweepError(
            f"sensitivity.quant_algorithm={algorithm} has no parity test against ModelOpt yet. "
            f"Choose one of: {', '.join(ALGORITHMS)}."
        )
    entries = _own_entries(pair, preset, algorithm)
    for quantizer, fields in pair.quant_cfg_overrides.items():
        set_fields = {key: value for key, value in fields.items() if key != "enable"}
        check_fields(quantizer, set_fields, f"quant_cfg_overrides of quant_pair {pair.name!r}")
        cfg = msgspec.convert(set_fields, Attributes) if fields.get("enable", True) else None
        entry = Entry(quantizer, cfg, None if cfg is not None else False)
        entries = [entry if each.quantizer_name == quantizer else each for each in entries]
    for quantizer, fields in granularity.quant_cfg_overrides.items():
        check_fields(quantizer, fields, f"quant_cfg_overrides of quant_granularity {granularity.name!r}")
        overlay = msgspec.convert(fields, Attributes)
        entries = [_overlaid(each, overlay) if each.quantizer_name == quantizer else each for each in entries]
    dropped = set[str]()
    if coverage == "all_layers":
        dropped |= _VISION_PATTERNS
    if lm_head:
        dropped |= _LM_HEAD_PATTERNS
    entries = [entry for entry in entries if entry.quantizer_name not in dropped]
    weight, inputs = (_quantizer(entries, name) for name in QUANTIZERS)
    found = Format(weight=weight, inputs=inputs, algorithm=algorithm, scales=scales).on_ranks(tp)
    _check_formats(found)
    _check_algorithm(found)
    _check_labels(pair, found)
    return Recipe(quant_cfg=tuple(entries), format=found)


def quantizer_for(quant_cfg: Sequence[Entry], module: str, quantizer: str, parent_class: str) -> Quantizer | None:
    """The quantizer that ModelOpt would make for one place of one module; None if it stays disabled.

    Args:
        quant_cfg: ModelOpt's ordered entries; later ones win.
        module: module name.
        quantizer: "weight_quantizer" or "input_quantizer".
        parent_class: the module's class as ModelOpt registers it, "nn.Linear".
    """
    attributes: Attributes = {}
    enabled = True
    for entry in quant_cfg:
        if entry.matches(f"{module}.{quantizer}", parent_class):
            attributes = entry.cfg or attributes
            enabled = entry.enable is not False
    return Quantizer(attributes) if enabled else None


def _own_entries(pair: PairConfig, preset: Mapping[str, Any], algorithm: Algorithm) -> list[Entry]:
    """The preset's entries, with one for each of our two quantizers.

    Raises: InvalidRecipe: the preset is more than one number format for the weights and one for the inputs of every
        linear.
    """
    name, found = f"format_name={pair.format_name} of quant_pair {pair.name!r}", preset.get("algorithm")
    own = found if isinstance(found, Mapping) else {"method": found}
    if own["method"] not in (None, "max", algorithm) or any(
        _ALGORITHM_DEFAULTS.get(key) != value for key, value in own.items() if key != "method"
    ):
        raise InvalidRecipe(
            f"{name} calibrates with {found!r}, not {algorithm!r}: its scores would be another format's. "
            f"Choose another preset, or one of sensitivity.quant_algorithm={','.join(ALGORITHMS)} that is the preset's."
        )
    entries: list[Entry] = []
    for node in preset["quant_cfg"]:
        try:
            entry = msgspec.convert(node, Entry)
        except msgspec.ValidationError:  # several quantizers in the place of one
            entry = Entry(node["quantizer_name"], enable=True)
        if (entry.cfg is None and entry.enable) or (entry.cfg is not None and entry.quantizer_name not in QUANTIZERS):
            raise InvalidRecipe(
                f"{name} is more than one format for weights and one for inputs (entry {entry.quantizer_name!r}). "
                "Choose another preset."
            )
        entries.append(entry)
    named = {entry.quantizer_name for entry in entries}
    missing = [Entry(quantizer, enable=False) for quantizer in QUANTIZERS if quantizer not in named]
    return [*entries[:1], *missing, *entries[1:]]


def _overlaid(entry: Entry, overlay: Attributes) -> Entry:
    """An enabled entry with the overlay's fields; `axis` and `block_sizes` replace each other."""
    if not entry.cfg:
        return entry
    # The cost hint was the preset's, for the preset's blocks.
    cfg = {key: value for key, value in entry.cfg.items() if key != COST_HINT}
    fields, blocks = dict(overlay), overlay.get("block_sizes")
    if isinstance(blocks, Mapping):
        cfg.pop("axis", None)
        fields["block_sizes"] = {**Quantizer(cfg).block_sizes, **blocks}
    elif "axis" in overlay:
        cfg.pop("block_sizes", None)
    return msgspec.structs.replace(entry, cfg={**cfg, **fields})


def _quantizer(entries: Sequence[Entry], name: str) -> Quantizer | None:
    own = [entry for entry in entries if entry.quantizer_name == name]
    return Quantizer(own[-1].cfg) if own and own[-1].cfg and own[-1].enable is not False else None


def _check_formats(found: Format) -> None:
    if not found.quantizers:
        raise InvalidRecipe("Neither weights nor activations are quantized: there is nothing to score.")
    for name, quantizer in (("weights", found.weight), ("activations", found.inputs)):
        if quantizer is not None:
            check_format(name, quantizer)
    inputs = found.inputs
    if inputs is None:
        return
    if inputs.axis not in (None, -1):
        raise InvalidRecipe(
            "Rows of activations are tokens: axis 0 or 1 means nothing there. "
            "Choose axis -1, or per token: type dynamic, block_sizes {-1: null}."
        )
    if inputs.is_dynamic and -1 not in inputs.block_lengths:
        raise InvalidRecipe(
            "A dynamic range of the whole input depends on how samples are batched. "
            "Choose per token: type dynamic, block_sizes {-1: null}."
        )
    if inputs.block_lengths.get(-2) is not None:
        raise InvalidRecipe(
            "Blocks of activations lie within one token: axis -2 would mix tokens. "
            "Leave it out of the inputs' block_sizes."
        )
    if inputs.block_sizes and inputs.is_calibrated and not inputs.has_dynamic_blocks:
        raise InvalidRecipe(
            "Static blocks of activations need inputs of one fixed shape. "
            "Choose type: dynamic, or no block_sizes for the inputs."
        )


def _check_algorithm(found: Format) -> None:
    """Refuse recipes that ModelOpt's algorithm would skip silently, or cannot calibrate."""
    weight, inputs, algorithm = found.weight, found.inputs, found.algorithm
    if algorithm == "max":
        return
    if algorithm == "mse" and (
        weight is None or not weight.is_calibrated or weight.has_dynamic_blocks or weight.has_e8m0_blocks
    ):
        raise InvalidRecipe(
            "quant_algorithm=mse searches ranges of weights; these have none to search. "
            "Choose max, or a format with static ranges."
        )
    if algorithm == "awq_lite" and (
        weight is None or weight.is_dynamic or not weight.block_elements or -1 not in weight.block_lengths
    ):
        raise InvalidRecipe(
            "quant_algorithm=awq_lite needs weights in groups along the inputs, as INT4 under w_group128 or NVFP4. "
            "Choose max, or these."
        )
    if algorithm == "awq_lite" and inputs is not None and not (inputs.is_per_tensor or inputs.has_dynamic_blocks):
        raise InvalidRecipe(
            "quant_algorithm=awq_lite needs inputs in 16 bits, under one static range, or in NVFP4 or MX. "
            "Choose max, or another granularity."
        )
    if algorithm == "smoothquant" and not (
        weight is not None
        and weight.num_bits == 8
        and weight.is_calibrated
        and inputs is not None
        and _is_int8_tensor(inputs)
    ):
        raise InvalidRecipe(
            "quant_algorithm=smoothquant is for INT8 weights and INT8 inputs under one static range: "
            "wint8_aint8/default. Choose max, or that."
        )


def _is_int8_tensor(quantizer: Quantizer) -> bool:
    return quantizer.num_bits == 8 and quantizer.is_per_tensor and not quantizer.has_dynamic_blocks


def _check_labels(pair: PairConfig, format_: Format) -> None:
    """Refuse a pair whose `weight` or `activation` is another format than its quantizers have.

    Scores would be published under another format's name.
    """
    for key, label, quantizer in (
        ("weight", pair.weight, format_.weight),
        ("activation", pair.activation, format_.inputs),
    ):
        found = quantizer and quantizer.num_bits
        if found != _NUM_BITS[label]:
            raise InvalidRecipe(
                f"quant_pair {pair.name!r} says {key}: {label}, which is num_bits {_NUM_BITS[label]}, "
                f"but resolves to {found}. Correct {key}, format_name or quant_cfg_overrides."
            )
