"""The figures of the section "Why" against n or the layer.

Each function returns None if its table has no rows of a chain.
"""

import duckdb
import numpy as np
import plotly.graph_objects as go

from melbo_ray.report.plots import AVERAGE, BASE, CHAIN, CONTRAST, CONTROL, _band, _colours, _curve, _figure, _marks
from melbo_ray.report.spread import participation
from melbo_ray.report.why_streams import alignments, kept_shares
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
    n, here = rows["n"], at["chain"]
    if not here.any():
        return None
    fig = _found_against_n(n[here], rows["found"][here], "relative loss")
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
           AND kind IN ('chain', 'random') AND position <> 'first' AND isfinite(cos_base) ORDER BY layer, index""",
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
        if (rows["kind"] == kind).any():
            last = {name: column[rows["position"] == "last"] for name, column in rows.items()}
            kept, name = np.array(alignments(last, kind)), f"centred kernel alignment with the source, {kind}"
            _curve(fig, layers, kept, name, colour, line_dash="longdashdot")
    return fig


def draw_token_cosines(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """Median cosine with the base's displacement at each token, by layer, of the chain and of random directions."""
    rows = select(
        db,
        """SELECT kind, layer, position, median(cos) AS cos
           FROM (SELECT kind, layer, unnest(cos_base) AS cos, generate_subscripts(cos_base, 1) - 1 AS position
                 FROM token_cosines WHERE concept = ? AND kind IN ('chain', 'random'))
           GROUP BY ALL""",
        concept,
    )
    if not (rows["kind"] == "chain").any():
        return None
    layers, column = np.unique(rows["layer"], return_inverse=True)
    fig = _figure("layer", "position in the prompt")
    fig.set_subplots(1, 2, shared_yaxes=True, subplot_titles=["found", "random directions"], horizontal_spacing=0.04)
    for place, kind in enumerate(("chain", "random"), start=1):
        of = rows["kind"] == kind
        grid = np.full((rows["position"].max() + 1, len(layers)), np.nan, np.float32)
        grid[rows["position"][of], column[of]] = rows["cos"][of]
        fig.add_heatmap(
            z=grid, x=layers, coloraxis="coloraxis", row=1, col=place,
            hovertemplate="layer %{x}, position %{y}<br>%{z:.2f}<extra></extra>",
        )  # fmt: skip
    scale = {"colorscale": _colours(), "cmin": 0, "cmax": 1, "colorbar": {"title": {"text": "cosine"}, "thickness": 10}}
    return fig.update_layout(coloraxis=scale, yaxis_autorange="reversed").update_xaxes(title_text="layer")


def draw_frozen(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """The share of each vector's displacement that is left with frozen attention, against n, and random directions'."""
    chain, random = (kept_shares(db, concept, kind) for kind in ("chain", "random"))
    if not len(chain["n"]):
        return None
    fig = _figure("n (position in the chain)", "share of the displacement left")
    _marks(fig, random["n"], random["left"], "random", CONTROL, "circle-open")
    _marks(fig, chain["n"], chain["left"], "found", CHAIN, "circle")
    return fig.update_yaxes(rangemode="tozero")


def draw_gain(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """Median gain along a vector's own path by kind, over the band of random ones."""
    rows = select(
        db, "SELECT kind, fraction, gain FROM gain WHERE concept = ? AND point = 'own' AND isfinite(gain)", concept
    )
    points = np.unique(rows["fraction"])
    of = {
        kind: [rows["gain"][(rows["kind"] == kind) & (rows["fraction"] == at)] for at in points]
        for kind in ("chain", "base", "random")
    }
    if not (rows["kind"] == "chain").any():
        return None
    fig = _figure("point on the way from 0 to the vector, as a share of its norm", "gain per unit")
    if (rows["kind"] == "random").any():
        ends = [np.quantile(gains, [0.025, 0.975]) for gains in of["random"]]
        _band(fig, points, *np.transpose(ends), "random, 95 % of them")
    for kind, colour in (("chain", CHAIN), ("base", BASE)):
        if (rows["kind"] == kind).any():
            _curve(fig, points, np.array([np.median(gains) for gains in of[kind]]), kind, colour, mode="lines+markers")
    return fig


def draw_curvature(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """The part of the base's displacement against n: vectors found, eigenvectors by the form and in the model."""
    rows = select(
        db,
        """SELECT kind, index AS n, along, first_order + second_order AS foretold FROM curvature
           WHERE concept = ? AND isfinite(along) ORDER BY n""",
        concept,
    )
    at = {kind: rows["kind"] == kind for kind in ("chain", "quadratic", "random")}
    n, here = rows["n"], at["chain"]
    if not here.any():
        return None
    fig = _found_against_n(n[here], rows["along"][here], "part of the base's displacement")
    _curve(fig, n[here], rows["foretold"][here], "of the vectors found, to second order", AVERAGE)
    _curve(fig, n[at["quadratic"]], rows["foretold"][at["quadratic"]], "eigenvectors, by the form", BASE)
    _curve(fig, n[at["quadratic"]], rows["along"][at["quadratic"]], "eigenvectors, in the model", BASE, line_dash="dot")
    _curve(fig, n[at["random"]], rows["along"][at["random"]], "random directions", CONTROL, line_dash="dash")
    # At a chain's norms the form gives its first eigenvectors many times what the base has.
    fig.update_yaxes(range=[-0.5, 2.5])
    return fig


def _found_against_n(n: np.ndarray, values: np.ndarray, y: str) -> go.Figure:
    """A figure against n with a dot for every vector found."""
    marker = {"color": CHAIN, "size": 7}
    return _figure("n (position in the chain)", y).add_scatter(
        x=n, y=values, mode="markers", name="found", marker=marker
    )
