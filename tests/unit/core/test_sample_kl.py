"""What of a sample's KL counts in a predicted mean."""

import numpy as np

from sweep.core.sample_kl import MOST_NATS, MOST_TIMES, counted_kl


def test_samples_of_one_kind_count_as_they_are() -> None:
    kl, counts = np.array([[0.5, 0.1, 0.9], [0.0, 0.0, 0.0]]), np.array([10.0, 5.0, 20.0])
    assert (counted_kl(kl, counts) == kl).all()


def test_a_sample_counts_at_most_one_nat_a_prediction() -> None:
    found = counted_kl(np.array([50.0, 5.0]), np.array([10.0, 10.0]))
    assert found.tolist() == [10.0 * MOST_NATS, 5.0]


def test_a_sample_counts_at_most_so_many_times_the_mean() -> None:
    """One of 100 samples of a prediction each has 0.5 nats where the others have 0.001: the mean is 0.00599."""
    kl = np.full(100, 0.001)
    kl[7] = 0.5
    found = counted_kl(kl, np.ones(100))
    np.testing.assert_allclose(found[7], MOST_TIMES * 0.00599)
    assert (np.delete(found, 7) == 0.001).all()


def test_what_was_never_called_stays_unknown() -> None:
    assert np.isnan(counted_kl(np.array([[np.nan, np.nan]]), np.array([1.0, 2.0]))).all()
