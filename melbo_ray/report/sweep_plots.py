"""The figures of a sweep's page, drawn with Plotly."""

from collections.abc import Sequence

import duckdb
import plotly.graph_objects as go
import pyarrow as pa

from melbo_ray.report import frequency
from melbo_ray.report.plots import CHAIN, CONTROL, UNSTEERED
from melbo_ray.runs import queries
from melbo_ray.runs.queries import select


def figures(db: duckdb.DuckDBPyConnection, table: pa.Table, names: Sequence[str]) -> list[go.Figure]:
    """The figures in the order of the page; `names` are those of the rows, and that of frequency may be lacking."""
    drawn = [_medians(table, names), _along(db, table, names)]
    return drawn if frequency.told(table) is None else [*drawn, _counts(table)]


def _medians(table: pa.Table, names: Sequence[str]) -> go.Figure:
    """The median KL of every run with its interval, beside random directions and the unsteered model."""
    rows = table.to_pylist()
    figure = _empty("KL(P_n ‖ P_base), nats", max(380, 120 + 26 * len(rows)))
    for key, label, colour in (("kl", "chain", CHAIN), ("kl_random", "random", CONTROL)):
        ends = [(row[f"{key}_low"], row[f"{key}_high"]) for row in rows]
        plus = [0 if high is None else high - row[key] for row, (_, high) in zip(rows, ends, strict=True)]
        minus = [0 if low is None else row[key] - low for row, (low, _) in zip(rows, ends, strict=True)]
        figure.add_scatter(
            x=[row[key] for row in rows], y=names, mode="markers", name=label, marker={"color": colour, "size": 9},
            error_x={"type": "data", "array": plus, "arrayminus": minus},
        )  # fmt: skip
    unsteered = [row["kl_unsteered"] for row in rows]
    marker = {"color": UNSTEERED, "symbol": "line-ns-open", "size": 12}
    figure.add_scatter(x=unsteered, y=names, mode="markers", name="unsteered", marker=marker)
    return figure.update_yaxes(autorange="reversed").update_xaxes(rangemode="tozero")


def _along(db: duckdb.DuckDBPyConnection, table: pa.Table, names: Sequence[str]) -> go.Figure:
    """The moving average of every chain's KL against n, as a share of its unsteered KL."""
    figure = _empty("n (position in the chain)", 460)
    found = select(db, f"SELECT run_id, concept, n, moving_average FROM ({queries.EXAMPLES['kl_against_n']})")
    for row, name in zip(table.to_pylist(), names, strict=True):
        mine = (found["run_id"] == row["run_id"]) & (found["concept"] == row["concept"])
        if mine.any() and row["kl_unsteered"]:
            shares = found["moving_average"][mine] / row["kl_unsteered"]
            figure.add_scatter(x=found["n"][mine].tolist(), y=shares.tolist(), mode="lines", name=name)
    return figure.update_yaxes(title={"text": "KL(P_n ‖ P_base), share of unsteered"}, rangemode="tozero")


def _counts(table: pa.Table) -> go.Figure:
    """The number of vectors below half of the unsteered KL against the log-probability, a dot for each concept."""
    points = frequency.points(table)
    log_probs, counts = zip(*points.values(), strict=True)
    figure = _empty("log-probability of the continuations on neutral prompts, nats per token", 420)
    figure.add_scatter(
        x=log_probs, y=counts, text=[*points], mode="markers+text", textposition="top center", name="concepts",
        marker={"color": CHAIN, "size": 9}, cliponaxis=False,
    )  # fmt: skip
    return figure.update_yaxes(title={"text": "vectors with KL below half of unsteered"}, rangemode="tozero")


def _empty(x: str, height: int) -> go.Figure:
    layout = go.Layout(
        template="none", height=height, margin={"l": 62, "r": 16, "t": 28, "b": 48}, hovermode="closest",
        xaxis={"title": {"text": x}, "zeroline": False, "automargin": True},
        yaxis={"zeroline": False, "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    return go.Figure(layout=layout)
