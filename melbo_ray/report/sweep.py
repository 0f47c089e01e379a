"""The runs of a sweep beside each other: a table of their key figures, and one HTML page."""

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from melbo_ray.report import comparison, frequency, sweep_plots
from melbo_ray.report.intervals import median_interval, share_interval
from melbo_ray.runs import queries
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.storage import Storage

Cells = Mapping[str, Mapping[str, Any]]
"""What is its own among the options of each run, by run id."""

FIGURES = (
    "vectors", "stop_reason", "norm", "norm_low", "norm_high", "below_half", "below_half_low", "below_half_high", "kl",
    "kl_low", "kl_high", "kl_unsteered", "kl_random", "kl_random_low", "kl_random_high", "texts", "texts_low",
    "texts_high", "neutral_log_prob",
)  # fmt: skip
"""Columns of the table: the number of vectors in the chain, and why it ended; their median norm, with its 95 % interval
over vectors; the number of those with KL(P_n ‖ P_base) below half of the unsteered model's (the interval is the
share's, times their number); their median KL(P_n ‖ P_base) in nats at their own norms on the training prompt; that of
the unsteered model; the median of random directions of the same norms; the share of vectors whose greedy text shows the
concept; and the concept's log-probability on neutral prompts (`frequency`), nats per token."""
COLUMNS = ("run_id", "concept", *FIGURES)
"""The columns beside those of a cell's options."""


def compare_runs(
    db: duckdb.DuckDBPyConnection, cells: Cells, ended: Mapping[tuple[str, str], str | None] = MappingProxyType({})
) -> pa.Table:
    """The key figures of runs: a row for every run and concept, with the columns of its cell and `FIGURES`.

    A figure that was not measured is null. `ended` has the reason why a chain ended, by run id and concept.
    """
    found = comparison.compare(db, (comparison.KL, comparison.TEXTS)).to_arrow_table().to_pylist()
    by_key = {(row["run_id"], row["concept"], row["figure"], row["kind"]): row for row in found}
    chains = {(row["run_id"], row["concept"]): row for row in db.sql(_CHAINS).to_arrow_table().to_pylist()}
    keys = db.execute("SELECT DISTINCT run_id, concept FROM vectors").fetchall()
    order = {run_id: place for place, run_id in enumerate(cells)}
    rows = []
    for run_id, concept in sorted((key for key in keys if key[0] in cells), key=lambda key: (order[key[0]], key[1])):
        row: dict[str, Any] = {"run_id": run_id, "concept": concept, **_written(cells[run_id])}
        row |= _of_chain(chains[run_id, concept]) | {"stop_reason": ended.get((run_id, concept))}
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


# A row for every run and concept: the chain's norms, how many vectors are below half of the unsteered KL, of how many.
_CHAINS = f"""
    SELECT run_id, concept, norms, of.below_50_percent AS below, of.vectors AS measured, value AS neutral_log_prob
    FROM (SELECT run_id, concept, list(norm ORDER BY index) FILTER (kind = 'chain') AS norms FROM vectors GROUP BY ALL)
    LEFT JOIN ({queries.EXAMPLES["vectors_under_threshold"]}) AS of USING (run_id, concept)
    LEFT JOIN (FROM summary WHERE figure = 'neutral_log_prob') USING (run_id, concept)
"""


def _of_chain(found: Mapping[str, Any]) -> dict[str, Any]:
    norms, below, measured = found["norms"] or [], found["below"], found["measured"]
    row = {"vectors": len(norms), "below_half": below, "neutral_log_prob": found["neutral_log_prob"]}
    if norms:
        row["norm"] = float(np.median(norms))
    if len(norms) > 1:
        row["norm_low"], row["norm_high"] = median_interval(norms)
    if measured:
        low, high = share_interval(below, measured)
        row |= {"below_half_low": low * measured, "below_half_high": high * measured}
    return row


def write_comparison(url: str, name: str, cells: Cells) -> pa.Table:
    """Write `sweep.parquet` and `report.html` of the runs below `url`; returns the table (`compare_runs`).

    Raises:
        UserError: no run there, or storage that cannot be read or written.
    """
    storage = Storage(url, patient=False)
    db = queries.connect(url)
    manifests = {run_id: Run.open(f"{storage.url}/{run_id}", patient=False).manifest() for run_id in cells}
    ended = {
        (run_id, concept): outcome.stop_reason
        for run_id, manifest in manifests.items()
        for concept, outcome in (manifest.concepts.items() if manifest else ())
    }
    with queries.reading(storage.url):
        table = compare_runs(db, cells, ended)
        page = _page(db, name, storage.url, table)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.put("sweep.parquet", buffer.getvalue())
    storage.put("report.html", page.encode("utf-8", "replace"))
    return table


_HEADINGS = (
    "vectors", "ended by", "norm [95 %]", "KL below half [95 %]", "KL, nats [95 %]", "unsteered", "random [95 %]",
    "texts with the concept",
)  # fmt: skip


def lines(table: pa.Table) -> tuple[list[str], list[list[str]]]:
    """The table as text: its headings, and the cells of each row."""
    own = [name for name in table.schema.names if name not in ("run_id", "concepts", *FIGURES)]
    return [*own, *_HEADINGS], [_line(row, own) for row in table.to_pylist()]


def _line(row: Mapping[str, Any], own: list[str]) -> list[str]:
    ended, below = row["stop_reason"] or "–", _figure(row, "below_half", "{:.0f}")
    figures = [_figure(row, name, "{:.3g}") for name in ("kl", "kl_unsteered", "kl_random")]
    return [
        *(str(row[name]) for name in own), str(row["vectors"]), ended, _figure(row, "norm", "{:.3g}"), below, *figures,
        _figure(row, "texts", "{:.0%}"),
    ]  # fmt: skip


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
    types = {"vectors": pa.int32(), "below_half": pa.int32(), "stop_reason": pa.string()}
    return pa.schema([*texts, *((name, types.get(name, pa.float64())) for name in FIGURES)])


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
        frequency=frequency.told(table) or "",
        figures=[json.loads(figure.to_json()) for figure in sweep_plots.figures(db, table, _names(table))],
        style=Markup((assets / "report.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def _names(table: pa.Table) -> list[str]:
    """A short name for every row: the concept, and the options of its cell with their values."""
    headings, rows = lines(table)
    own = [f"{name} " for name in headings[1 : -len(_HEADINGS)]]
    return [html.escape(" · ".join(map("".join, zip(("", *own), row, strict=False)))) for row in rows]
