"""A grid of studies from a TOML file: every combination of the options' values is a run with a name of its own.

name = "layers"                      # folder of the sweep; by default the file's name

[options]                            # the same for every study
model = "smollm2"

[grid]                               # a list for each option, or of options that go together
concepts = ["code", "alien"]
seed = [0, 1, 2]
layers = [{source_layer = 8, target_layer = 16}, {source_layer = 6, target_layer = 12}]

[grid.chain]                         # options that go together, by a name; they override [options]
free = {num_vectors = 300}
short = {num_vectors = 48, max_norm = "2R"}
"""

import difflib
import hashlib
import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table

from melbo_ray.config import ClusterOptions, Config
from melbo_ray.errors import UserError
from melbo_ray.report.sweep import COLUMNS
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.search.vector_io import run_named
from melbo_ray.study.preflight import Checked, check, compare, recorded

_OF_THE_SWEEP = {"storage": "give it under [options]", "run_id": "studies are named by their cells",
                 "config": "its options belong under [options]", "plan": "give --plan"}  # fmt: skip
_LONGEST = 32
# Options that may name vectors of another study of the sweep, and their defaults.
_OF_VECTORS = {"base": "melbo", "orthogonal_to": None}
# Options whose change does not make a finished study unfinished.
_RESOURCES = ClusterOptions.model_fields.keys() | {"storage", "device", "eval_batch"}


_Part = tuple[dict[str, Any], dict[str, Any]]
"""What a cell has on one axis: as it is named and shown, and as options."""


@dataclass(frozen=True)
class Cell:
    """A study of a sweep.

    Attributes:
        values: what is its own: the options of the grid, by name; or by its axis the name of those that go together.
        config: all its options.
    """

    values: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Grid:
    """The studies of a sweep, in folders below `url`."""

    name: str
    url: str
    cells: list[Cell]


@dataclass(frozen=True)
class Planned:
    """A study that has passed all checks, and its manifest if it has begun."""

    cell: Cell
    checked: Checked
    manifest: Manifest | None

    @property
    def run_id(self) -> str:
        """Name of its run."""
        return str(self.checked.config.run_id)

    @property
    def url(self) -> str:
        """Folder of its run."""
        return f"{self.checked.config.storage}/{self.run_id}"

    @property
    def awaits(self) -> set[str | None]:
        """Folders of the runs whose vectors it takes."""
        return {run_named(getattr(self.cell.config, option)) for option in _OF_VECTORS} - {None}

    @property
    def finished(self) -> bool:
        """Whether it has ended with these options."""
        if self.manifest is None or self.manifest.status != "finished":
            return False
        before, now = recorded(Config()) | self.manifest.config, recorded(self.checked.config)
        return all(before.get(name) == value for name, value in now.items() if name not in _RESOURCES)


def read_grid(path: str) -> Grid:
    """Read a grid.

    Raises:
        UserError: an unreadable file, an unknown or misplaced option, a value that is no list, or a cell that has
            invalid options.
    """
    try:
        found = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the sweep {path!r}: {error}") from None
    if unknown := found.keys() - {"name", "options", "grid"}:
        raise UserError(f"{path}: unknown {min(unknown)!r}: expected name, [options] and [grid]")
    name, options = str(found.get("name", Path(path).stem)), _named(found.get("options", {}))
    url = f"{str(options.pop('storage', Config().storage)).rstrip('/')}/{name}"
    axes = _axes(path, found.get("grid"))
    _check_names(options, axes)
    cells = [_cell(name, url, options, parts) for parts in itertools.product(*axes)]
    names = Counter(str(cell.config.run_id) for cell in cells)
    if twice := [run_id for run_id, count in names.items() if count > 1]:
        raise UserError(f"{path}: two cells have the name {twice[0]!r}: give every value once")
    return Grid(name, url, cells)


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in options.items()}


def _axes(path: str, grid: Any) -> list[list[_Part]]:
    """The axes of the grid, each a list of what a cell may have on it."""
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"{path}: [grid] is missing or empty: it has a list of values for each option that varies")
    axes = []
    for name, values in grid.items():
        if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
            if name in COLUMNS:
                raise UserError(f"{path}: [grid.{name}] has the name of a column of the table: choose another")
            axes.append([({name: own}, _named(value)) for own, value in values.items()])
        elif isinstance(values, list) and values:
            together = [_named(value if isinstance(value, dict) else {name: value}) for value in values]
            axes.append([(options, options) for options in together])
        else:
            raise UserError(f"{path}: {name} in [grid] is {values!r}: expected a list of values, or options by names")
    return axes


def _check_names(options: Mapping[str, Any], axes: list[list[_Part]]) -> None:
    """Raise if an option is unknown, belongs elsewhere, or is given twice; a named cell may say otherwise than all."""
    taken: set[str] = set()
    for axis in axes:
        own, listed = {name for _, part in axis for name in part}, all(shown is part for shown, part in axis)
        if twice := own & (taken | options.keys() if listed else taken):
            raise UserError(f"option {min(twice)!r} is given twice: once in [options], or in one list of [grid]")
        taken |= own
    taken |= options.keys()
    for name in sorted(taken):
        if name in _OF_THE_SWEEP:
            raise UserError(f"option {name!r} is no part of a grid: {_OF_THE_SWEEP[name]}")
        if name not in Config.model_fields:
            near = difflib.get_close_matches(name, Config.model_fields, n=1, cutoff=0.75)
            raise UserError(f"unknown option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _cell(name: str, url: str, options: dict[str, Any], parts: tuple[_Part, ...]) -> Cell:
    values = {own: value for shown, _ in parts for own, value in shown.items()}
    varied = {option: value for _, part in parts for option, value in part.items()}
    run_id = ".".join([name, *(f"{option}-{_short(value)}" for option, value in values.items())])
    whole: dict[str, Any] = {**options, **varied, "storage": url, "run_id": run_id}
    try:
        return Cell(values, Config(**whole))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        said = f"{first['loc'][0]} is {first['input']!r}: {message}" if first["loc"] else message
        raise UserError(f"{run_id}: {said}") from None


def _short(value: Any) -> str:
    """A value in a name of a run: readable, and with a hash where it had to be shortened."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.removesuffix("/").removesuffix(".toml")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", text.rpartition("/")[2] or text).strip("-.")
    if readable and len(readable) <= _LONGEST:
        return readable
    return f"{readable[:_LONGEST].rstrip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


def check_all(grid: Grid) -> list[Planned]:
    """Check every study of a grid, also against what storage has of it, before anything is written or started.

    Raises:
        UserError: a study cannot run, was begun with other options, or waits for vectors of one that waits for its own.
    """
    urls = {f"{cell.config.storage}/{cell.config.run_id}" for cell in grid.cells}
    studies = [check_cell(cell, urls) for cell in grid.cells]
    for _ in waves(studies):
        pass
    return studies


def check_cell(cell: Cell, coming: Collection[str] = ()) -> Planned:
    """Check a study; vectors of runs that are `coming` may be lacking, and are left out of its checked options.

    Raises:
        UserError: as `check_all`.
    """
    run_id, config = str(cell.config.run_id), cell.config
    try:
        try:
            checked = check(config)
        except UserError:
            lacking = {name: base for name, base in _OF_VECTORS.items() if run_named(getattr(config, name)) in coming}
            if not lacking:
                raise
            return Planned(cell, check(config.model_copy(update=lacking)), None)
        manifest = Run.open(f"{config.storage}/{run_id}", patient=False).manifest()
        if manifest is not None:
            compare(manifest, checked)
    except UserError as error:
        raise UserError(f"{run_id}: {error}") from None
    return Planned(cell, checked, manifest)


def waves(studies: Sequence[Planned]) -> Iterator[list[Planned]]:
    """The studies in groups; those of a group take vectors of studies in groups before it only.

    Raises:
        UserError: a study waits for itself.
    """
    while studies:
        urls = {study.url for study in studies}
        ready = [study for study in studies if not study.awaits & urls]
        if not ready:
            raise UserError(f"{studies[0].run_id}: it takes vectors of a study that waits for its own")
        yield ready
        studies = [study for study in studies if study.awaits & urls]


def overview(grid: Grid, studies: list[Planned]) -> Table:
    """Every study of a sweep with its own options, and how far it is."""
    own = list(dict.fromkeys(name for study in studies for name in study.cell.values))
    table = Table("study", *own, "state", title=f"Sweep {grid.name} in {grid.url}", title_justify="left")
    for study in studies:
        begun = "not begun" if study.manifest is None else "to be resumed"
        values = [str(study.cell.values.get(name, "–")) for name in own]
        table.add_row(study.run_id, *values, "finished" if study.finished else begun)
    return table
