"""Quant pair + granularity -> recipe: the overlay rules, as one pure function.

Knows ModelOpt's format and imports nothing of it. ModelOpt's `quant_cfg` is an ordered list (>= 0.44) in which an entry
with `cfg` replaces the whole quantizer and enables it. So an overlay is merged into the pair's own entry, in place;
appended, `{axis: 0}` would turn FP8 into INT8 and switch the vision tower on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Final

from sweep.core.errors import InvalidRecipe, SweepError
from sweep.core.pairs import ALGORITHMS, GranularityConfig, PairConfig
from sweep.formats.fields import QUANTIZERS, check_fields
from sweep.formats.quantizer import COST_HINT, UNQUANTIZED_BITS, QuantizerSpec, check_format, tupled

# Those that multiply the inputs by a pre-quantization scale, found on samples.
SCALES_INPUTS: Final = frozenset({"awq_lite", "smoothquant"})

# ModelOpt 0.47's, of awq_lite and of smoothquant.
_ALGORITHM_DEFAULTS: Final[Mapping[str, object]] = {"alpha_step": 0.1, "alpha": 1.0}
_VISION_PATTERNS = frozenset(
    {"*visual*", "*vision_tower*", "*vision_model*", "*embed_vision*", "*multi_modal_projector*"}
)
_LM_HEAD_PATTERNS = frozenset({"*lm_head*", "*output_layer*"})
_NUM_BITS: Final[Mapping[str, int | tuple[int, int] | None]] = {
    "int4": 4,
    "int8": 8,
    "fp4": (2, 1),
    "fp8": (4, 3),
    "fp16": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How each linear is quantized: ModelOpt's entries, the calibration algorithm, and the two quantizers."""

    quant_cfg: Sequence[Mapping[str, Any]]  # ModelOpt's ordered entries
    algorithm: str
    weight: QuantizerSpec | None  # None: left unquantized
    activation: QuantizerSpec | None

    @property
    def canonical(self) -> str:
        """The recipe's identity as text: equal recipes share one cell."""
        quantizers = [spec and spec.canonical for spec in (self.weight, self.activation)]
        return json.dumps([self.algorithm, *quantizers, [list(pattern) for pattern in self._switches]])

    @property
    def _switches(self) -> list[tuple[str, str | None, bool]]:
        """Entries that only switch quantizers on or off, but for the first, which every recipe has."""
        found: list[tuple[str, str | None, bool]] = []
        for entry in self.quant_cfg:
            name = entry["quantizer_name"]
            if entry.get("cfg") is None and name not in ("*", *QUANTIZERS):
                found.append((name, entry.get("parent_class"), bool(entry.get("enable"))))
        return sorted(found)

    @property
    def calibrates_activations(self) -> bool:
        """Whether scores depend on the samples that calibrated the inputs' range or scale."""
        return self.algorithm in SCALES_INPUTS or (self.activation is not None and self.activation.is_calibrated)

    @property
    def shares_ranges(self) -> bool:
        """Whether it makes a difference that linears of a group share what runtimes share."""
        return self.algorithm in SCALES_INPUTS or (self.weight is not None and self.weight.is_per_tensor)

    @property
    def has_dynamic_blocks(self) -> bool:
        """Whether a quantizer is NVFP4 or of the MX formats."""
        return any(spec is not None and spec.has_dynamic_blocks for spec in (self.weight, self.activation))

    @property
    def effective_bits(self) -> float:
        """Bits a weight, block scales counted: NVFP4 4.5, INT4 in blocks of 128 4.125."""
        return self.weight.effective_bits if self.weight is not None else UNQUANTIZED_BITS

    @property
    def block_lengths(self) -> tuple[int, ...]:
        """Block lengths along a linear's inputs, which they must divide."""
        specs = [spec for spec in (self.weight, self.activation) if spec is not None]
        return tuple(length for spec in specs if (length := spec.block_sizes.get(-1)) is not None)

    @property
    def block_rows(self) -> int | None:
        """Outputs that share a weight block, which must divide a linear's outputs; None where each has its own."""
        return self.weight.block_sizes.get(-2) if self.weight is not None else None


def resolve(
    pair: PairConfig,
    granularity: GranularityConfig,
    preset: Mapping[str, Any],
    *,
    coverage: str,
    lm_head: bool,
    algorithm: str,
) -> Recipe:
    """The recipe of one pair under one granularity.

    Args:
        pair: its `quant_cfg_overrides` replace quantizers of the preset.
        granularity: its `quant_cfg_overrides` are merged field by field, and never enable a quantizer that is off.
        preset: ModelOpt's, as plain data: `quant_cfg` entries and `algorithm`.
        coverage: "lm_only" keeps the preset's entries that disable the vision tower, "all_layers" drops them.
        lm_head: drops the entries that disable lm_head.
        algorithm: how ranges are found.

    Raises:
        InvalidRecipe: the two make no recipe that ModelOpt can run.
        SweepError: an override that is wrong whatever it is combined with, or an algorithm without a parity test.
    """
    if algorithm not in ALGORITHMS:
        raise SweepError(
            f"sensitivity.quant_algorithm={algorithm} has no parity test against ModelOpt yet. "
            f"Choose one of: {', '.join(ALGORITHMS)}."
        )
    entries = _own_entries(pair, [tupled(entry) for entry in preset["quant_cfg"]], preset.get("algorithm"), algorithm)
    for quantizer, fields in pair.quant_cfg_overrides.items():
        set_fields = {key: value for key, value in fields.items() if key != "enable"}
        check_fields(quantizer, set_fields, f"quant_cfg_overrides of quant_pair {pair.name!r}")
        entries = [_replaced(entry, fields) if entry["quantizer_name"] == quantizer else entry for entry in entries]
    for quantizer, fields in granularity.quant_cfg_overrides.items():
        check_fields(quantizer, fields, f"quant_cfg_overrides of quant_granularity {granularity.name!r}")
        entries = [
            _overlaid(entry, fields) if entry["quantizer_name"] == quantizer and entry.get("cfg") else entry
            for entry in entries
        ]
    dropped = set[str]()
    if coverage == "all_layers":
        dropped |= _VISION_PATTERNS
    if lm_head:
        dropped |= _LM_HEAD_PATTERNS
    entries = [entry for entry in entries if entry["quantizer_name"] not in dropped]
    weight, activation = (_spec(entries, quantizer) for quantizer in QUANTIZERS)
    recipe = Recipe(quant_cfg=entries, algorithm=algorithm, weight=weight, activation=activation)
    _check_formats(recipe)
    _check_algorithm(recipe)
    _check_labels(pair, recipe)
    return recipe


def attributes_for(
    quant_cfg: Sequence[Mapping[str, Any]], module: str, quantizer: str, parent_class: str
) -> Mapping[str, Any] | None:
    """The attributes that ModelOpt would give one quantizer of one module; None if it stays disabled.

    Args:
        quant_cfg: ModelOpt's ordered entries; later ones win.
        module: module name.
        quantizer: "weight_quantizer" or "input_quantizer".
        parent_class: the module's class as ModelOpt registers it, "nn.Linear".
    """
    attributes: Mapping[str, Any] = {}
    enabled = True
    for entry in quant_cfg:
        if entry.get("parent_class") not in (None, parent_class) or not fnmatch(
            f"{module}.{quantizer}", entry["quantizer_name"]
        ):
            continue
        attributes = entry.get("cfg") or attributes
        enabled = entry.get("enable", True)
    return attributes if enabled else None


def _own_entries(
    pair: PairConfig, entries: list[dict[str, Any]], preset_algorithm: object, algorithm: str
) -> list[dict[str, Any]]:
    """The preset's entries, with one for each of our two quantizers.

    Raises: InvalidRecipe: the preset is more than one number format for the weights and one for the inputs of every
        linear.
    """
    preset = f"format_name={pair.format_name} of quant_pair {pair.name!r}"
    own = preset_algorithm if isinstance(preset_algorithm, Mapping) else {"method": preset_algorithm}
    if own["method"] not in (None, "max", algorithm) or any(
        _ALGORITHM_DEFAULTS.get(key) != value for key, value in own.items() if key != "method"
    ):
        raise InvalidRecipe(
            f"{preset} calibrates with {preset_algorithm!r}, not {algorithm!r}: its scores would be another format's. "
            f"Choose another preset, or one of sensitivity.quant_algorithm={','.join(ALGORITHMS)} that is the preset's."
        )
    for entry in entries:
        enables = entry.get("cfg") is not None or entry.get("enable") is True
        if enables and (entry["quantizer_name"] not in QUANTIZERS or not isinstance(entry.get("cfg"), Mapping)):
            raise InvalidRecipe(
                f"{preset} is more than one format for weights and one for inputs (entry {entry['quantizer_name']!r}). "
                "Choose another preset."
            )
    named = {entry["quantizer_name"] for entry in entries}
    missing = [{"quantizer_name": quantizer, "enable": False} for quantizer in QUANTIZERS if quantizer not in named]
    return [*entries[:1], *missing, *entries[1:]]


def _replaced(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    name = {"quantizer_name": entry["quantizer_name"]}
    cfg = {key: value for key, value in fields.items() if key != "enable"}
    return {**name, "cfg": tupled(cfg)} if fields.get("enable", True) else {**name, "enable": False}


def _overlaid(entry: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    cfg = {**entry["cfg"]}
    overlay = tupled(fields)
    blocks = overlay.get("block_sizes")
    if "axis" in overlay and blocks is None:
        cfg.pop("block_sizes", None)
    if blocks is not None:
        cfg.pop("axis", None)
        overlay["block_sizes"] = {**(cfg.get("block_sizes") or {}), **blocks}
    cfg.pop(COST_HINT, None)  # it was the preset's, for the preset's blocks
    return {**entry, "cfg": {**cfg, **overlay}}


def _spec(entries: Sequence[Mapping[str, Any]], quantizer: str) -> QuantizerSpec | None:
    own = [entry for entry in entries if entry["quantizer_name"] == quantizer]
    cfg = own[-1].get("cfg") if own else None
    return QuantizerSpec(attributes=cfg) if cfg and own[-1].get("enable", True) else None


def _check_formats(recipe: Recipe) -> None:
    if recipe.weight is None and recipe.activation is None:
        raise InvalidRecipe("Neither weights nor activations are quantized: there is nothing to score.")
    for name, spec in (("weights", recipe.weight), ("activations", recipe.activation)):
        if spec is not None:
            check_format(name, spec)
    inputs = recipe.activation
    if inputs is None:
        return
    if inputs.attributes.get("axis") not in (None, -1):
        raise InvalidRecipe(
            "Rows of activations are tokens: axis 0 or 1 means nothing there. "
            "Choose axis -1, or per token: type dynamic, block_sizes {-1: null}."
        )
    if inputs.attributes.get("type") == "dynamic" and -1 not in inputs.block_sizes:
        raise InvalidRecipe(
            "A dynamic range of the whole input depends on how samples are batched. "
            "Choose per token: type dynamic, block_sizes {-1: null}."
        )
    if inputs.block_sizes.get(-2) is not None:
        raise InvalidRecipe(
            "Blocks of activations lie within one token: axis -2 would mix tokens. "
            "Leave it out of the inputs' block_sizes."
        )
    if inputs.block_sizes and inputs.is_calibrated and not inputs.has_dynamic_blocks:
        raise InvalidRecipe(
            "Static blocks of activations need inputs of one fixed shape. "
            "Choose type: dynamic, or no block_sizes for the inputs."
        )


def _check_algorithm(recipe: Recipe) -> None:
    """Refuse recipes that ModelOpt's algorithm would skip silently, or cannot calibrate."""
    weight, inputs, algorithm = recipe.weight, recipe.activation, recipe.algorithm
    if algorithm == "max":
        return
    if algorithm == "mse" and (weight is None or not weight.is_calibrated or weight.has_dynamic_blocks):
        raise InvalidRecipe(
            "quant_algorithm=mse searches ranges of weights; these have none to search. "
            "Choose max, or a format with static ranges."
        )
    if algorithm == "awq_lite" and (
        weight is None
        or weight.attributes.get("type") == "dynamic"
        or not weight.block_elements
        or -1 not in weight.block_sizes
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


def _is_int8_tensor(spec: QuantizerSpec) -> bool:
    return spec.num_bits == 8 and spec.is_per_tensor and not spec.has_dynamic_blocks


def _check_labels(pair: PairConfig, recipe: Recipe) -> None:
    """Refuse a pair whose `weight` or `activation` is another format than its quantizers have.

    Scores would be published under another format's name.
    """
    for key, label, spec in (
        ("weight", pair.weight, recipe.weight),
        ("activation", pair.activation, recipe.activation),
    ):
        found = spec and spec.num_bits
        if found != _NUM_BITS[label]:
            raise InvalidRecipe(
                f"quant_pair {pair.name!r} says {key}: {label}, which is num_bits {_NUM_BITS[label]}, "
                f"but resolves to {found}. Correct {key}, format_name or quant_cfg_overrides."
            )
