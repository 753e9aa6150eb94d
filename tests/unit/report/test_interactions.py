"""Projections of layer groups: their unit, how far their products count, and which pairs stand out."""

import numpy as np
import pyarrow as pa
import pytest

from sweep.report.interactions import (
    Float32Array,
    counted_projections,
    group_samples,
    interaction_weight,
    joint_samples,
    projections_of,
    strongest_pairs,
)
from sweep.store.records import SCORES_SCHEMA


def table(projections: np.ndarray, predictions: list[int], called: tuple[bool, ...]) -> pa.Table:
    """Rows of one cell. Args: projections: [groups, samples, draws]."""
    rows = []
    for number, (values, was_called) in enumerate(zip(projections, called, strict=True)):
        row = {"cell_id": "c", "group": f"g{number}", "modules": [f"g{number}"], "weight_elements": 1}
        row |= {"n_predictions": sum(predictions), "n_samples": len(predictions), "effective_bits": 8.0}
        row |= {"sample_predictions": predictions}
        if was_called:
            row |= {"score": float(np.square(values).mean(1).sum()), "projections": values.ravel()}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCORES_SCHEMA)


def drawn(n_groups: int, n_samples: int, n_draws: int, shared: float, seed: int = 0) -> Float32Array:
    """Projections of which a part is common to all groups: correlations of shared^2 / (1 + shared^2)."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(1, n_samples, n_draws))
    own = rng.normal(size=(n_groups, n_samples, n_draws))
    return (own + shared * common).astype(np.float32)


def test_squares_add_up_to_predicted_kl() -> None:
    """Two samples of 2 and 3 predictions, two draws: half the mean square over draws, per prediction of both."""
    values = np.array([[[1.0, 0.5], [0.25, 1.0]], [[9.0, 9.0], [9.0, 9.0]]])
    found = projections_of(table(values, [2, 3], (True, False)))
    assert found is not None
    expected = (1 + 0.25 + 0.0625 + 1) / 2 / (2 * 5)
    assert np.square(found).sum((1, 2)).tolist() == pytest.approx([expected, 0.0])
    assert (found[0] > 0).all()


def test_a_sample_beyond_the_estimates_range_is_made_smaller_with_its_sign() -> None:
    values, counts = np.array([[[-100.0, -100.0], [0.5, 0.5]]]), np.array([2.0, 2.0])
    whole = projections_of(table(values, [2, 2], (True,)))
    assert whole is not None
    found = counted_projections(whole, counts)
    np.testing.assert_allclose(np.square(found).sum(2), group_samples(whole, counts), rtol=1e-6)
    np.testing.assert_allclose(np.square(found[0, 0]).sum(), 1.0 * 2 / 4, rtol=1e-6)  # one nat a prediction
    assert (found[0, 0] < 0).all()


def test_scores_without_projections_have_none() -> None:
    empty = table(np.zeros((1, 2, 2)), [1, 1], (True,))
    without = empty.set_column(
        empty.schema.get_field_index("projections"), "projections", pa.nulls(1, pa.list_(pa.float32()))
    )
    assert projections_of(without) is None
    assert projections_of(table(np.zeros((1, 2, 2)), [1, 1], (False,))) is None


def test_a_mix_has_the_square_of_the_sum() -> None:
    one, two = np.array([[0.1, 0.2], [0.3, 0.0]], np.float32), np.array([[0.1, -0.2], [0.1, 0.1]], np.float32)
    np.testing.assert_allclose(joint_samples([one, two], np.array([4.0, 6.0])), [0.04, 0.16 + 0.01], rtol=1e-6)


def test_a_mix_of_one_group_has_its_predicted_kl_whatever_a_sample_has() -> None:
    """511 samples of 1e-4 nats a prediction and one of 0.9, which counts less, once."""
    counts = np.full(512, 10.0)
    kl = np.append(np.full(511, 1e-4), 0.9) * counts / counts.sum()
    projections = np.sqrt(kl).astype(np.float32)[None, :, None]
    alone = group_samples(projections, counts)
    np.testing.assert_allclose(joint_samples([projections[0]], counts), alone[0], rtol=1e-6)
    assert alone.sum() < 0.5 * kl.sum()


def test_the_weight_is_one_minus_the_variance_of_correlations_over_their_squares() -> None:
    """By loops over pairs, on few samples, where a variance is no mean square."""
    values = drawn(5, 6, 3, shared=0.8).astype(np.float64)
    values /= np.linalg.norm(values, axis=(1, 2), keepdims=True)
    squares, variance = 0.0, 0.0
    for i in range(5):
        for j in range(i):
            by_sample = (values[i] * values[j]).sum(1)
            squares += by_sample.sum() ** 2
            variance += 6 * by_sample.var(ddof=1)
    assert interaction_weight([values.astype(np.float32)]) == pytest.approx(max(0.0, 1 - variance / squares), abs=1e-5)


def test_noise_has_no_weight_and_what_samples_agree_on_has_much() -> None:
    assert np.mean([interaction_weight([drawn(40, 64, 4, shared=0.0, seed=seed)]) for seed in range(8)]) < 0.1
    assert interaction_weight([drawn(40, 256, 8, shared=1.0)]) > 0.95
    several = [drawn(40, 64, 4, shared=0.2), drawn(40, 64, 4, shared=0.2, seed=1)]
    assert 0.0 <= interaction_weight(several) < 1.0


def test_the_weight_is_the_share_of_squares_that_is_not_noise() -> None:
    """Correlations of 0.1 from 400 independent terms: squares are 0.01 signal and 1/400 noise, so four fifths."""
    shared = np.sqrt(0.1 / 0.9)
    weights = [interaction_weight([drawn(60, 100, 4, shared, seed)]) for seed in range(5)]
    assert np.mean(weights) == pytest.approx(0.8, abs=0.05)


def test_one_group_or_one_sample_has_no_interactions() -> None:
    assert interaction_weight([drawn(1, 8, 2, 0.0)]) == 0
    assert interaction_weight([drawn(5, 1, 2, 1.0)]) == 0
    assert strongest_pairs(drawn(5, 1, 2, 1.0), 3) == []


def test_pairs_that_stand_out_are_named_with_sign_and_size() -> None:
    values = drawn(6, 200, 4, shared=0.0)
    values[4] = values[1] + 0.1 * values[4]
    values[5] = -2 * values[2] + 0.1 * values[5]
    first, second = strongest_pairs(values, 5)
    assert [(first.first, first.second), (second.first, second.second)] == [(2, 5), (1, 4)]
    np.testing.assert_allclose(first.kl, 2 * (values[2].astype(np.float64) * values[5]).sum())
    assert (first.kl < 0, first.correlation < -0.99) == (True, True)
    assert second.correlation > 0.99
    by_sample = 2 * (values[1].astype(np.float64) * values[4]).sum(1)
    np.testing.assert_allclose(second.standard_error, by_sample.std(ddof=1) * np.sqrt(200))


def test_noise_has_no_pairs() -> None:
    assert strongest_pairs(drawn(30, 128, 8, shared=0.0), 10) == []
