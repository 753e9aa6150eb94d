"""Scores around a mixed-precision recipe instead of around the unquantized model: layers do not act alone.

A sweep scores each layer group with all others in 16 bits. Once a recipe is chosen, the inputs of every group come from
quantized layers, and its errors pass through quantized layers. So the model is captured again with the recipe applied,
and every format of every group is scored on this capture:

* x is the group's input in the quantized network, before its own quantizer. Formats calibrate on it.
* dy is the group's error against its own unquantized linears on this x: the error that its format adds to those of the
  other groups' formats.
* g is the gradient of the same loss at the group's output in the quantized network. The group's own current format is
  in it, too: one capture then serves all groups, and one group among many moves the gradient little.

The predicted KL follows as in a sweep: sum of (g dy)^2 over 2 n_predictions. `sweep solve --recapture N` solves again
with these numbers, and once more from there, N times in all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sweep.core.batches import Plan
from sweep.core.errors import SweepError
from sweep.core.groups import LayerGroup
from sweep.core.sizes import n_samples_of, size_name
from sweep.formats.format import GroupFormat
from sweep.formats.mixed import MixedRecipe
from workers.model import memory
from workers.quant.applied import applied, calibrated_model, output_error
from workers.quant.calibration import calibrated_linears
from workers.quant.linear import LinearQuant
from workers.scoring.capture import Rows
from workers.scoring.layout import Segments
from workers.scoring.windows import captures

_CPU_BYTES = 4e9  # for x and g; on a GPU half of the free memory
_ROWS = 2048  # rows whose errors are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class RecapturedScore:
    """The score of one format of one layer group, all other groups having the formats of the recipe."""

    group: str
    format: str  # label
    score: float
    predicted_kl: float  # score / (2 n_predictions), nats per prediction
    sample_scores: npt.NDArray[np.float64]  # [samples], in data set order; sums to `score`


def recaptured_scores(
    model: nn.Module,
    recipe: MixedRecipe,
    formats: Mapping[str, Sequence[GroupFormat]],
    plan: Plan,
    room: float | None = None,
) -> list[RecapturedScore]:
    """Score formats of layer groups on their inputs and gradients in the model quantized by a recipe.

    Args:
        model: unquantized, evaluation mode, no parameter requiring a gradient (workers.model.loading.load); it is left
            as it was.
        recipe: the current choice of every group.
        formats: those to score, by group.
        plan: of the recipe's own calibration samples.
        room: bytes for x and g; where they need more, a window of decoder layers at a time. None: half of what is free
            on a GPU, 4 GB on a CPU.

    Returns: rows in the model's order, formats in the order given; none for a group that no sample reaches.

    Raises: SweepError: a score is NaN or infinite; names the group and the format.
    """
    calibration = recipe.size if recipe.calibration_samples is None else size_name(recipe.calibration_samples)
    segments = plan.segments[: max(plan.segments_of(recipe.size), plan.segments_of(calibration))]
    quants = calibrated_model(model, list(plan.batches(calibration)), recipe)
    wanted = [choice.group for choice in recipe.groups if formats.get(choice.group.name)]
    if not wanted:
        return []
    found: dict[str, list[RecapturedScore]] = {}
    windows = _windows(model, wanted, segments, room)
    scored = _Scored(plan.n_predictions(recipe.size), n_samples_of(recipe.size), n_samples_of(calibration))
    with applied(model, quants):
        for index, rows in captures(model, segments, [_modules(window) for window in windows]):
            for group in windows[index]:
                found[group.name] = list(_scores(model, group, formats[group.name], rows, scored))
    return [row for group in wanted for row in found[group.name]]


@dataclass(frozen=True, slots=True)
class _Scored:
    """The leading samples that are scored, and those that calibrate."""

    n_predictions: int
    n_samples: int
    n_calibration: int


def _scores(
    model: nn.Module, group: LayerGroup, formats: Sequence[GroupFormat], rows: Mapping[str, Rows], scored: _Scored
) -> Iterator[RecapturedScore]:
    called = [name for name in group.modules if name in rows]
    if not called:
        return
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in called}
    first = rows[called[0]]
    batches = first.layout.leading_batches(first.x_TI, scored.n_calibration)
    for chosen in formats:
        quants = calibrated_linears(weights, batches, chosen)
        samples = sum(_sample_scores(quants[name], weights[name], rows[name]) for name in called)
        assert isinstance(samples, np.ndarray)
        samples = samples[: scored.n_samples]
        if not np.isfinite(samples).all():
            raise SweepError(
                f"Layer group {group.name} under {chosen.label}: "
                "its score in the quantized model is NaN or infinite. Exclude the format."
            )
        score = float(samples.sum())
        yield RecapturedScore(
            group=group.name,
            format=chosen.label,
            score=score,
            predicted_kl=score / (2 * scored.n_predictions),
            sample_scores=samples,
        )


@torch.no_grad()
def _sample_scores(quant: LinearQuant, weight_OI: Tensor, rows: Rows) -> npt.NDArray[np.float64]:
    """Sum of (g dy)^2 of each sample, in data set order."""
    pieces = zip(rows.x_TI.split(_ROWS), rows.g_TO.split(_ROWS), strict=True)
    by_row = torch.cat([(output_error(quant, weight_OI, x) * g.float()).double().square().sum(1) for x, g in pieces])
    return rows.layout.in_order(rows.layout.sample_sums(by_row).cpu().numpy())


def _windows(
    model: nn.Module, groups: Sequence[LayerGroup], segments: Segments, room: float | None
) -> list[list[LayerGroup]]:
    """Decoder layers whose x and g fit in memory together; a layer stays whole."""
    parameter = next(model.parameters())
    if room is None:
        room = torch.cuda.mem_get_info(parameter.device)[0] / 2 if parameter.device.type == "cuda" else _CPU_BYTES
    row_bytes = memory.n_rows(chain.from_iterable(segments)) * parameter.element_size()
    parts = [list(members) for _, members in groupby(groups, key=lambda group: group.part)]
    sizes: list[int] = []
    for part in parts:
        shapes = [model.get_parameter(f"{name}.weight").shape for name in _modules(part)]
        sizes.append(sum(map(sum, shapes)) * row_bytes)
    return [list(chain.from_iterable(window)) for window in memory.windows(parts, sizes, room)]


def _modules(groups: Sequence[LayerGroup]) -> list[str]:
    return [name for group in groups for name in group.modules]
