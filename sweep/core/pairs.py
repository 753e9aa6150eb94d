"""Quant pairs, granularities and calibration algorithms as the configuration names them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from sweep.core.typed import Section

NumberFormat = Literal["int4", "int8", "fp4", "fp8", "fp16"]

Algorithm = Literal["max", "mse", "awq_lite", "smoothquant"]
# Calibration algorithms that have a parity test against ModelOpt.
ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm)

Scales = Literal["fused", "private"]  # shared by the linears of a group as in runtimes, or each linear's own


@dataclass(frozen=True, slots=True, kw_only=True)
class PairConfig(Section):
    """Number formats of weights and activations; fp16 means left unquantized."""

    name: str  # [a-z0-9_]+
    weight: NumberFormat
    activation: NumberFormat
    format_name: str  # ModelOpt preset that it starts from
    quant_cfg_overrides: Mapping[str, Mapping[str, Any]]  # quantizers of the preset that it replaces


@dataclass(frozen=True, slots=True, kw_only=True)
class GranularityConfig(Section):
    """An overlay on a pair: what shares a scale."""

    name: str  # [a-z0-9_]+
    quant_cfg_overrides: Mapping[str, Mapping[str, Any]]  # fields merged into the pair's quantizers
