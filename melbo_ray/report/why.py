"""Why orthogonal vectors do the same: what a run's measurements say of each hypothesis, with its null.

A finding is computed from stored tables alone. Thresholds stand in its function (`why_*.py`) and follow no run; a
measurement that is missing is named with its reason.
"""

from collections.abc import Callable
from functools import partial

import duckdb

from melbo_ray.report import why_directions, why_maps, why_streams
from melbo_ray.report.finding import AGAINST, FEWEST, LEFT_OUT, SUPPORTS, UNDECIDED, Finding, Measured
from melbo_ray.runs.queries import select
from melbo_ray.runs.schema import SCHEMAS


def findings(db: duckdb.DuckDBPyConnection, concept: str) -> list[Finding]:
    """A finding for each hypothesis, in the order of the page."""
    return [Finding(hypothesis, *_measured(db, concept, *how)) for hypothesis, how in _HYPOTHESES.items()]


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
_of_few = partial(why_streams.mediation, subspaces=("base",), rank=4)
_of_one = partial(why_streams.mediation, subspaces=("last", "base"), rank=1)
_of_base = partial(why_streams.independence, ways=("vector", "base"))
_of_pairs = partial(why_streams.independence, ways=("neighbour",))
_HYPOTHESES: dict[str, tuple[str, _Judge]] = {
    "a linear map of high rank allows as many": ("linear", why_maps.linear),
    "their effect is linear about another point": ("gain", why_maps.gain),
    "a quadratic form allows as many": ("curvature", why_maps.curvature),
    "what differs at the source is one thing downstream": ("convergence", why_streams.convergence),
    "they act through few directions in common": ("mediation", _of_few),
    "they act through a single direction": ("mediation", _of_one),
    "each has a mechanism independent of the base's": ("independence", _of_base),
    "each has a mechanism independent of its neighbours'": ("independence", _of_pairs),
    "they act by moving attention": ("frozen", why_streams.attention),
    "they are features with error correction of their own": ("privileged", why_directions.privileged),
    "they are as efficient and as stable as the base": ("efficiency", why_directions.efficiency),
    "they are adversarial: the model does not use them": ("presence", why_directions.natural),
    "each hides a part of one true direction": ("geometry", why_directions.hidden),
}


def _measured(db: duckdb.DuckDBPyConnection, concept: str, evaluation: str, judge: _Judge) -> Measured:
    """What an evaluation says: nothing of fewer than two vectors, and of fewer than `FEWEST` no verdict."""
    vectors = _vectors(db, concept, evaluation)
    measured = judge(db, concept) if vectors >= 2 else None
    if measured is None:
        return _reason(db, concept, evaluation), LEFT_OUT
    if vectors < FEWEST:
        return f"{measured[0]} {vectors} vectors decide nothing.", UNDECIDED
    return measured


def _vectors(db: duckdb.DuckDBPyConnection, concept: str, table: str) -> int:
    """The number of vectors of the chain that a table has."""
    sql = f"SELECT count(DISTINCT index) AS n FROM {table} WHERE concept = ? AND kind = 'chain'"
    return int(select(db, sql, concept)["n"][0])


def _reason(db: duckdb.DuckDBPyConnection, concept: str, evaluation: str) -> str:
    """Why a hypothesis has no measurement."""
    told = "left_out" in SCHEMAS[evaluation].names
    left_out = select(db, f"SELECT left_out AS why FROM {evaluation} WHERE concept = ?", concept)["why"] if told else ()
    failed = select(db, "SELECT error AS why FROM failures WHERE concept = ? AND evaluation = ?", concept, evaluation)
    if reasons := sorted({str(why) for why in (*left_out, *failed["why"]) if why}):
        return f"not measured: {reasons[0]}"
    if _vectors(db, concept, "vectors") < 2:
        return "not measured: the chain has fewer than two vectors"
    if vectors := _vectors(db, concept, evaluation):
        return f"not measured: too few of {vectors} vectors, or of their null, have the figures that it compares"
    return f"not measured: add --evals {evaluation}"
