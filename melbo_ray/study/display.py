"""The progress of a run, as live bars on a terminal and as plain lines elsewhere; and the status of a stored run."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from melbo_ray.evals.catalog import EVALUATIONS, SAMPLED
from melbo_ray.runs.manifest import Manifest, Outcome
from melbo_ray.runs.work_unit import WHOLE, Coverage, Unit, count, covers, progress

if TYPE_CHECKING:  # a look at a run's storage needs neither
    from melbo_ray.cluster.backlog import Backlog
    from melbo_ray.search.vectors import SteeringVector

_LINE_EVERY, _BAR_EVERY, _RARE = 5.0, 0.5, 50
_FEWEST_STEPS, _STEPS = 4, 16


class Display:
    """Context manager that shows the progress of every concept, or of several studies' concepts, and the time left.

    Args:
        console: a terminal shows bars; any other console gets a line every few seconds if something changed.
        num_vectors: number of vectors to find per chain.
        clock: monotonic time, s.
    """

    def __init__(self, console: Console, num_vectors: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._num_vectors, self._clock = console, num_vectors, clock
        self._steps: dict[tuple[str, str], deque[tuple[float, float]]] = {}
        self._lines: dict[str, str] = {}
        self._next = 0.0
        self._bars: Progress | None = None
        self._tasks: dict[str, Any] = {}
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bars = Progress(*columns, TimeElapsedColumn(), console=console)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def update(self, backlogs: Mapping[str, "Backlog"], last: Mapping[str, "SteeringVector"], evaluators: int) -> None:
        """Show the current progress, at limited intervals."""
        begun = self._clock()
        if begun < self._next:
            return
        for name, backlog in backlogs.items():
            text = self._describe(name, backlog, last.get(name), evaluators)
            goal = self._goal(backlog)
            if self._bars is not None:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=goal, text=text)
                self._bars.update(self._tasks[name], completed=backlog.found, total=goal, text=text)
            elif self._lines.get(name) != text:
                self._lines[name] = text
                self.say(f"{name}: {text}")
        # Counting takes longer with longer chains; it may take a fiftieth of the driver's time.
        every = _LINE_EVERY if self._bars is None else _BAR_EVERY
        self._next = begun + max(every, _RARE * (self._clock() - begun))

    def forget(self, run_id: str) -> None:
        """Take the bars of a study away that is finished, where several are shown by run id and concept."""
        for name in [name for name in self._tasks if name.startswith(f"{run_id} ")]:
            if self._bars is not None:
                self._bars.remove_task(self._tasks.pop(name))

    def _goal(self, backlog: "Backlog") -> int:
        """The length that the chain will have."""
        return backlog.found if backlog.stop_reason else backlog.most or self._num_vectors

    def _describe(self, name: str, backlog: "Backlog", vector: "SteeringVector | None", evaluators: int) -> str:
        if backlog.base is None:
            stage = f": {backlog.stages[-1]}" if backlog.stages else ""
            return f"finding the base vector{stage}" + ("" if evaluators else ", as soon as an evaluator is there")
        parts = [f"vector {backlog.found} of {backlog.most or self._num_vectors}"]
        if vector is not None:
            parts.append(f"loss {vector.loss:.3g} ({vector.relative_loss:.1%} of unsteered), norm {vector.norm:.3g}")
        goal = self._goal(backlog)
        done, wanted = backlog.evaluations(goal)
        parts.append(f"{done} of {wanted} evaluations by {evaluators}")
        parts.append(self._time_left(name, backlog, goal))
        return ", ".join(parts)

    def _time_left(self, name: str, backlog: "Backlog", goal: int) -> str:
        """The time left at the recent rates of the chain and of its evaluations, whichever is longer."""
        now, slowest = self._clock(), 0.0
        for what, (done, wanted) in (("chain", (backlog.found, goal)), ("evaluations", backlog.units(goal))):
            steps = self._steps.setdefault((name, what), deque(maxlen=_STEPS))
            if not steps or steps[-1][1] != done:
                steps.append((now, done))
            if done >= wanted:
                continue
            if len(steps) < _FEWEST_STEPS:
                return "time left not known yet"
            since, before = steps[0]
            slowest = max(slowest, (wanted - done) * (now - since) / (done - before))
        return f"about {duration(slowest)} left"


def duration(seconds: float) -> str:
    """Format seconds in a suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def status(manifest: Manifest, fresh: Iterable[Unit], driver: Mapping[str, Any] | None) -> Table:
    """The status of a run: a column per concept, with the number of vectors that have each evaluation."""
    state: str = manifest.status
    if driver is not None:
        state = f"running, driven by process {driver['pid']} on {driver['host']}"
    elif state == "running":
        state = "interrupted: its driver is gone; the same command with this run id resumes"
    done = progress(manifest.done, fresh)
    title = f"Run {manifest.run_id}: {state} (as of {manifest.updated})"
    table = Table("", *manifest.definitions, title=title, title_justify="left")
    columns = [_concept_status(done, concept, manifest) for concept in manifest.definitions]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _concept_status(done: Coverage, concept: str, manifest: Manifest) -> dict[str, str]:
    config, outcome = manifest.config, manifest.concepts.get(concept, Outcome())
    found = count(done, concept, "chain", "chain")
    evaluated = {}
    for name in config["evals"]:
        if name in EVALUATIONS and EVALUATIONS[name].shares:
            evaluated[f"parts of {name}"] = _parts(done, concept, name, found)
            continue
        number = count(done, concept, name, "chain")
        sample = config.get("sample") if name in SAMPLED and number else None
        evaluated[f"vectors with {name}"] = f"{number} of a sample of {sample}" if sample else str(number)
    return {
        "base vector": "found" if covers(done, Unit.base(concept)) else "not yet found",
        "vectors": f"{found} of {config['num_vectors']}",
        "chain stopped": outcome.stop_reason or "not yet",
        **evaluated,
    }


def _parts(done: Coverage, concept: str, name: str, found: int) -> str:
    """The items of an evaluation of the whole chain that are done, of those of the chain as it is."""
    shares = EVALUATIONS[name].shares if found else ()
    have = sum(count(done, concept, name, share.kind(found)) for share in shares)
    if not have and covers(done, Unit(concept, name, WHOLE, 1, max(found, 1))):
        return "all, by an earlier release"
    return f"{have} of {sum(len(share.items(found)) for share in shares)}"
