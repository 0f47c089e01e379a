"""Whether frequent concepts have more vectors: counts beside log-probabilities, over the concepts of a sweep."""

import math
import statistics

import pyarrow as pa

from melbo_ray.report.intervals import rank_correlation

_FEWEST = 4


def points(table: pa.Table) -> dict[str, tuple[float, float]]:
    """Of every concept its log-probability on neutral prompts and its number of vectors below half of the unsteered KL.

    `table` is that of a sweep (`sweep.compare_runs`); where a concept has several rows with both, they are medians.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in table.to_pylist():
        if row["neutral_log_prob"] is not None and row["below_half"] is not None:
            found.setdefault(row["concept"], []).append((row["neutral_log_prob"], row["below_half"]))
    return {concept: tuple(map(statistics.median, zip(*rows, strict=True))) for concept, rows in found.items()}


def told(table: pa.Table) -> str | None:
    """A sentence with Spearman's rank correlation of the two; None for fewer than four concepts with both."""
    pairs = points(table)
    if len(pairs) < _FEWEST:
        return None
    log_probs, counts = zip(*pairs.values(), strict=True)
    found = rank_correlation(log_probs, counts)
    begin = (
        f"Over {len(pairs)} concepts, the rank correlation (Spearman) of the number of vectors with KL below half of "
        "the unsteered one and the concept's log-probability on neutral prompts"
    )
    if math.isnan(found.rho):
        return f"{begin} does not exist: all have the same number."
    return f"{begin} is {found.rho:.2f} [{found.low:.2f}, {found.high:.2f}], permutation p = {found.p_value:.2g}."
