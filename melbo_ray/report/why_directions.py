"""What the vectors are as directions of the stream: findings on exponents, on natural use, on a hidden direction."""

import math

import duckdb
import numpy as np
from jaxtyping import Float

from melbo_ray.report.finding import AGAINST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import median_interval, share_interval
from melbo_ray.runs.queries import EXAMPLES, Columns, select

# Exponents of fewer vectors are an anecdote.
_FEWEST_EXPONENTS = 8
_PARTNERS = {"base": "the base", "contrast": "the mean difference", "component": "the leading principal components"}


def privileged(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The exponents of the vectors mixed with others, beside those without interaction and of random directions."""
    rows = select(
        db,
        """SELECT kind, partner, p, p_orthogonal AS null, left_out AS why FROM privileged
           WHERE concept = ? ORDER BY index""",
        concept,
    )
    chain, random = _exponents(rows, "chain", "random"), _exponents(rows, "random", "random")
    if not (len(chain) and len(random)):
        return None
    low, high = median_interval(chain[:, 0])
    mixed = {name: _exponents(rows, "chain", partner) for partner, name in _PARTNERS.items()}
    known = {name: _exponents(rows, kind, "random") for kind, name in _PARTNERS.items()}
    missing = [str(why) for why in rows["why"][(rows["kind"] == "base") & (rows["partner"] == "contrast")] if why]
    text = (
        f"Mixed with a random direction the exponent is {np.median(chain[:, 0]):.2f} [{low:.2f}, {high:.2f}], without "
        f"interaction it would be {np.median(chain[:, 1]):.2f}; of two random directions {_told(random)}."
        f"{_medians(' Mixed with', mixed)}{_medians(' With a random direction', known)}"
        f"{''.join(f' No mean difference: {why}.' for why in missing)}"
    )
    if len(chain) < _FEWEST_EXPONENTS:
        return f"{text} Only {len(chain)} vectors were measured.", UNDECIDED
    controls = [_excess(p) for name, p in known.items() if name != _PARTNERS["base"] and len(p)]
    if not controls or min(np.median(excess) for excess in controls) <= 0:
        return f"{text} Directions that the model is known to use do not show it, so that it cannot be told.", UNDECIDED
    low, high = median_interval(_excess(chain))
    return text, SUPPORTS if low > max(0.0, np.median(_excess(random))) else AGAINST if high <= 0 else UNDECIDED


def _exponents(rows: Columns, kind: str, partner: str) -> Float[np.ndarray, "n 2"]:
    """The exponents of these mixtures, and what they would be without interaction."""
    of = (rows["kind"] == kind) & (rows["partner"] == partner)
    pairs = np.stack([rows[name][of].astype(np.float64) for name in ("p", "null")], axis=1)
    return pairs[np.isfinite(pairs).all(1)]


def _excess(exponents: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """By how much each is above both 2 and what it would be without interaction."""
    return exponents[:, 0] - np.maximum(2, exponents[:, 1])


def _told(exponents: Float[np.ndarray, "n 2"]) -> str:
    return "{:.2f} ({:.2f})".format(*np.median(exponents, axis=0))


def _medians(begin: str, exponents: dict[str, np.ndarray]) -> str:
    """A sentence with the medians of each that has any; empty if none has."""
    told = [f"{name} {_told(p)}" for name, p in exponents.items() if len(p)]
    return f"{begin} {', '.join(told)}." if told else ""


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
