"""A run in storage: atomically written units, published tables, and the manifest from which a run resumes.

    <storage>/<run_id>/run.json                                  manifest, with the published indices
                       lease/000001.json                         lease of the driver
                       units/<concept>/<evaluation>.<kind>.000001-000008.zip    fresh units
                       <table>/concept=<name>/part-<evaluation>-00000.parquet   published parts

A worker writes the rows of a unit, of all its tables and failures, as one object, whose name depends on the work alone
and not on the worker. The driver publishes units by merging them into the tables' parts. Each part is replaced
atomically by a superset of itself, so readers never see missing or duplicate rows. The driver then records the units as
done in the manifest, and only then deletes them.
"""

import dataclasses
import datetime
import io
import json
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from melbo_ray.errors import UserError
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.schema import SCHEMA_VERSION, SCHEMAS
from melbo_ray.runs.storage import Storage, StorageError
from melbo_ray.runs.vectors import RunVectors, Site
from melbo_ray.runs.work_unit import WHOLE, Coverage, Unit, cover, covers, spans_of, uncover

_Written = tuple[Unit, dict[str, pa.Table]]
"""A unit and its rows by table."""


class Run:
    """One run at `<url>/<run_id>`: anyone may read it, any worker writes units, and only the driver publishes."""

    def __init__(self, storage: Storage | str | os.PathLike[str]) -> None:
        """A run by its storage, or by the directory or fsspec URL of its folder."""
        self.storage = storage if isinstance(storage, Storage) else Storage(os.fspath(storage), patient=False)
        self._known: bytes | None = None

    @classmethod
    def open(cls, url: str, patient: bool = True) -> "Run":
        """Open the run whose folder is `url`; `patient` as in `Storage`."""
        return cls(Storage(url, patient))

    def manifest(self) -> Manifest | None:
        """Read `run.json`; None if there is no run yet.

        Raises:
            UserError: the file is not a manifest, or has another schema version.
        """
        data = self._known = self.storage.get("run.json")
        return None if data is None else Manifest.decode(data, self.storage.url)

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace `run.json`, provided that it is unchanged since this object last read or wrote it.

        Raises:
            StorageError: another driver has written it meanwhile.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        data = manifest.model_copy(update={"updated": now}).encode()
        version = self.storage.version("run.json")
        if self.storage.get("run.json") != self._known:
            raise StorageError(f"{self.storage.url}/run.json: another driver has written it meanwhile; this one stops")
        self.storage.swap("run.json", data, version)
        self._known = data

    def commit(self, unit: Unit, tables: Mapping[str, pa.Table], exclusive: bool = False) -> None:
        """Write a unit atomically.

        Args:
            unit: the unit.
            tables: its rows by table.
            exclusive: raise if another worker has written this unit with different content.

        Raises:
            FileExistsError: as `exclusive` says.
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
        """The written units that are not yet published."""
        return [Unit.of(name) for name in self.storage.names("units") if name.endswith(".zip")]

    def load(self, unit: Unit) -> dict[str, pa.Table] | None:
        """The tables of a fresh unit; None if the unit has been published and deleted meanwhile."""
        data = self.storage.get(unit.name)
        if data is None:
            return None
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {
                name.removesuffix(".parquet"): pq.read_table(io.BytesIO(archive.read(name)))
                for name in archive.namelist()
            }

    def read(self, table: str, concept: str) -> pa.Table:
        """All rows of a table of one concept, published or fresh, sorted by index.

        Fresh units are read before the parts, so that a unit published meanwhile is found in its part.
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

    def vectors(self, concept: str = "") -> RunVectors:
        """The base and the chain of a concept; without a name, of the run's only one.

        Raises:
            UserError: no run or no such concept, no name where there are several, or no base yet.
        """
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"no run at {self.storage.url}: expected run.json there")
        known = list(manifest.definitions or manifest.concepts)
        if not concept and len(known) > 1:
            raise UserError(f"{self.storage.url} has several concepts: give one of {', '.join(known)}")
        name = concept or known[0]
        if name not in known:
            raise UserError(f"{self.storage.url} has no concept {concept!r}: expected one of {', '.join(known)}")
        rows = self.read("vectors", name)
        rows = rows.filter(pc.field("kind").isin(["base", "chain"]))
        if rows["index"].to_pylist() != list(range(len(rows))) or not len(rows):
            raise UserError(f"{self.storage.url} has no base vector of {name} yet: resume the run")
        layer, model = manifest.config.get("source_layer"), manifest.config.get("model")
        if layer is None or model is None:
            raise UserError(f"{self.storage.url}/run.json names no source layer or model: it is no whole manifest")
        return RunVectors(rows, Site(int(layer), str(model), manifest.fingerprint))

    def publish(self, manifest: Manifest, guard: Callable[[], None]) -> None:
        """Merge the fresh units into the tables' parts, record them in `manifest.done`, and delete them.

        `guard` is called before each write and raises if the lease is lost. Storage rejects a write that is delayed
        until another driver has replaced the part. If the process is killed at any point, the next call completes the
        publication.
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
                if len(merged) or version is not None:  # an existing part is replaced even by an empty one
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
        """The published part `name` with the units' rows added, except those of indices that it covers already.

        A failed index is not covered, so that another unit may still bring its rows or another failure.
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
    """Expression for rows of earlier attempts at the unit: those of its indices, except the covered ones (`had`)."""
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
