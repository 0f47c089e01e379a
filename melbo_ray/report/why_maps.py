"""What linear and quadratic maps allow: findings on the number of vectors, and on the order of their effect."""

import duckdb
import numpy as np

from melbo_ray.report.finding import AGAINST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import median_interval
from melbo_ray.runs.queries import select


def linear(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The number of vectors beside those of a linear chain, and the part of their effect that is of first order."""
    rows = select(
        db,
        """WITH l AS (FROM linear WHERE concept = $1), s AS (FROM summary WHERE concept = $1)
           SELECT c.relative_loss AS found, c.linear_loss AS beside, coalesce(o.linear_loss, 1) AS linear,
                  c.first_order AS of_first, c.half_share AS half,
                  (SELECT max(value) FROM s WHERE figure = 'jacobian_most_below_half') AS most,
                  (SELECT count(*) FROM vectors WHERE concept = $1 AND kind = 'chain') / count(*) OVER () AS each
           FROM l c LEFT JOIN (FROM l WHERE kind = 'linear') o USING (index)
           WHERE c.kind = 'chain' AND isfinite(c.relative_loss) ORDER BY index""",
        concept,
    )
    if len(rows["found"]) < 2:
        return None
    found, linear = (float((rows[name] < 0.5).sum() * rows["each"][0]) for name in ("found", "linear"))
    text = (
        f"About {found:.0f} vectors found have a loss below 0.5; the chain of a linear map (Jacobian at 0) has about "
        f"{linear:.0f} at these norms, and none can have more than {rows['most'][0]:.0f}. To first order the vectors "
        f"have {np.median(rows['of_first']):.0%} of the base's effect; half of their norm has "
        f"{np.median(rows['half']):.0%} of theirs (50% if linear). Yet the least linear loss beside them differs from "
        f"theirs by only {np.median(np.abs(rows['beside'] - rows['found'])):.2f}."
    )
    return text, SUPPORTS if linear >= found / 2 else AGAINST if found > rows["most"][0] else UNDECIDED


def gain(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The derivative at the base and along each vector's own path, with the bound of a linear map about the base."""
    rows = select(
        db, "SELECT kind, point, fraction, gain, sensitivity FROM gain WHERE concept = ? AND isfinite(gain)", concept
    )
    chain, about_base = rows["kind"] == "chain", rows["point"] == "base"
    here, null = (rows["gain"][about_base & (rows["kind"] == kind)] for kind in ("chain", "random"))
    if len(here) < 2 or not len(null):
        return None
    sql = """SELECT count(*) FILTER (relative_loss < 0.5) AS found, max(norm) AS norm FROM vectors
             WHERE concept = ? AND kind = 'chain' AND isfinite(norm)"""
    count = select(db, sql, concept)
    found, most = int(count["found"][0]), float((2 * rows["sensitivity"][about_base][0] * count["norm"][0]) ** 2)
    points = np.unique(rows["fraction"][~about_base])
    path = [float(np.median(rows["gain"][chain & ~about_base & (rows["fraction"] == at)])) for at in points]
    low, high = median_interval(here)
    text = (
        f"To first order about the base the vectors have {np.median(here):.0%} [{low:.0%}, {high:.0%}] of its effect "
        f"(about 0 {path[0]:.0%}; random directions about the base {np.median(null):.0%}), and a linear map with the "
        f"Jacobian there has at most {most:.0f} orthogonal vectors with a loss below 0.5 at these norms; found are "
        f"{found}. On its own way from 0 to its norm a vector gains {', '.join(f'{value:.2f}' for value in path)} "
        f"(constant if linear, from 0 in equal steps if quadratic)."
    )
    return text, SUPPORTS if low >= 0.5 else AGAINST if high <= 0.25 and found > most else UNDECIDED


def curvature(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The number of eigenvectors that suffice, and how much of the effect the second-order form has."""
    rows = select(
        db,
        """SELECT kind, along, first_order + second_order AS foretold, positive,
                  (SELECT max(value) FROM summary WHERE concept = $1 AND figure = 'hessian_most_below_half') AS most,
                  (SELECT count(*) FROM vectors WHERE concept = $1 AND kind = 'chain')
                  / count(*) FILTER (kind = 'chain') OVER () AS each
           FROM curvature WHERE concept = $1 AND isfinite(along) ORDER BY index""",
        concept,
    )
    at = {kind: rows["kind"] == kind for kind in ("chain", "quadratic", "random")}
    if at["chain"].sum() < 2:
        return None
    found, foretold, real = (
        float((rows[name][at[kind]] >= 0.5).sum() * rows["each"][0])
        for kind, name in (("chain", "along"), ("quadratic", "foretold"), ("quadratic", "along"))
    )
    most, strong = float(rows["most"][0]), at["chain"] & (rows["along"] > 0.1)
    shares = rows["foretold"][strong] / rows["along"][strong]
    low, high = median_interval(shares)
    positive = {kind: np.median(rows["positive"][at[kind]]) for kind in ("chain", "random")}
    text = (
        f"About {found:.0f} vectors found have half of the base's displacement or more. Of the Hessian's eigenvectors "
        f"about {foretold:.0f} would have it at these norms by the quadratic form (Hessian at 0), {real:.0f} have it "
        f"in the model, and no family of orthogonal vectors can have more than {most:.0f} by the form. Of the "
        f"vectors' effect the form has {np.median(shares):.0%} [{low:.0%}, {high:.0%}]; {positive['chain']:.0%} of "
        f"their squared norm lies where it is positive, of random directions {positive['random']:.0%}."
    )
    fits = foretold >= found / 2 and low >= 0.5
    return text, AGAINST if found > most or high <= 0.25 else SUPPORTS if fits else UNDECIDED
