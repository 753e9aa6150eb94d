"""A language model's decoder layers, run a range at a time.

One ordinary forward of a batch is recorded: the arguments with which each layer was called, and the features that the
model added between layers. From a kept hidden state any range of layers then runs again, with the same bits.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sweep.core.errors import SweepError
from workers.model.hooks import removed_after
from workers.model.loading import PACKABLE, PreTrainedModel

# Keyword arguments of a decoder layer or of the text model: masks, positions, rotary embeddings, deepstack features.
Arguments = dict[str, Tensor | Sequence[Tensor] | bool | None]
_PreHook = Callable[[nn.Module, tuple[Tensor, ...], Arguments], None]


@dataclass(frozen=True, slots=True)
class Features:
    """The features that Qwen3-VL's deepstack adds to a hidden state at an image's positions."""

    positions: Tensor  # [visual tokens] int64, of the flattened batch
    values: Tensor  # [visual tokens, hidden]

    def added_to(self, hidden_BTH: Tensor) -> Tensor:
        """A new hidden state; gradients pass through to the old one."""
        rows = hidden_BTH.flatten(0, 1)
        return rows.index_put((self.positions,), rows[self.positions] + self.values).view_as(hidden_BTH)


@dataclass(frozen=True, slots=True)
class Trace:
    """The recorded pass of one batch through the decoder layers."""

    # Inputs of the layers asked for, [batch, tokens, hidden]; n_layers: the input of the final norm.
    hidden: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    arguments: list[Arguments] = field(default_factory=list[Arguments])  # of each layer
    features: dict[int, Features] = field(
        default_factory=dict[int, Features]
    )  # by the layer after which they are added


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model of a known type, in parts: base (which ends in layers and norm), then head."""

    base: nn.Module
    text: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: nn.Linear
    head_name: str
    prefix: str  # of a layer's modules, without the layer's number: "model.language_model.layers."

    def layer_of(self, module: str) -> int | None:
        """The decoder layer that a module is in, None outside."""
        return int(module.removeprefix(self.prefix).split(".")[0]) if module.startswith(self.prefix) else None

    def output(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """An ordinary forward up to the final norm: [batch, tokens, hidden].

        Args:
            inputs: from workers.model.forward.batch_to.
        """
        return self.base(**inputs, use_cache=False)[0]

    def run(self, trace: Trace, hidden_BTH: Tensor, start: int, stop: int) -> Tensor:
        """Run layers `start` to `stop` (exclusive) from the input of the first.

        Returns: the input of layer `stop`, or of the final norm, deepstack features included.
        """
        for index in range(start, stop):
            hidden_BTH = self.layers[index](hidden_BTH, **trace.arguments[index])
            if (features := trace.features.get(index)) is not None:
                hidden_BTH = features.added_to(hidden_BTH)
        return hidden_BTH

    @torch.no_grad()
    def record(self, inputs: Mapping[str, Tensor], keep: Collection[int]) -> tuple[Trace, Tensor]:
        """Run a batch once, without gradients.

        Args:
            inputs: from workers.model.forward.batch_to.
            keep: layers whose input is kept.

        Returns: the trace, and the output of the final norm.

        Raises: RuntimeError: the model changes the hidden state between two layers in an unknown way.
        """
        trace = Trace()
        last_output: Tensor | None = None

        def enter_text(_module: nn.Module, _args: tuple[Tensor, ...], kwargs: Arguments) -> None:
            mask, values = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
            if isinstance(mask, Tensor) and isinstance(values, Sequence):
                positions, dtype = mask.flatten().nonzero().flatten(), next(self.norm.parameters()).dtype
                for index, value in enumerate(values):
                    trace.features[index] = Features(positions, value.to(dtype))

        def enter(index: int) -> _PreHook:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: Arguments) -> None:
                if last_output is not None and args[0] is not last_output and index - 1 not in trace.features:
                    raise RuntimeError(
                        f"The model changes the hidden state between decoder layers {index - 1} and {index} "
                        "in an unknown way."
                    )
                if index < len(self.layers):
                    trace.arguments.append(kwargs)
                if index in keep:
                    trace.hidden[index] = args[0]

            return hook

        def leave(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal last_output
            last_output = output

        handles = [
            module.register_forward_pre_hook(enter(index), with_kwargs=True)
            for index, module in enumerate((*self.layers, self.norm))
        ]
        handles += [layer.register_forward_hook(leave) for layer in self.layers]
        handles.append(self.text.register_forward_pre_hook(enter_text, with_kwargs=True))
        with removed_after(handles):
            return trace, self.output(inputs)


def decoder_of(model: nn.Module) -> Decoder | None:
    """The parts of a model, None for a type that is not among workers.model.loading.PACKABLE."""
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in PACKABLE:
        return None
    name, layers = next(
        (name, module)
        for name, module in model.named_modules()
        if name.endswith(".layers") and isinstance(module, nn.ModuleList)
    )
    text = model.get_submodule(name.removesuffix(".layers"))
    head_name, head = head_of(model)
    return Decoder(
        model.get_submodule("model"), text, tuple(layers), text.get_submodule("norm"), head, head_name, f"{name}."
    )


def head_of(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """The output layer and its name.

    Raises: SweepError: it is not a linear without a bias.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        raise SweepError(
            f"{type(model).__name__} has no output layer to compare logits of. "
            "Only causal language models can be validated."
        )
    return next(name for name, module in model.named_modules() if module is head), head
