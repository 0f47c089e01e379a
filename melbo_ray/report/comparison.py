"""The chain compared with its nulls: medians and shares over vectors with 95 % intervals, by measure and kind.

from melbo_ray.report import comparison
from melbo_ray.runs import queries
comparison.compare(queries.connect("runs")).show()
"""

from collections.abc import Collection

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from melbo_ray.report.intervals import median_interval, share_interval
from melbo_ray.runs.queries import EXAMPLES, select

_KINDS = ("base", "chain", "random", "shuffled", "contrast", "unsteered")

KL, TEXTS = "KL from the base, nats", "greedy texts with the concept"
"""The figures by which runs are compared."""

# One row per vector and measure; over prompts the median is taken, so that every vector counts once.
_MEDIANS = {
    KL: "SELECT *, kl_from_base AS value FROM kl WHERE prompt_id = 'training' AND scale = 'own'",
    "KL at the radius": "SELECT *, kl_from_base AS value FROM kl WHERE prompt_id = 'training' AND scale = 'radius'",
    "concept score": "SELECT *, concept_score AS value FROM generalization WHERE prompt_id = 'training'",
    "KL on held-out prompts": """SELECT run_id, concept, kind, index, median(kl_from_base) AS value FROM generalization
        WHERE prompt_id <> 'training' GROUP BY ALL""",
    "concept score on held-out prompts": """SELECT run_id, concept, kind, index, median(concept_score) AS value
        FROM generalization WHERE prompt_id <> 'training' GROUP BY ALL""",
    "presence in texts read, |AUROC − ½|": """SELECT *, abs(auroc - 0.5) AS value FROM presence
        WHERE texts = 'concept' AND sinks = 'dropped'""",
    "presence in texts written, |AUROC − ½|": """SELECT *, abs(auroc - 0.5) AS value FROM presence
        WHERE texts = 'written_concept' AND sinks = 'dropped'""",
    "KL of means, own norm": "SELECT *, kl_from_base AS value FROM composition WHERE scale = 'own'",
    "KL of means, typical norm": "SELECT *, kl_from_base AS value FROM composition WHERE scale = 'typical'",
    "KL of the base without means": "SELECT *, kl_from_base AS value FROM composition WHERE scale = 'ablated'",
}
_SHARES = {
    TEXTS: """SELECT *, detected::INT AS value FROM generations
        WHERE prompt_id = 'training' AND scale = 'own' AND temperature = 0""",
    "present in texts read, p ≤ 0.05": f"""SELECT *, n AS index, (p_value <= 0.05)::INT AS value
        FROM ({EXAMPLES["presence_p_values"]}) WHERE texts = 'concept'""",
    "present in texts written, p ≤ 0.05": f"""SELECT *, n AS index, (p_value <= 0.05)::INT AS value
        FROM ({EXAMPLES["presence_p_values"]}) WHERE texts = 'written_concept'""",
}

_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("run_id", "concept", "figure", "kind")]
    + [("vectors", pa.int32())]
    + [(name, pa.float64()) for name in ("value", "low", "high")]
)


def compare(db: duckdb.DuckDBPyConnection, figures: Collection[str] = ()) -> duckdb.DuckDBPyRelation:
    """A row for every measure (column `figure`), concept and kind: `value` (median or share) and its 95 % interval.

    `vectors` is the number of vectors; a single one has no interval. Measures of means (`composition`) count subsets,
    which share vectors, so their intervals are too narrow. `figures` names the measures; by default all.
    """
    rows = []
    for figure, sql in (_MEDIANS | _SHARES).items():
        if figures and figure not in figures:
            continue
        found = select(
            db,
            f"""SELECT run_id, concept, kind, list(value ORDER BY index) AS values FROM ({sql})
                WHERE isfinite(value) GROUP BY ALL""",
        )
        for run, concept, kind, values in zip(*found.values(), strict=True):
            keys = {"run_id": run, "concept": concept, "figure": figure, "kind": kind, "vectors": len(values)}
            rows.append(keys | _described(np.asarray(values, np.float64), figure in _SHARES))
    # The figures are in order already, and sorting is stable.
    rows.sort(key=lambda row: (row["run_id"], row["concept"]))
    return db.from_arrow(pa.Table.from_pylist(rows, schema=_SCHEMA))


def cells(db: duckdb.DuckDBPyConnection, concept: str) -> tuple[list[str], dict[str, list[str]]]:
    """The kinds of a concept, and for each measure the text of its cell under each kind: value, interval and count.

    The text is – if the measure is missing.
    """
    rows = [row for row in compare(db).to_arrow_table().to_pylist() if row["concept"] == concept]
    kinds = [kind for kind in _KINDS if any(row["kind"] == kind for row in rows)]
    lines = {row["figure"]: ["–"] * len(kinds) for row in rows}
    for row in rows:
        form = "{:.0%}" if row["figure"] in _SHARES else "{:.2f}"
        text = form.format(row["value"])
        if row["low"] is not None:
            text += f" [{form.format(row['low'])}, {form.format(row['high'])}] of {row['vectors']}"
        lines[row["figure"]][kinds.index(row["kind"])] = text
    return kinds, lines


def _described(values: Float64[np.ndarray, " n"], shares: bool) -> dict[str, float | None]:
    if shares:
        value, ends = values.mean(), share_interval(int(values.sum()), len(values))
    else:
        value, ends = np.median(values), median_interval(values)
    low, high = ends if len(values) > 1 else (None, None)
    return {"value": float(value), "low": low, "high": high}
