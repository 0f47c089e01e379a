import numpy as np
import pytest
from scipy import stats

from melbo_ray.report.intervals import jackknife_interval, median_interval, share_interval


def exact_median_interval(values):
    """The percentile bootstrap without drawing: of an odd number n, the median of n draws is at most the k-th smallest
    value with the chance that more than half of the draws are (each with chance k/n)."""
    n = len(values)
    at_most = stats.binom.sf(n // 2, n, np.arange(1, n + 1) / n)
    ordered = np.sort(values)
    return ordered[np.searchsorted(at_most, 0.025)], ordered[np.searchsorted(at_most, 0.975)]


@pytest.mark.parametrize("n", [3, 9, 25, 101])
def test_the_interval_of_a_median_is_that_of_every_resample(n):
    values = np.random.default_rng(n).lognormal(size=n)
    assert median_interval(values) == pytest.approx(exact_median_interval(values), rel=1e-12)


def test_the_interval_of_a_median_is_that_of_scipy():
    values = np.random.default_rng(3).normal(size=24)
    found = stats.bootstrap((values,), np.median, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert median_interval(values) == pytest.approx((found.low, found.high), abs=0.05)
    assert median_interval(values) == median_interval(values)
    assert median_interval(-values) == pytest.approx([-end for end in median_interval(values)[::-1]], abs=0.05)


def test_the_interval_covers_the_median_about_95_times_in_100():
    draws = np.random.default_rng(0).normal(size=(200, 25))
    covered = np.mean([low <= 0 <= high for low, high in map(median_interval, draws)])
    assert 0.9 <= covered <= 0.99


@pytest.mark.parametrize(("hits", "total"), [(0, 8), (8, 8), (16, 24), (112, 562), (1, 1)])
def test_the_interval_of_a_share_is_that_of_scipy(hits, total):
    found = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert share_interval(hits, total) == pytest.approx((found.low, found.high), abs=1e-9)


def test_of_one_vector_or_none_nothing_is_known():
    assert np.isnan(median_interval([1.0])).all()
    assert np.isnan(median_interval([])).all()
    assert np.isnan(share_interval(0, 0)).all()


def test_of_a_mean_the_jackknife_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=12)
    half = stats.norm.ppf(0.975) * values.std(ddof=1) / np.sqrt(12)
    expected = (values.mean() - half, values.mean() + half)
    assert jackknife_interval(lambda kept: values[kept].mean(), 12) == pytest.approx(expected)
    assert np.isnan(jackknife_interval(lambda kept: values[kept].mean(), 2)).all()
