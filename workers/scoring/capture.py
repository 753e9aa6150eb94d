"""Capture: one forward and backward pass of the unquantized model that keeps every linear's input and output gradient.

For each linear its input x [rows, in] and the gradient g [rows, out] of the summed loss with respect to its output.
That is all that any recipe's score needs, so the model runs once, not once a recipe.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from sweep.core.batches import Batch
from sweep.core.errors import SweepError
from sweep.core.groups import is_vision
from workers.model.decoder import decoder_of
from workers.model.forward import attention_of, batch_to, labels_of, summed_loss
from workers.model.hooks import removed_after
from workers.model.memory import HEAD_ROWS
from workers.scoring.layout import FloatArray, Layout, Segments, layout_of, patch_kinds, token_kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One linear's inputs and output gradients, over all segments."""

    x_TI: Tensor  # [rows, in], model dtype; linears with the same input tensor share it
    g_TO: Tensor  # [rows, out], dLoss/dy, model dtype
    y_square_sums: FloatArray  # [samples], in data set order: sum of squares of the unquantized output
    input_amaxes: FloatArray  # [samples], in data set order: largest |x|; NaN if there is one
    layout: Layout
    # Calibration ranges found so far, see workers.quant.modelopt.Quantizers.inputs; shared as x is.
    input_ranges: dict[tuple[str, int], Tensor]


def capture(model: nn.Module, segments: Segments, modules: Sequence[str]) -> dict[str, Rows]:
    """Run segments of a plan through the model and keep the named linears' inputs and output gradients.

    Modules below the first named one take no part in the backward pass.

    Args:
        model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
        segments: leading segments of the plan, in canonical order.
        modules: names of nn.Linear modules of `model`.

    Returns: rows by module name; a module that no batch called is absent.

    Raises: SweepError: a module is called on other rows than the batch's tokens or patches, on fewer or more.
    """
    parameter = next(model.parameters())
    decoder = decoder_of(model)
    recorder = Recorder(segments, parameter.device)
    attention = attention_of(chain.from_iterable(segments), parameter.device)
    with recorder.attached(model, modules), attention, torch.enable_grad():
        for batch in recorder.batches():
            inputs, labels = batch_to(batch, parameter.device, parameter.dtype), labels_of(batch)
            if decoder is not None:
                backward_from(decoder.output(inputs), decoder.head, labels)
            else:
                _backward(summed_loss(model(**inputs, use_cache=False).logits, labels))
    return recorder.rows()


def backward_from(output_BTH: Tensor, head: nn.Module, labels: Tensor) -> None:
    """Backward pass of the summed loss through head and model, with the logits of at most HEAD_ROWS rows in memory.

    Args:
        output_BTH: the final norm's output, with the graph that made it.
        head: the output layer, from [rows, hidden] to logits.
        labels: [batch, tokens], already shifted.
    """
    gradient_BTH = output_BTH.new_zeros(output_BTH.shape)
    tensors = (output_BTH.detach(), labels[..., None], gradient_BTH)
    pieces = [tensor.flatten(0, 1).split(HEAD_ROWS) for tensor in tensors]
    for piece_TH, piece_labels, piece_gradient_TH in zip(*pieces, strict=True):
        leaf_TH = piece_TH.detach().requires_grad_(output_BTH.requires_grad)
        _backward(summed_loss(head(leaf_TH)[None], piece_labels))
        if leaf_TH.grad is not None:
            piece_gradient_TH.copy_(leaf_TH.grad)
    if output_BTH.requires_grad:
        output_BTH.backward(gradient_BTH)


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # not if no captured module took part
        loss.backward()


class _Buffer:
    """Memory for all rows of one module; rows that no call fills stay 0 and add nothing to any score."""

    def __init__(self, layout: Layout, in_features: int, y_TO: Tensor, shares: "_Buffer | None") -> None:
        n_rows = layout.ends[-1]
        self.layout, self.shares = layout, shares
        # On the module's device: its input may come from another GPU.
        self.x_TI = y_TO.new_zeros(n_rows, in_features) if shares is None else shares.x_TI
        self.g_TO = y_TO.new_zeros(n_rows, y_TO.shape[1])
        self.y_squares_T = torch.zeros(n_rows, device=y_TO.device)  # sum of squares of each row of the output
        self.batch, self.end = -1, 0  # the last batch that called it, and the rows filled then


class Recorder:
    """Forward hooks that keep x, and put a backward hook on the output that keeps g."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self._segments, self._device = segments, device
        self._layouts: dict[Fraction, Layout] = {}  # by rows a patch; 0: rows are tokens
        self._buffers: dict[str, _Buffer] = {}
        self._n_batch = -1
        # Inputs of this batch by address; the tensors are held, so that no address is used twice.
        self._seen: dict[int, tuple[_Buffer, Tensor]] = {}

    @contextmanager
    def attached(self, model: nn.Module, modules: Sequence[str]) -> Generator[None]:
        """Record the named modules in every forward and backward pass of the block."""
        handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in modules]
        with removed_after(handles):
            yield

    def batches(self) -> Generator[Batch]:
        """Every batch in canonical order; each is to be run before the next is taken."""
        for batches in self._segments:
            for batch in batches:
                self._batch = batch
                self._n_batch += 1
                self._seen.clear()
                yield batch
                self._check_filled()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # the first linears: nothing before them takes a gradient
                # A copy, for a model may change it in place, as Gemma 3n does, and no leaf may be changed.
                output = output.requires_grad_().clone()
            x_TI, y_TO = args[0].detach().flatten(0, -2), output.detach().flatten(0, -2)
            found = self._seen.get(x_TI.data_ptr())
            if (buffer := self._buffers.get(name)) is None:
                layout = self._layout(name, len(x_TI))
                buffer = self._buffers[name] = _Buffer(layout, x_TI.shape[1], y_TO, found and found[0])
            rows = self._rows(name, buffer, len(x_TI))
            if buffer.shares is None:
                buffer.x_TI[rows] = x_TI
                self._seen[x_TI.data_ptr()] = buffer, x_TI
            elif found is None or found[0] is not buffer.shares:
                raise RuntimeError(
                    f"{name} shared its input with another linear in the first batch, but not in a later one."
                )
            buffer.y_squares_T[rows] = row_square_sums(y_TO)

            def keep_gradient(gradient: Tensor) -> None:
                buffer.g_TO[rows] = gradient.detach().flatten(0, -2)

            output.register_hook(keep_gradient)
            return output

        return keep

    def rows(self) -> dict[str, Rows]:
        """The recorded rows, by module name."""
        found: dict[str, Rows] = {}
        shared: dict[_Buffer, tuple[FloatArray, dict[tuple[str, int], Tensor]]] = {}  # ranges, by owner of x
        for name, buffer in self._buffers.items():
            layout = buffer.layout
            if buffer.shares is None:
                shared[buffer] = layout.by_sample(_row_amaxes(buffer.x_TI), "max"), {}
            input_amaxes, input_ranges = shared[buffer.shares or buffer]
            found[name] = Rows(
                x_TI=buffer.x_TI,
                g_TO=buffer.g_TO,
                y_square_sums=layout.by_sample(buffer.y_squares_T.double(), "sum"),
                input_amaxes=input_amaxes,
                layout=layout,
                input_ranges=input_ranges,
            )
        return found

    def _layout(self, name: str, n_rows: int) -> Layout:
        n_patches = sum(self._batch.patch_counts) if is_vision(name) else 0
        rows_a_patch = Fraction(n_rows, n_patches) if n_patches else Fraction(0)
        if rows_a_patch not in self._layouts:
            kinds_of = partial(patch_kinds, rows_a_patch=rows_a_patch) if rows_a_patch else token_kinds
            self._layouts[rows_a_patch] = layout_of(self._segments, kinds_of, self._device)
        return self._layouts[rows_a_patch]

    def _check_filled(self) -> None:
        """Raises: SweepError: rows of this batch lack, so those that are there may be of any of its samples."""
        for name, buffer in self._buffers.items():
            first, last = buffer.layout.batch_ends[self._n_batch : self._n_batch + 2]
            if buffer.batch == self._n_batch and buffer.end < last:
                raise _not_scored(name, buffer.end - first, last - first)

    def _rows(self, name: str, buffer: _Buffer, n_rows: int) -> slice:
        """The place of a call's rows in the buffer.

        A module may be called several times for one batch, each time on the rows after those of the call before.
        """
        first, last = buffer.layout.batch_ends[self._n_batch : self._n_batch + 2]
        start = buffer.end if buffer.batch == self._n_batch else first
        if start + n_rows > last:
            raise _not_scored(name, start + n_rows - first, last - first)
        buffer.batch, buffer.end = self._n_batch, start + n_rows
        return slice(start, buffer.end)


def _not_scored(name: str, n_called: int, n_rows: int) -> SweepError:
    advice = " Choose sensitivity.coverage=lm_only." if is_vision(name) else ""
    return SweepError(
        f"{name} is called on {n_called} rows where the batch has {n_rows}: it cannot be scored by sample.{advice}"
    )


def row_square_sums(tensor_TO: Tensor) -> Tensor:
    """Sum of squares of each row, in fp32: [rows]."""
    values = tensor_TO.float()
    return torch.linalg.vecdot(values, values)


def square_sum(tensor_TO: Tensor) -> Tensor:
    """Sum of squares of a matrix, a float64 scalar: rows in fp32, over rows in fp64.

    That costs a seventh of fp64 throughout.
    """
    return row_square_sums(tensor_TO).double().sum()


def _row_amaxes(x_TI: Tensor) -> Tensor:
    """Largest magnitude of each row, NaN if there is one, without a copy of the tensor: [rows] float32."""
    if not x_TI.numel():
        return x_TI.new_zeros(len(x_TI), dtype=torch.float32)
    low, high = torch.aminmax(x_TI, dim=1)
    return torch.maximum(-low, high).float()
