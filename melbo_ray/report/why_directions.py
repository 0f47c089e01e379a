"""What the vectors are as directions of the stream: findings on exponents, on natural use, on a hidden direction."""

import math

import duckdb
import numpy as np

from melbo_ray.report.finding import AGAINST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import median_interval, share_interval
from melbo_ray.runs.queries import EXAMPLES, select

# Exponents of fewer vectors are an anecdote.
_FEWEST_EXPONENTS = 8
_PARTNERS = {"base": "the base", "contrast": "the mean difference", "component": "the leading principal components"}


def privileged(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The exponents of the vectors mixed with others, beside those of random directions."""
    rows = select(
        db, "SELECT kind, partner, p, left_out AS why FROM privileged WHERE concept = ? ORDER BY index", concept
    )

    def exponents(kind: str, partner: str) -> np.ndarray:
        p = rows["p"][(rows["kind"] == kind) & (rows["partner"] == partner)].astype(np.float64)
        return p[np.isfinite(p)]

    chain, null = exponents("chain", "random"), exponents("random", "random")
    if not (len(chain) and len(null)):
        return None
    low, high = median_interval(chain)
    mixed = {name: exponents("chain", partner) for partner, name in _PARTNERS.items()}
    known = {name: exponents(kind, "random") for kind, name in _PARTNERS.items()}
    missing = [str(why) for why in rows["why"][(rows["kind"] == "base") & (rows["partner"] == "contrast")] if why]
    text = (
        f"Mixed with a random direction the exponent is {np.median(chain):.2f} [{low:.2f}, {high:.2f}]; of two random "
        f"directions {np.median(null):.2f}.{_medians(' Mixed with', mixed, ' (1 is one effect, 2 are two)')}"
        f"{_medians(' With a random direction', known)}{''.join(f' No mean difference: {why}.' for why in missing)}"
    )
    if len(chain) < _FEWEST_EXPONENTS:
        return f"{text} Only {len(chain)} vectors were measured.", UNDECIDED
    return text, SUPPORTS if low > max(2.0, float(np.median(null))) else AGAINST if high <= 2.0 else UNDECIDED


def _medians(begin: str, exponents: dict[str, np.ndarray], end: str = "") -> str:
    """A sentence with the median of each that has any; empty if none has."""
    told = [f"{name} {np.median(p):.2f}" for name, p in exponents.items() if len(p)]
    return f"{begin} {', '.join(told)}{end}." if told else ""


def natural(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """How many vectors tell texts of the concept apart, and how large a part of an activation they are."""
    sql = f"SELECT p_value AS p FROM ({EXAMPLES['presence_p_values']}) WHERE concept = ? AND kind = 'chain'"
    rows = select(db, f"{sql} AND texts = 'concept'", concept)
    natural = select(db, "SELECT kind, natural_share AS share FROM efficiency WHERE concept = ?", concept)
    chain, null = (natural["share"][natural["kind"] == kind] for kind in ("chain", "random"))
    if not len(rows["p"]):
        return None
    hits, total = int((rows["p"] <= 0.05).sum()), len(rows["p"])
    low, high = share_interval(hits, total)
    text = (
        f"{hits} of {total} [{low:.0%}, {high:.0%}] tell texts of the concept apart beyond random directions, p ≤ 0.05"
    )
    if len(chain) and len(null):
        text += f"; their largest natural share is {np.median(chain):.3f}, of random directions {np.median(null):.3f}"
    return text + ".", SUPPORTS if low <= 0.05 else AGAINST if low >= 0.25 else UNDECIDED


def hidden(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The part of the mean difference in the vectors, beside what any direction can have and what is needed."""
    figures = select(db, "SELECT figure, max(value) AS value FROM summary WHERE concept = ? GROUP BY figure", concept)
    known = dict(zip(figures["figure"], figures["value"], strict=True))
    cos, bound = known.get("rms_cos_contrast", math.nan), known.get("bessel_rms_cos", math.nan)
    component, dose = known.get("bessel_rms_component", math.nan), known.get("contrast_norm_for_half_score", math.nan)
    if not math.isfinite(cos):
        return None
    needed = f"a norm of {dose:.2f}" if math.isfinite(dose) else "more than 2 R, if any norm does it,"
    text = (
        f"The mean difference has an rms cosine of {cos:.3f} with the chain (Bessel's bound {bound:.3f}); no direction "
        f"has an rms part of more than {component:.2f} in it, and the mean difference needs {needed} for half of the "
        f"effect."
    )
    small = not math.isfinite(dose) or component < dose
    return text, AGAINST if small else UNDECIDED
