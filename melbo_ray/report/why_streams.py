"""What becomes of the vectors downstream: findings on convergence, mediation, independence and attention."""

import math

import duckdb
import numpy as np
from jaxtyping import Float

from melbo_ray.report.finding import AGAINST, FEWEST, SUPPORTS, UNDECIDED, Measured
from melbo_ray.report.intervals import jackknife_interval, median_interval, median_told
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
    if chain.sum() < 2 or random.sum() < 2:
        return None
    first, last = rows["layer"].min(), rows["layer"].max()
    at = {layer: rows["cos"][chain & (rows["layer"] == layer)] for layer in (first, last)}
    null = rows["cos"][random & (rows["layer"] == last)]
    middle, top = float(np.median(at[last])), float(np.quantile(null, 0.975))
    text = (
        f"Cosine of the displacement with the base's at the last token: {np.median(at[first]):.2f} at layer {first}, "
        f"{median_told(at[last])} at layer {last}; random directions have {np.median(null):.2f} there (97.5 % of them "
        f"below {top:.2f}).{_aligned(rows)}"
    )
    return text, SUPPORTS if middle >= max(0.5, top) else AGAINST if middle <= np.median(null) else UNDECIDED


def _aligned(rows: Columns) -> str:
    """A sentence on the centred kernel alignment of both ends; none of fewer than three vectors, as two always are."""
    source, *_, end = by_layer(rows, "chain")
    if len(source) < 3:
        return ""
    low, high = jackknife_interval(lambda kept: alignment(source[kept], end[kept]), len(source))
    return (
        f" Centred kernel alignment there with the source is {alignment(source, end):.2f} [{low:.2f}, {high:.2f}], of "
        f"random directions {alignments(rows, 'random')[-1]:.2f} (1: what tells vectors apart at the source still "
        f"does)."
    )


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

    `agreement` and `score` are what it has of them without the subspace, `whole_agreement` and `whole_score` with it. A
    vector whose effect is below a tenth of the unsteered KL has no share.
    """
    return select(
        db,
        """WITH m AS (FROM mediation WHERE concept = ?), o AS (FROM m WHERE subspace = 'none'),
                u AS (SELECT max(kl_from_base) AS nats FROM o WHERE kind = 'unsteered')
           SELECT m.kind AS kind, m.layer AS layer, m.subspace AS subspace, m.rank AS rank, m.index AS n,
                  coalesce(m.layer = (SELECT target_layer FROM runs WHERE runs.run_id = m.run_id), false) AS at_target,
                  (m.kl_from_base - o.kl_from_base) / (nats - o.kl_from_base) AS lost,
                  m.agreement AS agreement, m.concept_score AS score,
                  o.agreement AS whole_agreement, o.concept_score AS whole_score
           FROM m JOIN o USING (kind, index, layer), u
           WHERE m.subspace <> 'none' AND nats - o.kl_from_base > 0.1 * nats ORDER BY ALL""",
        concept,
    )


_COMMON = {
    "base": "the leading directions of the base's displacement",
    "last": "the direction of the base's displacement at the last token",
}


def mediation(db: duckdb.DuckDBPyConnection, concept: str, subspaces: tuple[str, ...], rank: int) -> Measured | None:
    """The share of the effect lost at the target layer without the first of `subspaces` that was measured at `rank`.

    Supports if the interval begins at a half or above, and that of every null of this rank ends at a quarter or below;
    speaks against if the interval ends at a quarter or below.
    """
    rows = lost_shares(db, concept)
    of = (rows["kind"] == "chain") & rows["at_target"] & (rows["rank"] == rank)
    lost = {name: rows["lost"][of & (rows["subspace"] == name)] for name in np.unique(rows["subspace"][of])}
    subspace = next((name for name in subspaces if name in lost), None)
    nulls = [shares for name, shares in lost.items() if name not in _COMMON]
    if subspace is None or len(lost[subspace]) < 2 or not nulls:
        return None
    here = {name: values[of & (rows["subspace"] == subspace)] for name, values in rows.items()}
    text = (
        f"At the target layer {len(here['lost'])} vectors lose {median_told(here['lost'], '.0%')} of their effect on "
        f"KL without {_COMMON[subspace]} (rank {rank}); without those of random vectors "
        f"{' and '.join(median_told(shares, '.0%') for shares in nulls)}. Of the base's text "
        f"{median_told(here['agreement'], '.0%')} stays the likeliest (of the whole displacement's "
        f"{np.median(here['whole_agreement']):.0%}), and the concept's gains {median_told(here['score'])} nats per "
        f"token ({np.median(here['whole_score']):.2f})."
    )
    if len(here["lost"]) < FEWEST:
        return text, UNDECIDED
    (low, high), top = median_interval(here["lost"]), max(median_interval(shares)[1] for shares in nulls)
    return text, SUPPORTS if low >= 0.5 and top <= 0.25 else AGAINST if high <= 0.25 else UNDECIDED


def profile_changes(db: duckdb.DuckDBPyConnection, concept: str) -> Columns:
    """For each vector how much its pairs' profiles `change`, and the `profile` itself, by kind and what is `ablated`.

    The two neighbours of a vector are one, `neighbour`: their mean, so that intervals are over vectors, not pairs.
    """
    return select(
        db,
        """SELECT kind, CASE WHEN ablated IN ('previous', 'next') THEN 'neighbour' ELSE ablated END AS way, index AS n,
                  avg(change) AS change, avg(profile) AS profile
           FROM independence WHERE concept = ? AND isfinite(change) AND isfinite(profile) GROUP BY ALL ORDER BY ALL""",
        concept,
    )


def chance_cosine(db: duckdb.DuckDBPyConnection, concept: str) -> float:
    """The rms cosine of a random unit vector with any direction, 1/√d_model; NaN if no vector is stored."""
    return float(select(db, "SELECT max(len(vector)) AS d FROM vectors WHERE concept = ?", concept)["d"][0]) ** -0.5


WAYS = {
    "vector": ("a vector", "the base's"),
    "base": ("the base", "a vector's"),
    "neighbour": ("a neighbour in the chain", "a vector's"),
}
"""What is ablated, and whose profile may change."""


def independence(db: duckdb.DuckDBPyConnection, concept: str, ways: tuple[str, ...]) -> Measured | None:
    """The change of the profile of one of each pair without the other, in each of `ways` round.

    Undecided if a profile is below twice a random unit vector's, as there is nothing to ablate. Else it speaks against
    if one way does, and supports if every way does.
    """
    rows, chance = profile_changes(db, concept), chance_cosine(db, concept)
    found = [way for way in (_one_way(rows, way) for way in ways) if way]
    if len(found) < len(ways) or math.isnan(chance):
        return None
    texts, profiles, verdicts = zip(*found, strict=True)
    text = f"{'. '.join(texts)}, a random unit vector's {chance:.3f}"
    if min(profiles) < 2 * chance:
        return f"{text}: too little is there to ablate.", UNDECIDED
    return f"{text}.", next((v for v in (AGAINST, UNDECIDED) if v in verdicts), SUPPORTS)


def _one_way(rows: Columns, way: str) -> tuple[str, float, str] | None:
    """What is told of one way, the median profile, and the verdict of it.

    It speaks against independence if the interval of the change begins above the end of the null's; it supports it if
    the interval ends at that or below, and at a tenth of the profile or below.
    """
    of = {kind: (rows["kind"] == kind) & (rows["way"] == way) for kind in ("chain", "random")}
    change, null = (rows["change"][at] for at in of.values())
    if len(change) < 2 or len(null) < 2:
        return None
    profile, (low, high), (_, top) = np.median(rows["profile"][of["chain"]]), *map(median_interval, (change, null))
    named, whose = WAYS[way]
    text = (
        f"Ablating {named} changes {whose} cosines along the layers by {median_told(change, '.4f')} (rms), a random "
        f"direction in its place {median_told(null, '.4f')}; these cosines are {profile:.3f}"
    )
    verdict = AGAINST if low > top else SUPPORTS if high <= min(top, profile / 10) else UNDECIDED
    return text, float(profile), verdict


def attention(db: duckdb.DuckDBPyConnection, concept: str) -> Measured | None:
    """The share of the displacement that is left with frozen attention."""
    left = {kind: kept_shares(db, concept, kind)["left"] for kind in ("chain", "random")}
    if len(left["chain"]) < 2:
        return None
    low, high = median_interval(left["chain"])
    beside = f"; of random directions' {median_told(left['random'], '.0%')}" if len(left["random"]) else ""
    text = (
        f"With unsteered attention patterns {median_told(left['chain'], '.0%')} of the displacement along the "
        f"base's is left ({len(left['chain'])} vectors){beside}."
    )
    decided = len(left["chain"]) >= FEWEST
    return text, UNDECIDED if not decided else AGAINST if low >= 0.5 else SUPPORTS if high <= 0.5 else UNDECIDED


def kept_shares(db: duckdb.DuckDBPyConnection, concept: str, kind: str) -> Columns:
    """The part of each vector's displacement along the base's that is `left` with frozen attention, as a share.

    A vector whose displacement has a cosine of 0.1 or less with the base's has none.
    """
    return select(
        db,
        """SELECT index AS n, (f.moved::DOUBLE * f.cos) / (o.moved::DOUBLE * o.cos) AS left
           FROM frozen f JOIN frozen o USING (concept, kind, index)
           WHERE concept = ? AND kind = ? AND f.attention = 'frozen' AND o.attention = 'free' AND o.cos > 0.1
           AND isfinite(f.moved * f.cos) AND o.moved > 0 ORDER BY n""",
        concept,
        kind,
    )
