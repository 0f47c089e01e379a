"""How a run is going, on a terminal as bars that live, elsewhere as plain lines; and its summary at the end."""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from melbo_ray import checks
from melbo_ray.config import EVERY
from melbo_ray.intervals import median_interval
from melbo_ray.store import Run
from melbo_ray.tables import SINK
from melbo_ray.units import WHOLE, Coverage, Unit, count, progress

if TYPE_CHECKING:  # a look at a run's storage needs neither
    from melbo_ray.agenda import Agenda
    from melbo_ray.ortho import SteeringVector

_LINE_EVERY, _BAR_EVERY = 5.0, 0.5
_FEWEST_STEPS, _STEPS = 4, 16


class Display:
    """Shows where every concept stands, with the time left; a context manager.

    Args:
        console: a terminal gets bars, anything else a line of text every few seconds where something changed.
        num_vectors: vectors each chain shall find.
    """

    def __init__(self, console: Console, num_vectors: int) -> None:
        self._console, self._num_vectors = console, num_vectors
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
        """One line above the bars."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def update(self, agendas: Mapping[str, "Agenda"], last: Mapping[str, "SteeringVector"], evaluators: int) -> None:
        """Show where things stand."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (_LINE_EVERY if self._bars is None else _BAR_EVERY)
        for name, agenda in agendas.items():
            text = self._describe(agenda, last.get(name), evaluators)
            goal = agenda.found if agenda.stop_reason else self._num_vectors
            if self._bars is not None:
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name, total=goal, text=text)
                self._bars.update(self._tasks[name], completed=agenda.found, total=goal, text=text)
            elif self._lines.get(name) != text:
                self._lines[name] = text
                self.say(f"{name}: {text}")

    def _describe(self, agenda: "Agenda", vector: "SteeringVector | None", evaluators: int) -> str:
        if agenda.base is None:
            return "finding the base vector" + ("" if evaluators else " as soon as an evaluator is there")
        parts = [f"vector {agenda.found} of {self._num_vectors}"]
        if vector is not None:
            parts.append(f"loss {vector.loss:.3g} ({vector.relative_loss:.1%} of unsteered), norm {vector.norm:.3g}")
        goal = agenda.found if agenda.stop_reason else self._num_vectors
        done, wanted = agenda.evaluations(goal)
        parts.append(f"{done} of {wanted} evaluations by {evaluators}")
        parts.append(self._time_left(agenda, goal))
        return ", ".join(parts)

    def _time_left(self, agenda: "Agenda", goal: int) -> str:
        """By the newest rates of the chain and of its evaluations; the slower one rules."""
        now, slowest = time.monotonic(), 0.0
        for what, (done, wanted) in (("chain", (agenda.found, goal)), ("evaluations", agenda.units(goal))):
            steps = self._steps.setdefault((agenda.concept, what), deque(maxlen=_STEPS))
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
    """Seconds as a person reads them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summary(run: Run, manifest: Mapping[str, Any]) -> Table:
    """What was found: a row for each concept.

    KL is KL(P_n ‖ P_base) at the vector's own norm, counted below 10 % and 50 % of that of the unsteered model.
    """
    table = Table("", *manifest["concepts"], title=f"Run {manifest['run_id']}", title_justify="left")
    columns = [_facts(run, concept, facts) for concept, facts in manifest["concepts"].items()]
    for name in columns[0] if columns else ():
        table.add_row(name, *(column[name] for column in columns))
    return table


def status(manifest: Mapping[str, Any], fresh: Iterable[Unit], driver: Mapping[str, Any] | None) -> Table:
    """Where a run stands: a row for each concept, a column for each evaluation with the vectors that have it."""
    state = manifest["status"]
    if driver is not None:
        state = f"running, driven by process {driver['pid']} on {driver['host']}"
    elif state == "running":
        state = "interrupted: its driver is gone; the same command with this run id resumes"
    done, config = progress(manifest, fresh), manifest["config"]
    title = f"Run {manifest['run_id']}: {state} (as of {manifest['updated']})"
    table = Table("", *manifest["definitions"], title=title, title_justify="left")
    columns = [_standing(done, config, concept, manifest) for concept in manifest["definitions"]]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _standing(done: Coverage, config: Mapping[str, Any], concept: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    found = count(done, concept, "chain", "chain")
    evaluated = {
        name: str(count(done, concept, name, "chain") or count(done, concept, name, WHOLE)) for name in config["evals"]
    }
    if sample := config.get("sample"):
        for name in (name for name in evaluated if name not in EVERY and count(done, concept, name, "chain")):
            evaluated[name] += f" of a sample of {sample}"
    return {
        "base vector": "found" if count(done, concept, "base", "base") else "not yet found",
        "vectors": f"{found} of {config['num_vectors']}",
        "chain stopped": manifest["concepts"].get(concept, {}).get("stop_reason") or "not yet",
        **{f"vectors with {name}": value for name, value in evaluated.items()},
    }


def _facts(run: Run, concept: str, facts: Mapping[str, Any]) -> dict[str, str]:
    vectors = run.read("vectors", concept)
    chain = vectors.filter(pc.field("kind") == "chain")
    norms, seconds = chain["norm"].to_pylist(), chain["seconds"].to_pylist()
    below_10, below_50, unsteered = _kl_counts(run, concept)
    medians = {kind: _median_kl(run, concept, kind) for kind in ("chain", "random", "shuffled")}
    return {
        "the base": base_reason(run, concept) or "–",
        "R, and the first position's share of the target": _of_base(run, concept),
        "vectors found": str(len(chain)),
        "why the chain stopped": str(facts["stop_reason"]),
        "KL from the base, nats: median [95 %]": medians["chain"],
        "the same, random directions": medians["random"],
        "the same, shuffled targets": medians["shuffled"],
        "KL below 10 % of unsteered": below_10,
        "KL below 50 % of unsteered": below_50,
        "KL unsteered, nats": unsteered,
        "greedy texts with the concept": _greedy_texts(run, concept),
        "norms": f"{min(norms):.2f} to {max(norms):.2f}" if norms else "–",
        "largest |cos|": f"{facts['max_abs_cos']:.1e}",
        "seconds per vector, median": f"{statistics.median(seconds):.2f}" if seconds else "–",
        "failed evaluations": str(facts["failures"]),
    }


def base_reason(run: Run, concept: str) -> str:
    """Which candidate the base is, and why, in one line; empty where there were none."""
    taken = [row for row in run.read("candidates", concept).to_pylist() if row["taken"]]
    return f"candidate {taken[0]['index']}: {taken[0]['reason']}" if taken else ""


def base_figures(run: Run, concept: str) -> dict[str, float]:
    """What `summary` has of the base: `radius`, `sink_share`, `coordinate_share`."""
    return {row["figure"]: row["value"] for row in run.read("summary", concept).to_pylist() if row["kind"] == "base"}


def _of_base(run: Run, concept: str) -> str:
    figures = base_figures(run, concept)
    if not figures:
        return "–"
    warning = "" if figures["sink_share"] < SINK else ": READ relative_loss_from_1"
    return f"{figures['radius']:.3g}, {figures['sink_share']:.0%}{warning}"


def candidates(run: Run, concept: str) -> Table:
    """All the candidates for the base, the best first: how each was judged, what it writes, why it was taken or not.

    `coherence` is in nats a token under the unsteered model; `held out` counts the held-out prompts on which it newly
    shows the concept.
    """
    columns = ("", "objective", "concept score", "coherence", "held out", "greedy text", "why")
    table = Table(*columns, title=f"{concept} (→ the base)", title_justify="left")
    for row in sorted(run.read("candidates", concept).to_pylist(), key=lambda row: row["rank"]):
        numbers = (f"{row['objective']:.4g}", f"{row['concept_score']:.3f}", f"{row['coherence']:.2f}")
        gained = "–" if row["held_out_texts"] is None else f"{row['held_out_gained']} of {len(row['held_out_texts'])}"
        index = f"{'→ ' if row['taken'] else ''}{row['index']}"
        # A model's text is no markup, and commands nobody's terminal.
        table.add_row(index, *numbers, gained, Text(printable(row["text"])), row["reason"])
    return table


def printable(text: str) -> str:
    """The text with every control or format character but the line break shown as �: escapes, bells, reversed order."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "�" for mark in text)


def _kl_counts(run: Run, concept: str) -> tuple[str, str, str]:
    rows = [row for row in run.read("kl", concept).to_pylist() if row["scale"] == "own"]
    unsteered = [row["kl_from_base"] for row in rows if row["kind"] == "unsteered"]
    values = [row["kl_from_base"] for row in rows if row["kind"] == "chain"]
    if not unsteered or not values:
        return "–", "–", "–"
    below = [sum(value < share * unsteered[0] for value in values) for share in (0.1, 0.5)]
    return str(below[0]), str(below[1]), f"{unsteered[0]:.3f}"


def _median_kl(run: Run, concept: str, kind: str) -> str:
    """At the vectors' own norms, with its interval over vectors."""
    rows = run.read("kl", concept).filter((pc.field("kind") == kind) & (pc.field("scale") == "own"))
    values = [value for value in rows["kl_from_base"].to_pylist() if math.isfinite(value)]
    if not values:
        return "–"
    median, (low, high) = statistics.median(values), median_interval(values)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]" if len(values) > 1 else f"{median:.2f}"


def _greedy_texts(run: Run, concept: str) -> str:
    """On the training prompt at the vectors' own norms, by the heuristic that `detected` is."""
    wanted = {"kind": "chain", "prompt_id": "training", "scale": "own", "temperature": 0}
    rows = run.read("generations", concept).to_pylist()
    found = [row["detected"] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return f"{sum(found)} of {len(found)}" if found else "–"


def epilogue(console: Console, run: Run, manifest: Mapping[str, Any]) -> None:
    """The summary, what memory it took, where the results lie, and a query to paste."""
    console.print(summary(run, manifest))
    if peaks := manifest["peak_memory"]:
        told = ", ".join(f"{role} {peak / 1e9:.1f} GB" for role, peak in sorted(peaks.items()))
        console.print(f"memory at most: {told}", highlight=False)
    if told := checks.line(manifest["checks"]):
        console.print(f"self-check: {told}", highlight=False, soft_wrap=True)
    url = run.storage.url
    console.print(f"results: {url}", highlight=False, soft_wrap=True)
    sql = "SELECT concept, index, kl_from_base FROM kl WHERE kind = 'chain' AND scale = 'own' ORDER BY ALL"
    command = f'python -c "from melbo_ray.query import connect; connect(\'{url}\').sql(\\"{sql}\\").show()"'
    console.print(f"query:   {command}", highlight=False, soft_wrap=True)
