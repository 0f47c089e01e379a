"""Why orthogonal vectors do the same: what a run's measurements say of each hypothesis, with its null.

A finding is computed from stored tables alone. Thresholds stand in its function (`why_*.py`) and follow no run; a
measurement that is missing is named with its reason.
"""

from collections.abc import Callable
from functools import partial

import duckdb

from melbo_ray.report import why_directions, why_maps, why_streams
from melbo_ray.report.finding import AGAINST, LEFT_OUT, SUPPORTS, Finding, Measured
from melbo_ray.runs.queries import select
from melbo_ray.runs.schema import SCHEMAS


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


_Judge = Callable[[duckdb.DuckDBPyConnection, str], Measured | None]
_of_base = partial(why_streams.independence, ablated=("vector",), named="a vector", whose="the base's")
_of_pairs = partial(
    why_streams.independence, ablated=("previous", "next"), named="a neighbour in the chain", whose="a vector's"
)
_HYPOTHESES: dict[str, tuple[str, _Judge]] = {
    "a linear map of high rank allows as many": ("linear", why_maps.linear),
    "their effect is linear about another point": ("gain", why_maps.gain),
    "a quadratic form allows as many": ("curvature", why_maps.curvature),
    "what differs at the source is one thing downstream": ("convergence", why_streams.convergence),
    "they act through few directions in common": ("mediation", why_streams.mediation),
    "each has a mechanism independent of the base's": ("independence", _of_base),
    "each has a mechanism independent of its neighbours'": ("independence", _of_pairs),
    "they act by moving attention": ("frozen", why_streams.attention),
    "they are features with error correction of their own": ("privileged", why_directions.privileged),
    "they are adversarial: the model does not use them": ("presence", why_directions.natural),
    "each hides a part of one true direction": ("geometry", why_directions.hidden),
}


def _reason(db: duckdb.DuckDBPyConnection, concept: str, evaluation: str) -> str:
    """Why a hypothesis has no measurement."""
    told = "left_out" in SCHEMAS[evaluation].names
    left_out = select(db, f"SELECT left_out AS why FROM {evaluation} WHERE concept = ?", concept)["why"] if told else ()
    failed = select(db, "SELECT error AS why FROM failures WHERE concept = ? AND evaluation = ?", concept, evaluation)
    if reasons := sorted({str(why) for why in (*left_out, *failed["why"]) if why}):
        return f"not measured: {reasons[0]}"
    if db.execute("SELECT count(*) FROM vectors WHERE concept = ? AND kind = 'chain'", [concept]).fetchall()[0][0] < 2:
        return "not measured: the chain has fewer than two vectors"
    return f"not measured: add --evals {evaluation}"
