"""Statistics of one cell's scores: ranking, uncertainty, stability, totals. Pure functions.

A layer group that was never called has no score: NaN in the arrays here, NULL in the table. It ranks last, is left out
of every correlation and total, and never counts as 0.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sweep.core.batches import TOKEN_KINDS

_ROUNDING: Final = 1e-6  # relative: of differences of float32 values
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStability:
    """Do the odd samples rank the layer groups as the even ones do?"""

    spearman: float | None  # None: too few groups, or all equal
    top_overlap: float  # share of the `top_k` most sensitive groups that both halves name
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One trial in a few figures, for index pages and the end of a run."""

    n_groups: int
    n_measured: int  # groups that have a score
    n_samples: int
    n_predictions: int
    total_predicted_kl: float | None  # nats per prediction, groups added up; None: nothing was measured
    effective_bits: float  # mean bits a weight over the covered groups
    n_groups_half: int  # so few groups carry half of the total score
    top_groups: tuple[str, ...]  # most sensitive first, at most 10
    top_modules: tuple[str, ...]  # of the first of them
    top_shares: tuple[float, ...]  # of the total score, aligned with `top_groups`


def summarize(scores: pa.Table) -> Summary:
    """The key figures of one cell's scores (SCORES_SCHEMA)."""
    score = ranked_scores(scores)
    n_measured = int(np.isfinite(score).sum())
    top = ranking(score)[: min(10, n_measured)]
    groups: list[str] = scores["group"].to_pylist()
    shares = score_shares(score)
    return Summary(
        n_groups=len(score),
        n_measured=n_measured,
        n_samples=int(max(scores["n_samples"].to_pylist(), default=0)),
        n_predictions=int(max(scores["n_predictions"].to_pylist(), default=0)),
        total_predicted_kl=total_predicted_kl(scores),
        effective_bits=mean_effective_bits(scores),
        n_groups_half=groups_carrying(score, 0.5),
        top_groups=tuple(groups[i] for i in top),
        top_modules=tuple(scores["modules"][int(top[0])].as_py()) if len(top) else (),
        top_shares=tuple(float(shares[i]) for i in top),
    )


def ranked_scores(scores: pa.Table) -> FloatArray:
    """The score of each group, as far as it counts: of method=fisher predicted KL is less where one sample has most."""
    score = float_column(scores, "score")
    if "projections" not in scores.column_names or scores["projections"].null_count == len(scores):
        return score
    return float_column(scores, "predicted_kl") * 2 * float_column(scores, "n_predictions")


def float_column(scores: pa.Table, name: str) -> FloatArray:
    """A numeric column as float64, NULL as NaN."""
    return np.array(scores[name].to_pylist(), dtype=np.float64)  # `to_numpy` would import pandas: a quarter of a second


def ranking(score: FloatArray) -> IntArray:
    """Row numbers, most sensitive first; equal scores keep their order, missing ones come last."""
    return np.argsort(-score, kind="stable")  # argsort puts NaN at the end


def score_shares(score: FloatArray) -> FloatArray:
    """Each group's part of the total score, in 0..1; NaN where nothing was measured, 0 everywhere if the total is 0."""
    total = np.nansum(score)
    return score / total if total > 0 else score * 0.0


def groups_carrying(score: FloatArray, fraction: float) -> int:
    """The least number of groups whose scores together reach `fraction` of the total."""
    ordered = np.sort(score[np.isfinite(score)])[::-1]
    if ordered.sum() <= 0:
        return 0
    return int(np.searchsorted(np.cumsum(ordered), fraction * ordered.sum() * (1 - 1e-12)) + 1)


def total_predicted_kl(scores: pa.Table) -> float | None:
    """Predicted KL of all groups added up, nats per prediction; None if no group was measured."""
    predicted = float_column(scores, "predicted_kl")
    return float(np.nansum(predicted)) if np.isfinite(predicted).any() else None


def mean_effective_bits(scores: pa.Table) -> float:
    """Mean bits a weight under the recipe, each group counted with its weight elements; never-called ones too."""
    elements = float_column(scores, "weight_elements")
    return float(np.average(float_column(scores, "effective_bits"), weights=elements)) if elements.sum() > 0 else 0.0


def average_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1 up; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(left: FloatArray, right: FloatArray) -> float | None:
    """Rank correlation over the groups that both sides measured; None with under two of them, or a constant side."""
    both = np.isfinite(left) & np.isfinite(right)
    left_ranks, right_ranks = average_ranks(left[both]), average_ranks(right[both])
    if len(left_ranks) < 2 or np.ptp(left_ranks) == 0 or np.ptp(right_ranks) == 0:
        return None
    return float(np.corrcoef(left_ranks, right_ranks)[0, 1])


def top_k_overlap(left: FloatArray, right: FloatArray, k: int) -> float:
    """Share of the `k` most sensitive groups of one side that the other names, too, over groups that both measured."""
    both = np.isfinite(left) & np.isfinite(right)
    k = min(k, int(both.sum()))
    if k == 0:
        return 0.0
    return len({*ranking(left[both])[:k].tolist()} & {*ranking(right[both])[:k].tolist()}) / k


def sample_matrix(scores: pa.Table) -> FloatArray | None:
    """Per-sample scores ``[groups, samples]``, NaN rows for groups never called; None if the engine kept none."""
    if "sample_scores" not in scores.column_names:
        return None
    measured = np.isfinite(float_column(scores, "score"))
    column = scores["sample_scores"].filter(pa.array(measured))
    lengths = set(column.combine_chunks().value_lengths().to_pylist())  # None among them: a NULL list
    if len(lengths) != 1 or not (n_samples := lengths.pop()):
        return None
    matrix = np.full((len(measured), int(n_samples)), np.nan)
    matrix[measured] = column.combine_chunks().flatten().to_numpy().reshape(-1, int(n_samples))
    return matrix


def kind_scores(scores: pa.Table) -> FloatArray | None:
    """Scores by kind of token ``[groups, kinds]``, see TOKEN_KINDS; NaN rows for groups never called.

    Returns: None: scored by an older program, or by an engine that does not know them.
    """
    by_kind = np.stack([float_column(scores, f"score_{kind}") for kind in TOKEN_KINDS], axis=1)
    unknown = np.isfinite(float_column(scores, "score")) & ~np.isfinite(by_kind).all(axis=1)
    return None if unknown.any() else by_kind


def occurring(scores: pa.Table) -> list[str]:
    """The kinds of token that the samples have: those with a score in some group; none where they are not known."""
    by_kind = kind_scores(scores)
    return (
        [] if by_kind is None else [kind for kind, sum_ in zip(TOKEN_KINDS, np.nansum(by_kind, 0), strict=True) if sum_]
    )


def kind_samples(scores: pa.Table, kinds: Collection[str]) -> FloatArray | None:
    """Per-sample scores of some kinds of token, added up: ``[groups, samples]``; as `sample_matrix` otherwise."""
    whole = sample_matrix(scores)
    if whole is None:
        return None
    found, none = np.zeros(whole.shape), [0.0] * whole.shape[1]
    prompt = whole.copy()
    for kind in TOKEN_KINDS:
        if kind == "prompt":
            continue
        part = np.array([samples or none for samples in scores[f"sample_scores_{kind}"].to_pylist()])
        prompt -= part
        found += part * (kind in kinds)
    # What is left is rounded to float32 as the parts are; more than that is negative with method=fisher alone, where it
    # undoes what other kinds do. NaN where nothing was measured.
    prompt = np.where((prompt < 0) & (prompt > -_ROUNDING * whole), 0, prompt)
    return found + prompt if "prompt" in kinds else found + 0 * whole


def sample_predictions(scores: pa.Table) -> FloatArray | None:
    """Predictions of each sample ``[samples]``; None: scored by a program that did not keep them."""
    known = (counts for counts in scores["sample_predictions"].to_pylist() if counts is not None)
    found = next(known, None)
    return None if found is None else np.array(found, dtype=np.float64)


def bootstrap_interval(
    samples: FloatArray, n_predictions: int | FloatArray, seed: str, level: float = 0.9, draws: int = 1000
) -> FloatArray:
    """Interval of sums per prediction, as sensitivities and KL are, if other samples of the same kind had been drawn.

    Percentile bootstrap over samples, each of which is drawn with its predictions: a ratio of sums. On 64 or 128
    samples of very different lengths 90 % intervals cover the true ratio 87 and 89 times in 100; with the number
    of predictions kept, 100 times, being 2.4 times as wide (`tests/unit/report/test_analysis.py`).

    Args:
        samples: ``[n, samples]``, for example scores of layer groups; NaN rows give NaN.
        n_predictions: of each sample, ``[samples]``; or, where that is not known, of all of them together.
        seed: of the draws, so that the same cell or model has the same intervals everywhere.
        level: probability between the two ends.
        draws: resampled data sets.

    Returns: ``[2, n]``, lower and upper end, per prediction.
    """
    if isinstance(n_predictions, int):
        drawn = _resampled_sums(samples, seed, draws) / n_predictions
    else:
        sums = _resampled_sums(np.vstack([samples, n_predictions]), seed, draws)
        sums = sums[sums[:, -1] > 0]  # a data set without predictions would not have been scored
        drawn = sums[:, :-1] / sums[:, -1:]
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _resampled_sums(samples: FloatArray, seed: str, draws: int) -> FloatArray:
    """Sums over samples that are drawn with replacement. Args: samples: ``[n, samples]``. Returns: ``[draws, n]``."""
    n_samples = samples.shape[1]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    picks = rng.integers(0, n_samples, (draws, n_samples)) + np.arange(draws)[:, None] * n_samples
    times_drawn = np.bincount(picks.ravel(), minlength=draws * n_samples).reshape(draws, n_samples)
    return times_drawn.astype(np.float64) @ samples.T


def split_half_stability(samples: FloatArray, top_k: int = 10) -> RankStability | None:
    """Ranking by the samples 0, 2, 4... against 1, 3, 5...; None with under two samples.

    With few groups `top_k` is cut to half of them: naming ten out of ten proves nothing.
    """
    if samples.shape[1] < 2:
        return None
    even, odd = samples[:, ::2].sum(axis=1), samples[:, 1::2].sum(axis=1)
    top_k = max(1, min(top_k, int(np.isfinite(even).sum()) // 2))
    return RankStability(spearman=spearman(even, odd), top_overlap=top_k_overlap(even, odd, top_k), top_k=top_k)
