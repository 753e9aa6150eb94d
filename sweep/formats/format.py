"""A number format of linears: both quantizers, the calibration algorithm, and whose scales linears share."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Self

from sweep.core.pairs import Algorithm, Scales
from sweep.core.parallel import rank_inputs
from sweep.formats.quantizer import UNQUANTIZED_BITS, Canonical, Quantizer

# Algorithms that multiply the inputs by a pre-quantization scale, found on samples.
SCALES_INPUTS: Final = frozenset({"awq_lite", "smoothquant"})
_INT8: Final = 8  # bits; INT8 weights under quantized inputs are not packed


@dataclass(frozen=True, kw_only=True)
class Format:
    """How linears are quantized."""

    weight: Quantizer | None  # None: left unquantized
    inputs: Quantizer | None
    algorithm: Algorithm  # ModelOpt's, which finds calibration ranges (amax) and pre-quantization scales
    scales: Scales  # whether the linears of a group share the ranges of whole tensors and the pre-quantization scale
    tp: int = 1  # ranks that each find the inputs' range of a token over their own inputs; see `on_ranks`

    @property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Those of weights and inputs that are quantized."""
        return tuple(each for each in (self.weight, self.inputs) if each is not None)

    def on_ranks(self, tp: int) -> Self:
        """The format on a target of `tp` ranks; the same one but for inputs with a dynamic range a token.

        Each rank finds that range over the inputs that it has: of a row-parallel linear a part of them. Calibrated
        ranges are the checkpoint's on every rank, and shorter blocks lie in one rank.
        """
        return replace(self, tp=tp if self.inputs is not None and self.inputs.is_per_token else 1)

    def of_linear(self, module: str, n_inputs: int) -> Self:
        """The format as one linear computes it: a range a token and rank is one a block of the linear's inputs.

        Args:
            module: the linear's name, which tells whether its inputs are split.
            n_inputs: of the whole linear.

        Returns: a format of `tp` 1.

        Raises: SweepError: the ranks do not divide the linear's inputs.
        """
        if self.tp == 1 or self.inputs is None:
            return self
        length = rank_inputs(module, n_inputs, self.tp)
        return replace(self, tp=1, inputs=self.inputs if length == n_inputs else self.inputs.with_blocks(length))

    @property
    def calibrates_inputs(self) -> bool:
        """Whether scores depend on the samples that calibrated the inputs' range or scale."""
        return self.algorithm in SCALES_INPUTS or (self.inputs is not None and self.inputs.is_calibrated)

    @property
    def shares_ranges(self) -> bool:
        """Whether it makes a difference that linears of a group share what runtimes share."""
        return self.algorithm in SCALES_INPUTS or (self.weight is not None and self.weight.is_per_tensor)

    @property
    def is_fused(self) -> bool:
        """Whether linears of a group share ranges or scales, and that makes a difference."""
        return self.scales == "fused" and self.shares_ranges

    @property
    def rounds_scales(self) -> bool:
        """Whether the weights' scales are rounded to bfloat16 before codes are chosen, as runtimes hold them.

        vLLM keeps the scales of packed integers (CompressedTensorsWNA16, W4A8Fp8, W4A8Int and WNA8Int: all integer
        weights but INT8 under quantized inputs) in the model's dtype, and rounds those of a checkpoint as it loads
        them. Scales of formats with `scales` "private" are ModelOpt's, in float32.

        The dtype is bfloat16 whatever the checkpoint's is: that is what vLLM computes in where it is told nothing,
        float32 checkpoints included, and its values are exact in float32 and, from 2^-17 to 65,280, in float16.
        Source: vLLM 0.32, compressed_tensors/schemes/*.py: `weight_scale` of `params_dtype`.
        """
        weight, inputs = self.weight, self.inputs
        if self.scales == "private" or weight is None or not weight.is_calibrated or weight.has_dynamic_blocks:
            return False
        return isinstance(weight.num_bits, int) and (inputs is None or weight.num_bits < _INT8)

    @property
    def has_dynamic_blocks(self) -> bool:
        """Whether a quantizer is NVFP4 or of the MX formats."""
        return any(each.has_dynamic_blocks for each in self.quantizers)

    @property
    def effective_bits(self) -> float:
        """Bits a weight, block scales counted: NVFP4 4.5, INT4 in blocks of 128 4.125."""
        return self.weight.effective_bits if self.weight is not None else UNQUANTIZED_BITS

    @property
    def block_lengths(self) -> tuple[int, ...]:
        """Block lengths along a linear's inputs, which they must divide."""
        return tuple(length for each in self.quantizers if (length := each.block_lengths.get(-1)) is not None)

    @property
    def block_rows(self) -> int | None:
        """Outputs that share a weight block, which must divide a linear's outputs; None where each has its own."""
        return self.weight.block_lengths.get(-2) if self.weight is not None else None

    @property
    def canonical(self) -> list[Canonical]:
        """Algorithm, weights and inputs, with defaults filled in."""
        return [self.algorithm, *(each and each.canonical for each in (self.weight, self.inputs))]

    @cached_property
    def weight_id(self) -> str:
        """Equal for formats under which a weight has the same values."""
        rounding = ["bfloat16 scales"] if self.rounds_scales else []
        return json.dumps([self.algorithm, self.is_fused, self.weight and self.weight.id, *rounding])

    @property
    def input_id(self) -> str:
        """Equal for formats that quantize inputs alike."""
        ranks = f" tp={self.tp}" if self.tp > 1 else ""
        return f"{self.inputs.id}{ranks}" if self.inputs is not None else ""

    @cached_property
    def id(self) -> str:
        """The format's identity: equal for formats with the same arithmetic."""
        return json.dumps([self.weight_id, self.input_id])


@dataclass(frozen=True, kw_only=True)
class GroupFormat(Format):
    """A format for layer groups, with the names of its pair and granularity."""

    quant_pair: str
    quant_granularity: str

    @property
    def label(self) -> str:
        """Its name in files and tables: ``wint4_afp16/w_group128/awq_lite``.

        The algorithm `max` is left out.
        """
        algorithm = [] if self.algorithm == "max" else [self.algorithm]
        return "/".join([self.quant_pair, self.quant_granularity, *algorithm])
