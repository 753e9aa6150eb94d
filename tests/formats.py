"""Formats from plain mappings of ModelOpt's attributes, and the engines' jobs with them."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sweep.core.pairs import Algorithm, Scales
from sweep.core.sizes import n_samples_of
from sweep.formats.format import Format, GroupFormat
from sweep.formats.quantizer import Quantizer

if TYPE_CHECKING:
    from workers.scoring.gradient import Job

Fields = Mapping[str, Any]  # of ModelOpt's QuantizerAttributeConfig


def quantizer_of(fields: Fields | None) -> Quantizer | None:
    return None if fields is None else Quantizer(fields)


def format_of(
    weight: Fields | None, inputs: Fields | None, algorithm: Algorithm = "max", scales: Scales = "private"
) -> Format:
    return Format(weight=quantizer_of(weight), inputs=quantizer_of(inputs), algorithm=algorithm, scales=scales)


def group_format(
    name: str,
    weight: Fields | None,
    inputs: Fields | None,
    algorithm: Algorithm = "max",
    scales: Scales = "private",
) -> GroupFormat:
    """Called ``NAME/default``, and by the algorithm if it is not `max`."""
    return GroupFormat(
        quant_pair=name,
        quant_granularity="default",
        weight=quantizer_of(weight),
        inputs=quantizer_of(inputs),
        algorithm=algorithm,
        scales=scales,
    )


def job_of(
    name: str,
    weight: Fields | None,
    inputs: Fields | None,
    sizes: Iterable[str],
    algorithm: Algorithm = "max",
    scales: Scales = "private",
) -> "Job":
    """What an engine scores."""
    from workers.scoring.gradient import Job  # it imports torch, which tests of formats do without

    return Job(
        name=name,
        format=format_of(weight, inputs, algorithm, scales),
        sizes={size: n_samples_of(size) for size in sizes},
    )
