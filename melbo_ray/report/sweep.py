"""The runs of a sweep beside each other: a table of their key figures, and one HTML page."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import duckdb
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from melbo_ray.report import comparison
from melbo_ray.report.plots import CHAIN, CONTROL, UNSTEERED
from melbo_ray.runs import queries
from melbo_ray.runs.queries import select
from melbo_ray.runs.storage import Storage

Cells = Mapping[str, Mapping[str, Any]]
"""What is its own among the options of each run, by run id."""

FIGURES = (
    "vectors", "kl", "kl_low", "kl_high", "kl_unsteered", "kl_random", "kl_random_low", "kl_random_high", "texts",
    "texts_low", "texts_high",
)  # fmt: skip
"""Columns of the table: the number of vectors in the chain; the median KL(P_n ‖ P_base) in nats at the vectors' own
norms on the training prompt, with its 95 % interval over vectors; that of the unsteered model; the median of random
directions of the same norms; and the share of vectors whose greedy text shows the concept, with its interval."""


def compare_runs(db: duckdb.DuckDBPyConnection, cells: Cells) -> pa.Table:
    """The key figures of runs: a row for every run and concept, with the columns of its cell and `FIGURES`.

    A figure that was not measured is null.
    """
    found = comparison.compare(db, (comparison.KL, comparison.TEXTS)).to_arrow_table().to_pylist()
    by_key = {(row["run_id"], row["concept"], row["figure"], row["kind"]): row for row in found}
    counts = select(db, "SELECT run_id, concept, count(*) AS n FROM vectors WHERE kind = 'chain' GROUP BY ALL")
    vectors = {(run, concept): int(n) for run, concept, n in zip(*counts.values(), strict=True)}
    keys = db.execute("SELECT DISTINCT run_id, concept FROM vectors").fetchall()
    order = {run_id: place for place, run_id in enumerate(cells)}
    rows = []
    for run_id, concept in sorted((key for key in keys if key[0] in cells), key=lambda key: (order[key[0]], key[1])):
        row: dict[str, Any] = {"run_id": run_id, "concept": concept, **_written(cells[run_id])}
        row["vectors"] = vectors.get((run_id, concept), 0)
        for name, figure, kind in (
            ("kl", comparison.KL, "chain"), ("kl_unsteered", comparison.KL, "unsteered"),
            ("kl_random", comparison.KL, "random"), ("texts", comparison.TEXTS, "chain"),
        ):  # fmt: skip
            measured = by_key.get((run_id, concept, figure, kind), {})
            row |= {name: measured.get("value"), f"{name}_low": measured.get("low")}
            row[f"{name}_high"] = measured.get("high")
        rows.append({key: value for key, value in row.items() if not key.startswith("kl_unsteered_")})
    own = dict.fromkeys(name for cell in cells.values() for name in _written(cell))
    return pa.Table.from_pylist(rows, schema=_schema(own))


def write_comparison(url: str, name: str, cells: Cells) -> pa.Table:
    """Write `sweep.parquet` and `report.html` of the runs below `url`; returns the table (`compare_runs`).

    Raises:
        UserError: no run there, or storage that cannot be read or written.
    """
    storage = Storage(url, patient=False)
    db = queries.connect(url)
    with queries.reading(storage.url):
        table = compare_runs(db, cells)
        page = _page(db, name, storage.url, table)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.put("sweep.parquet", buffer.getvalue())
    storage.put("report.html", page.encode("utf-8", "replace"))
    return table


def lines(table: pa.Table) -> tuple[list[str], list[list[str]]]:
    """The table as text: its headings, and the cells of each row."""
    own = [name for name in table.schema.names if name not in ("run_id", "concepts", *FIGURES)]
    headings = [*own, "vectors", "KL, nats [95 %]", "unsteered", "random [95 %]", "texts with the concept"]
    return headings, [_line(row, own) for row in table.to_pylist()]


def _line(row: Mapping[str, Any], own: list[str]) -> list[str]:
    figures = [_figure(row, name, "{:.3g}") for name in ("kl", "kl_unsteered", "kl_random")]
    return [*(str(row[name]) for name in own), str(row["vectors"]), *figures, _figure(row, "texts", "{:.0%}")]


def _figure(row: Mapping[str, Any], name: str, form: str) -> str:
    if row[name] is None:
        return "–"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return form.format(row[name]) + ("" if low is None else f" [{form.format(low)}, {form.format(high)}]")


def _written(cell: Mapping[str, Any]) -> dict[str, str]:
    """The cell's options as text, since one list may hold a word and numbers (`radius`)."""
    return {name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in cell.items()}


def _schema(own: Mapping[str, None]) -> pa.Schema:
    texts = [(name, pa.string()) for name in ("run_id", "concept", *own)]
    return pa.schema([*texts, ("vectors", pa.int32()), *((name, pa.float64()) for name in FIGURES[1:])])


def _page(db: duckdb.DuckDBPyConnection, name: str, url: str, table: pa.Table) -> str:
    environment = Environment(
        loader=PackageLoader("melbo_ray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    assets = files("melbo_ray") / "report/templates"
    scripts = [get_plotlyjs(), (assets / "sweep.js").read_text("utf-8")]
    headings, rows = lines(table)
    return environment.get_template("sweep.html").render(
        name=name,
        url=url,
        headings=headings,
        rows=list(zip(table["run_id"].to_pylist(), rows, strict=True)),
        figures=[json.loads(figure.to_json()) for figure in (_medians(table), _along(db, table))],
        style=Markup((assets / "report.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def _names(table: pa.Table) -> list[str]:
    """A short name for every row: the values of its cell."""
    _, rows = lines(table)
    return [html.escape(" · ".join(row[:-5])) for row in rows]


def _medians(table: pa.Table) -> go.Figure:
    """The median KL of every run with its interval, beside random directions and the unsteered model."""
    rows, names = table.to_pylist(), _names(table)
    figure = _empty("KL(P_n ‖ P_base), nats", 120 + 26 * len(rows))
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


def _along(db: duckdb.DuckDBPyConnection, table: pa.Table) -> go.Figure:
    """The moving average of every chain's KL against n, as a share of its unsteered KL."""
    figure = _empty("n (position in the chain)", 460)
    found = select(db, f"SELECT run_id, concept, n, moving_average FROM ({queries.EXAMPLES['kl_against_n']})")
    for row, name in zip(table.to_pylist(), _names(table), strict=True):
        mine = (found["run_id"] == row["run_id"]) & (found["concept"] == row["concept"])
        if mine.any() and row["kl_unsteered"]:
            shares = found["moving_average"][mine] / row["kl_unsteered"]
            figure.add_scatter(x=found["n"][mine].tolist(), y=shares.tolist(), mode="lines", name=name)
    return figure.update_yaxes(title={"text": "KL(P_n ‖ P_base), share of unsteered"}, rangemode="tozero")


def _empty(x: str, height: int) -> go.Figure:
    layout = go.Layout(
        template="none", height=height, margin={"l": 62, "r": 16, "t": 28, "b": 48}, hovermode="closest",
        xaxis={"title": {"text": x}, "zeroline": False, "automargin": True},
        yaxis={"zeroline": False, "automargin": True},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    return go.Figure(layout=layout)
