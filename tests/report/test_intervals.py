import itertools

import numpy as np
import pytest
from scipy import stats

from melbo_ray.report.intervals import jackknife_interval, median_interval, rank_correlation, share_interval


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


LOG_PROBS, COUNTS = [-3.6, -3.7, -3.8, -4.6, -6.3, -6.3, -7.9], [30, 32, 30, 29, 20, 25, 28]


def test_a_rank_correlation_is_that_of_scipy():
    found = rank_correlation(LOG_PROBS, COUNTS)

    def rho(x, y):
        return stats.spearmanr(x, y).statistic

    assert found.rho == pytest.approx(rho(LOG_PROBS, COUNTS))
    exact = stats.permutation_test(
        (COUNTS,), lambda y: abs(rho(LOG_PROBS, y)), permutation_type="pairings", n_resamples=5040, vectorized=False,
        alternative="greater",
    )  # fmt: skip
    assert found.p_value == pytest.approx(exact.pvalue)
    assert found == rank_correlation(LOG_PROBS, COUNTS)


def test_the_interval_of_a_rank_correlation_is_that_of_every_resample():
    pairs = np.array([LOG_PROBS[:6], COUNTS[:6]])
    one, other = pairs[:, np.array([*itertools.product(range(6), repeat=6)])]
    ranks = [stats.rankdata(side, axis=1) - 3.5 for side in (one, other)]
    spread = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    exact = np.quantile((ranks[0] * ranks[1]).sum(1)[spread > 0] / spread[spread > 0], [0.025, 0.975])
    found = rank_correlation(*pairs)
    assert (found.low, found.high) == pytest.approx(exact, abs=0.05)


def test_of_many_pairs_random_permutations_count():
    x = np.random.default_rng(0).normal(size=40)
    related, unrelated = rank_correlation(x, x + 0.1 * np.sin(np.arange(40))), rank_correlation(x, np.arange(40))
    assert related.p_value == pytest.approx(1 / 10_001)
    assert related.low > 0.9
    assert unrelated.p_value == pytest.approx(stats.spearmanr(x, np.arange(40)).pvalue, abs=0.02)


def test_equal_values_have_no_rank_correlation():
    assert np.isnan([rank_correlation(LOG_PROBS, [30] * 7).rho, rank_correlation([1, 1], [2, 3]).p_value]).all()
