"""What becomes of the vectors downstream: findings on convergence, mediation, independence and attention."""

import duckdb
import numpy as np
from jaxtyping import Float

from melbo_ray.report.finding import AGAINST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import jackknife_interval, median_interval
from melbo_ray.report.spread import alignment
from melbo_ray.runs.queries import Columns, select


def convergence(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The cosine with the base's displacement at both ends, and what still tells the vectors apart."""
    rows = select(
        db,
        """SELECT kind, layer, cos_base AS cos, vector FROM convergence WHERE concept = ? AND position = 'last'
           AND kind IN ('chain', 'random') AND isfinite(cos_base) ORDER BY index""",
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
    source, *_, end = by_layer(rows, "chain")
    ends = jackknife_interval(lambda kept: alignment(source[kept], end[kept]), len(source))
    text = (
        f"Cosine of the displacement with the base's at the last token: {np.median(at[first]):.2f} at layer {first}, "
        f"{middle:.2f} [{low:.2f}, {high:.2f}] at layer {last}; random directions have {np.median(null):.2f} there "
        f"(97.5 % of them below {top:.2f}). Centred kernel alignment there with the source is "
        f"{alignment(source, end):.2f} [{ends[0]:.2f}, {ends[1]:.2f}], of random directions "
        f"{alignments(rows, 'random')[-1]:.2f} (1: what tells vectors apart at the source still does)."
    )
    return text, SUPPORTS if middle >= max(0.5, top) else AGAINST if middle <= np.median(null) else UNDECIDED


def by_layer(rows: Columns, kind: str) -> list[Float[np.ndarray, "n d_model"]]:
    """The displacements of a kind at each layer, from rows of one position of `convergence` sorted by index."""
    of = rows["kind"] == kind
    places = [np.flatnonzero(of & (rows["layer"] == layer)) for layer in np.unique(rows["layer"])]
    return [np.stack(list(rows["vector"][at])) for at in places]


def alignments(rows: Columns, kind: str) -> list[float]:
    """Centred kernel alignment of a kind's displacements at each layer with those at the first; rows as `by_layer`."""
    source, *above = by_layer(rows, kind)
    return [alignment(source, here) for here in (source, *above)]


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


def mediation(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The largest share of the effect that is lost without directions of the base's displacement."""
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


def independence(
    db: duckdb.DuckDBPyConnection, concept: str, ablated: tuple[str, ...], named: str, whose: str
) -> Measured | None:
    """The change of the profiles of one of each pair without the other, which `ablated` names as in the table."""
    sql = "SELECT kind, ablated, change FROM independence WHERE concept = ? AND isfinite(change)"
    rows = select(db, sql, concept)
    of = np.isin(rows["ablated"], ablated)
    chain, null = (rows["change"][of & (rows["kind"] == kind)] for kind in ("chain", "random"))
    if not (len(chain) and len(null)):
        return None
    low, high = median_interval(chain)
    text = (
        f"Ablating {named} changes {whose} cosines along the layers by {np.median(chain):.4f} [{low:.4f}, "
        f"{high:.4f}] (rms); ablating a random direction by {np.median(null):.4f} (97.5 % below "
        f"{np.quantile(null, 0.975):.4f})."
    )
    return text, AGAINST if low > np.median(null) else SUPPORTS if high <= np.median(null) else UNDECIDED


def attention(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The share of the displacement that is left with frozen attention."""
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
