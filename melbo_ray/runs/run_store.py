"""A run in storage: units of work that appear at once, tables that readers see whole, a manifest, resume.

    <storage>/<run_id>/run.json                                  manifest, with what is done
                       lease/000001.json                         who drives the run
                       units/<concept>/<evaluation>.<kind>.000001-000008.zip    fresh work
                       <table>/concept=<name>/part-<evaluation>-00000.parquet   published tables

A writer puts the rows of one unit, of all its tables and failures, into one object: it is there or it is not, and its
name depends on the work, never on the worker. The driver publishes units by merging them into the tables' parts, each
replaced in one stroke by a superset of itself, so a reader of the tables never sees a row missing or doubled; then it
records them as done and only then deletes the units.
"""

import dataclasses
import datetime
import io
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS
from melbo_ray.runs.storage import Storage, StorageError
from melbo_ray.runs.work_unit import WHOLE, Coverage, Unit, cover, covers, spans_of, uncover

_Written = tuple[Unit, dict[str, pa.Table]]
"""A unit and its rows by table."""


class Run:
    """One run at `<url>/<run_id>`: read by anyone, units written by any worker, published by the driver alone."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._known: bytes | None = None

    @classmethod
    def open(cls, url: str, patient: bool = True) -> "Run":
        """The run whose folder is `url`."""
        return cls(Storage(url, patient))

    def manifest(self) -> Manifest | None:
        """`run.json`; None where there is no run yet.

        Raises:
            UserError: it is no manifest, or one of another schema version.
        """
        data = self._known = self.storage.get("run.json")
        return None if data is None else Manifest.decode(data, self.storage.url)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace `run.json` as this object has last read or written it; what another has made of it stays.

        Raises:
            StorageError: another driver has come between.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data = manifest.model_copy(update={"updated": now}).encode()
        version = self.storage.version("run.json")
        if self.storage.get("run.json") != self._known:
            raise StorageError(f"{self.storage.url}/run.json: another driver has written it meanwhile; this one stops")
        self.storage.swap("run.json", data, version)
        self._known = data

    def commit(self, unit: Unit, tables: Mapping[str, pa.Table], exclusive: bool = False) -> None:
        """Make a unit durable: all its rows appear at once, or none.

        Args:
            unit: what the rows are.
            tables: rows by name of the table.
            exclusive: fail where another worker has written this unit with other content.

        Raises:
            FileExistsError: with `exclusive`.
        """
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, rows in sorted(tables.items()):
                archive.writestr(zipfile.ZipInfo(f"{name}.parquet"), _parquet(rows))
        if not exclusive:
            self.storage.put(unit.name, buffer.getvalue())
        elif not self.storage.create(unit.name, buffer.getvalue()):
            raise FileExistsError(f"another worker has written {unit.name}")

    def fresh(self) -> list[Unit]:
        """The units that are written and not yet published."""
        return [Unit.of(name) for name in self.storage.names("units") if name.endswith(".zip")]

    def load(self, unit: Unit) -> dict[str, pa.Table] | None:
        """A fresh unit's tables; None where it has been published and deleted meanwhile."""
        data = self.storage.get(unit.name)
        if data is None:
            return None
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {
                name.removesuffix(".parquet"): pq.read_table(io.BytesIO(archive.read(name)))
                for name in archive.namelist()
            }

    def read(self, table: str, concept: str) -> pa.Table:
        """Every row of a table of one concept that any worker has made durable, sorted by index.

        Fresh units are read first: what is published and deleted under our hands is in the parts that are read after.
        """
        fresh = [(unit, self.load(unit)) for unit in self.fresh() if unit.concept == concept]
        parts: dict[str, list[_Written]] = defaultdict(list)
        for unit, tables in fresh:
            if tables and table in tables:
                parts[unit.part(table)].append((unit, tables))
        published = [n for n in self.storage.names(f"{table}/concept={concept}") if n.endswith(".parquet")]
        merged = [self._merged(table, name, parts.get(name, [])) for name in sorted({*published, *parts})]
        return pa.concat_tables(
            [_schema(table).empty_table(), *(rows.cast(_schema(table)) for rows in merged)]
        ).sort_by("index")

    def publish(self, manifest: Manifest, guard: Callable[[], None]) -> None:
        """Merge the fresh units into the tables' parts, record them in `manifest.done`, and delete them.

        `guard` is called before each write and raises where the run is no longer ours; a write that is held up until
        another driver has replaced the part is refused by storage. Killed anywhere, the next call finishes the work.
        """
        groups: dict[tuple, list[Unit]] = defaultdict(list)
        for unit in self.fresh():
            groups[unit.concept, unit.evaluation, unit.part("")].append(unit)
        for units in groups.values():
            parts: dict[str, list[_Written]] = defaultdict(list)
            for unit in units:
                tables = self.load(unit) or {}
                for table in tables:
                    parts[table].append((unit, tables))
            for table, additions in parts.items():
                name = additions[0][0].part(table)
                version = self.storage.version(name)
                merged = self._merged(table, name, additions)
                if len(merged) or version is not None:  # a part that has lost its rows is replaced too
                    guard()
                    self.storage.swap(name, _parquet(merged), version)
        if groups:
            units = [unit for group in groups.values() for unit in group]
            for unit in units:
                cover(manifest.done, unit)
            guard()
            self.write_manifest(manifest)
            self.storage.delete(unit.name for unit in units)

    def _merged(self, table: str, name: str, additions: list[_Written]) -> pa.Table:
        """The published part `name` with the units' rows added, those of indices that it has already left out.

        An index that failed is not one that it has: another unit may still bring its rows, or fail it anew.
        """
        old = self.storage.get(name)
        rows = [] if old is None else [pq.read_table(io.BytesIO(old))]
        covered: Coverage = json.loads((rows[0].schema.metadata or {}).get(b"units", b"{}")) if rows else {}
        for unit, tables in sorted(additions, key=lambda pair: pair[0]):
            if covers(covered, unit):
                continue
            had = [] if unit.kind == WHOLE else spans_of(covered, unit)
            kept = [] if unit.kind == WHOLE else [part.filter(~_tried(unit, had)) for part in rows]
            rows = [*kept, _outside(had, tables[table])]
            cover(covered, unit)
            failures = tables.get("failures", _schema("failures").empty_table())
            for index in _outside(had, failures)["index"].to_pylist():
                uncover(covered, dataclasses.replace(unit, first=index, last=index))
        schema = _schema(table)
        merged = pa.concat_tables([part.cast(schema) for part in rows]).sort_by(
            [("index", "ascending"), ("kind", "ascending")]
        )
        return merged.replace_schema_metadata({**(schema.metadata or {}), "units": json.dumps(covered)})


def _outside(spans: list[list[int]], rows: pa.Table) -> pa.Table:
    for first, last in spans:
        rows = rows.filter((pc.field("index") < first) | (pc.field("index") > last))
    return rows


def _tried(unit: Unit, had: list[list[int]]) -> pc.Expression:
    """Whether a row tells of an index of the unit beside those that it `had`: that an earlier try of it failed."""
    index = pc.field("index")
    found = (pc.field("kind") == unit.kind) & (index >= unit.first) & (index <= unit.last)
    for first, last in had:
        found &= (index < first) | (index > last)
    return found


def _schema(table: str) -> pa.Schema:
    return SCHEMAS[table].with_metadata({"schema_version": str(SCHEMA_VERSION), "table": table})


def _parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    return buffer.getvalue()
