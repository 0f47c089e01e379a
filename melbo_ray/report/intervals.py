"""95 % confidence intervals: of medians, shares, figures of all vectors, and rank correlations."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

_RESAMPLES = 10_000
# Pairs of which every permutation is counted: 362,880 of them.
_MOST_PERMUTED = 9
_DRAWS_AT_ONCE = 1 << 22
_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def median_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median over vectors, by the percentile bootstrap; NaN for fewer than two values.

    The vectors are resampled 10,000 times with replacement, and the interval is between the 2.5 % and 97.5 % quantiles
    of their medians (Efron 1979). It covers variation over vectors, not over prompts or models.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    draws, rows = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // len(values))
    medians = [
        np.median(values[draws.integers(len(values), size=(min(rows, _RESAMPLES - done), len(values)))], axis=1)
        for done in range(0, _RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(medians), [0.025, 0.975])
    return float(low), float(high)


def median_told(values: Sequence[float] | np.ndarray, form: str = ".2f") -> str:
    """The median as text, with its interval in brackets if there are two values or more."""
    low, high = median_interval(values)
    ends = "" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]"
    return f"{float(np.median(values)):{form}}{ends}"


def share_interval(hits: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of vectors (Wilson 1927), which has a positive width at 0 and 1 too."""
    if not total:
        return math.nan, math.nan
    share, weight = hits / total, _Z**2 / total
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def jackknife_interval(figure: Callable[[np.ndarray], float], total: int) -> tuple[float, float]:
    """The 95 % interval of a figure of all vectors, by the jackknife (Tukey 1958); NaN for fewer than three vectors.

    `figure` takes the positions of the vectors that are kept. The bootstrap would not do where a vector drawn twice
    resembles itself. It covers variation over vectors, not over prompts or models.
    """
    if total < 3:
        return math.nan, math.nan
    every = np.arange(total)
    without = np.array([figure(np.delete(every, left_out)) for left_out in every])
    half = _Z * math.sqrt((total - 1) * without.var())
    return figure(every) - half, figure(every) + half


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of pairs.

    Attributes:
        rho: the correlation of the ranks, ties at their mean; NaN if either side has one value only.
        low: lower end of its 95 % interval.
        high: upper end.
        p_value: share of the permutations of one side with |ρ| at least as large.
    """

    rho: float
    low: float
    high: float
    p_value: float


def rank_correlation(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, seed: int = 0
) -> RankCorrelation:
    """Spearman's rank correlation, its interval by the percentile bootstrap over pairs, and its permutation p-value.

    As in `median_interval`; resamples without a correlation do not count. Up to nine pairs the permutations are all,
    beyond that 10,000 random ones and the identity.
    """
    pairs, draws = np.array([x, y], np.float64), np.random.default_rng(seed)
    n, ranks = len(x), _ranks(pairs)
    spread = math.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1]))
    if not spread:
        return RankCorrelation(math.nan, math.nan, math.nan, math.nan)
    rho = float(ranks[0] @ ranks[1] / spread)
    one, other = _ranks(pairs[:, draws.integers(n, size=(_RESAMPLES, n))])
    spreads = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    low, high = np.quantile((one * other).sum(1)[spreads > 0] / spreads[spreads > 0], [0.025, 0.975])
    if n <= _MOST_PERMUTED:
        orders = np.array([*itertools.permutations(range(n))])
    else:
        orders = np.vstack([np.arange(n), draws.permuted(np.tile(np.arange(n), (_RESAMPLES, 1)), axis=1)])
    as_large = np.abs(ranks[1][orders] @ ranks[0]) >= abs(rho) * spread * (1 - 1e-9)
    return RankCorrelation(rho, float(low), float(high), float(as_large.mean()))


def _ranks(values: Float64[np.ndarray, "*rows n"]) -> Float64[np.ndarray, "*rows n"]:
    """The ranks of each row, ties at their mean, around 0."""
    one, other = values[..., :, None], values[..., None, :]
    ranks = ((other < one).sum(-1) + (other <= one).sum(-1)) / 2
    return ranks - ranks.mean(-1, keepdims=True)
