"""What linear and quadratic maps allow: findings on the number of vectors, and on the order of their effect."""

import math

import duckdb
import numpy as np

from melbo_ray.report.finding import AGAINST, FEWEST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import median_interval
from melbo_ray.runs.queries import Columns, select

# "As many" are four fifths of the vectors found, of which there must be some.
_AS_MANY = 0.8


def linear(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The number of vectors beside those of a linear chain, and the part of their effect that is of first order."""
    rows = select(
        db,
        """SELECT kind, relative_loss AS found, linear_loss AS linear, first_order AS of_first, half_share AS half
           FROM linear WHERE concept = ? AND (kind = 'linear' OR kind = 'chain' AND isfinite(relative_loss))""",
        concept,
    )
    chain, of_linear = (_of_kind(rows, kind) for kind in ("chain", "linear"))
    if len(chain["found"]) < 2:
        return None
    found, length, _ = _found(db, concept)
    allowed = (of_linear["linear"] < 0.5).sum() * length / len(chain["found"])
    most, at_most = _bound(db, concept, "jacobian_most_below_half", "none can have more than")
    text = (
        f"{found} vectors found have a loss below 0.5; the chain of a linear map (Jacobian at 0) has about "
        f"{allowed:.0f} at these norms, and {at_most}. To first order the vectors have "
        f"{np.median(chain['of_first']):.0%} of the base's effect; half of their norm has "
        f"{np.median(chain['half']):.0%} of theirs (50% if linear). Yet the least linear loss beside them differs from "
        f"theirs by only {np.median(np.abs(chain['linear'] - chain['found'])):.2f}."
    )
    as_many = found >= FEWEST and allowed >= _AS_MANY * found
    return text, AGAINST if found > most else SUPPORTS if as_many else UNDECIDED


def gain(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The derivative at the base and along each vector's own path, with the bound of a linear map about the base."""
    rows = select(
        db,
        """SELECT kind, point, fraction, gain, sensitivity_beside AS beside FROM gain
           WHERE concept = ? AND isfinite(gain)""",
        concept,
    )
    chain, about_base = rows["kind"] == "chain", rows["point"] == "base"
    here, null = (rows["gain"][about_base & (rows["kind"] == kind)] for kind in ("chain", "random"))
    if len(here) < 2 or len(null) < 2:
        return None
    own = rows["gain"][about_base & (rows["kind"] == "base")]
    needed, (found, _, norm) = float(own[0]) - 0.5 if len(own) else math.nan, _found(db, concept)
    points = np.unique(rows["fraction"][~about_base])
    path = [float(np.median(rows["gain"][chain & ~about_base & (rows["fraction"] == at)])) for at in points]
    (low, high), beyond = median_interval(here), median_interval(null)[1]
    text = (
        f"To first order about the base the vectors have {np.median(here):.0%} [{low:.0%}, {high:.0%}] of its effect "
        f"(about 0 {path[0]:.0%}; random directions about the base {np.median(null):.0%}). On its own way from 0 to "
        f"its norm a vector gains {', '.join(f'{value:.2f}' for value in path)} (constant if linear, from 0 in equal "
        f"steps if quadratic). "
    )
    if not needed > 0:
        return f"{text}About the base not even the base has half of its effect, so that there is no bound.", UNDECIDED
    most = (float(rows["beside"][chain & about_base][0]) * norm / needed) ** 2
    text += (
        f"A loss below 0.5 takes {needed:.0%} about the base, and a linear map with the Jacobian there has at most "
        f"{most:.0f} orthogonal vectors with it at these norms; found are {found}."
    )
    against = high <= needed / 2 and found > most
    return text, SUPPORTS if low >= needed and low > beyond else AGAINST if against else UNDECIDED


def curvature(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The number of eigenvectors that suffice, and how much of the effect the second-order form has."""
    rows = select(
        db,
        """SELECT kind, along, first_order + second_order AS foretold, positive FROM curvature
           WHERE concept = ? AND isfinite(along)""",
        concept,
    )
    chain, quadratic, random = (_of_kind(rows, kind) for kind in ("chain", "quadratic", "random"))
    if len(chain["along"]) < 2:
        return None
    strong = chain["along"] > 0.1
    if strong.sum() < 2:
        return "Fewer than two of the vectors have a tenth of the base's displacement.", UNDECIDED
    found, length, _ = _found(db, concept)
    each = length / len(chain["along"])
    foretold, real = ((quadratic[name] >= 0.5).sum() * each for name in ("foretold", "along"))
    most, at_most = _bound(db, concept, "hessian_most_below_half", "by the form no chain can have more than")
    shares = chain["foretold"][strong] / chain["along"][strong]
    low, high = median_interval(shares)
    beside = f", of random directions {np.median(random['positive']):.0%}" if len(random["positive"]) else ""
    text = (
        f"{found} vectors found have a loss below 0.5, and so half of the base's displacement. Of the Hessian's "
        f"eigenvectors about {foretold:.0f} would have it at these norms by the quadratic form (Hessian at 0), "
        f"{real:.0f} have it in the model, and {at_most}. Of the vectors' effect the form has {np.median(shares):.0%} "
        f"[{low:.0%}, {high:.0%}]; {np.median(chain['positive']):.0%} of their squared norm lies where it is "
        f"positive{beside}."
    )
    as_many = found >= FEWEST and foretold >= _AS_MANY * found and real >= found / 2
    fits = low >= 0.5 and high <= 1.5
    return text, AGAINST if found > most or high <= 0.25 else SUPPORTS if as_many and fits else UNDECIDED


def _of_kind(rows: Columns, kind: str) -> Columns:
    return {name: values[rows["kind"] == kind] for name, values in rows.items()}


def _found(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[int, int, float]:
    """Of the whole chain: how many vectors have a loss below 0.5, how many there are, and their largest norm."""
    rows = select(
        db,
        """SELECT count(*) FILTER (relative_loss < 0.5) AS found, count(*) AS length, max(norm) AS norm FROM vectors
           WHERE concept = ? AND kind = 'chain' AND isfinite(norm)""",
        concept,
    )
    return int(rows["found"][0]), int(rows["length"][0]), float(rows["norm"][0])


def _bound(db: duckdb.DuckDBPyConnection, concept: str, figure: str, words: str) -> tuple[float, str]:
    """A bound of the number of vectors that `summary` has, NaN if it has none, and what to say of it."""
    sql = "SELECT max(value) AS most FROM summary WHERE concept = ? AND figure = ?"
    most = float(select(db, sql, concept, figure)["most"][0])
    return most, "how many there can be was not measured" if math.isnan(most) else f"{words} {most:.0f}"
