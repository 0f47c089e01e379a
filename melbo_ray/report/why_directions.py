"""What the vectors are as directions of the stream: findings on exponents, efficiency, use, a hidden one."""

import math

import duckdb
import numpy as np
from jaxtyping import Float

from melbo_ray.report.finding import AGAINST, FEWEST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import median_interval, median_told, share_interval
from melbo_ray.runs.queries import EXAMPLES, Columns, select, unsteered

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
    if len(chain) < FEWEST:
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


def efficiency(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The loss at equal norms, its rise under orthogonal noise, and the change on neutral texts, beside the base's.

    Supports if the interval of the loss at R ends at 0.5 or below and below the random directions', and that of the
    rise under noise of half the own norm ends at 0.1 above the base's or below; speaks against if one of the two begins
    above 0.5, or 0.1 above the base's (the metrics are those of Soligo et al. 2026, the thresholds ours).
    """
    chain, null, base = (efficiencies(db, concept, kind) for kind in ("chain", "random", "base"))
    if len(chain["rise"]) < 2 or len(null["rise"]) < 2 or not len(base["rise"]):
        return None

    def beside(name: str) -> str:
        return f"{median_told(chain[name])} (random directions {median_told(null[name])}, the base {base[name][0]:.2f})"

    text = (
        f"At norms of R, 2 R and 4 R their relative loss is {beside('loss_at_1r')}, {beside('loss_at_2r')} and "
        f"{beside('loss_at_4r')}. Orthogonal noise of half their own norm raises it by {beside('rise')}. At norm R "
        f"they change neutral texts by a KL of {beside('kl_neutral')} nats."
    )
    (low, high), (least, most) = median_interval(chain["loss_at_1r"]), median_interval(chain["rise"])
    allowed = float(base["rise"][0]) + 0.1
    if low > 0.5 or least > allowed:
        return text, AGAINST
    efficient = high <= 0.5 and high < median_interval(null["loss_at_1r"])[0]
    return text, SUPPORTS if efficient and most <= allowed else UNDECIDED


def efficiencies(db: duckdb.DuckDBPyConnection, concept: str, kind: str) -> Columns:
    """The losses and the KL of a kind; `rise` is that of the loss under orthogonal noise of half the own norm."""
    return select(
        db,
        """SELECT loss_at_1r, loss_at_2r, loss_at_4r, loss_own, loss_noise_05, loss_noise_10, kl_neutral,
                  loss_noise_05 - loss_own AS rise
           FROM efficiency WHERE concept = ? AND kind = ? AND isfinite(
               loss_at_1r + loss_at_2r + loss_at_4r + loss_own + loss_noise_05 + loss_noise_10 + kl_neutral)""",
        concept,
        kind,
    )


def natural(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """How many vectors tell texts of the concept apart, and how large a part of an activation they are.

    Supports if the share's interval ends at 15 % or below, three times what chance has; speaks against if it begins at
    25 % or above. Both look at the source layer alone.
    """
    sql = f"SELECT p_value AS p FROM ({EXAMPLES['presence_p_values']}) WHERE concept = ? AND kind = 'chain'"
    rows = select(db, f"{sql} AND texts = 'concept'", concept)
    sql = "SELECT kind, natural_share AS share FROM efficiency WHERE concept = ? AND isfinite(natural_share)"
    shares = select(db, sql, concept)
    chain, null = (shares["share"][shares["kind"] == kind] for kind in ("chain", "random"))
    if not len(rows["p"]):
        return None
    hits, total = int((rows["p"] <= 0.05).sum()), len(rows["p"])
    low, high = share_interval(hits, total)
    text = (
        f"At the source layer {hits} of {total} [{low:.0%}, {high:.0%}] tell texts of the concept apart beyond random "
        f"directions at p ≤ 0.05 (5% would by chance)"
    )
    if len(chain) and len(null):
        natural, random = (median_told(values, ".3f") for values in (chain, null))
        text += f"; their largest natural share there is {natural}, of random directions {random}"
    return text + ".", SUPPORTS if high <= 0.15 else AGAINST if low >= 0.25 else UNDECIDED


def hidden(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The part of the mean difference in the vectors, beside what any direction can have and what is needed.

    Speaks against if no direction can have an rms part in them as large as what the mean difference, and the base, need
    for half of the effect, and the mean difference has at most four fifths of the rms cosine that a direction can have.
    """
    figures = select(db, "SELECT figure, max(value) AS value FROM summary WHERE concept = ? GROUP BY figure", concept)
    known = dict(zip(figures["figure"], figures["value"], strict=True))
    cos, bound = known.get("rms_cos_contrast", math.nan), known.get("bessel_rms_cos", math.nan)
    component, dose = known.get("bessel_rms_component", math.nan), known.get("contrast_norm_for_half_score", math.nan)
    if not math.isfinite(cos + bound + component):
        return None
    base = _base_dose(db, concept)
    needed = (
        f"needs a norm of {dose:.2f} for half of the score" if math.isfinite(dose) else "has it at no norm up to 2 R"
    )
    text = (
        f"The mean difference (of the contrast prompts, or of the texts without such) has an rms cosine of {cos:.3f} "
        f"with the chain (Bessel's bound {bound:.3f}). No direction has an rms part of more than {component:.2f} in "
        f"it; the mean difference {needed}{f', the base one of {base:.2f} for half of the KL' if base else ''}."
    )
    small = math.isfinite(dose) and component < min(dose, base or dose) and cos <= 0.8 * bound
    return text, AGAINST if small else UNDECIDED


def _base_dose(db: duckdb.DuckDBPyConnection, concept: str) -> float | None:
    """The least norm measured at which the base leaves half of the unsteered KL or less; None if there is none."""
    sql = """SELECT min(norm) AS norm FROM dose WHERE concept = ? AND kind = 'base' AND scale = 'alpha'
             AND kl_from_base <= ?"""
    norm = float(select(db, sql, concept, unsteered(db, concept) / 2)["norm"][0])
    return norm if math.isfinite(norm) else None
