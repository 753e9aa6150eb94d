"""method=kl_div: the KL divergence, in nats, of the model with one layer group quantized from the unquantized model.

The unquantized model runs once. For a group in a decoder layer each batch then starts again at the kept input of that
layer, so half the model runs on average. The change of the logits is computed from the change of the final hidden
state: the difference of two outputs of the head would cancel, and bf16 logits would round away most of a mild recipe's
effect.
"""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sweep.core.sizes import SIZES
from sweep.formats.quantizer import Quantizer
from workers.quant import kernels
from workers.quant.modelopt import Quantizers, quantized
from workers.scoring.baseline import Baseline
from workers.scoring.capture import Segments, square_sum
from workers.scoring.gradient import Job
from workers.scoring.host_copy import start_host_copy
from workers.scoring.scores import GroupScore, NotFinite, Scores, not_finite_weight


@dataclass(frozen=True, slots=True)
class _Linear:
    """One linear of a layer group under one recipe."""

    weight_OI: Tensor  # quantized, model dtype
    delta_OI: Tensor | None  # its change; None: left unquantized
    dw_square_sum: Tensor | float
    inputs: "_SharedInput | None" = None  # None: left unquantized


class KlEngine:
    """Scores layer groups by KL divergence on one model and data set; keeps quantizers and ranges between calls."""

    def __init__(self, model: Any, segments: Segments, modules: Sequence[str]) -> None:
        """Run the unquantized model once.

        Args:
            model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
            segments: leading segments of the plan, up to the largest size of any job.
            modules: names of all linears that a group may hold.
        """
        self._model = model
        self._base = Baseline(model, segments, modules)
        self._quantizers, self._input_quantizers = Quantizers(), dict[int, Quantizers]()
        self._finite: dict[str, bool] = {}  # by module, of the weights checked so far
        self._weight_squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def score_group(self, modules: Sequence[str], jobs: Sequence[Job]) -> Callable[[], list[Scores] | None]:
        """Start scoring one layer group under several recipes.

        Args:
            modules: the group's, all of them among the engine's `modules`.
            jobs: recipes.

        Returns: a function that waits for the GPU and gives each job's scores by size (or NotFinite), None if no module
            of the group was called. A sample's score is the sum of KL(base || quantized) over its predictions, in nats;
            the square sums of outputs are 0, since the group's own outputs are not recorded. Call it after the next
            group has been started, so that the GPU never waits.
        """
        called = [name for name in modules if name in self._base.inputs.amaxes]
        if not called:
            return lambda: None
        if (text := self._not_finite(called)) is not None:
            broken: list[Scores] = [NotFinite(f"Layer group {modules[0]} under {job.name}: {text}") for job in jobs]
            return lambda: broken
        started = [self._start(called, job) for job in jobs]
        return lambda: [finish(modules[0]) for finish in started]

    def _start(self, modules: Sequence[str], job: Job) -> Callable[[str], Scores]:
        fused = (
            {name: self._model.get_submodule(name).weight.detach() for name in modules} if job.format.is_fused else None
        )
        linears = {name: self._linear(name, job.format.weight, fused) for name in modules}
        by_size: dict[str, Tensor] = {}  # [samples] float64, in the order of the rows
        if job.format.calibrates_inputs:
            by_size |= {
                size: self._samples(self._with_inputs(linears, job, n_segments), n_segments)
                for size, n_segments in job.sizes.items()
            }
        else:
            n_segments = max(job.sizes.values())
            by_size |= dict.fromkeys(job.sizes, self._samples(self._with_inputs(linears, job, n_segments), n_segments))
        amaxes = torch.stack([self._base.inputs.amaxes[name].amax(1) for name in modules]).amax(0).double()
        squares = amaxes.new_zeros(2)
        for name, linear in linears.items():
            squares[0] += linear.dw_square_sum
            squares[1] += self._weight_square(name)
        samples_on_host = {size: start_host_copy(samples) for size, samples in by_size.items()}
        rest_on_host = start_host_copy(torch.cat([squares, amaxes]))

        def finish(group: str) -> Scores:
            dw_square, w_square, *input_amaxes = rest_on_host().tolist()
            found: dict[str, GroupScore] = {}
            for size, n_segments in job.sizes.items():
                scores = self._in_order(samples_on_host[size](), size, n_segments)
                if not np.isfinite(scores).all():
                    first = int(np.flatnonzero(~np.isfinite(scores))[0])
                    return NotFinite(
                        f"Layer group {group} under {job.name}: the KL divergence of sample {first} is NaN or infinite."
                    )
                found[size] = GroupScore(
                    score=float(scores.sum()),
                    sample_scores=scores,
                    dy_square_sum=0.0,
                    y_square_sum=0.0,
                    dw_square_sum=dw_square,
                    w_square_sum=w_square,
                    input_amax=max(input_amaxes[:n_segments]),
                )
            return found

        return finish

    def _samples(self, linears: Mapping[str, _Linear], n_segments: int) -> Tensor:
        """KL divergence of each sample of leading segments, [samples] in the order of the rows."""
        base, batches = self._base, self._base.batches(n_segments)
        if base.decoder is not None and base.decoder.head_name in linears:
            (linear,) = linears.values()
            rows = [base.divergence_in_head(number, _change(linear)) for number in batches]
        else:
            layer = self._first_layer(linears)
            if layer is not None:
                base.start_at(layer)
            with self._replaced(linears):
                rows = [base.divergence_after(number, layer) for number in batches]
        lengths = base.layout.lengths[: base.layout.sample_ends[n_segments - 1]]
        # unsafe: a check of the lengths would wait for the GPU.
        return torch.segment_reduce(torch.cat(rows), "sum", lengths=lengths, unsafe=True)

    def _in_order(self, samples: Tensor, size: str, n_segments: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Sample scores in data set order."""
        n_samples = self._base.layout.sample_ends[n_segments - 1]
        scores = np.zeros(SIZES[size])
        scores[list(self._base.layout.samples[:n_samples])] = samples[:n_samples].numpy()
        return scores

    def _first_layer(self, modules: Iterable[str]) -> int | None:
        """The decoder layer that a group is in; None: the whole model must run."""
        if self._base.decoder is None:
            return None
        layers = [self._base.decoder.layer_of(name) for name in modules]
        return None if None in layers else min(layer for layer in layers if layer is not None)

    @contextmanager
    def _replaced(self, linears: Mapping[str, _Linear]) -> Generator[None]:
        """Have the group's linears compute Q(x) Q(W)^T until the block ends."""
        replaced = {name: self._model.get_submodule(name) for name in linears}
        for name, module in replaced.items():
            module.forward = _forward(linears[name], module.bias)
        try:
            yield
        finally:
            for module in replaced.values():
                del module.forward  # the instance's attribute: the class's method is in force again

    def _linear(self, name: str, attributes: Quantizer | None, fused: Mapping[str, Tensor] | None) -> _Linear:
        weight = self._model.get_submodule(name).weight.detach()
        if attributes is None:
            return _Linear(weight, None, 0.0)
        quantizer = self._quantizers.weight(name, attributes, weight, fused)
        return _Linear(*kernels.deltas(quantized(quantizer, weight), weight))

    def _with_inputs(self, linears: Mapping[str, _Linear], job: Job, n_segments: int) -> Mapping[str, _Linear]:
        """The linears with one quantizer for each distinct input tensor, its range set by leading segments."""
        if job.format.inputs is None:
            return linears
        shared: dict[str, _SharedInput] = {}
        for name in linears:
            source = self._base.inputs.source[name]
            if source not in shared:
                # `Quantizers` keeps one object for a recipe, but the input tensors of a group have a range each at the
                # same time. A range is remembered as a weight's is: finding one makes the host wait for the GPU.
                quantizers = self._input_quantizers.setdefault(len(shared), Quantizers())
                amaxes = self._base.inputs.amaxes[source][:n_segments]
                shared[source] = _SharedInput(quantizers.weight(f"{source} {n_segments}", job.format.inputs, amaxes))
        return {
            name: replace(linear, inputs=shared[self._base.inputs.source[name]]) for name, linear in linears.items()
        }

    def _weight_square(self, name: str) -> Tensor:
        if name not in self._weight_squares:
            self._weight_squares[name] = square_sum(self._model.get_submodule(name).weight.detach())
        return self._weight_squares[name]

    def _not_finite(self, modules: Sequence[str]) -> str | None:
        """A message if the unquantized model has a NaN or an infinity, under which no recipe can be scored."""
        for name in modules:
            if name not in self._finite:
                self._finite[name] = bool(torch.isfinite(self._model.get_submodule(name).weight).all())
            if not self._finite[name]:
                return not_finite_weight(name)
        sample = self._base.first_broken_sample
        return None if sample is None else f"the unquantized model's output for sample {sample} is NaN or infinite."


class _SharedInput:
    """Quantizes the input of several linears once."""

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = x, quantized(self.quantizer, x.flatten(0, -2)).to(x.dtype).view_as(x)
        return self._last[1]


def _forward(linear: _Linear, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x if linear.inputs is None else linear.inputs(x), linear.weight_OI, bias)


def _change(linear: _Linear) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that gives the change of the linear's outputs at some rows: x dW^T + dx Q(W)^T."""

    def change(x_TI: Tensor, rows: Tensor) -> Tensor:
        terms: list[Tensor] = []
        if linear.delta_OI is not None:
            terms.append(F.linear(x_TI[rows], linear.delta_OI))
        if linear.inputs is not None:
            dx_TI = kernels.deltas(quantized(linear.inputs.quantizer, x_TI), x_TI)[1]
            terms.append(F.linear(dx_TI[rows], linear.weight_OI))
        return terms[0].add_(terms[1]) if len(terms) == 2 else terms[0]

    return change
