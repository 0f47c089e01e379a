"""95 % confidence intervals of a median, of a share, and of a figure of all vectors together."""

import math
from collections.abc import Callable, Sequence

import numpy as np

_RESAMPLES = 10_000
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
