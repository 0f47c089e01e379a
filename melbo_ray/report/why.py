"""Why orthogonal vectors do the same: what a run's measurements say of each hypothesis, with its null.

A finding is computed from stored tables alone. Thresholds stand in the functions and follow no run; a
measurement that is missing is named with its reason.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import duckdb
import numpy as np

from melbo_ray.report.intervals import median_interval, share_interval
from melbo_ray.runs.queries import EXAMPLES, Columns, select

SUPPORTS, AGAINST, UNDECIDED, LEFT_OUT = "supports", "speaks against", "does not decide", "left out"
# Exponents of fewer vectors are an anecdote.
_FEWEST_EXPONENTS = 8


@dataclass(frozen=True)
class Finding:
    """What a measurement says of a hypothesis.

    Attributes:
        hypothesis: the hypothesis.
        measured: a plain sentence with the figures and their null; or the reason why there are none.
        verdict: `supports`, `speaks against`, `does not decide`, or `left out`.
    """

    hypothesis: str
    measured: str
    verdict: str


def findings(db: duckdb.DuckDBPyConnection, concept: str) -> list[Finding]:
    """A finding for each hypothesis, in the order of the page."""
    found = []
    for hypothesis, (evaluation, judge) in _HYPOTHESES.items():
        measured = judge(db, concept) or (_reason(db, concept, evaluation), LEFT_OUT)
        found.append(Finding(hypothesis, *measured))
    return found


def told(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[list[Finding], str]:
    """The findings, and the sentence that concludes them."""
    return (found := findings(db, concept)), conclusion(found)


def conclusion(found: list[Finding]) -> str:
    """One sentence that counts the verdicts and names what is supported and what contradicted."""
    by = {verdict: [f.hypothesis for f in found if f.verdict == verdict] for verdict in (SUPPORTS, AGAINST)}
    decided = sum(f.verdict != LEFT_OUT for f in found)
    if not decided:
        return "Nothing that decides between the hypotheses has been measured."
    parts = [f"Of {decided} hypotheses measured, {len(by[SUPPORTS])} are supported"]
    parts += [f" ({'; '.join(by[SUPPORTS])})"] if by[SUPPORTS] else []
    parts += [f" and {len(by[AGAINST])} contradicted"]
    parts += [f" ({'; '.join(by[AGAINST])})"] if by[AGAINST] else []
    return "".join(parts) + "."


def lost_shares(db: duckdb.DuckDBPyConnection, concept: str) -> Columns:
    """For each vector, layer, subspace and rank the share of its effect on KL that is `lost` without the subspace.

    A vector whose effect is below a tenth of the unsteered KL has no share.
    """
    return select(
        db,
        """WITH m AS (FROM mediation WHERE concept = ?), o AS (FROM m WHERE subspace = 'none'),
                u AS (SELECT max(kl_from_base) AS nats FROM o WHERE kind = 'unsteered')
           SELECT m.kind AS kind, m.layer AS layer, m.subspace AS subspace, m.rank AS rank, m.index AS n,
                  (m.kl_from_base - o.kl_from_base) / (nats - o.kl_from_base) AS lost
           FROM m JOIN o USING (kind, index, layer), u
           WHERE m.subspace <> 'none' AND nats - o.kl_from_base > 0.1 * nats ORDER BY ALL""",
        concept,
    )


def _geometry(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
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


def _convergence(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
    rows = select(
        db,
        """SELECT kind, layer, cos_base AS cos FROM convergence WHERE concept = ? AND position = 'last'
           AND kind IN ('chain', 'random') AND isfinite(cos_base)""",
        concept,
    )
    chain, random = rows["kind"] == "chain", rows["kind"] == "random"
    if not (chain.any() and random.any()):
        return None
    first, last = rows["layer"].min(), rows["layer"].max()
    at = {layer: rows["cos"][chain & (rows["layer"] == layer)] for layer in (first, last)}
    null = rows["cos"][random & (rows["layer"] == last)]
    middle, top = float(np.median(at[last])), float(np.quantile(null, 0.975))
    low, high = median_interval(at[last])
    text = (
        f"Cosine of the displacement with the base's at the last token: {np.median(at[first]):.2f} at layer {first}, "
        f"{middle:.2f} [{low:.2f}, {high:.2f}] at layer {last}; random directions have {np.median(null):.2f} there "
        f"(97.5 % of them below {top:.2f})."
    )
    return text, SUPPORTS if middle >= max(0.5, top) else AGAINST if middle <= np.median(null) else UNDECIDED


def _mediation(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
    rows = lost_shares(db, concept)
    chain = rows["kind"] == "chain"
    medians = {
        (subspace, rank, layer): float(np.median(rows["lost"][at]))
        for subspace, rank, layer in sorted(set(zip(rows["subspace"], rows["rank"], rows["layer"], strict=True)))
        if (at := chain & (rows["subspace"] == subspace) & (rows["rank"] == rank) & (rows["layer"] == layer)).any()
    }
    of_base = {key: value for key, value in medians.items() if key[0] == "base"}
    if not of_base:
        return None
    (_, rank, layer), lost = max(of_base.items(), key=lambda item: item[1])
    null = max(medians.get((name, rank, layer), 0.0) for name in ("other", "random"))
    single = max(value for key, value in of_base.items() if key[1] == 1)
    text = (
        f"Without {rank} leading direction{'s' if rank > 1 else ''} of the base's displacement at layer {layer} they "
        f"lose {lost:.0%} of their effect (a single direction: at most {single:.0%}); without those of a random "
        f"vector, or random ones, {null:.0%}."
    )
    return text, SUPPORTS if lost >= 0.5 and null <= lost / 2 else AGAINST if lost <= 0.2 else UNDECIDED


def _independence(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
    sql = "SELECT kind, change FROM independence WHERE concept = ? AND ablated = 'vector' AND isfinite(change)"
    rows = select(db, sql, concept)
    chain, null = rows["change"][rows["kind"] == "chain"], rows["change"][rows["kind"] == "random"]
    if not (len(chain) and len(null)):
        return None
    low, high = median_interval(chain)
    text = (
        f"Ablating a vector changes the base's cosines along the layers by {np.median(chain):.4f} [{low:.4f}, "
        f"{high:.4f}] (rms); ablating a random direction by {np.median(null):.4f} (97.5 % below "
        f"{np.quantile(null, 0.975):.4f})."
    )
    return text, AGAINST if low > np.median(null) else SUPPORTS if high <= np.median(null) else UNDECIDED


def _attention(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
    left = {kind: _left(db, concept, kind) for kind in ("chain", "random")}
    if not len(left["chain"]):
        return None
    middle, (low, high) = float(np.median(left["chain"])), median_interval(left["chain"])
    beside = f"; of random directions' {np.median(left['random']):.0%}" if len(left["random"]) else ""
    text = (
        f"With unsteered attention patterns {middle:.0%} [{low:.0%}, {high:.0%}] of the displacement is left{beside}."
    )
    return text, AGAINST if low >= 0.5 else SUPPORTS if high <= 0.5 else UNDECIDED


def _left(db: duckdb.DuckDBPyConnection, concept: str, kind: str) -> np.ndarray:
    """The part of each vector's displacement along the base's that is left with frozen attention, as a share."""
    sql = """SELECT f.moved * f.cos / (o.moved * o.cos) AS share
             FROM frozen f JOIN frozen o USING (concept, kind, index)
             WHERE concept = ? AND kind = ? AND f.attention = 'frozen' AND o.attention = 'free' AND o.cos > 0.1"""
    share = select(db, sql, concept, kind)["share"].astype(np.float64)
    return share[np.isfinite(share)]


def _privileged(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
    rows = select(db, "SELECT kind, partner, p FROM privileged WHERE concept = ? AND isfinite(p)", concept)
    mixed = rows["partner"] == "random"
    chain, null = rows["p"][mixed & (rows["kind"] == "chain")], rows["p"][mixed & (rows["kind"] == "random")]
    if not (len(chain) and len(null)):
        return None
    low, high = median_interval(chain)
    same = rows["p"][(rows["partner"] == "base") & (rows["kind"] == "chain")]
    beside = f" Mixed with the base it is {np.median(same):.2f} (1 is one effect, 2 are two)." if len(same) else ""
    text = (
        f"Mixed with a random direction the exponent is {np.median(chain):.2f} [{low:.2f}, {high:.2f}]; of two random "
        f"directions {np.median(null):.2f}.{beside}"
    )
    if len(chain) < _FEWEST_EXPONENTS:
        return f"{text} Only {len(chain)} vectors were measured.", UNDECIDED
    return text, SUPPORTS if low > max(2.0, float(np.median(null))) else AGAINST if high <= 2.0 else UNDECIDED


def _natural(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
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


def _hidden(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[str, str] | None:
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


_Judge = Callable[[duckdb.DuckDBPyConnection, str], tuple[str, str] | None]
_HYPOTHESES: dict[str, tuple[str, _Judge]] = {
    "a linear map of high rank allows as many": ("linear", _geometry),
    "what differs at the source is one thing downstream": ("convergence", _convergence),
    "they act through few directions in common": ("mediation", _mediation),
    "each has a mechanism independent of the base's": ("independence", _independence),
    "they act by moving attention": ("frozen", _attention),
    "they are features with error correction of their own": ("privileged", _privileged),
    "they are adversarial: the model does not use them": ("presence", _natural),
    "each hides a part of one true direction": ("geometry", _hidden),
}


def _reason(db: duckdb.DuckDBPyConnection, concept: str, evaluation: str) -> str:
    """Why a hypothesis has no measurement."""
    if evaluation in ("frozen", "privileged"):
        told = select(db, f"SELECT DISTINCT left_out AS why FROM {evaluation} WHERE concept = ?", concept)["why"]
        if reasons := sorted(str(why) for why in told if why):
            return f"not measured: {reasons[0]}"
    if db.execute("SELECT count(*) FROM vectors WHERE concept = ? AND kind = 'chain'", [concept]).fetchall()[0][0] < 2:
        return "not measured: the chain has fewer than two vectors"
    return f"not measured: add --evals {evaluation}"
