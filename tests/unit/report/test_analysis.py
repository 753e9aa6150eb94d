"""Ranking, correlation and intervals against hand arithmetic and scipy."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from sweep.report import analysis
from sweep.report.analysis import FloatArray
from sweep.store.records import SCORES_SCHEMA
from tests import scored

NAN = float("nan")


def table(sample_scores: list[list[float] | None], *, n_predictions: int = 10, **columns: list[Any]) -> pa.Table:
    """Scores of groups ``g0``, ``g1``...; None for a group that was never called."""
    rows: list[dict[str, Any]] = []
    for i, samples in enumerate(sample_scores):
        score = None if samples is None else sum(samples)
        row: dict[str, Any] = {
            "cell_id": "c",
            "group": f"g{i}",
            "modules": [f"g{i}"],
            "score": score,
            "sample_scores": samples,
        }
        row |= {"n_predictions": n_predictions, "n_samples": 2, "weight_elements": 100, "effective_bits": 8.0}
        if score is not None:
            row |= {"sensitivity": score / n_predictions, "predicted_kl": score / n_predictions / 2}
        rows.append(row | {name: values[i] for name, values in columns.items()})
    return pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)


def test_groups_never_called_rank_last_and_are_no_zeros() -> None:
    score = np.array([1.0, NAN, 3.0, 0.0, 3.0])
    assert analysis.ranking(score).tolist() == [2, 4, 0, 3, 1]
    np.testing.assert_array_equal(analysis.score_shares(score), [1 / 7, NAN, 3 / 7, 0, 3 / 7])


@pytest.mark.parametrize("levels", [3, 1000])  # many ties, and few
def test_spearman_is_scipys(levels: int) -> None:
    rng = np.random.default_rng(1)
    left, right = rng.integers(0, levels, (2, 200)).astype(float)
    assert analysis.spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-12)


def test_spearman_drops_what_one_side_did_not_measure() -> None:
    assert analysis.spearman(np.array([1.0, 2.0, 3.0, NAN]), np.array([10.0, 20.0, 30.0, 0.0])) == pytest.approx(1.0)
    assert analysis.spearman(np.array([1.0, NAN]), np.array([NAN, 2.0])) is None
    assert analysis.spearman(np.array([1.0, 1.0]), np.array([1.0, 2.0])) is None


def test_top_k_overlap_counts_common_names() -> None:
    left, right = np.array([5.0, 4.0, 3.0, 2.0, NAN]), np.array([5.0, 1.0, 4.0, 2.0, 9.0])
    assert analysis.top_k_overlap(left, right, 2) == 0.5  # {0, 1} and {0, 2}; group 4 has no left score
    assert analysis.top_k_overlap(left, right, 10) == 1.0


@pytest.mark.parametrize(
    ("scores", "fraction", "groups"),
    [([4, 3, 2, 1], 0.5, 2), ([5, 3, 2], 0.5, 1), ([0, 0], 0.5, 0), ([1, NAN, 1, 1], 1.0, 3)],
)
def test_groups_carrying_a_fraction(scores: list[float], fraction: float, groups: int) -> None:
    assert analysis.groups_carrying(np.array(scores, dtype=float), fraction) == groups


def test_effective_bits_weigh_groups_by_their_elements() -> None:
    scores = table([[1.0, 1.0], None], weight_elements=[300, 100], effective_bits=[4.0, 16.0])
    assert analysis.mean_effective_bits(scores) == 7.0


def test_total_predicted_kl_leaves_out_groups_never_called() -> None:
    assert analysis.total_predicted_kl(table([[1.0, 1.0], None, [2.0, 2.0]])) == pytest.approx((2 + 4) / 20)
    assert analysis.total_predicted_kl(table([None])) is None


def test_summary_names_the_most_sensitive_groups() -> None:
    summary = analysis.summarize(table([[1.0, 0.0], None, [2.0, 1.0]]))
    assert (summary.n_groups, summary.n_measured, summary.n_groups_half) == (3, 2, 1)
    assert summary.top_groups == ("g2", "g0")
    assert summary.top_shares == (0.75, 0.25)


def test_no_sample_scores_no_matrix() -> None:
    assert analysis.sample_matrix(table([[1.0, 2.0], [3.0, 4.0]]).drop_columns(["sample_scores"])) is None
    one_null = table([[1.0, 2.0], [3.0, 4.0]]).set_column(
        15, SCORES_SCHEMA.field(15), pa.array([[1.0, 2.0], None], SCORES_SCHEMA.field(15).type)
    )
    assert analysis.sample_matrix(one_null) is None
    matrix = analysis.sample_matrix(table([[1.0, 2.0], None, [3.0, 4.0]]))
    np.testing.assert_array_equal(matrix, [[1, 2], [NAN, NAN], [3, 4]])


def test_bootstrap_interval_is_the_normal_one_for_many_samples() -> None:
    samples = np.random.default_rng(0).gamma(2.0, 1.0, (2, 400))
    low, high = analysis.bootstrap_interval(samples, n_predictions=800, seed="c", draws=4000)
    spread = 1.645 * samples.std(axis=1) * np.sqrt(400) / 800
    np.testing.assert_allclose(low, samples.sum(axis=1) / 800 - spread, rtol=0.02)
    np.testing.assert_allclose(high, samples.sum(axis=1) / 800 + spread, rtol=0.02)


def test_bootstrap_interval_depends_on_the_cell_alone() -> None:
    samples = np.arange(20.0).reshape(2, 10)
    first = analysis.bootstrap_interval(samples, 10, "cell")
    np.testing.assert_array_equal(first, analysis.bootstrap_interval(samples, 10, "cell"))
    assert (first != analysis.bootstrap_interval(samples, 10, "other")).any()


def test_bootstrap_interval_of_equal_samples_is_a_point() -> None:
    np.testing.assert_allclose(analysis.bootstrap_interval(np.full((1, 16), 3.0), 24, "c"), [[2.0], [2.0]])


def test_the_interval_of_a_ratio_is_narrow_where_both_sums_move_together() -> None:
    rng = np.random.default_rng(0)
    below = rng.gamma(2.0, 1.0, 400)
    above = 2 * below + rng.normal(0, 0.1, 400)
    low, high = analysis.bootstrap_interval(above[None], below, "c", draws=4000)
    spread = 1.645 * (above - 2 * below).std() * np.sqrt(400) / below.sum()  # the delta method
    assert low == pytest.approx(above.sum() / below.sum() - spread, abs=0.1 * spread)
    assert high == pytest.approx(above.sum() / below.sum() + spread, abs=0.1 * spread)
    np.testing.assert_allclose(analysis.bootstrap_interval(3 * below[None], below, "c"), [[3], [3]])


def test_a_draw_without_any_prediction_says_nothing() -> None:
    low, high = analysis.bootstrap_interval(np.array([[0.0, 6.0]]), np.array([0.0, 3.0]), "c")
    assert (low, high) == (2, 2)


@pytest.mark.parametrize("n_samples", [64, 128])
def test_intervals_cover_the_true_ratio_as_often_as_they_say(n_samples: int) -> None:
    """90 % intervals of 500 data sets, whose samples have 5 to 1,000 predictions.

    With the number of predictions kept, they cover it nearly always: they are 2.4 times as wide.
    """
    rng = np.random.default_rng(3)

    def drawn(n: int) -> tuple[FloatArray, FloatArray]:
        lengths = np.ceil(rng.lognormal(4, 0.9, n))
        return lengths * rng.gamma(8, 1 / 8, n), lengths

    scores, lengths = drawn(1_000_000)
    true = scores.sum() / lengths.sum()
    covered: list[tuple[bool, bool]] = []
    for number in range(500):
        scores, lengths = drawn(n_samples)
        ends = [analysis.bootstrap_interval(scores[None], n, str(number))[:, 0] for n in (lengths, int(lengths.sum()))]
        covered.append((ends[0][0] <= true <= ends[0][1], ends[1][0] <= true <= ends[1][1]))
    ratio, kept = np.mean(covered, axis=0)
    assert 0.85 <= ratio <= 0.95
    assert kept > 0.98
    assert abs(ratio - 0.9) < abs(kept - 0.9)


def test_scores_by_kind_of_token() -> None:
    scores = scored.scores("c", [0.1, None, 0.1, 0.2, 0.2], by_kind={"image": (0.5,) * 5, "prompt": (0.5,) * 5})
    by_kind = analysis.kind_scores(scores)
    np.testing.assert_allclose(by_kind, [[0, 5, 5, 0], [NAN] * 4, [0, 5, 5, 0], [0, 10, 10, 0], [0, 10, 10, 0]])
    assert analysis.occurring(scores) == ["image", "prompt"]
    np.testing.assert_array_equal(analysis.sample_predictions(scores), [10, 40])
    half, whole = analysis.kind_samples(scores, ["prompt"]), analysis.kind_samples(scores, ["image", "prompt"])
    np.testing.assert_allclose(half, [[1.25, 3.75], [NAN] * 2, [1.25, 3.75], [2.5, 7.5], [2.5, 7.5]])
    np.testing.assert_allclose(whole, analysis.sample_matrix(scores))


def test_a_prompt_whose_errors_undo_those_of_others_stays_negative() -> None:
    """What float32 has left below 0 where there is no prompt does not."""
    parts = {"image": (1.25,) * 5, "prompt": (-0.25,) * 5}
    scores = scored.scores("c", [0.1] * 5, by_kind=parts)
    np.testing.assert_allclose(analysis.kind_samples(scores, ["prompt"]), [[-0.625, -1.875]] * 5)
    rest = scored.scores("c", [0.1] * 5, by_kind={"image": (1 / 3,) * 5, "answer": (2 / 3 * (1 + 1e-7),) * 5})
    found = analysis.kind_samples(rest, ["prompt"])
    assert found is not None
    assert (found >= 0).all()


def test_rows_of_older_programs_have_no_kinds() -> None:
    scores = table([[1.0, 1.0], None])
    assert (analysis.kind_scores(scores), analysis.occurring(scores), analysis.sample_predictions(scores)) == (
        None,
        [],
        None,
    )


def test_split_halves_compare_even_and_odd_samples() -> None:
    alike = np.array([[9.0, 8.0], [5.0, 5.0], [2.0, 3.0], [NAN, NAN], [1.0, 0.0]])
    stability = analysis.split_half_stability(alike)
    assert stability == analysis.RankStability(spearman=pytest.approx(1.0), top_overlap=1.0, top_k=2)
    opposed = analysis.split_half_stability(np.array([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]]))
    assert opposed == analysis.RankStability(spearman=pytest.approx(-1.0), top_overlap=0.0, top_k=2)
    assert analysis.split_half_stability(alike[:, :1]) is None
