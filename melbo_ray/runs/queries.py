"""DuckDB over runs: one view per table of the schema, on local files and object storage.

    from melbo_ray.runs import queries
    db = queries.connect("runs")  # every run there; or one of them, or s3://bucket/prefix
    db.sql(queries.EXAMPLES["kl_against_n"]).df()

Plain SQL works too: `SELECT index, kl_from_base FROM 'runs/*/kl/**/*.parquet' WHERE kind = 'chain'`.
"""

import re
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import duckdb
import fsspec
import fsspec.asyn
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from melbo_ray.errors import UserError, first_line
from melbo_ray.runs.httpfs import load_httpfs, quote
from melbo_ray.runs.run_table import run_table
from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS
from melbo_ray.runs.storage import Storage

Columns = dict[str, np.ndarray]
"""The result of a query, by column."""

_PART = re.compile(r"^(?P<run>.*)/(?P<table>[^/]+)/concept=[^/]+/[^/._][^/]*\.parquet$")

WINDOW = "ROWS BETWEEN 25 PRECEDING AND 24 FOLLOWING"
"""The window of a moving average: 50 vectors, centred, fewer at the ends of a chain."""


def _moving_average(column: str, over: str = "") -> str:
    return f"avg({column}) FILTER (NOT isnan({column})) OVER ({over} ORDER BY index {WINDOW})"


EXAMPLES = {
    # KL(P_n ‖ P_base) in nats against n, with its moving average over 50 vectors (fewer at the two ends).
    "kl_against_n": f"""
        SELECT run_id, concept, index AS n, kl_from_base,
               {_moving_average("kl_from_base", "PARTITION BY run_id, concept")} AS moving_average
        FROM kl WHERE kind = 'chain' AND scale = 'own'
        ORDER BY run_id, concept, n
    """,
    # The median KL of every run beside its options, for a sweep (`runs` has the options of each run).
    "runs_compared": """
        SELECT run_id, concept, model, seed, source_layer, target_layer, radius, count(*) AS vectors,
               median(kl_from_base) AS median_kl
        FROM kl JOIN runs USING (run_id) WHERE kind = 'chain' AND scale = 'own' GROUP BY ALL ORDER BY ALL
    """,
    # How many vectors of each concept lie below 10 % and below 50 % of the unsteered KL.
    "vectors_under_threshold": """
        WITH unsteered AS (
            SELECT run_id, concept, max(kl_from_base) AS nats FROM kl
            WHERE kind = 'unsteered' AND scale = 'own' GROUP BY ALL
        )
        SELECT run_id, concept, count(*) AS vectors,
               count(*) FILTER (kl_from_base < 0.1 * nats) AS below_10_percent,
               count(*) FILTER (kl_from_base < 0.5 * nats) AS below_50_percent
        FROM kl JOIN unsteered USING (run_id, concept)
        WHERE kind = 'chain' AND scale = 'own'
        GROUP BY run_id, concept ORDER BY run_id, concept
    """,
    # What the 14th, 129th and 893rd vector make the model write.
    "texts": """
        SELECT run_id, concept, index AS n, prompt_id, sample, concept_score, text
        FROM generations WHERE kind = 'chain' AND scale = 'own' AND index IN (14, 129, 893)
        ORDER BY run_id, concept, n, prompt_id, sample
    """,
    # Which vectors generalise: on what share of the held-out prompts is the base's own answer likelier than unsteered?
    "generalising_vectors": """
        SELECT run_id, concept, index AS n, avg((log_likelihood_ratio > 0)::INT) AS share_of_prompts,
               median(kl_from_base) AS median_kl, avg(top1_agreement) AS top1_agreement
        FROM generalization WHERE kind = 'chain' AND prompt_id <> 'training'
        GROUP BY run_id, concept, n ORDER BY share_of_prompts DESC, median_kl, run_id, concept, n
    """,
    # Does the model use these directions itself? The two-sided p-value of each: the share of random directions (and it)
    # whose AUROC lies as far from 1/2 as its own.
    "presence_p_values": """
        WITH p AS (
            SELECT run_id, concept, texts, kind, index, auroc, abs(auroc::DOUBLE - 0.5) AS away
            FROM presence WHERE sinks = 'dropped' AND isfinite(auroc)
        )
        SELECT v.run_id, v.concept, v.texts, v.kind, v.index AS n, v.auroc,
               (1 + count(*) FILTER (r.away >= v.away)) / (1 + count(*)) AS p_value, count(*) AS random_directions
        FROM p v JOIN p r ON (v.run_id, v.concept, v.texts) = (r.run_id, r.concept, r.texts) AND r.kind = 'random'
        WHERE v.kind <> 'random'
        GROUP BY ALL ORDER BY v.run_id, v.concept, v.texts, v.kind, n
    """,
    # Dose-response: KL(P_n ‖ P_base) against the norm that directions are scaled to, chain and controls.
    "dose_response": """
        SELECT concept, kind, round(norm, 1) AS at_norm, count(*) AS directions, median(kl_from_base) AS median_kl,
               quantile_cont(kl_from_base, 0.1) AS low, quantile_cont(kl_from_base, 0.9) AS high
        FROM dose WHERE scale IN ('alpha', 'radius') GROUP BY concept, kind, at_norm ORDER BY concept, kind, at_norm
    """,
}


def connect(run_or_prefix: str) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB connection with one view per table, over one run or all runs at a directory or fsspec URL.

    A view has the columns of its schema (`runs.schema`) and `concept`; it is empty if the table has no parts. The view
    `runs` has the options of each run (`run_table.SCHEMA`). The views cover what exists now; connect again to see later
    parts. Object storage is read by DuckDB's httpfs if that
    is installed (once, by `INSTALL httpfs`), otherwise through fsspec.

    Raises:
        UserError: no run there, unreadable storage, a corrupt part, or a part of another schema version.
    """
    storage = Storage(run_or_prefix, patient=False)
    fs, root = fsspec.url_to_fs(storage.url)
    names, runs = _listed(storage)
    parts = {table: [f"{root}/{name}" for name in found] for table, found in _parts(names, runs).items()}
    with reading(storage.url):
        with ThreadPoolExecutor(16) as pool:
            manifests = pool.map(storage.get, [f"{run}/run.json".lstrip("/") for run in sorted(runs)])
            for table, paths in parts.items():
                list(pool.map(partial(_check, fs, table), paths))
        db = duckdb.connect()
        local = "file" in fs.protocol
        if not local and not load_httpfs(db, fs):
            db.register_filesystem(fs)
        _create_table(db, "runs", run_table(data for data in manifests if data is not None))
        for table, paths in parts.items():
            _create_view(db, table, [path if local else fs.unstrip_protocol(path) for path in paths])
    return db


def select(db: duckdb.DuckDBPyConnection, sql: str, *parameters: object) -> Columns:
    """Run a query and return its columns; NULL becomes NaN in numeric columns, None in others."""
    columns = db.execute(sql, list(parameters)).fetchnumpy()
    return {name: _filled(values) for name, values in columns.items()}


def _filled(values: np.ndarray) -> np.ndarray:
    if not isinstance(values, np.ma.MaskedArray):
        return values
    if values.dtype.kind in "fiu":
        return np.ma.filled(values.astype(np.float64), np.nan)
    filled = values.data.astype(object)
    filled[np.ma.getmaskarray(values)] = None
    return filled


def along_chain(db: duckdb.DuckDBPyConnection, table: str, column: str, concept: str) -> Columns:
    """The `value` of a column for every chain vector `n`, with its centred moving `average` over 50 vectors."""
    return select(
        db,
        f"""SELECT index AS n, {column} AS value, {_moving_average(column)} AS average
            FROM {table} WHERE concept = ? AND kind = 'chain' AND {_own(table)} ORDER BY n""",
        concept,
    )


def _own(table: str) -> str:
    return "scale = 'own'" if table == "kl" else "true"


def under_threshold(db: duckdb.DuckDBPyConnection, concept: str) -> dict[str, int]:
    """The number of `vectors` in one run's chain, and how many are below 10 % and 50 % of the unsteered KL.

    The result is empty if the chain's KL or the unsteered KL was not measured.
    """
    sql = "SELECT vectors, below_10_percent, below_50_percent"
    found = select(db, f"{sql} FROM ({EXAMPLES['vectors_under_threshold']}) WHERE concept = ?", concept)
    return {name: int(values[0]) for name, values in found.items() if len(values)}


def unsteered(db: duckdb.DuckDBPyConnection, concept: str) -> float:
    """KL(P_unsteered ‖ P_base) on the training prompt, nats; NaN if it was not measured."""
    sql = "SELECT max(kl_from_base) AS kl FROM kl WHERE concept = ? AND kind = 'unsteered' AND scale = 'own'"
    return float(select(db, sql, concept)["kl"][0])


@contextmanager
def reading(url: str) -> Generator[None]:
    """Within the context, errors of DuckDB and of reading parts become a `UserError` that names `url`."""
    try:
        yield
    except (OSError, ValueError, duckdb.Error) as error:
        raise UserError(f"cannot read {url}: {first_line(error)}") from None


def _listed(storage: Storage) -> tuple[list[str], set[str]]:
    """The names of all objects at or below the root of `storage`, and the folders of all runs; both begin with /."""
    names = [f"/{name}" for name in storage.names()]
    runs = {name.removesuffix("/run.json") for name in names if name.endswith("/run.json")}
    if not runs:
        raise UserError(f"no run at {storage.url}: expected run.json there or in a directory below it")
    return names, runs


def _parts(names: list[str], runs: set[str]) -> dict[str, list[str]]:
    """The parts of each table in all runs, as relative names."""
    parts: dict[str, list[str]] = {table: [] for table in SCHEMAS}
    for name in names:
        match = _PART.match(name)
        if match and match["run"] in runs and match["table"] in parts:
            parts[match["table"]].append(name[1:])
    return parts


def _check(fs: Any, table: str, path: str) -> None:
    try:
        schema = pq.read_schema(path, filesystem=fs)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # raised by the storage; Arrow's errors have no number
            raise
        raise UserError(f"{path} is not a whole Parquet file: delete it, and the job writes it anew") from None
    version = (schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise UserError(
            f"{path} has schema version {version}, this melbo_ray reads {SCHEMA_VERSION}: use the one that wrote it"
        )
    differing = set(schema.names) ^ set(SCHEMAS[table].names)
    if differing:
        raise UserError(f"{path} differs from the schema of {table!r} in the columns {', '.join(sorted(differing))}")


def _create_view(db: duckdb.DuckDBPyConnection, table: str, paths: list[str]) -> None:
    schema = SCHEMAS[table].append(pa.field("concept", pa.string()))
    if not paths:
        _create_table(db, table, schema.empty_table())
        return
    columns = ", ".join(f'"{name}"' for name in schema.names)
    # DuckDB treats paths as glob patterns, so brackets in a run's name are escaped.
    files = ", ".join(quote(re.sub(r"([\[*?])", r"[\1]", path)) for path in paths)
    options = "hive_partitioning = true, hive_types = {'concept': VARCHAR}"
    db.execute(f"CREATE VIEW {table} AS SELECT {columns} FROM read_parquet([{files}], {options})")


def _create_table(db: duckdb.DuckDBPyConnection, name: str, rows: pa.Table) -> None:
    db.register("rows", rows)
    db.execute(f"CREATE TABLE {name} AS FROM rows")
    db.unregister("rows")
