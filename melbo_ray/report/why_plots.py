"""The figures of the section "Why"; each function returns None if its table has no rows of a chain."""

import math

import duckdb
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from melbo_ray.report.plots import AVERAGE, BASE, CHAIN, CONTRAST, CONTROL, _band, _curve, _figure
from melbo_ray.report.why import lost_shares
from melbo_ray.runs.queries import select


def draw_linear(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """Relative loss found and the least that a linear model allows, against n."""
    rows = select(
        db,
        """SELECT kind, index AS n, relative_loss AS found, linear_loss AS linear, linear_loss_at_radius AS at_radius
           FROM linear WHERE concept = ? ORDER BY kind, n""",
        concept,
    )
    at = {kind: rows["kind"] == kind for kind in ("chain", "linear", "random")}
    if not at["chain"].any():
        return None
    fig = _figure("n (position in the chain)", "relative loss")
    n, here = rows["n"], at["chain"]
    marker = {"color": CHAIN, "size": 7}
    fig.add_scatter(x=n[here], y=rows["found"][here], mode="markers", name="found", marker=marker)
    _curve(fig, n[here], rows["linear"][here], "linear, beside the vectors found", AVERAGE)
    _curve(fig, n[here], rows["at_radius"][here], "the same at R", CONTRAST, line_dash="dot")
    for kind, name, colour in (
        ("linear", "linear chain", BASE),
        ("random", "linear, beside random directions", CONTROL),
    ):
        if at[kind].any():
            _curve(fig, n[at[kind]], rows["linear"][at[kind]], name, colour, line_dash="dash")
    return fig.update_yaxes(rangemode="tozero")


def draw_convergence(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """Median cosine with the base's displacement and participation ratio, by layer, over the band of random ones."""
    rows = select(
        db,
        """SELECT kind, position, layer, cos_base AS cos, vector FROM convergence WHERE concept = ?
           AND kind IN ('chain', 'random') AND position <> 'first' AND isfinite(cos_base) ORDER BY layer""",
        concept,
    )
    if not (rows["kind"] == "chain").any():
        return None
    fig = _figure("layer", "cosine, or share of the number of vectors")
    layers = np.unique(rows["layer"])

    def by_layer(kind: str, position: str) -> list[np.ndarray]:
        of = (rows["kind"] == kind) & (rows["position"] == position)
        return [np.flatnonzero(of & (rows["layer"] == layer)) for layer in layers]

    if (rows["kind"] == "random").any():
        ends = [np.quantile(rows["cos"][at], [0.025, 0.975]) for at in by_layer("random", "last")]
        _band(fig, layers, *np.transpose(ends), "random, 95 % of them")
    for position, dash in (("last", "solid"), ("mean", "dot")):
        medians = np.array([np.median(rows["cos"][at]) for at in by_layer("chain", position)])
        _curve(fig, layers, medians, f"cosine, {position} position", CHAIN, line_dash=dash)
    for kind, colour in (("chain", AVERAGE), ("random", CONTROL)):
        shares = [
            participation(np.stack(list(rows["vector"][at]))) / len(at) if len(at) else np.nan
            for at in by_layer(kind, "last")
        ]
        _curve(fig, layers, np.array(shares), f"participation ratio / vectors, {kind}", colour, line_dash="dash")
    return fig


def draw_mediation(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """Median share of the chain's effect lost without a subspace, by layer."""
    rows = lost_shares(db, concept)
    chain = rows["kind"] == "chain"
    if not chain.any():
        return None
    fig = _figure("layer at which is projected", "share of the effect on KL lost")
    names = {"base": ("the base's", CHAIN), "other": ("a random vector's", AVERAGE), "random": ("random", CONTROL)}
    for subspace, (name, colour) in names.items():
        for rank in np.unique(rows["rank"]):
            of = chain & (rows["subspace"] == subspace) & (rows["rank"] == rank)
            layers = np.unique(rows["layer"][of])
            medians = np.array([np.median(rows["lost"][of & (rows["layer"] == layer)]) for layer in layers])
            if len(layers):
                dash = "dot" if rank == 1 else "solid"
                _curve(fig, layers, medians, f"{name}, rank {rank}", colour, line_dash=dash, mode="lines+markers")
    return fig


def participation(vectors: Float[np.ndarray, "n d_model"]) -> float:
    """Participation ratio (Σλ)² / Σλ² of the unit vectors' Gram matrix: 1 if all are parallel, n if orthogonal."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = (vectors / np.where(norms > 0, norms, 1))[norms[:, 0] > 0].astype(np.float64)
    return float(len(units) ** 2 / np.square(units @ units.T).sum()) if len(units) else math.nan
