"""Capture: one forward and backward pass of the unquantized model that keeps every linear's input and output gradient.

For each linear its input x [rows, in] and the gradient g [rows, out] of the summed loss with respect to its output.
That is all that any recipe's score needs, so the model runs once, not once a recipe. Where labels are drawn, there is a
backward pass and a g for each draw, of the same forward pass.
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
from workers.model.forward import attention_of, batch_to, summed_loss
from workers.model.hooks import removed_after
from workers.model.memory import HEAD_ROWS
from workers.scoring.labels import Targets, targets_of
from workers.scoring.layout import FloatArray, Layout, Segments, layout_of, patch_kinds, token_kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """One linear's inputs and output gradients, over all segments."""

    x_TI: Tensor  # [rows, in], model dtype; linears with the same input tensor share it
    g_DTO: Tensor  # [draws, rows, out], dLoss/dy, model dtype; one, of the data's own labels, where none are drawn
    is_drawn: bool
    y_square_sums: FloatArray  # [samples], in data set order: sum of squares of the unquantized output
    input_amaxes: FloatArray  # [samples], in data set order: largest |x|; NaN if there is one
    layout: Layout
    # Calibration ranges found so far, see workers.quant.modelopt.Quantizers.inputs; shared as x is.
    input_ranges: dict[tuple[str, int], Tensor]

    @property
    def g_TO(self) -> Tensor:
        """[rows, out], of the data's own labels."""
        (g_TO,) = self.g_DTO
        return g_TO


def capture(model: nn.Module, segments: Segments, modules: Sequence[str], draws: int | None = None) -> dict[str, Rows]:
    """Run segments of a plan through the model and keep the named linears' inputs and output gradients.

    Modules below the first named one take no part in the backward pass.

    Args:
        model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
        segments: leading segments of the plan, in canonical order.
        modules: names of nn.Linear modules of `model`.
        draws: labels that the model draws at each prediction; None: the data's own count.

    Returns: rows by module name; a module that no batch called is absent.

    Raises: SweepError: a module is called on other rows than the batch's tokens or patches, on fewer or more.
    """
    parameter = next(model.parameters())
    decoder = decoder_of(model)
    recorder = Recorder(segments, parameter.device, draws)
    attention = attention_of(chain.from_iterable(segments), parameter.device)
    with recorder.attached(model, modules), attention, torch.enable_grad():
        for batch in recorder.batches():
            inputs, targets = batch_to(batch, parameter.device, parameter.dtype), targets_of(batch, draws)
            if decoder is not None:
                output_BTH = decoder.output(inputs)
                recorder.backward(output_BTH, recorder.head_gradients(output_BTH, decoder.head, targets))
            else:
                logits_TV = model(**inputs, use_cache=False).logits.flatten(0, 1)
                for _ in recorder.backward_losses(logits_TV, targets):
                    pass
    return recorder.rows()


class _Buffer:
    """Memory for all rows of one module; rows that no call fills stay 0 and add nothing to any score."""

    def __init__(self, layout: Layout, in_features: int, y_TO: Tensor, n_passes: int, shares: "_Buffer | None") -> None:
        n_rows = layout.ends[-1]
        self.layout, self.shares = layout, shares
        # On the module's device: its input may come from another GPU.
        self.x_TI = y_TO.new_zeros(n_rows, in_features) if shares is None else shares.x_TI
        self.g_DTO = y_TO.new_zeros(n_passes, n_rows, y_TO.shape[1])
        self.y_squares_T = torch.zeros(n_rows, device=y_TO.device)  # sum of squares of each row of the output
        self.batch, self.end = -1, 0  # the last batch that called it, and the rows filled then


class Recorder:
    """Forward hooks that keep x, and put a backward hook on the output that keeps g.

    Every backward pass goes through a method of it, which knows the number of the draw whose g it keeps.
    """

    def __init__(self, segments: Segments, device: torch.device, draws: int | None) -> None:
        self._segments, self._device, self._draws = segments, device, draws
        self._pass = 0  # number of the draw
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
                buffer = _Buffer(layout, x_TI.shape[1], y_TO, self._draws or 1, found and found[0])
                self._buffers[name] = buffer
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
                buffer.g_DTO[self._pass, rows] = gradient.detach().flatten(0, -2)

            output.register_hook(keep_gradient)
            return output

        return keep

    def head_gradients(self, output_BTH: Tensor, head: nn.Module, targets: Targets) -> Tensor:
        """The gradient of the summed loss at the final norm's output: [passes, batch, tokens, hidden].

        The logits of at most HEAD_ROWS rows are in memory.

        Args:
            output_BTH: the final norm's output.
            head: the output layer, from [rows, hidden] to logits.
            targets: of the batch.
        """
        gradients_DBTH = output_BTH.new_zeros(targets.n_passes, *output_BTH.shape)
        gradients_DTH = gradients_DBTH.flatten(1, 2)
        for start in range(0, gradients_DTH.shape[1], HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            leaf_TH = output_BTH.detach().flatten(0, 1)[rows].requires_grad_(output_BTH.requires_grad)
            for number in self.backward_losses(head(leaf_TH), targets, start):
                if leaf_TH.grad is not None:
                    gradients_DTH[number, rows] = leaf_TH.grad
                    leaf_TH.grad = None
        return gradients_DBTH

    def backward_losses(self, logits_TV: Tensor, targets: Targets, start: int = 0) -> Generator[int]:
        """A backward pass of the summed loss for each draw. Args: as of Targets.of. Yields: its number, after it."""
        if not logits_TV.requires_grad:  # no captured module took part
            return
        for number, labels_T in enumerate(labels := targets.of(logits_TV, start)):
            self._pass = number
            summed_loss(logits_TV[None], labels_T).backward(retain_graph=number + 1 < len(labels))
            yield number

    def backward(
        self, output: Tensor, gradients: Sequence[Tensor] | Tensor, leaf: Tensor | None = None
    ) -> list[Tensor]:
        """A backward pass from an output for each draw.

        Args:
            output: with the graph that made it.
            gradients: of the loss at it, one a draw.
            leaf: a tensor that it was made from.

        Returns: of each draw the gradient at `leaf`, if that takes one.
        """
        found: list[Tensor] = []
        for number, gradient in enumerate(gradients) if output.requires_grad else ():
            self._pass = number
            output.backward(gradient, retain_graph=number + 1 < len(gradients))
            if leaf is not None and leaf.grad is not None:
                found.append(leaf.grad)
                leaf.grad = None
        return found

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
                g_DTO=buffer.g_DTO,
                is_drawn=self._draws is not None,
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
