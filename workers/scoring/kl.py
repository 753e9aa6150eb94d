"""method=kl_div: the KL divergence, in nats, of the model with one layer group quantized from the unquantized model.

The unquantized model runs once. For a group in a decoder layer each batch then starts again at the kept input of that
layer, so half the model runs on average; on a GPU in few kernels (workers.model.fused), the unquantized model too. The
change of the logits is computed from the change of the final hidden state: the difference of two outputs of the head
would cancel, and bf16 logits would round away most of a mild recipe's effect.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.model.hooks import replaced_forwards
from workers.quant import kernels
from workers.quant.modelopt import Quantizers, TensorQuantizer, quantized
from workers.scoring.baseline import Baseline
from workers.scoring.gradient import Job
from workers.scoring.host_copy import start_host_copy
from workers.scoring.layout import Segments
from workers.scoring.scores import GroupScore, NotFinite, Scores, first_not_finite
from workers.scoring.weights import QuantizedWeight, Weights


class KlEngine:
    """Scores layer groups by KL divergence on one model and data set; keeps quantizers and ranges between calls."""

    def __init__(self, model: nn.Module, segments: Segments, modules: Sequence[str], sizes: Iterable[int] = ()) -> None:
        """Run the unquantized model once.

        Args:
            model: evaluation mode, no parameter requiring a gradient (workers.model.loading.load).
            segments: leading segments of the plan, up to the largest size of any job.
            modules: names of all linears that a group may hold.
            sizes: numbers of leading samples of any job, those that calibrate included; besides the segments' ends.
        """
        self._model = model
        self._base = Baseline(model, segments, modules, sizes)
        self._weights, self._input_quantizers = Weights(), dict[int, Quantizers]()

    @property
    def shapes(self) -> list[tuple[int, list[int]]]:
        """Of each pass through the layers: its rows, and the predictions that the head is called on at a time."""
        return self._base.shapes

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
        weights = {
            name: self._model.get_parameter(f"{name}.weight").detach()
            for name in modules
            if name in self._base.inputs.amaxes
        }
        if not weights:
            return lambda: None
        reason, sample = self._weights.not_finite(weights), self._base.first_broken_sample
        if reason is None and sample is not None:
            reason = f"the unquantized model's output for sample {sample} is NaN or infinite."
        if reason is not None:
            return lambda: [NotFinite.of(modules[0], job.name, reason) for job in jobs]
        (name, weight), *_ = weights.items()
        started = [self._start(modules[0], weights, job.of_linear(name, weight)) for job in jobs]
        return lambda: [finish() for finish in started]

    def _start(self, group: str, weights: Mapping[str, Tensor], job: Job) -> Callable[[], Scores]:
        linears = {name: self._weights.quantized(name, job.format, weight, weights) for name, weight in weights.items()}
        by_size: dict[str, Tensor] = {}  # [predictions] float64 of leading segments
        if job.has_ranges_by_size:
            by_size |= {size: self._predictions(linears, job, n, n) for size, n in job.sizes.items()}
        else:
            n_samples, n_calibration = max(job.sizes.values()), job.calibration_of(None)
            by_size |= dict.fromkeys(job.sizes, self._predictions(linears, job, n_samples, n_calibration))
        amaxes = torch.stack([self._base.inputs.amaxes[name].amax(1) for name in linears]).amax(0).double()
        squares = amaxes.new_zeros(2)
        for name, linear in linears.items():
            squares[0] += linear.dw_square_sum
            squares[1] += self._weights.square(name, weights[name])
        figures_on_host = {size: start_host_copy(self._figures(by_row)) for size, by_row in by_size.items()}
        rest_on_host = start_host_copy(torch.cat([squares, amaxes]))

        def finish() -> Scores:
            dw_square, w_square, *input_amaxes = rest_on_host().tolist()
            found: dict[str, GroupScore] = {}
            for size, n_samples in job.sizes.items():
                layout, figures = self._base.layout, figures_on_host[size]().numpy()
                n_runs = layout.run_ends[bisect_left(layout.ends, len(by_size[size]))]
                run_sums, run_maxes = figures[: 2 * n_runs].reshape(2, -1)
                scores = layout.in_order(figures[2 * n_runs :])[:n_samples]
                if (reason := first_not_finite(scores, "KL divergence")) is not None:
                    return NotFinite.of(group, job.name, reason)
                found[size] = GroupScore(
                    score=float(scores.sum()),
                    sample_scores=scores,
                    kind_scores=layout.by_kind(run_sums)[:, :n_samples],
                    top_token_score=float(layout.largest(run_maxes, n_samples)),
                    dy_square_sum=0.0,
                    y_square_sum=0.0,
                    dw_square_sum=dw_square,
                    w_square_sum=w_square,
                    input_amax=max(input_amaxes[: self._base.inputs.intervals_of(n_samples)]),
                )
            return found

        return finish

    def _figures(self, by_row: Tensor) -> Tensor:
        """Sums and largest values of runs, and sums of samples, one after another. Args: by_row: [predictions]."""
        layout = self._base.layout
        n_segments = bisect_left(layout.ends, len(by_row)) + 1
        runs, samples = layout.run_figures(by_row, n_segments), layout.sample_sums(by_row, n_segments)
        return torch.cat([runs.flatten(), samples])

    def _predictions(
        self, weights: Mapping[str, QuantizedWeight], job: Job, n_samples: int, n_calibration: int
    ) -> Tensor:
        """KL divergence at each prediction of the segments that hold leading samples, [predictions] float64.

        Args:
            weights: of the group, quantized, by module.
            job: recipe.
            n_samples: number of leading samples that are scored.
            n_calibration: number of those that find the ranges of the inputs.
        """
        base = self._base
        runs = base.runs(base.layout.leading(n_samples).n_segments)
        inputs = self._shared_inputs(weights, job, n_calibration)
        if base.decoder is not None and base.decoder.head_name in weights:
            ((name, weight),) = weights.items()
            rows = [base.divergence_in_head(number, _change(weight, inputs.get(name))) for number in runs]
        else:
            layer = self._first_layer(weights)
            if layer is not None:
                base.start_at(layer)
            forwards = {name: self._forward(name, weight, inputs.get(name)) for name, weight in weights.items()}
            with replaced_forwards(self._model, forwards):  # Q(x) Q(W)^T
                rows = [base.divergence_after(number, layer) for number in runs]
        return torch.cat(rows)

    def _first_layer(self, modules: Iterable[str]) -> int | None:
        """The decoder layer that a group is in; None: the whole model must run."""
        if self._base.decoder is None:
            return None
        layers = [self._base.decoder.layer_of(name) for name in modules]
        return None if None in layers else min(layer for layer in layers if layer is not None)

    def _shared_inputs(self, modules: Iterable[str], job: Job, n_calibration: int) -> dict[str, "_SharedInput"]:
        """By module, one quantizer for each distinct input tensor; none if the job leaves inputs unquantized."""
        shared: dict[str, _SharedInput] = {}  # by the first module with the same input
        if job.format.inputs is None:
            return shared
        sources = {name: self._base.inputs.source[name] for name in modules}
        for source in dict.fromkeys(sources.values()):
            # `Quantizers` keeps one object for a recipe, but the input tensors of a group have a range each at the
            # same time. A range is remembered as a weight's is: finding one makes the host wait for the GPU.
            quantizers = self._input_quantizers.setdefault(len(shared), Quantizers())
            amaxes = self._base.inputs.amaxes[source][: self._base.inputs.intervals_of(n_calibration)]
            shared[source] = _SharedInput(quantizers.weight(f"{source} {n_calibration}", job.format.inputs, amaxes))
        return {name: shared[source] for name, source in sources.items()}

    def _forward(self, name: str, weight: QuantizedWeight, inputs: "_SharedInput | None") -> Callable[[Tensor], Tensor]:
        linear = self._model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return lambda x: F.linear(x if inputs is None else inputs(x), weight.quantized_OI, linear.bias)


class _SharedInput:
    """Quantizes the input of several linears once."""

    def __init__(self, quantizer: TensorQuantizer) -> None:
        self.quantizer = quantizer
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = x, quantized(self.quantizer, x.flatten(0, -2)).to(x.dtype).view_as(x)
        return self._last[1]


def _change(weight: QuantizedWeight, inputs: _SharedInput | None) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that gives the change of a linear's outputs at some rows: x dW^T + dx Q(W)^T."""

    def change(x_TI: Tensor, rows: Tensor) -> Tensor:
        terms: list[Tensor] = []
        if weight.delta_OI is not None:
            terms.append(F.linear(x_TI[rows], weight.delta_OI))
        if inputs is not None:
            dx_TI = kernels.deltas(quantized(inputs.quantizer, x_TI), x_TI)[1]
            terms.append(F.linear(dx_TI[rows], weight.quantized_OI))
        return terms[0].add_(terms[1]) if len(terms) == 2 else terms[0]

    return change
