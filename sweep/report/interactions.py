"""How the errors of layer groups add up or undo each other, from their projections (method=fisher).

The KL that errors of several groups cause together is the mean square of the sum of their projections. What it has
beyond the sum of the groups' own KLs are the products of two groups' projections, a term a pair. All of them together
are known well: to a few per cent of the KL. A single one is small beside the noise of the samples and labels that it is
estimated from, and there are thousands: a mix that is chosen by all of them as they are is worse than one that is
chosen without (tests/bench/RESULTS.md). So in a choice they count as far as they agree between samples: they are shrunk
towards none by the intensity that Schaefer and Strimmer (2005, "A shrinkage approach to large-scale covariance matrix
estimation") give for correlations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sweep.core.sample_kl import counted_kl
from sweep.report.analysis import FloatArray, float_column, sample_predictions

Float32Array = npt.NDArray[np.float32]

_ROUNDS: Final = 8  # mixes of formats, each with all pairs of groups
_ERRORS: Final = 4.0  # standard errors from which on a pair stands out: of 10,000 pairs less than one does by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two layer groups whose errors, under one recipe, add up or undo each other."""

    first: int  # row
    second: int
    kl: float  # of both together beyond the sum of each alone, nats per prediction; negative: they undo each other
    standard_error: float  # of `kl`, over samples
    correlation: float  # of their projections


def projections_of(scores: pa.Table) -> Float32Array | None:
    """Projections of a cell, in the unit in which their squares add up to KL.

    Args:
        scores: of one cell (SCORES_SCHEMA).

    Returns: [groups, samples, draws], root nats per prediction of all samples; 0 for a group that was never called.
        None: another method, or nothing was measured.
    """
    column, counts = scores["projections"].combine_chunks(), sample_predictions(scores)
    measured = np.isfinite(float_column(scores, "score"))
    if counts is None or not measured.any() or column.filter(pa.array(measured)).null_count:
        return None
    flat = column.filter(pa.array(measured)).flatten().to_numpy().astype(np.float64)
    found = flat.reshape(int(measured.sum()), len(counts), -1) / np.sqrt(2 * counts.sum())
    whole = np.zeros((len(measured), *found.shape[1:]), dtype=np.float32)
    whole[measured] = found / np.sqrt(found.shape[2])
    return whole


def group_samples(projections: Float32Array, n_predictions: FloatArray) -> FloatArray:
    """KL of each sample with one group alone quantized; adds up to the group's predicted KL.

    Args:
        projections: [groups, samples, draws].
        n_predictions: of each sample.

    Returns: [groups, samples], nats per prediction of all samples; what counts of them.
    """
    kl = np.square(projections, dtype=np.float64).sum(2)
    return counted_kl(kl * n_predictions.sum(), n_predictions) / n_predictions.sum()


def counted_projections(projections: Float32Array, n_predictions: FloatArray) -> Float32Array:
    """The same projections, of samples that count less (`sweep.core.sample_kl`) smaller by as much.

    Their squares add up to each group's predicted KL.
    """
    whole = np.square(projections, dtype=np.float64).sum(2)
    counted = group_samples(projections, n_predictions)
    shares = np.sqrt(np.divide(counted, whole, out=np.zeros_like(whole), where=whole > 0))
    return (projections * shares[:, :, None]).astype(np.float32)


def joint_samples(projections: Sequence[Float32Array], n_predictions: FloatArray) -> FloatArray:
    """KL of each sample where several groups are quantized at once; adds up to what is predicted.

    Args:
        projections: of each of the groups, [samples, draws].
        n_predictions: of each sample.

    Returns: [samples], nats per prediction of all samples; what counts of them.
    """
    together = np.zeros(projections[0].shape)
    for each in projections:
        together += each
    kl = np.square(together).sum(1)
    return counted_kl(kl * n_predictions.sum(), n_predictions) / n_predictions.sum()


def interaction_weight(projections: Sequence[Float32Array]) -> float:
    """How much interactions count in a choice: the share of their squares that is not the samples' noise.

    Args:
        projections: of formats on the same samples, [groups, samples, draws] each.

    Returns: 0 to 1: 1 minus the sum over pairs of groups of the variance of their correlation, over that of its square.
    """
    n_groups, n_samples, _ = projections[0].shape
    if n_groups < 2 or n_samples < 2:
        return 0.0
    squares, within, rng = 0.0, 0.0, np.random.default_rng(0)
    for _ in range(_ROUNDS if len(projections) > 1 else 1):
        formats = rng.integers(0, len(projections), n_groups).tolist()
        mix = np.stack([projections[number][group] for group, number in enumerate(formats)])
        norms = np.linalg.norm(mix, axis=(1, 2), keepdims=True)
        mix = np.divide(mix, norms, out=np.zeros_like(mix), where=norms > 0)
        correlations = np.tensordot(mix, mix, axes=((1, 2), (1, 2)))
        squares += float(np.square(correlations).sum() - np.square(correlations.diagonal()).sum())
        # Of a sample, the sum over pairs of groups of (v w)^2 is that over pairs of draws, without a group with itself.
        by_draws = np.einsum("gsd,gse->sde", mix, mix)
        within += float(np.square(by_draws).sum() - np.square(np.square(mix).sum(2)).sum())
    variance = n_samples / (n_samples - 1) * (within - squares / n_samples)
    return float(np.clip(1 - variance / squares, 0.0, 1.0)) if squares > 0 else 0.0


def strongest_pairs(projections: Float32Array, n_pairs: int) -> list[Pair]:
    """The pairs of groups whose interaction stands out of the samples' noise, largest first.

    Args:
        projections: of one cell, [groups, samples, draws].
        n_pairs: at most.
    """
    n_groups, n_samples, _ = projections.shape
    if n_samples < 2:
        return []
    squares = np.zeros((n_groups, n_groups))
    together = np.zeros((n_groups, n_groups))
    for by_sample in projections.transpose(1, 0, 2).astype(np.float64):
        product = 2 * by_sample @ by_sample.T
        together += product
        squares += np.square(product)
    errors = np.sqrt(n_samples / (n_samples - 1) * np.maximum(squares - np.square(together) / n_samples, 0))
    alone = together.diagonal() / 2
    rows, columns = np.triu_indices(n_groups, 1)
    stands_out = (np.abs(together) > _ERRORS * errors)[rows, columns] & (together != 0)[rows, columns]
    order = np.argsort(-np.abs(together[rows, columns][stands_out]), kind="stable")[:n_pairs]
    found: list[Pair] = []
    for i, j in zip(rows[stands_out][order].tolist(), columns[stands_out][order].tolist(), strict=True):
        kl = float(together[i, j])
        correlation = kl / (2 * float(np.sqrt(alone[i] * alone[j])))
        found.append(Pair(first=i, second=j, kl=kl, standard_error=float(errors[i, j]), correlation=correlation))
    return found
