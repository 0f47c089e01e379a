"""The page docs/data.md, made of the schema (`melbo_ray.runs.schema`) and of docs/columns.toml.

Usage: python docs/data_dictionary.py     # writes the page anew; `make docs` does, and a test compares
"""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS

DOCS = Path(__file__).parent
PAGE = DOCS / "data.md"
Meanings = Mapping[str, Mapping[str, str]]

_HEAD = """# The data

A run is a folder: `run.json` (the manifest: configuration, model fingerprint, versions, why each chain stopped, the
Gram audit), `report.html`, and one folder of Parquet for each table, partitioned by concept:
`<table>/concept=<name>/part-….parquet`. This is schema version {version}; a change of columns takes a new one.

```sql
SELECT index, kl_from_base FROM 'runs/*/kl/**/*.parquet' WHERE kind = 'chain' AND scale = 'own' ORDER BY index;
```

```python
from melbo_ray.runs import queries

queries.connect("runs").sql(queries.EXAMPLES["kl_against_n"]).show()  # a view for each table; s3:// works the same
```

The view `runs` has a row for each run with its options (`seed`, `source_layer`, `radius`, …; all in `config`, as JSON),
to join by `run_id` ([sweeps](sweeps.md)).

The notebook [Query a run](notebooks/query.ipynb) goes on from here. `melbo-ray report --run runs/RUN` renders the
report anew, and with `--figures DIR` its figures as PNG and SVG. In the report, arrow keys move along n, a click on a
dot opens that vector, and `report.html#code/chain/14` links to one.

Vectors and norms are in units of the residual stream, KL in nats, time in seconds.
"""


def meanings() -> Meanings:
    """Sections of docs/columns.toml: `rows`, `every`, `shared`, and one for each table."""
    return tomllib.loads((DOCS / "columns.toml").read_text("utf-8"))


def page(schemas: Mapping[str, pa.Schema] = SCHEMAS, told: Meanings | None = None) -> str:
    """The page as Markdown.

    Raises:
        KeyError: a column that docs/columns.toml does not explain.
    """
    told = meanings() if told is None else told
    parts = [_HEAD.format(version=SCHEMA_VERSION), "## Every table\n", *_table(every(told), told["every"])]
    for name, schema in schemas.items():
        meaning = {**told["shared"], **told.get(name, {})}
        columns = {field.name: field.type for field in schema if field.name not in told["every"]}
        parts += [f"\n## {name}\n", f"One row is {told['rows'][name]}.\n", *_table(columns, meaning)]
    return "\n".join(parts) + "\n"


def every(told: Meanings) -> dict[str, pa.DataType]:
    """The keys' types; the concept is text."""
    keys = next(iter(SCHEMAS.values()))
    return {name: keys.field(name).type if name in keys.names else pa.string() for name in told["every"]}


def unused(schemas: Mapping[str, pa.Schema] = SCHEMAS, told: Meanings | None = None) -> set[str]:
    """What docs/columns.toml explains and no table has."""
    told = meanings() if told is None else told
    used = {f"{name}.{column}" for name, schema in schemas.items() for column in schema.names}
    own = {f"{name}.{column}" for name in told.keys() - {"rows", "every", "shared"} for column in told[name]}
    columns = {column for schema in schemas.values() for column in schema.names}
    return (own - used) | (told["shared"].keys() - columns) | (told["rows"].keys() - schemas.keys())


def _table(columns: Mapping[str, pa.DataType], meaning: Mapping[str, str]) -> Iterator[str]:
    yield "| column | type | meaning |"
    yield "|---|---|---|"
    for name, dtype in columns.items():
        told = meaning[name].replace("|", r"\|")
        yield f"| `{name}` | {_type(dtype)} | {told} |"


def _type(dtype: pa.DataType) -> str:
    return f"list of {_type(dtype.value_type)}" if pa.types.is_list(dtype) else str(dtype)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
