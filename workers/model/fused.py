"""Decoder layers in few kernels, with the roundings of transformers' own.

A layer of transformers launches seven kernels a norm and a dozen for the rotary embedding, and attends over whole
packed rows, though a sample sees only itself. Here a norm (with the residual's sum before it), the rotary embedding of
queries and keys (with their norms), attention and SiLU's product are one kernel each on a GPU. The kernels are ours:
liger-kernel 0.8.5 has no attention that knows where samples begin, and its rotary embedding writes into what it is
given, transposed, and takes no norm before it; torch.compile takes longer than it saves in a first trial.

Whether a layer is what these kernels compute is not asked of its class: it must have the same parts, and give the same
hidden states on a batch of the data.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.model.decoder import Arguments, Decoder
from workers.model.hooks import removed_after, replaced_forwards

_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS: Final = ("self_attn.q_norm", "self_attn.k_norm")
_LINEARS: Final = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
# Of a row's norm: some steps of the dtype; in float32 a GPU's exponential function is off by more.
_TOLERANCE_STEPS: Final = 4.0
_TOLERANCE: Final = 1e-5
_Hook = Callable[[nn.Module, tuple[Tensor, ...], Arguments, Tensor], None]


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm, as Llama's and Qwen's: the normalized value is rounded, then multiplied."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> "Self | None":
        """The norm that a module is, None if it keeps its weight and epsilon otherwise."""
        eps, weight = vars(module).get("variance_epsilon"), dict(module.named_parameters()).get("weight")
        return None if weight is None or not isinstance(eps, float) else cls(weight.detach(), eps)


def add_norm(x_TH: Tensor, added_TH: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The sum of both, and its norm: [rows, hidden] each.

    Args:
        x_TH: [rows, hidden].
        added_TH: the same; None: the sum is x_TH itself.
        norm: over hidden.
    """
    if x_TH.is_cuda:
        from workers.model import fused_triton

        return fused_triton.add_norm(x_TH, added_TH, norm.weight, norm.eps)
    total_TH = x_TH if added_TH is None else x_TH + added_TH
    return total_TH, _normalized(total_TH, norm)


def rotated(
    q_TN: Tensor, k_TN: Tensor, norms: tuple[Norm, Norm] | None, cos_TD: Tensor, sin_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each head normalized if there are norms, and turned by its position.

    Args:
        q_TN: [rows, heads x head dimension].
        k_TN: [rows, key heads x head dimension].
        norms: of the queries' heads and of the keys'.
        cos_TD: [rows, head dimension]; entry d goes with entry d + half, as Llama has it.
        sin_TD: the same.

    Returns: new tensors of the same shapes.
    """
    if q_TN.is_cuda:
        from workers.model import fused_triton

        given = None if norms is None else (norms[0].weight, norms[1].weight, norms[0].eps)
        return fused_triton.rotated(q_TN, k_TN, given, cos_TD, sin_TD)
    q_norm, k_norm = norms or (None, None)
    return _rotated(q_TN, q_norm, cos_TD, sin_TD), _rotated(k_TN, k_norm, cos_TD, sin_TD)


def attention(q_TN: Tensor, k_TN: Tensor, v_TN: Tensor, starts_T: Tensor, head_dim: int, scale: float) -> Tensor:
    """Causal attention within samples, [rows, heads x head dimension].

    Args:
        q_TN: [rows, heads x head dimension].
        k_TN: [rows, key heads x head dimension]; key heads divide heads.
        v_TN: the same.
        starts_T: [rows] int32, the first row of each row's sample.
        head_dim: of all three.
        scale: of the products of queries and keys.
    """
    if q_TN.is_cuda:
        from workers.model import fused_triton

        return fused_triton.attention(q_TN, k_TN, v_TN, starts_T, head_dim, scale)
    row = torch.arange(len(starts_T))
    is_seen = (row[None, :] <= row[:, None]) & (row[None, :] >= starts_T[:, None])
    q, k, v = (each.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None] for each in (q_TN, k_TN, v_TN))
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1).flatten(1)


def silu_product(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up, [rows, intermediate]."""
    if gate_TI.is_cuda:
        from workers.model import fused_triton

        return fused_triton.silu_product(gate_TI, up_TI)
    return F.silu(gate_TI) * up_TI


def _normalized(x: Tensor, norm: Norm) -> Tensor:
    values = x.float()
    scaled = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + norm.eps)
    return norm.weight * scaled.to(x.dtype)


def _rotated(x_TN: Tensor, norm: Norm | None, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    heads = x_TN.unflatten(-1, (-1, cos_TD.shape[-1]))
    if norm is not None:
        heads = _normalized(heads, norm)
    first, second = heads.chunk(2, -1)
    return (heads * cos_TD[:, None] + torch.cat([-second, first], -1) * sin_TD[:, None]).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLayer:
    """One decoder layer's forward function. Its linears are called as modules: their hooks and replacements hold."""

    linears: tuple[nn.Module, ...]  # by _LINEARS
    norms: tuple[Norm, Norm]
    head_norms: tuple[Norm, Norm] | None  # of queries and keys
    head_dim: int
    scale: float

    @classmethod
    def of(cls, layer: nn.Module, longest: int) -> "Self | None":
        """A layer in parts, None if it has others.

        Args:
            layer: any module.
            longest: tokens of the longest sample; a layer that attends over fewer is none of these.
        """
        parts = dict(layer.named_modules())
        holders = {name for name, module in parts.items() if next(module.parameters(recurse=False), None) is not None}
        if holders - {*_HEAD_NORMS} != {*_LINEARS, *_NORMS} or any("forward" in vars(each) for each in parts.values()):
            return None
        attends = vars(parts["self_attn"])
        window = attends.get("sliding_window", getattr(attends.get("config"), "sliding_window", None))
        norms = [Norm.of(parts[name]) for name in (*_NORMS, *_HEAD_NORMS) if name in holders]
        found = [norm for norm in norms if norm is not None]
        if len(found) < len(norms) or len(norms) == 3 or not attends.keys() >= {"head_dim", "scaling"}:
            return None
        if (window is not None and window < longest) or len({norm.eps for norm in found[2:]}) > 1:
            return None
        first, second, *of_heads = found
        return cls(
            linears=tuple(parts[name] for name in _LINEARS),
            norms=(first, second),
            head_norms=(of_heads[0], of_heads[1]) if of_heads else None,
            head_dim=attends["head_dim"],
            scale=attends["scaling"],
        )

    def forward(self, hidden_BTH: Tensor, starts_T: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        """The layer's output, [batch, tokens, hidden].

        Args:
            hidden_BTH: its input.
            starts_T: see `attention`, of the flattened batch.
            cos_BTD: see `rotated`; [batch or 1, tokens, head dimension].
            sin_BTD: the same.
        """
        q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = self.linears
        cos, sin = (each.expand(len(hidden_BTH), -1, -1).flatten(0, 1) for each in (cos_BTD, sin_BTD))
        x_TH, normed_TH = add_norm(hidden_BTH.flatten(0, 1), None, self.norms[0])
        q, k = rotated(q_proj(normed_TH), k_proj(normed_TH), self.head_norms, cos, sin)
        attended = attention(q, k, v_proj(normed_TH), starts_T, self.head_dim, self.scale)
        x_TH, normed_TH = add_norm(x_TH, o_proj(attended), self.norms[1])
        x_TH = x_TH + down_proj(silu_product(gate_proj(normed_TH), up_proj(normed_TH)))
        return x_TH.view_as(hidden_BTH)


class FusedDecoder:
    """The decoder layers and the final norm of a model, which it runs instead of its own where it is told to."""

    def __init__(self, decoder: Decoder, layers: Sequence[FusedLayer], norm: Norm) -> None:
        """Take parts of equal results. Args: see `fused_decoder`."""
        self._decoder, self._layers, self._norm = decoder, layers, norm

    @contextmanager
    def running(self, starts_T: Tensor) -> Generator[None]:
        """Have the model run these layers, until the block ends. Args: starts_T: see `attention`, of its batch."""

        def forward(layer: FusedLayer) -> Callable[..., Tensor]:
            # What the model passes on beside these describes masks, which starts_T does, and caches, of which none is.
            return lambda hidden_BTH, *, position_embeddings, **_: layer.forward(
                hidden_BTH, starts_T, *position_embeddings
            )

        forwards = {f"layers.{index}": forward(layer) for index, layer in enumerate(self._layers)}
        forwards["norm"] = lambda hidden_BTH: _final(hidden_BTH, self._norm)
        with replaced_forwards(self._decoder.text, forwards):
            yield


@torch.no_grad()
def fused_decoder(
    decoder: Decoder, inputs: Mapping[str, Tensor], lengths: Sequence[int], longest: int
) -> FusedDecoder | None:
    """A decoder's layers and final norm, fused; None if any of them is another function, or is spread over devices.

    Args:
        decoder: of the model.
        inputs: a batch, from workers.model.forward.batch_to, on which the model's own layers are run beside the fused.
        lengths: tokens of each of its samples.
        longest: tokens of the longest sample of any batch.
    """
    layers = [FusedLayer.of(layer, longest) for layer in decoder.layers]
    found, norm = [layer for layer in layers if layer is not None], Norm.of(decoder.norm)
    devices = {parameter.device for parameter in decoder.text.parameters()}
    if len(found) < len(layers) or norm is None or len(devices) > 1:
        return None
    starts_T = starts_of(lengths, *devices)
    agree: list[bool] = []

    def compare(layer: FusedLayer) -> _Hook:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments, output: Tensor) -> None:
            turns = kwargs.get("position_embeddings")
            if not isinstance(turns, Sequence) or {each.shape[-1] for each in turns} != {layer.head_dim}:
                agree.append(False)
            elif {each.dim() for each in turns} == {3}:
                agree.append(_agree(layer.forward(args[0], starts_T, *turns), output, args[0]))

        return hook

    def compare_norm(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        agree.append(_agree(_final(args[0], norm), output, output))

    pairs = zip(decoder.layers, found, strict=True)
    handles = [module.register_forward_hook(compare(layer), with_kwargs=True) for module, layer in pairs]
    with removed_after([*handles, decoder.norm.register_forward_hook(compare_norm)]):
        decoder.output(inputs)
    return FusedDecoder(decoder, found, norm) if len(agree) == len(layers) + 1 and all(agree) else None


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The first row of each row's sample, [rows] int32. Args: lengths: rows of each sample."""
    counts = torch.tensor(lengths)
    return (counts.cumsum(0) - counts).repeat_interleave(counts).int().to(device)


def _final(hidden_BTH: Tensor, norm: Norm) -> Tensor:
    return add_norm(hidden_BTH.flatten(0, -2), None, norm)[1].view_as(hidden_BTH)


def _agree(found: Tensor, expected: Tensor, before: Tensor) -> bool:
    """Whether two outputs are one function's, rounded at other places; never, where one is not finite.

    Args:
        found: [..., hidden].
        expected: the same.
        before: what the function was given and has added to: its rounding is the output's.
    """
    if found.dtype != expected.dtype:
        return False
    apart, added, kept = (
        torch.linalg.vector_norm(each, dim=-1, dtype=torch.float32)
        for each in (found.float() - expected.float(), expected.float() - before.float(), before)
    )
    tolerance = max(_TOLERANCE, _TOLERANCE_STEPS * torch.finfo(found.dtype).eps)
    return bool((apart <= tolerance * (added + kept)).all())
