"""Capture: one forward and backward pass of the unquantized model, keeping what every linear saw.

For each linear its input x [tokens, in] and the gradient g [tokens, out] of the summed loss with respect to its output.
That is all that any recipe's score needs, so the model runs once, not once a recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.data import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What one linear saw in one segment; its rows are the samples' tokens (or patches), sample after sample."""

    x_TI: Tensor  # [rows, in], model dtype; shared by the linears that read the same tensor
    g_TO: Tensor  # [rows, out], dLoss/dy, model dtype
    y_square_sum: float  # sum of squares of the unquantized output
    samples: tuple[int, ...]  # data set index of each sample, in row order
    lengths: Tensor  # [samples] int64 on x's device: rows of each sample


def batch_to(batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch's tensors as forward's keyword arguments."""
    tensors = {key: torch.from_numpy(value).to(device) for key, value in batch.tensors.items()}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}


def labels_of(batch: Batch) -> Tensor:
    """Next-token labels [batch, tokens] in which a sample's last token predicts nothing (-100)."""
    tokens = torch.from_numpy(batch.tensors["input_ids"]).flatten()
    labels = tokens.roll(-1)
    labels[torch.tensor(batch.lengths).cumsum(0) - 1] = -100
    return labels.view(batch.tensors["input_ids"].shape)


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats, summed over predictions: a score then does not depend on how samples are batched.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens], already shifted; -100 where nothing is predicted.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten().to(logits.device), ignore_index=-100, reduction="sum")


def row_square_sums(tensor_TO: Tensor) -> Tensor:
    """Sum of squares of each row, in fp32: [rows]."""
    values = tensor_TO.float()
    return torch.linalg.vecdot(values, values)


def square_sum(tensor_TO: Tensor) -> float:
    """Sum of squares of a matrix: rows in fp32, over rows in fp64, which costs a seventh of fp64 throughout."""
    return row_square_sums(tensor_TO).double().sum().item()


def capture(model: nn.Module, batches: Sequence[Batch], modules: Sequence[str]) -> dict[str, Rows]:
    """Run the batches of one segment through the model and keep the named linears' inputs and output gradients.

    Args:
        model: evaluation mode, no parameter requiring a gradient (workers.modeling.load).
        batches: the segment's, in canonical order.
        modules: names of nn.Linear modules of `model`.

    Returns: by module name; a module that no batch called is absent.
    """
    parameter = next(model.parameters())
    recorder = _Recorder()
    handles = [model.get_submodule(name).register_forward_hook(recorder.hook(name)) for name in modules]
    try:
        for batch in batches:
            recorder.start(batch)
            with torch.enable_grad():
                logits = model(**batch_to(batch, parameter.device, parameter.dtype), use_cache=False).logits
                loss = summed_loss(logits, labels_of(batch))
                loss.backward()
            del logits, loss
    finally:
        for handle in handles:
            handle.remove()
    return recorder.rows()


@dataclass(slots=True)
class _Call:
    batch: Batch
    x_TI: Tensor
    g_TO: Tensor | None  # None: no gradient came back, the output did not touch the loss
    out_features: int
    y_square_sum: float


class _Recorder:
    """Forward hooks that keep x, and put a hook on the output that keeps g."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._calls: dict[str, list[_Call]] = {}

    def start(self, batch: Batch) -> None:
        self._batch = batch

    def hook(self, name: str) -> Any:
        calls = self._calls.setdefault(name, [])

        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert self._batch is not None
            if not output.requires_grad:
                output.requires_grad_()  # the first linears: nothing before them takes a gradient
            y = output.detach()
            x_TI = args[0].detach().flatten(0, -2)
            call = _Call(self._batch, x_TI, None, y.shape[-1], square_sum(y.flatten(0, -2)))
            calls.append(call)

            def keep_gradient(gradient: Tensor) -> None:
                call.g_TO = gradient.detach().flatten(0, -2)

            output.register_hook(keep_gradient)

        return keep

    def rows(self) -> dict[str, Rows]:
        """Join each module's calls, one module at a time, so that the peak is one copy of one module's tensors."""
        joined: dict[tuple[int, ...], Tensor] = {}  # linears that read the same tensors share one x
        result: dict[str, Rows] = {}
        for name, calls in self._calls.items():
            if not calls:
                continue
            key = tuple(call.x_TI.data_ptr() for call in calls)
            if key not in joined:
                joined[key] = torch.cat([call.x_TI for call in calls])
            x_TI = joined[key]
            gradients = [call.g_TO if call.g_TO is not None else call.x_TI.new_zeros(len(call.x_TI), call.out_features) for call in calls]
            result[name] = Rows(
                x_TI=x_TI,
                g_TO=torch.cat(gradients),
                y_square_sum=sum(call.y_square_sum for call in calls),
                samples=tuple(i for call in calls for i in call.batch.order),
                lengths=torch.tensor([n for call in calls for n in _row_counts(call)], device=x_TI.device),
            )
            for call in calls:
                call.g_TO = None
        return result


def _row_counts(call: _Call) -> tuple[int, ...]:
    """Rows of each sample in one call: its tokens, or its patches (merged ones, after a merger)."""
    batch, n_rows = call.batch, len(call.x_TI)
    if n_rows == sum(batch.lengths):
        return batch.lengths
    n_patches = sum(batch.patch_counts)
    if not n_patches or n_patches % n_rows:
        raise RuntimeError(f"{n_rows} rows fit neither {sum(batch.lengths)} tokens nor {n_patches} patches of the batch.")
    return tuple(count * n_rows // n_patches for count in batch.patch_counts)
