"""The parts of a run's tables: Parquet files, and how the rows of fresh units are merged into them."""

import dataclasses
import io
import json
import zipfile
from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS
from melbo_ray.runs.work_unit import Coverage, Unit, cover, covers, spans_of, uncover

Written = tuple[Unit, dict[str, pa.Table]]
"""A unit and its rows by table."""


def merged(table: str, old: bytes | None, additions: list[Written]) -> pa.Table:
    """The rows of a published part with the units' rows added, except those of indices that it covers already.

    A failed index is not covered, so that another unit may still bring its rows or another failure. A longer chain
    replaces rows that depend on its length.
    """
    rows = [] if old is None else [_read(old)]
    covered: Coverage = json.loads((rows[0].schema.metadata or {}).get(b"units", b"{}")) if rows else {}
    held = {index for part in rows for index in part["index"].to_pylist()}
    for unit, tables in sorted(additions, key=lambda pair: (pair[0].chain, pair[0])):
        if covers(covered, unit) or unit.chain < (longest := _longest(covered, unit)):
            continue
        if unit.chain > longest:
            rows, covered, held = [], {}, set()
        had = _within(spans_of(covered, unit), unit)
        if any(index in held for index in range(unit.first, unit.last + 1)):
            # Only then: filtering every part for every unit would grow with the square of their number.
            rows = [part.filter(~_tried(unit, had)) for part in rows]
        rows.append(_outside(had, tables[table]))
        held.update(rows[-1]["index"].to_pylist())
        cover(covered, unit)
        failures = tables.get("failures", of_table("failures").empty_table())
        for index in _outside(had, failures)["index"].to_pylist():
            uncover(covered, dataclasses.replace(unit, first=index, last=index))
    schema = of_table(table)
    whole = in_order(pa.concat_tables([schema.empty_table(), *(part.cast(schema) for part in rows)]))
    return whole.replace_schema_metadata({**(schema.metadata or {}), "units": json.dumps(covered)})


def in_order(rows: pa.Table) -> pa.Table:
    """The rows sorted by index and kind; those that are sorted are not copied."""
    index = rows["index"].to_numpy()
    if (index[1:] > index[:-1]).all():
        return rows
    return rows.sort_by([("index", "ascending"), ("kind", "ascending")])


def _within(spans: list[list[int]], unit: Unit) -> list[list[int]]:
    """Those of the spans that contain an index of the unit."""
    return [span for span in spans if span[0] <= unit.last and unit.first <= span[1]]


def _longest(covered: Coverage, unit: Unit) -> int:
    """Length of the chain that the covered units of the unit's part depend on."""
    kinds = covered.get(unit.concept, {}).get(unit.evaluation, {})
    return max((dataclasses.replace(unit, kind=kind).chain for kind in kinds), default=0)


def _outside(spans: list[list[int]], rows: pa.Table) -> pa.Table:
    for first, last in spans:
        rows = rows.filter((pc.field("index") < first) | (pc.field("index") > last))
    return rows


def _tried(unit: Unit, had: list[list[int]]) -> pc.Expression:
    """Expression for rows of earlier attempts at the unit: those of its indices, except the covered ones (`had`)."""
    index = pc.field("index")
    found = (index >= unit.first) & (index <= unit.last)
    if not unit.chain:  # otherwise all rows of the part are of the unit's share, whatever their kind
        found &= pc.field("kind") == unit.kind
    for first, last in had:
        found &= (index < first) | (index > last)
    return found


def of_table(table: str) -> pa.Schema:
    """The schema of a table, with what its files tell of themselves."""
    return SCHEMAS[table].with_metadata({"schema_version": str(SCHEMA_VERSION), "table": table})


def tables_of(data: bytes, wanted: Collection[str] | None = None) -> dict[str, pa.Table]:
    """The tables of a unit's object, or the wanted ones of them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = {name.removesuffix(".parquet"): name for name in archive.namelist()}
        return {table: _read(archive.read(name)) for table, name in names.items() if wanted is None or table in wanted}


def _read(data: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)


def parquet(rows: pa.Table) -> bytes:
    """The bytes of a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    return buffer.getvalue()
