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

import datetime
import io
import os
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from melbo_ray.errors import UserError
from melbo_ray.runs import part_files
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.storage import Storage, StorageError
from melbo_ray.runs.vectors import RunVectors, named_concept, run_vectors
from melbo_ray.runs.work_unit import Unit, cover

_PARTS_AT_ONCE = 8
# A part is merged anew once this share of it is fresh, so that all its versions together are a few times its size.
_WORTHWHILE = 0.25


class Run:
    """One run at `<url>/<run_id>`: anyone may read it, any worker writes units, and only the driver publishes."""

    def __init__(self, storage: Storage | str | os.PathLike[str]) -> None:
        """A run by its storage, or by the directory or fsspec URL of its folder."""
        self.storage = storage if isinstance(storage, Storage) else Storage(os.fspath(storage), patient=False)
        self._known: bytes | None = None
        self._published: Counter[str] = Counter()

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
                archive.writestr(zipfile.ZipInfo(f"{name}.parquet"), part_files.parquet(rows))
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
        return None if data is None else part_files.tables_of(data)

    def read(self, table: str, concept: str, of: Collection[str] | None = None) -> pa.Table:
        """All rows of a table of one concept, published or fresh, sorted by index.

        Fresh units are read before the parts, so that a unit published meanwhile is found in its part.

        Args:
            table: name of the table.
            concept: name of the concept.
            of: the evaluations (or `base`, `chain`) whose rows are read; None for all.
        """
        fresh = [unit for unit in self.fresh() if unit.concept == concept and (of is None or unit.evaluation in of)]
        parts: dict[str, list[part_files.Written]] = defaultdict(list)
        for unit, data in zip(fresh, self.storage.get_many([unit.name for unit in fresh]), strict=True):
            if data is not None and table in (tables := part_files.tables_of(data, {table, "failures"})):
                parts[unit.part(table)].append((unit, tables))
        begin = "part-" if of is None else tuple(f"part-{name}-" for name in of)
        found = self.storage.names(f"{table}/concept={concept}")
        published = [n for n in found if n.endswith(".parquet") and n.rpartition("/")[2].startswith(begin)]
        names = sorted({*published, *parts})
        merged = [
            part_files.merged(table, old, parts.get(name, []))
            for name, old in zip(names, self.storage.get_many(names), strict=True)
        ]
        return part_files.in_order(pa.concat_tables([part_files.of_table(table).empty_table(), *merged]))

    def vectors(self, concept: str = "") -> RunVectors:
        """The base and the chain of a concept; without a name, of the run's only one.

        Raises:
            UserError: no run or no such concept, no name where there are several, or no base yet.
        """
        manifest = self.manifest()
        if manifest is None:
            raise UserError(f"no run at {self.storage.url}: expected run.json there")
        name = named_concept(manifest, concept, self.storage.url)
        return run_vectors(manifest, name, self.read("vectors", name), self.storage.url)

    def publish(self, manifest: Manifest, guard: Callable[[], None], everything: bool = True) -> None:
        """Merge the fresh units into the tables' parts, record them in `manifest.done`, and delete them.

        Unless `everything` is asked for, units wait until those of their part are worth writing the part again.
        Those that an evaluation has due are written in order, so that no query sees the later without the earlier.

        `guard` is called before each write and raises if the lease is lost. Storage rejects a write that is delayed
        until another driver has replaced the part. If the process is killed at any point, the next call completes the
        publication.
        """
        groups: dict[tuple, list[Unit]] = defaultdict(list)
        for unit in self.fresh():
            groups[unit.concept, unit.evaluation, unit.part("")].append(unit)
        due = [g for g in groups.values() if everything or len(g) >= _WORTHWHILE * self._published[g[0].part("")]]
        in_order: dict[tuple, list[list[Unit]]] = defaultdict(list)
        for group in sorted(due, key=lambda group: group[0].part("")):
            in_order[group[0].concept, group[0].evaluation].append(group)
        with ThreadPoolExecutor(_PARTS_AT_ONCE, thread_name_prefix="parts") as threads:
            list(threads.map(lambda groups: [self._publish(units, guard) for units in groups], in_order.values()))
        if due:
            units = [unit for group in due for unit in group]
            for unit in units:
                cover(manifest.done, unit)
            guard()
            self.write_manifest(manifest)
            self.storage.delete(unit.name for unit in units)
            self._published.update(unit.part("") for unit in units)

    def _publish(self, units: Sequence[Unit], guard: Callable[[], None]) -> None:
        """Merge units of one part, for all their tables."""
        parts: dict[str, list[part_files.Written]] = defaultdict(list)
        for unit, data in zip(units, self.storage.get_many([unit.name for unit in units]), strict=True):
            tables = {} if data is None else part_files.tables_of(data)
            for table in tables:
                parts[table].append((unit, tables))
        for table, additions in parts.items():
            name = additions[0][0].part(table)
            version = self.storage.version(name)
            merged = part_files.merged(table, None if version is None else self.storage.get(name), additions)
            if len(merged) or version is not None:  # an existing part is replaced even by an empty one
                guard()
                self.storage.swap(name, part_files.parquet(merged), version)
