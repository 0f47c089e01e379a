"""The benchmark of queries: the time of the documented queries on a study of one million rows.

python -m benchmarks.query    (also `query` in benchmarks/bench.py)
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import duckdb
from rich.console import Console
from rich.table import Table

from melbo_ray.runs import queries
from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS

CONCEPTS = ("alien", "code", "jailbreak", "stem")
_VECTORS = 2000
_KEYS = "'synthetic' AS run_id, if(v = 0, 'unsteered', 'chain') AS kind, v AS index"
_MEASURES = "2 * random() AS kl_from_base, 2 * random() AS kl_to_base, 2 * random() - 1 AS concept_score"
_TEXT = "repeat(md5(v::VARCHAR || '/' || p), 6)"
_ROWS = {
    "kl": (
        9,
        "'training' AS prompt_id, 'own' AS scale, ['def', 'import'] AS top_tokens, [0.6, 0.1]::FLOAT[] AS top_probs",
    ),
    "dose": (20, "'alpha' AS scale, p / 2 AS norm"),
    "generalization": (
        32,
        "'prompt_' || p AS prompt_id, random() AS top1_agreement, random() - 0.5 AS log_likelihood_ratio",
    ),
    "generations": (
        64,
        f"'prompt_' || p // 2 AS prompt_id, 'own' AS scale, p % 2 AS sample, 48 AS num_tokens, {_TEXT} AS text",
    ),
}


def write_study(run: Path) -> int:
    """A run of one million evaluation rows at `run`, every number of it drawn at random; returns how many rows."""
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"run_id": "synthetic", "schema_version": SCHEMA_VERSION}))
    count = 0
    for table, (repeats, columns) in _ROWS.items():
        db = duckdb.connect()
        db.register("nothing", SCHEMAS[table].empty_table())
        db.execute("CREATE TABLE part AS FROM nothing")
        given = f"SELECT {_KEYS}, {_MEASURES}, {columns} FROM range({_VECTORS}) t(v), range({repeats}) u(p) ORDER BY v"
        named = [name for name in SCHEMAS[table].names if f"AS {name}" in f"{given},"]
        db.execute(f"INSERT INTO part BY NAME SELECT {', '.join(named)} FROM ({given})")
        for concept in CONCEPTS:
            folder = run / table / f"concept={concept}"
            folder.mkdir(parents=True)
            options = f"FORMAT parquet, COMPRESSION zstd, KV_METADATA {{schema_version: '{SCHEMA_VERSION}'}}"
            db.execute(f"COPY part TO '{folder}/part-0.parquet' ({options})")
            count += _VECTORS * repeats
    return count


def measure(folder: Path, repeats: int = 5) -> list[dict]:
    """Seconds that connecting and each documented query take on such a study: the first time, and the median after."""
    rows = write_study(folder / "synthetic")
    seconds, db = _time(lambda: queries.connect(str(folder)))
    results = [{"query": "connect", "rows": rows, "first": seconds, "median": None}]
    for name, sql in queries.EXAMPLES.items():
        first, answer = _time(lambda sql=sql: db.sql(sql).fetchall())
        later = [_time(lambda sql=sql: db.sql(sql).fetchall())[0] for _ in range(repeats)]
        results.append({"query": name, "rows": len(answer), "first": first, "median": statistics.median(later)})
    return results


def _time(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(Path(scratch))
    table = Table("query", "rows", "first, s", "median, s")
    for row in results:
        median = "" if row["median"] is None else f"{row['median']:.3f}"
        table.add_row(row["query"], f"{row['rows']:,}", f"{row['first']:.3f}", median)
    Console().print(table)
