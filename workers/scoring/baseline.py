"""The unquantized model's outputs on calibration data: what KL divergence compares with. Any layer can be rerun."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.core.batches import Batch
from workers.data.batches import in_rows, joined
from workers.model.decoder import Trace, decoder_of
from workers.model.forward import batch_to, labels_of
from workers.model.fused import FusedDecoder, fused_decoder, starts_of
from workers.model.graphs import LayerGraphs
from workers.model.hooks import inputs_seen
from workers.model.memory import HEAD_ROWS
from workers.scoring.divergence import divergence
from workers.scoring.layout import Segments, layout_of, prediction_kinds

_CPU_BYTES: Final = 2 << 30  # for the log-probabilities; on a GPU half of the free memory
# Of a run, where the time of attention does not grow with their square: a GEMM of 2,048 rows fills an H100's 132
# multiprocessors 1.2 times, and so wastes two fifths of the second round.
_ROW_TOKENS: Final = 8192


@dataclass(frozen=True, slots=True)
class _Run:
    """Batches of the plan under the unquantized model, run as one."""

    batch: Batch
    # [predictions] int64 of each of the plan's batches: rows of the flattened `batch` whose next token is valid.
    predictions: tuple[Tensor, ...]
    output_TH: Tensor  # the head's input, all rows; for unknown model types the logits, at the predictions
    trace: Trace | None  # None for unknown model types
    starts_T: Tensor  # see workers.model.fused.attention


class Baseline:
    """One forward pass of the unquantized model, and the KL divergence of a changed model from it.

    Besides the model it holds three hidden states a token, and the log-probabilities at the predictions where they fit
    (2.0 GB for 6,600 predictions over a vocabulary of 151,936 in bf16); otherwise they are computed again whenever
    needed, with the same bits.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, segments: Segments, modules: Sequence[str], sizes: Iterable[int] = ()) -> None:
        """Run the model.

        Args:
            model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
            segments: leading segments of the plan.
            modules: names of the linears whose calibration ranges (amax) of the inputs are recorded.
            sizes: numbers of leading samples that have ranges, besides the segments' ends.
        """
        parameter = next(model.parameters())
        self.decoder = decoder_of(model)
        self.layout = layout_of(segments, prediction_kinds, parameter.device)  # its rows are predictions
        self.inputs = _InputRanges({*self.layout.sample_ends, *sizes})
        self._model, self._device, self._dtype = model, parameter.device, parameter.dtype
        self._fused = self._fused_decoder(segments)
        # Never across segments: the bits of a smaller size are the same alone.
        row_tokens = 0 if self._fused is None else _ROW_TOKENS
        rows = [in_rows(batches, row_tokens) for batches in segments]
        self._run_ends = [*accumulate(map(len, rows))]
        with self.inputs.recorded(model, modules):
            self._runs = [self._run(batches) for batches in chain.from_iterable(rows)]
        self._layer, self._hidden = 0, self._embedded()
        self._log_probs: dict[tuple[int, int], Tensor] = {}
        # On a GPU, [predictions, hidden] of the same: the mean of the head's rows, weighted by these probabilities.
        self._mean_rows: dict[tuple[int, int], Tensor] = {}
        self._graphs: LayerGraphs | None = None
        self._room = torch.cuda.mem_get_info(self._device)[0] // 2 if self._device.type == "cuda" else _CPU_BYTES
        self.first_broken_sample = self._first_broken_sample()

    def runs(self, n_segments: int) -> range:
        """Numbers of the runs of leading segments."""
        return range(self._run_ends[n_segments - 1])

    @property
    def shapes(self) -> list[tuple[int, list[int]]]:
        """Of each run: its rows, and the predictions that the head is called on at a time."""
        return [(sum(run.batch.lengths), [*map(len, run.predictions)]) for run in self._runs]

    def start_at(self, layer: int) -> None:
        """Advance the kept hidden states to the input of a decoder layer.

        All layers, in the model's order, cost one forward.
        """
        assert self.decoder is not None
        if layer < self._layer:
            self._layer, self._hidden = 0, self._embedded()
        for number, run in enumerate(self._runs):
            assert run.trace is not None
            with self._running(run.starts_T):
                self._hidden[number] = self.decoder.run(run.trace, self._hidden[number], self._layer, layer)
        self._layer = layer

    def divergence_after(self, number: int, layer: int | None) -> Tensor:
        """KL divergence of the model, as it is now, from the unquantized one on a run.

        Args:
            number: of the run.
            layer: the one that `start_at` was last given: all before it is unchanged; None: run the whole model.

        Returns: KL(unquantized || changed) of each prediction in nats, [predictions] float64.
        """
        run, decoder = self._runs[number], self.decoder
        if decoder is None:
            return divergence(self.log_probs(number, 0), self._logits(run.batch)[run.predictions[0]] - run.output_TH)
        with self._running(run.starts_T):
            if layer is None or run.trace is None:
                output = decoder.output(batch_to(run.batch, self._device, self._dtype))
            else:
                assert layer == self._layer, "start_at comes first"
                output = decoder.norm(self._run_from(number, run.trace, layer))
        output_TH, found = output.flatten(0, 1), list[Tensor]()
        for part, rows in enumerate(run.predictions):
            log_probs, moved_TH = self.log_probs(number, part), output_TH[rows] - run.output_TH[rows]
            mean_TH = self._mean_rows.get((number, part))  # the mean change of the logits follows, but for roundings
            mean_T = None if mean_TH is None else torch.linalg.vecdot(moved_TH.float(), mean_TH.float())
            found.append(divergence(log_probs, F.linear(moved_TH, decoder.head.weight), mean_T))
        return torch.cat(found)

    def _run_from(self, number: int, trace: Trace, layer: int) -> Tensor:
        """Make a run from the input of `layer` to that of the final norm; only that layer may have been changed."""
        assert self.decoder is not None
        hidden, n_layers = self._hidden[number], len(self.decoder.layers)
        if not hidden.is_cuda:
            return self.decoder.run(trace, hidden, layer, n_layers)
        if self._graphs is None:
            self._graphs = LayerGraphs(self.decoder)
        return self._graphs.run(number, trace, self.decoder.run(trace, hidden, layer, layer + 1), layer + 1)

    def divergence_in_head(self, number: int, change_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """KL divergence of each prediction in nats, [predictions] float64, when only the head changes.

        Args:
            number: of the run.
            change_of: from the head's input, [rows, hidden], and the rows at which something is predicted, to the
                change of the logits, [predictions, vocabulary].
        """
        run = self._runs[number]
        changes = enumerate(run.predictions)
        return torch.cat(
            [divergence(self.log_probs(number, part), change_of(run.output_TH, rows)) for part, rows in changes]
        )

    def log_probs(self, number: int, part: int) -> Tensor:
        """Log-probabilities at predictions of a run, [predictions, vocabulary] in the model's dtype.

        Args:
            number: of the run.
            part: which of the plan's batches in it.
        """
        if (known := self._log_probs.get((number, part))) is not None:
            return known
        run = self._runs[number]
        if self.decoder is None:
            made = run.output_TH.float().log_softmax(-1).to(self._dtype)
        else:
            pieces, head = run.output_TH[run.predictions[part]].split(HEAD_ROWS), self.decoder.head
            made = torch.cat([float_logits(head, piece).log_softmax(-1).to(self._dtype) for piece in pieces])
            if made.is_cuda and (number, part) not in self._mean_rows:
                means = [some.exp() @ head.weight for some in made.split(HEAD_ROWS)]
                self._mean_rows[number, part] = torch.cat(means)
        if made.nbytes <= self._room:
            self._room -= made.nbytes
            self._log_probs[number, part] = made
        return made

    def _fused_decoder(self, segments: Segments) -> FusedDecoder | None:
        """On a GPU: the decoder's layers in few kernels. None: they run as they are, on batches of the plan."""
        if self.decoder is None or self._device.type != "cuda":
            return None
        batch = segments[0][0]
        longest = max(max(batch.lengths) for batches in segments for batch in batches)
        return fused_decoder(self.decoder, batch_to(batch, self._device, self._dtype), batch.lengths, longest)

    def _running(self, starts_T: Tensor) -> AbstractContextManager[None]:
        """Every pass of the model is inside, so that the unquantized model's bits are those of an unquantized rerun."""
        return nullcontext() if self._fused is None else self._fused.running(starts_T)

    def _run(self, batches: Sequence[Batch]) -> _Run:
        self.inputs.batch = batch = joined(batches)
        starts_T = starts_of(batch.lengths, self._device)
        rows = (labels_of(batch).flatten() != -100).nonzero().flatten().to(self._device)
        predictions = rows.split([sum(each.n_predictions) for each in batches])
        if self.decoder is None:
            return _Run(batch, predictions, self._logits(batch)[rows], None, starts_T)
        with self._running(starts_T):
            trace, output = self.decoder.record(batch_to(batch, self._device, self._dtype), (0,))
        output_TH = output.flatten(0, 1)
        self.inputs.record(self.decoder.head_name, output_TH)
        if self._fused is not None:  # masks are [tokens, tokens]
            trace = replace(trace, arguments=[{**each, "attention_mask": None} for each in trace.arguments])
        return _Run(batch, predictions, output_TH, trace, starts_T)

    def _logits(self, batch: Batch) -> Tensor:
        return self._model(**batch_to(batch, self._device, self._dtype), use_cache=False).logits.flatten(0, 1)

    def _embedded(self) -> list[Tensor]:
        return [run.trace.hidden[0] for run in self._runs if run.trace is not None]

    def _first_broken_sample(self) -> int | None:
        unseen = self.decoder is None  # then outputs lack the rows that predict nothing
        broken: list[int] = []
        for run in self._runs:
            counts = run.batch.n_predictions if unseen else run.batch.lengths
            finite = torch.isfinite(run.output_TH).all(1).cpu().split(list(counts))
            broken += [sample for sample, rows in zip(run.batch.order, finite, strict=True) if not rows.all()]
        return min(broken, default=None)


class _InputRanges:
    """Calibration ranges (amax) of linears' inputs, recorded by forward hooks."""

    def __init__(self, sizes: Collection[int]) -> None:
        """Start with no range. Args: sizes: numbers of leading samples that will have ranges."""
        # By module, [intervals, in] float32: largest |x| of each channel over the samples between one size and the
        # next, NaN if there is one.
        self.amaxes: dict[str, Tensor] = {}
        self.source: dict[str, str] = {}  # by module: the first module with the same input tensor
        self.batch: Batch | None = None  # that the model runs
        self._sizes = sorted(sizes)
        self._last: tuple[Tensor, str] | None = None

    @contextmanager
    def recorded(self, model: nn.Module, modules: Sequence[str]) -> Generator[None]:
        """Record the inputs of these modules in every forward pass of the block."""
        with inputs_seen(model, modules, self.record):
            yield
        self._last = None

    def record(self, name: str, x: Tensor) -> None:
        """Extend a module's range for the current segment by an input, [..., in]."""
        if self._last is not None and self._last[0] is x:
            self.source[name] = self._last[1]
            self.amaxes[name] = self.amaxes[self._last[1]]
            return
        self._last, self.source[name] = (x, name), name
        if name not in self.amaxes:
            self.amaxes[name] = torch.zeros(len(self._sizes), x.shape[-1], device=x.device)
        x_TI = x.flatten(0, -2)
        for interval, rows in self._intervals(len(x_TI)):
            low, high = torch.aminmax(x_TI if rows is None else x_TI[rows.to(x.device)], dim=0)
            known = self.amaxes[name][interval]
            torch.maximum(known, torch.maximum(-low, high).float(), out=known)

    def intervals_of(self, n_samples: int) -> int:
        """Number of leading intervals that hold that many leading samples, which is one of the sizes."""
        return bisect_left(self._sizes, n_samples) + 1

    def _intervals(self, n_rows: int) -> Iterator[tuple[int, Tensor | None]]:
        """The intervals that samples of the batch are in, with their rows; None: all of them."""
        assert self.batch is not None
        intervals = np.searchsorted(self._sizes, self.batch.order, side="right")
        if len(set(intervals)) == 1:
            yield int(intervals[0]), None
            return
        patches = self.batch.patch_counts
        counts = np.array(self.batch.lengths if n_rows == sum(self.batch.lengths) else patches)
        by_row = np.repeat(intervals, counts * n_rows // max(1, counts.sum()))
        for interval in sorted({*by_row.tolist()}):
            yield interval, torch.from_numpy(np.flatnonzero(by_row == interval))


def float_logits(head: nn.Linear, x_TH: Tensor) -> Tensor:
    """Logits in float32, accumulated and returned: in bf16 one of 20 is rounded by up to 0.06.

    No known model type's head has a bias.

    Args:
        head: the output layer.
        x_TH: [rows, hidden], its input.

    Returns: [rows, vocabulary].
    """
    if x_TH.is_cuda and x_TH.dtype != torch.float32:
        return torch.mm(x_TH, head.weight.T, out_dtype=torch.float32)
    return x_TH.float() @ head.weight.float().T
