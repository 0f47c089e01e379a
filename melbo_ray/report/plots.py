"""The figures of a study, drawn with Plotly; each function returns None if its table has no rows.

The data come from a DuckDB connection (`melbo_ray.runs.queries.connect`); model texts never enter a figure.
"""

import html
import math

import duckdb
import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from melbo_ray.runs.queries import WINDOW, Columns, along_chain, select, unsteered

CHAIN, AVERAGE, BASE, UNSTEERED, CONTROL = "#4f86f7", "#f59e0b", "#10b981", "#ef4444", "#94a3b8"
CONTRAST = "#a855f7"
"""The colours are the same in all figures, and readable on white and on black."""
_SHADES = ["#4f86f7", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#06b6d4", "#ec4899", "#84cc16"]


def draw_kl(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """KL(P_n ‖ P_base) against n: chain, moving average, base at 0, unsteered line, band of random directions."""
    chain = along_chain(db, "kl", "kl_from_base", concept)
    if not len(chain["n"]):
        return None
    fig = _figure("n (position in the chain)", "KL(P_n ‖ P_base), nats")
    ends = np.array([0, int(chain["n"].max())])
    # A random direction of the chain's n-th norm has index n: its band moves with n, unless there are only a few.
    band = select(
        db,
        f"""SELECT index AS n, quantile_cont(kl_from_base, 0.05) OVER w AS low,
                   quantile_cont(kl_from_base, 0.95) OVER w AS high
            FROM kl WHERE concept = ? AND kind = 'random' AND scale = 'own'
            WINDOW w AS (ORDER BY index {WINDOW}) ORDER BY n""",
        concept,
    )
    if 0 < len(band["n"]) < 0.5 * len(chain["n"]):
        _band(fig, ends, np.full(2, np.median(band["low"])), np.full(2, np.median(band["high"])), "random, 5–95 %")
    elif len(band["n"]):
        _band(fig, band["n"], band["low"], band["high"], "random, 5–95 %")
    _dots_and_average(fig, chain)
    other = "SELECT index AS n, kl_from_base AS kl FROM kl WHERE concept = ? AND kind = 'shuffled' AND scale = 'own'"
    if len((shuffled := select(db, other, concept))["n"]):
        _marks(fig, shuffled["n"], shuffled["kl"], "shuffled target", CONTROL, "x")
    nats = unsteered(db, concept)
    if math.isfinite(nats):
        _line(fig, nats, ends, "unsteered")
    return _marks(fig, np.zeros(1), np.zeros(1), "base", BASE, "diamond")


def draw_along_chain(
    db: duckdb.DuckDBPyConnection, concept: str, table: str, column: str, axis: str
) -> go.Figure | None:
    """A column of a table that has a row for each vector, against n: chain, moving average, base at 0."""
    chain = along_chain(db, table, column, concept)
    if not len(chain["n"]):
        return None
    fig = _figure("n (position in the chain)", axis)
    _dots_and_average(fig, chain)
    base = select(db, f"SELECT {column} AS value FROM {table} WHERE concept = ? AND kind = 'base'", concept)["value"]
    return _marks(fig, np.zeros(1), base, "base", BASE, "diamond") if len(base) else fig


def draw_norm(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """‖θ_n‖ against n: chain, moving average, base at 0 and as a line."""
    fig = draw_along_chain(db, concept, "vectors", "norm", "‖θ_n‖, residual-stream units")
    if fig is None:
        return None
    for base in list(fig.select_traces({"name": "base"})):
        _line(fig, float(base.y[0]), np.array([0, int(fig.data[0].x.max())]), "norm of the base")
    return fig


def draw_dose(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """KL from the base against the norm a direction is scaled to: the chain by n, the base, random ones as a band."""
    dose = select(
        db,
        """SELECT kind, index AS n, norm, kl_from_base AS kl FROM dose
           WHERE concept = $1 AND scale IN ('alpha', 'radius')
           UNION ALL  -- at norm 0 every direction is the unsteered model
           SELECT DISTINCT d.kind, d.index, 0, k.kl_from_base FROM dose d, kl k
           WHERE d.concept = $1 AND k.concept = $1 AND k.kind = 'unsteered' AND k.scale = 'own'
           ORDER BY kind, n, norm""",
        concept,
    )
    curves = {
        kind: [
            (n, dose["norm"][at], dose["kl"][at]) for n in np.unique(dose["n"][of]) for at in [of & (dose["n"] == n)]
        ]
        for kind in ("chain", "random", "base", "contrast")
        for of in [dose["kind"] == kind]
    }
    if not curves["chain"]:
        return None
    fig = _figure("norm, residual-stream units", "KL(P ‖ P_base), nats")
    if curves["random"]:
        grid = np.linspace(0, np.median([norms[-1] for _, norms, _ in curves["random"]]), 50)
        on_grid = [np.interp(grid, norms, kls, right=np.nan) for _, norms, kls in curves["random"]]
        _band(fig, grid, *np.nanquantile(on_grid, [0.05, 0.95], axis=0), "random, 5–95 %")
    last = curves["chain"][-1][0]
    for place in np.unique(np.linspace(0, len(curves["chain"]) - 1, 24).astype(int)):
        n, norms, kls = curves["chain"][place]
        _curve(fig, norms, kls, f"n = {n}", _along(n / last), showlegend=False, line_width=1.3)
    for kind, name, colour in (("base", "base", BASE), ("contrast", "mean difference", CONTRAST)):
        for _, norms, kls in curves[kind]:
            _curve(fig, norms, kls, name, colour, line_width=3)
    if math.isfinite(unsteered(db, concept)):
        _line(fig, unsteered(db, concept), np.array([0, dose["norm"].max()]), "unsteered")
    bar = {"title": {"text": "n"}, "thickness": 10, "len": 0.8, "outlinewidth": 0}
    scale = {"colorscale": _colours(), "cmin": 1, "cmax": int(last), "showscale": True, "color": [1], "colorbar": bar}
    fig.add_scatter(x=[None], y=[None], mode="markers", marker=scale, showlegend=False)
    return fig


def draw_generalization(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """KL from the base on each held-out prompt, as a share of the unsteered one where that was measured."""
    rows = select(
        db,
        """WITH unsteered AS (SELECT prompt_id, max(kl_from_base) AS nats FROM generalization
                              WHERE concept = $1 AND kind = 'unsteered' GROUP BY prompt_id)
           SELECT index AS n, prompt_id, g.kl_from_base AS kl, g.kl_from_base / nats AS share
           FROM generalization g LEFT JOIN unsteered USING (prompt_id)
           WHERE concept = $1 AND kind = 'chain' AND prompt_id <> 'training'""",
        concept,
    )
    if not len(rows["n"]):
        return None
    values, top = (rows["share"], 1.5) if np.isfinite(rows["share"]).any() else (rows["kl"], None)
    prompts, row = np.unique(rows["prompt_id"].astype(str), return_inverse=True)
    ns, column = np.unique(rows["n"], return_inverse=True)
    grid = np.full((len(prompts), len(ns)), np.nan, np.float32)
    grid[row, column] = values
    order = np.argsort(np.nan_to_num(np.nanmean(grid, axis=1)))
    label = "KL, share<br>of unsteered" if top else "KL, nats"
    fig = _figure("n (position in the chain)", "")
    fig.add_heatmap(
        z=grid[order], x=ns, y=[html.escape(prompts[i]) for i in order], zmin=0, zmax=top, colorscale=_colours(),
        colorbar={"title": {"text": label}, "thickness": 10, "outlinewidth": 0},
        hovertemplate="n %{x}, %{y}<br>%{z:.3f}<extra></extra>",
    )  # fmt: skip
    return fig.update_layout(height=max(360, 110 + 15 * len(prompts)), yaxis={"showgrid": False, "tickfont_size": 10})


def draw_presence(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """How well each chain vector tells concept text from neutral text, over the band of random directions."""
    rows = select(
        db,
        """SELECT kind, sinks, index AS n, auroc FROM presence
           WHERE concept = $1 AND isfinite(auroc) AND texts = (SELECT min(texts) FROM presence
                WHERE concept = $1 AND texts IN ('concept', 'written_concept')) ORDER BY kind, n""",
        concept,
    )
    dropped = rows["sinks"] == "dropped"
    at = {kind: dropped & (rows["kind"] == kind) for kind in ("chain", "random", "base", "contrast")}
    if not at["chain"].any():
        return None
    fig = _figure("n (position in the chain)", "AUROC, concept against neutral")
    ends = np.array([0, int(rows["n"][at["chain"]].max())])
    if at["random"].any():
        low, high = np.quantile(rows["auroc"][at["random"]], [0.025, 0.975])
        _band(fig, ends, np.full(2, low), np.full(2, high), "random, 95 % of them")
    _marks(fig, rows["n"][at["chain"]], rows["auroc"][at["chain"]], "chain vectors", CHAIN, "circle")
    kept = ~dropped & (rows["kind"] == "chain")
    _marks(fig, rows["n"][kept], rows["auroc"][kept], "chain, sinks kept", AVERAGE, "circle")
    fig.data[-1].visible = "legendonly"
    fig.update_traces(marker_size=7 if at["chain"].sum() < 100 else 4, selector={"mode": "markers"})
    for kind, name, colour in (("base", "base", BASE), ("contrast", "mean difference", CONTRAST)):
        for value in rows["auroc"][at[kind]]:
            _curve(fig, ends, np.full(2, value), name, colour, line_width=3)
    return fig


def draw_composition(db: duckdb.DuckDBPyConnection, concept: str) -> go.Figure | None:
    """KL from the base of means of k vectors, against k, and in grey of means of as many random directions."""
    rows = select(
        db,
        """SELECT of, scale, k, median(kl_from_base) AS kl
           FROM (SELECT *, if(kind = 'random', 'null', rule) AS of FROM composition WHERE concept = ?)
           GROUP BY of, scale, k ORDER BY of, scale, k""",
        concept,
    )
    if not len(rows["k"]):
        return None
    fig = _figure("k, vectors in the mean", "KL(P ‖ P_base), nats")
    colours = dict(zip(["own", "typical", "ablated"], [CHAIN, AVERAGE, CONTRAST], strict=True))
    dashes = dict(zip(colours, ["dot", "dash", "dashdot"], strict=True))
    for of, scale in sorted(set(zip(rows["of"], rows["scale"], strict=True))):
        at = (rows["of"] == of) & (rows["scale"] == scale)
        name, colour = (
            (f"random directions, {scale}", CONTROL) if of == "null" else (f"{of} k, {scale}", colours[scale])
        )
        dash = "solid" if of == "first" else dashes[scale] if of == "null" else "dot"
        _curve(fig, rows["k"][at], rows["kl"][at], name, colour, mode="lines+markers", line_dash=dash)
    return fig.update_layout(xaxis={"type": "log", "tickvals": np.unique(rows["k"]).tolist()})


def draw_comparison(db: duckdb.DuckDBPyConnection, concepts: list[str]) -> go.Figure | None:
    """Every concept's KL as a share of its unsteered one, against n: dots and moving average."""
    fig = _figure("n (position in the chain)", "KL(P_n ‖ P_base), share of unsteered")
    for concept, colour in zip(concepts, _SHADES * len(concepts), strict=False):
        chain, nats = along_chain(db, "kl", "kl_from_base", concept), unsteered(db, concept)
        if len(chain["n"]) and math.isfinite(nats):
            shares = {"n": chain["n"], "value": chain["value"] / nats, "average": chain["average"] / nats}
            _dots_and_average(fig, shares, html.escape(concept), colour)
    return fig.update_yaxes(rangemode="tozero") if fig.data else None


def _figure(x: str, y: str) -> go.Figure:
    layout = go.Layout(
        template="none", height=400, margin={"l": 62, "r": 16, "t": 28, "b": 48}, hovermode="closest",
        xaxis={"title": {"text": x}, "zeroline": False, "automargin": True},
        yaxis={"title": {"text": y}, "zeroline": False, "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, font={"size": 12},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    return go.Figure(layout=layout)


def _dots_and_average(fig: go.Figure, chain: Columns, concept: str | None = None, colour: str | None = None) -> None:
    """Draw vectors and their moving average; with `concept`, as one of several concepts in its own colour."""
    size = 7 if len(chain["n"]) < 100 else 4
    fig.add_scatter(
        x=chain["n"], y=chain["value"].astype(np.float32), mode="markers", name="vector", legendgroup=concept,
        showlegend=concept is None, marker={"color": colour or CHAIN, "size": size, "opacity": 0.6},
        hovertemplate="n = %{x}<br>%{y:.4f}<extra></extra>",
    )  # fmt: skip
    options = {"line_width": 2.5, "legendgroup": concept}
    _curve(fig, chain["n"], chain["average"], concept or "moving average, 50", colour or AVERAGE, **options)


def _curve(fig: go.Figure, x: np.ndarray, y: np.ndarray, name: str, colour: str, **options) -> None:
    options = {"mode": "lines", "line_width": 2} | options
    fig.add_scatter(x=x, y=y.astype(np.float32), name=name, line_color=colour, **options)


def _line(fig: go.Figure, value: float, ends: np.ndarray, name: str) -> None:
    fig.add_scatter(x=ends, y=[value, value], name=name, mode="lines", line={"color": UNSTEERED, "dash": "dash"})


def _band(fig: go.Figure, x: np.ndarray, low: np.ndarray, high: np.ndarray, name: str) -> None:
    edge = {"mode": "lines", "line_width": 0, "hoverinfo": "skip", "legendgroup": name}
    fig.add_scatter(x=x, y=low, showlegend=False, **edge)
    fig.add_scatter(x=x, y=high, name=name, fill="tonexty", fillcolor="rgba(148,163,184,0.3)", **edge)


def _marks(fig: go.Figure, x: np.ndarray, y: np.ndarray, name: str, colour: str, symbol: str) -> go.Figure:
    return fig.add_scatter(x=x, y=y, mode="markers", name=name, marker={"color": colour, "size": 10, "symbol": symbol})


def _colours() -> list:
    return [[i / 10, _along(i / 10)] for i in range(11)]


def _along(share: float) -> str:
    """The Viridis colour at `share`; its order is visible to the colour-blind and in grey."""
    return sample_colorscale("Viridis", [share])[0]
