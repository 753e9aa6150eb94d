"""Capture a window of decoder layers at a time, where the inputs and gradients of all linears would not fit in memory.

One forward without gradients keeps each window's hidden input. Then, from the top down, each window's layers alone run
again with gradients, from that hidden state, and back from the gradient that the window above has left at it (one a
draw, where labels are drawn). So all windows together cost one forward more than one capture, however many they are,
and give the same bits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from workers.model.decoder import Decoder, Trace, decoder_of
from workers.model.forward import attention_of, batch_to
from workers.scoring.capture import Recorder, Rows, capture
from workers.scoring.labels import targets_of
from workers.scoring.layout import Segments


@dataclass(frozen=True, slots=True)
class _Window:
    index: int  # in the caller's order
    start: int  # first decoder layer to run again; n_layers if there is the head alone
    inside: tuple[str, ...]  # modules of these layers, and the head's in the topmost window
    outside: tuple[str, ...]  # all others: an ordinary capture


def captures(
    model: nn.Module, segments: Segments, windows: Sequence[Sequence[str]], draws: int | None = None
) -> Iterator[tuple[int, dict[str, Rows]]]:
    """Capture modules as `workers.scoring.capture.capture` does, but a window at a time.

    Args:
        model: as for `capture`.
        segments: as for `capture`.
        windows: module names. A window's decoder layers are all below those of another or all above; it may name
            modules outside the decoder layers too, and those cost a pass of their own, except for the head in the
            topmost window.
        draws: as for `capture`.

    Yields: a window's index and its rows, from the last decoder layers to the first, then windows without decoder
        layers. For a model of another type than workers.model.loading.PACKABLE in the order given, each an ordinary
        capture. A window's dictionary is emptied when the next is asked for, so that it need not be let go of to free
        its memory.

    Raises: ValueError: two windows share a decoder layer, or reach into each other's.
    """
    for index, rows in _captures(model, segments, windows, draws):
        yield index, rows
        rows.clear()


def _captures(
    model: nn.Module, segments: Segments, windows: Sequence[Sequence[str]], draws: int | None
) -> Iterator[tuple[int, dict[str, Rows]]]:
    decoder = decoder_of(model)
    if decoder is None or len(windows) == 1:
        for index, modules in enumerate(windows):
            yield index, capture(model, segments, modules, draws)
        return
    inner, rest = _arranged(decoder, windows)
    recorded = _Recorded(model, decoder, segments, [window.start for window in inner], draws)
    stop = len(decoder.layers)
    for window in inner:
        rows = recorded.rows(window, stop, is_lowest=window is inner[-1])
        rows |= _ordinary(model, segments, window, draws)  # not a second dictionary: the caller empties this one
        yield window.index, rows
        stop = window.start
    del recorded
    for window in rest:
        yield window.index, _ordinary(model, segments, window, draws)


class _Recorded:
    """Every batch's trace through the decoder, and the gradients at the input of the last window that ran."""

    def __init__(
        self, model: nn.Module, decoder: Decoder, segments: Segments, starts: Sequence[int], draws: int | None
    ) -> None:
        parameter = next(model.parameters())
        self._model, self._decoder, self._segments, self._device = model, decoder, segments, parameter.device
        self._draws = draws
        self._traces: list[Trace] = []
        self._gradients: list[list[Tensor] | None] = []  # by batch, one a draw
        with attention_of(chain.from_iterable(segments), parameter.device):
            for batch in chain.from_iterable(segments) if starts else ():
                self._traces.append(decoder.record(batch_to(batch, parameter.device, parameter.dtype), starts)[0])
                self._gradients.append(None)

    def rows(self, window: _Window, stop: int, *, is_lowest: bool) -> dict[str, Rows]:
        """Run a window's layers, up to the start of the one above."""
        recorder = Recorder(self._segments, self._device, self._draws)
        attention = attention_of(chain.from_iterable(self._segments), self._device)
        with recorder.attached(self._model, window.inside), attention, torch.enable_grad():
            for number, batch in enumerate(recorder.batches()):
                trace, gradients = self._traces[number], self._gradients[number]
                hidden = trace.hidden.pop(window.start).requires_grad_(not is_lowest)
                top = self._decoder.run(trace, hidden, window.start, stop)
                if gradients is None:
                    top, targets = self._decoder.norm(top), targets_of(batch, self._draws)
                    gradients = recorder.head_gradients(top, self._decoder.head, targets)
                self._gradients[number] = recorder.backward(top, gradients, hidden)
        return recorder.rows()


def _arranged(decoder: Decoder, windows: Sequence[Sequence[str]]) -> tuple[list[_Window], list[_Window]]:
    """Windows with decoder layers (or the head alone) from the top down, and the others."""
    inner: list[_Window] = []
    rest: list[_Window] = []
    n_layers = len(decoder.layers)
    layers: list[list[int]] = []
    for modules in windows:
        found = [decoder.layer_of(name) for name in modules]
        layers.append([layer for layer in found if layer is not None])
    highest = max((max(found, default=-1) for found in layers), default=-1)
    for index, modules in enumerate(windows):
        has_top = max(layers[index], default=n_layers) >= highest  # with the topmost layers, or with none
        top = decoder.head_name if has_top else None
        inside = tuple(name for name in modules if decoder.layer_of(name) is not None or name == top)
        outside = tuple(name for name in modules if name not in inside)
        window = _Window(index, min(layers[index], default=n_layers), inside, outside)
        (inner if inside else rest).append(window)
    inner.sort(key=lambda window: window.start, reverse=True)
    for upper, lower in pairwise(inner):
        if max(layers[lower.index], default=n_layers) >= upper.start:
            pair = f"Windows {lower.index} and {upper.index}"
            raise ValueError(f"{pair} are not apart: one must end below decoder layer {upper.start}.")
    return inner, rest


def _ordinary(model: nn.Module, segments: Segments, window: _Window, draws: int | None) -> dict[str, Rows]:
    return capture(model, segments, window.outside, draws) if window.outside else {}
