"""A sweep: the studies of a grid as one job, on one pool of evaluators for each model."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from melbo_ray.cluster.fleet import Fleet
from melbo_ray.cluster.member import Member
from melbo_ray.cluster.memory import Demands
from melbo_ray.cluster.resources import Layout
from melbo_ray.cluster.session import connected
from melbo_ray.config import ClusterOptions, ModelOptions
from melbo_ray.errors import UserError
from melbo_ray.report import frequency
from melbo_ray.report import sweep as comparison
from melbo_ray.report.page import render
from melbo_ray.runs.manifest import ALL_PACKED, Packed
from melbo_ray.runs.run_store import Run
from melbo_ray.study.display import Display
from melbo_ray.study.grid import Grid, Planned, check_cell, waves
from melbo_ray.study.placement import Growth, place
from melbo_ray.study.runner import StudyRun, leased, start_manifest

_PER_STUDY = {"source_layer", "target_layer"}
# Options of which studies on one pool have the same.
_SHARED = (ModelOptions.model_fields.keys() | ClusterOptions.model_fields.keys()) - _PER_STUDY


def run(grid: Grid, studies: list[Planned], console: Console) -> None:
    """Run every study that is not finished; models follow one another, the studies of a model share their evaluators.

    A study that takes vectors of another one waits until that has ended.

    Raises:
        UserError: as `runner.run`, of any study; the same command goes on from there.
        KeyboardInterrupt: the sweep was stopped; the message says how to resume it.
    """
    due = [study for study in studies if not study.finished]
    console.print(
        f"sweep {grid.name} in {grid.url}: {len(studies)} studies, {len(studies) - len(due)} of them finished before",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not due:
        return
    try:
        with connected() as fixed, Display(console, 0) as display:
            progress = _Progress(display, len(studies), len(studies) - len(due))
            for wave in waves(due):
                # Those that take another's vectors were checked without them.
                ready = [check_cell(study.cell) if study.awaits else study for study in wave]
                for group in _groups(ready):
                    _Sweep(group, console, progress, fixed).drive()
    except KeyboardInterrupt as stop:
        raise type(stop)("stopped; the same command resumes") from None


def outcome(grid: Grid, console: Console) -> None:
    """Write the table and the report across the runs of a sweep, and print the table."""
    cells = {str(cell.config.run_id): cell.values for cell in grid.cells}
    compared = comparison.write_comparison(grid.url, grid.name, cells)
    headings, rows = comparison.lines(compared)
    table = Table(*headings, title=f"Sweep {grid.name}: KL from the base, medians over vectors", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if (line := frequency.told(compared)) is not None:
        console.print(line, highlight=False)
    for what, name in (("results", ""), ("table", "/sweep.parquet"), ("report", "/report.html")):
        console.print(f"{f'{what}:':8} {grid.url}{name}", highlight=False, soft_wrap=True)


def _groups(studies: Iterable[Planned]) -> list[list[Planned]]:
    """The studies by what their evaluators have in common, in the order of the grid."""

    def shared(study: Planned) -> list[tuple[str, Any]]:
        return sorted((name, repr(getattr(study.checked.config, name))) for name in _SHARED)

    groups = itertools.groupby(sorted(studies, key=shared), key=shared)
    found = [list(group) for _, group in groups]
    order = {study.run_id: place for place, study in enumerate(studies)}
    return sorted(found, key=lambda group: order[group[0].run_id])


class _Progress:
    """What is shown of a sweep: the studies under way, and how many are done."""

    def __init__(self, display: Display, total: int, done: int) -> None:
        self.display, self._total, self._done = display, total, done

    def update(self, fleet: Fleet) -> None:
        self.display.update(fleet.backlogs(), fleet.newest(), fleet.pool.ready)

    def ended(self, study: "_Study") -> None:
        self._done += 1
        vectors = ", ".join(f"{name} {outcome.vectors}" for name, outcome in study.manifest.concepts.items())
        self.display.forget(study.planned.run_id)
        self.display.say(
            f"{self._done} of {self._total} studies finished: {study.planned.run_id}, vectors found: {vectors}"
        )


class _Said:
    """A display for one study among several: its lines begin with its name, its bars are those of the sweep."""

    def __init__(self, display: Display, run_id: str) -> None:
        self._display, self._run_id = display, run_id

    def say(self, text: str) -> None:
        self._display.say(f"{self._run_id}: {text}")

    def update(self, *_: object) -> None:
        pass


class _Study:
    """A study under way: its lease, its books, and its driver in the fleet."""

    def __init__(self, planned: Planned, console: Console, display: Display, layout: Layout, make: Any) -> None:
        self.planned, self._held = planned, contextlib.ExitStack()
        lease = self._held.enter_context(leased(Run.open(planned.url, patient=False)))
        try:
            run = Run.open(planned.url)
            self.manifest = start_manifest(run, planned.checked, layout.packed)
            self._books = StudyRun(run, planned.checked, self.manifest, lease, console, fixed=True)
            self._books.display = _Said(display, planned.run_id)
            self.member: Member = self._books.driver(make, layout, chains=True)
        except BaseException:
            self._held.close()
            raise

    def announce(self) -> None:
        """Print what its last workers have told of their self-checks."""
        self._books.announce(self.member)

    def end(self, finished: bool) -> None:
        """Publish what is left, and give the lease back; a finished study gets its report."""
        with self._held:
            self._books.conclude(self.member, finished)
        if finished:
            with contextlib.suppress(UserError):  # what a report lacks is no fault of the study
                render(self.planned.url)


class _Sweep:
    """The studies of one model."""

    def __init__(self, group: list[Planned], console: Console, progress: _Progress, fixed: bool) -> None:
        self._group, self._console, self._progress = group, console, progress
        first, config = group[0].checked, group[0].checked.config
        together = dataclasses.replace(first, demands=_largest([study.checked.demands for study in group]))
        packed = [study.manifest.packed if study.manifest else ALL_PACKED for study in group]
        allowed = Packed(all(each.chain for each in packed), all(each.evaluator for each in packed))
        self._fleet = Fleet(config, place(together, len(group), fixed, allowed, console))
        self._growth = Growth(config, fixed)
        self._open: dict[str, _Study] = {}
        self._ending: list[tuple[_Study, Future]] = []
        # A study's last publication, audit and report take seconds, for which no evaluator must wait.
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finish")

    def drive(self) -> None:
        """Run the studies to their end, or until they are stopped."""
        try:
            self._fleet.drive([self._start(planned) for planned in self._group], self._end, self._tick)
        finally:
            for study in self._open.values():
                study.end(finished=False)
            self._finisher.shutdown(wait=True)
        self._take_ended()

    def _start(self, planned: Planned) -> Callable[[], Member]:
        def start() -> Member:
            study = _Study(planned, self._console, self._progress.display, self._fleet.layout, self._fleet.member)
            self._open[planned.run_id] = study
            return study.member

        return start

    def _end(self, member: Member) -> None:
        study = self._open.pop(member.run_id)
        study.announce()
        self._ending.append((study, self._finisher.submit(study.end, True)))

    def _tick(self, fleet: Fleet) -> None:
        self._take_ended()
        fleet.layout = self._growth.follow(fleet.layout)
        self._progress.update(fleet)
        if (line := fleet.wait_notice()) is not None:
            self._progress.display.say(line)

    def _take_ended(self) -> None:
        """Report the studies that are published by now; raises what kept one from it."""
        for study, ending in [pair for pair in self._ending if pair[1].done()]:
            self._ending.remove((study, ending))
            ending.result()
            self._progress.ended(study)


def _largest(demands: list[Demands]) -> Demands:
    """What the largest worker of each kind takes among several studies."""
    return Demands(
        max((each.chain for each in demands), key=lambda demand: demand.on_cpu(True)),
        max((each.evaluator for each in demands), key=lambda demand: demand.on_cpu(True)),
    )
