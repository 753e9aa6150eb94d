"""ModelOpt's presets, grouping rules, quantizers on captured tensors and stock searcher. The home of `modelopt`."""

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ModelOpt warns that this transformers is newer than those it was tested with
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import extensions
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

from sweep.core.batches import Batch
from sweep.core.errors import SweepError, require_known
from sweep.formats.quantizer import Attributes, Quantizer
from sweep.formats.recipe import Entry
from workers.model.forward import batch_to, labels_of, summed_loss
from workers.quant import block_formats, tensor_formats
from workers.quant.linear import rounded_range

block_formats.register()
tensor_formats.register()

# Linears that vLLM 0.32 fuses and ModelOpt's rules leave apart; those of one prefix are a layer group. These rules are
# asked before ModelOpt's, of whose groups they join whole ones. Source: `packed_modules_mapping` and
# `orig_to_new_stacked` of vllm/model_executor/models and vllm/models, with the names of the fused modules.
_FUSED: Final = tuple(
    re.compile(pattern)
    for pattern in (
        r"(.*\.)(?:q_a_proj|kv_a_proj_with_mqa)",  # deepseek_v2: fused_qkv_a_proj
        r"(.*\.feed_forward\.)w[13]",  # lfm2: w13
        r"(.*\.linear_attn\.)[qkvg]_proj",  # olmo_hybrid: in_proj_qkvg
        # bailing_moe_v3: qkvb_proj; glm5next: in_proj_qkvbfg_a; kimi_k3: in_proj_qkvgfab; inkling: qkvr
        r"(.*\.self_attn\.)(?:[qkvbr]_proj|g_a_proj|forget_gate\.f_a_proj)",
    )
)


def preset(name: str) -> dict[str, Any]:
    """A ModelOpt preset as plain data: its ordered `quant_cfg` entries and its `algorithm`.

    Raises: SweepError: ModelOpt has no such preset.
    """
    require_known("ModelOpt preset (quant_pair.format_name)", name, mtq.config.choices)
    found = getattr(mtq, name)
    return {
        "quant_cfg": [copy.deepcopy(dict(entry)) for entry in found["quant_cfg"]],
        "algorithm": found.get("algorithm"),
    }


def build_extensions(names: Iterable[str]) -> None:
    """Have ModelOpt build its CUDA extensions, 60-90 s each on a machine that has not built them yet.

    Args:
        names: "integers", "fp8", "mx".
    """
    builders = {
        "integers": extensions.get_cuda_ext,
        "fp8": extensions.get_cuda_ext_fp8,
        "mx": extensions.get_cuda_ext_mx,
    }
    for name in sorted(names):
        builders[name](raise_if_failed=False)


def layer_groups(linears: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Linears that must share a recipe because runtimes fuse them, by vLLM's fusions and ModelOpt's rules.

    Args:
        linears: module names in the model's order.

    Returns: modules of each group by the name of its first module, in the model's order.
    """
    by_key: dict[str, list[str]] = {}
    for name in linears:
        by_key.setdefault(_group_key(name), []).append(name)
    return {modules[0]: tuple(modules) for modules in by_key.values()}


def _group_key(name: str) -> str:
    for pattern in _FUSED:
        if match := pattern.fullmatch(name):
            return f"{match.group(1)}{pattern.pattern}"
    for rule in AutoQuantizeGradientSearcher.quant_grouping_rules:
        match = None if callable(rule) else re.match(rule, name)
        key = rule(None, name) if callable(rule) else match and match.group(1)
        if key is not None:
            return key
    return name


class Quantizers:
    """A cache of ModelOpt's quantizers, one for each recipe and shape, and of the weights' ranges.

    Building one costs the host more than its arithmetic costs a GPU. A quantizer that a method returns is valid until
    the next call with the same attributes.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[int, ...]], TensorQuantizer] = {}
        self._weight_ranges: dict[tuple[str, str], Tensor] = {}

    def weight(
        self,
        module: str,
        quantizer: Quantizer,
        weight_OI: Tensor,
        fused: Mapping[str, Tensor] | None = None,
        *,
        rounds_scales: bool = False,
    ) -> TensorQuantizer:
        """A quantizer with a weight's range, set by ModelOpt's own `max` calibrator or known from an earlier call.

        Args:
            module: names the weight; an equal name means an equal weight.
            quantizer: of the weight.
            weight_OI: [out, in].
            fused: weights by module, this one among them, that share the largest of their ranges, each of its whole
                tensor.
            rounds_scales: round the scales to bfloat16 (workers.quant.linear.rounded_range).

        Raises: AssertionError: ModelOpt's calibrator met a NaN; callers check for it first.
        """
        if rounds_scales:
            made = self.weight(module, quantizer, weight_OI, fused)
            amax = range_of(made)
            assert amax is not None  # as Format.rounds_scales has it: static integers
            assert isinstance(quantizer.num_bits, int)
            made.amax = rounded_range(amax, quantizer.num_bits)
            return made
        range_key = _range_key(quantizer)
        if fused is not None and len(fused) > 1:
            shared = (",".join(fused), range_key)
            if shared not in self._weight_ranges:
                ranges = [range_of(self.weight(name, quantizer, weight)) for name, weight in fused.items()]
                amaxes = torch.stack([amax.clone() for amax in ranges if amax is not None])
                self._weight_ranges[shared] = amaxes.amax(dim=0)
            return self._calibrated(quantizer, tuple(weight_OI.shape), weight_OI, self._weight_ranges[shared])
        known = self._weight_ranges.get((module, range_key))
        calibrates_on = weight_OI if known is not None else weight_OI.float()
        made = self._calibrated(quantizer, tuple(weight_OI.shape), calibrates_on, known)
        if known is None and (amax := _amax(made)) is not None:
            self._weight_ranges[module, range_key] = amax.clone()
        return made

    def inputs(
        self,
        quantizer: Quantizer,
        x_TI: Tensor,
        largest: float,
        known: MutableMapping[tuple[str, int], Tensor] | None = None,
    ) -> TensorQuantizer:
        """A quantizer with the range of calibration inputs, set by ModelOpt's own `max` calibrator or known.

        Args:
            quantizer: of the inputs.
            x_TI: the inputs, [rows, in]: those of leading samples of one tensor.
            largest: largest magnitude of `x_TI`, which suffices to calibrate one range for the whole tensor.
            known: ranges of that tensor, by axis and blocks and by number of rows; receives this one.
        """
        known, key = {} if known is None else known, (_range_key(quantizer), len(x_TI))
        if (amax := known.get(key)) is not None:
            return self._calibrated(quantizer, (x_TI.shape[1],), x_TI, amax)
        seen = torch.tensor([largest], device=x_TI.device) if quantizer.axis is None else x_TI.float()
        made = self._calibrated(quantizer, (x_TI.shape[1],), seen, None)
        if (amax := _amax(made)) is not None:
            known[key] = amax.clone()
        return made

    def _calibrated(
        self, quantizer: Quantizer, shape: tuple[int, ...], tensor: Tensor, known: Tensor | None
    ) -> TensorQuantizer:
        key = (quantizer.id, shape)
        if key not in self._made:
            self._made[key] = new_quantizer(quantizer, tensor.device)
        made = self._made[key]
        if not made._dynamic and not made.is_mx_format:
            made.reset_amax()
            if known is not None:
                made.amax = known
            else:
                calibrate(made, [tensor])
        return made


class _RowBlocks(TensorQuantizer):
    """Dynamic blocks of a row with a range each, for tensors of any number of rows.

    ModelOpt's own quantizer of such blocks accepts only the shape of the first tensor that it quantizes.
    """

    def __init__(self, config: QuantizerAttributeConfig, block: int) -> None:
        super().__init__(config)
        self._block = block

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.reshape(-1, self._block)).view_as(inputs)


def new_quantizer(quantizer: Quantizer, device: torch.device) -> TensorQuantizer:
    """One of ModelOpt's quantizers, without a range yet.

    Args:
        quantizer: its attributes.
        device: of the tensors that it will quantize; it decides which kernels.
    """
    block = _row_block(quantizer)
    whole_rows = {**quantizer.attributes, "block_sizes": {**quantizer.block_sizes, -1: None}}
    plain = quantizer if block is None else Quantizer(whole_rows)
    fast = device.type == "cuda" and tensor_formats.supports(plain)
    fields = {**plain.attributes, "backend": tensor_formats.BACKEND} if fast else with_backend(plain)
    config = QuantizerAttributeConfig.model_validate(fields)
    return (TensorQuantizer(config) if block is None else _RowBlocks(config, block)).to(device)


def _row_block(quantizer: Quantizer) -> int | None:
    """The block length of a format whose blocks lie along rows and have a dynamic range each, None for others."""
    along_rows = quantizer.is_dynamic and not quantizer.has_dynamic_blocks and [*quantizer.block_lengths] == [-1]
    return quantizer.block_lengths[-1] if along_rows else None


def _amax(made: TensorQuantizer) -> Tensor | None:
    return getattr(made, "_amax", None)


def range_of(made: TensorQuantizer) -> Tensor | None:
    """A calibrated quantizer's range (amax), None for dynamic ranges and MX formats."""
    return None if made._dynamic or made.is_mx_format else _amax(made)


def quantized(made: TensorQuantizer, tensor: Tensor) -> Tensor:
    """The tensor quantized in float32, whatever its dtype."""
    return made(tensor if made.backend == tensor_formats.BACKEND else tensor.float())


def calibrate(made: TensorQuantizer, tensors: Iterable[Tensor]) -> None:
    """Set a quantizer's range with its own calibrator."""
    made.disable_quant()
    made.enable_calib()
    for tensor in tensors:
        made(tensor)
    made.load_calib_amax()
    made.disable_calib()
    made.enable_quant()


def with_backend(quantizer: Quantizer) -> Attributes:
    """The attributes with our backend for dynamic blocks, and for FP8 in others under power-of-two scales.

    The former are exact on a CPU, and on a GPU ModelOpt's kernels with the recipe's block size; the latter are ours.
    """
    is_ours = quantizer.has_dynamic_blocks or quantizer.has_e8m0_blocks
    backend = {"backend": block_formats.BACKEND} if is_ours else {}
    return {**quantizer.attributes, **backend}


def _range_key(quantizer: Quantizer) -> str:
    """A key of the range: formats of one axis or static block size share it, whatever their number of bits."""
    lengths = {} if quantizer.has_dynamic_blocks else quantizer.block_lengths
    return repr((quantizer.axis, sorted(lengths.items())))


@torch.enable_grad()
def auto_quantize_state(
    model: nn.Module,
    recipes: Sequence[tuple[Sequence[Entry], str]],
    batches: Sequence[Batch],
    covered: Sequence[str],
    *,
    bits: float,
    **options: Any,
) -> Mapping[str, Any]:
    """Stock `mtq.auto_quantize` on a copy of the model, with the loss summed over predictions.

    Args:
        model: unquantized; it is not touched.
        recipes: entries and algorithm of each, to choose among.
        batches: calibrated and scored on, all of them.
        covered: names of the modules to choose for; all others, convolutions too, stay unquantized.
        bits: its `effective_bits` constraint, over all linears of the model, disabled ones too.
        options: further arguments of `mtq.auto_quantize`.

    Returns: the searcher's state.
    """
    parameter = next(model.parameters())

    def forward_step(network: nn.Module, batch: Batch) -> Tensor:
        return network(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False).logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            copy.deepcopy(model).requires_grad_(True),
            constraints={"effective_bits": bits},
            quantization_formats=[
                {"quant_cfg": list(map(_entry, entries)), "algorithm": algorithm} for entries, algorithm in recipes
            ],
            data_loader=list(batches),
            forward_step=forward_step,
            loss_func=lambda logits, batch: summed_loss(logits, labels_of(batch)),
            disabled_layers=[name for name, _ in model.named_modules() if name not in covered],
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            **options,
        )
    return state


def auto_quantize_scores(
    model: nn.Module,
    quant_cfg: Sequence[Entry],
    algorithm: str,
    batches: Sequence[Batch],
    covered: Sequence[str],
) -> dict[str, float]:
    """Stock `mtq.auto_quantize` on a copy of the model: one format a call, so that no score is clamped to another's.

    Args:
        model: unquantized; it is not touched.
        quant_cfg: ModelOpt's ordered entries.
        algorithm: ModelOpt's calibration algorithm.
        batches: calibrated and scored on, all of them, with the loss summed over predictions.
        covered: names of the modules to score; all others, convolutions too, stay unquantized.

    Returns: raw score by layer group of ModelOpt's, named by its first module, in the model's order. A group of
        `layer_groups` has the sum of those of ModelOpt's that it joins.
    """
    # 16 bits let any search pass: only the scores are used.
    state = auto_quantize_state(model, [(quant_cfg, algorithm)], batches, covered, bits=16.0, verbose=False)
    scores: dict[str, float] = {}
    for name, stats in state["candidate_stats"].items():
        if len(stats["scores"]) == 2:  # groups that are disabled have the unquantized choice only
            scores[name.removesuffix(".quant_recipe")] = float(stats["scores"][0])
    if not scores:
        raise SweepError("mtq.auto_quantize scored no layer group: every linear is disabled.")
    return scores


def _entry(entry: Entry) -> dict[str, Attributes | str | bool]:
    """An entry as ModelOpt takes it, with our backend for dynamic blocks."""
    return entry.to_modelopt() | ({"cfg": with_backend(Quantizer(entry.cfg))} if entry.cfg else {})
