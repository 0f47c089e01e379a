"""A study of a thousand evaluators, simulated: the driver's loop, its pool and the run in storage are the real ones.

python -m benchmarks.simulator                # three studies (`CASES`), a quarter of an hour on an idle core
python -m benchmarks.simulator --scale 0.1    # a tenth of the evaluators and of the vectors

Simulated are the actors (`simulated_ray`), which write rows of the usual size, and the distance to storage: every
request of the driver takes as long as one to S3 may. Publications run beside the driver: they take their CPU time and
that of their requests, and none of the driver's.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console

from benchmarks.simulated_cluster import ROWS, Cluster, DistantStorage
from benchmarks.simulated_ray import SimulatedRay
from melbo_ray.cli import exit_code
from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.resources import Layout
from melbo_ray.config import Config
from melbo_ray.runs.manifest import ALL_PACKED, Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.search.subspace import max_abs_cos
from melbo_ray.search.vectors import stored_vectors
from melbo_ray.study.display import Display

_PUBLISH_EVERY, _EVERYTHING_EVERY = 20.0, 15


@dataclass(frozen=True)
class Case:
    """A study.

    Attributes:
        name: what it shows.
        vectors: vectors of each chain.
        concepts: number of chains.
        evaluators: most evaluators.
        seconds: mean duration of a unit, s.
        vector_seconds: duration of the search for a vector, s.
        loading: seconds until an actor is ready.
        d_model: dimension of the vectors.
        evals: the evaluations, each of one vector a unit.
    """

    name: str
    vectors: int = 500
    concepts: int = 20
    evaluators: int = 1000
    seconds: float = 4.0
    vector_seconds: float = 0.2
    loading: float = 20.0
    d_model: int = 2048
    evals: tuple[str, ...] = tuple(ROWS)


@dataclass
class Outcome:
    """What a simulated study came to; all seconds are simulated ones, except where CPU time is said.

    Attributes:
        begun: when all evaluators were ready first; infinite if they never were.
        spans: begin and end of every unit of evaluation.
        ticks: CPU time of the driver in each iteration of its loop.
        driver_seconds: its CPU time in all.
        publications: seconds of each publication.
        publisher_seconds: CPU time of all publications.
        tail: from the end of the last unit until everything is published and audited.
        requests: number of the driver's requests to storage, by kind.
        grown: growth of this process's resident memory, bytes.
    """

    begun: float = math.inf
    spans: list[tuple[float, float]] = field(default_factory=list)
    ticks: list[float] = field(default_factory=list)
    driver_seconds: float = 0.0
    publications: list[float] = field(default_factory=list)
    publisher_seconds: float = 0.0
    tail: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    grown: int = 0

    @property
    def ended(self) -> float:
        """The end of the last unit."""
        return max(end for _, end in self.spans)

    def efficiency(self, evaluators: int) -> float:
        """Share of the evaluators' time at work, from when all were ready to the end of the last unit."""
        worked = sum(max(0.0, end - max(begin, self.begun)) for begin, end in self.spans)
        return worked / (evaluators * (self.ended - self.begun)) if self.begun < self.ended else 0.0


class Simulation:
    """One case: the real driver, with the ticks that the study's runner gives it."""

    def __init__(self, case: Case, folder: str, ray: SimulatedRay, latency: float) -> None:
        self.case, self.ray, self.outcome = case, ray, Outcome()
        self.storage = DistantStorage(f"{folder}/run", ray, self.outcome.requests, latency)
        self.run, self.manifest = Run(self.storage), Manifest(run_id="run")
        self.cluster = Cluster(
            ray, self.run, case.vectors, case.seconds, case.vector_seconds, case.loading, case.d_model
        )
        self.outcome.spans = self.cluster.spans
        self.display = Display(Console(quiet=True), case.vectors, ray.clock)
        self._next, self._free, self._ticked, self._before = _PUBLISH_EVERY, 0.0, 0.0, _resident()

    def drive(self) -> Outcome:
        """Run the study."""
        names = [f"concept-{i}" for i in range(self.case.concepts)]
        config = Config(eval_batch=1, evals=list(self.case.evals), num_vectors=self.case.vectors)
        backlogs = {name: Backlog(name, config.evals, 1, {}, None, self.case.vectors) for name in names}
        options = {"num_cpus": 1, "num_gpus": 0}
        most = self.case.evaluators
        layout = Layout(self.case.concepts, options, options, 1, 1, most, most, ALL_PACKED)
        worker: Any = self.cluster.worker
        with self.ray:
            self.run.write_manifest(self.manifest)
            Driver(self.run, "run", config, [], backlogs, layout, self._tick, worker, self.ray.clock).drive()
            self.outcome.driver_seconds = self.ray.driver_seconds
            with self.ray.not_the_driver():
                self.outcome.tail = max(self.ray.clock(), self._free) - self.outcome.ended + self._finish(names)
        return self.outcome

    def _tick(self, driver: Driver) -> None:
        now, taken = self.ray.clock(), self.ray.taken()
        self.outcome.ticks.append(taken - self._ticked)
        self._ticked = taken
        if driver.pool.ready == self.case.evaluators:
            self.outcome.begun = min(self.outcome.begun, now)
        self.display.update(driver.backlogs, driver.last, driver.pool.ready)
        driver.wait_notice()
        if now > max(self._next, self._free):
            self._next = now + _PUBLISH_EVERY
            everything = len(self.outcome.publications) % _EVERYTHING_EVERY == _EVERYTHING_EVERY - 1
            with self.ray.not_the_driver():
                self._free = now + self._publish(everything)

    def _publish(self, everything: bool) -> float:
        """Publish; returns the seconds that it takes."""

        def work() -> None:
            self.run.publish(self.manifest, lambda: None, everything)
            self.run.write_manifest(self.manifest)

        cpu = time.process_time()
        self.outcome.publications.append(self.storage.beside(work))
        self.outcome.publisher_seconds += time.process_time() - cpu
        self.outcome.grown = max(self.outcome.grown, _resident() - self._before)
        return self.outcome.publications[-1]

    def _finish(self, names: list[str]) -> float:
        """Publish the rest and audit, as the runner does; returns the seconds that it takes."""

        def audit() -> None:
            for name in names:
                stored = stored_vectors(self.run, name)
                max_abs_cos(torch.stack([found.theta for found in (stored.base, *stored.chain) if found is not None]))
                self.run.read("failures", name)
            self.run.write_manifest(self.manifest)

        seconds = self._publish(everything=True) + self.storage.beside(audit)
        self.outcome.grown = max(self.outcome.grown, _resident() - self._before)
        return seconds


def simulate(case: Case, latency: float = 0.025, cpu: Callable[[], float] = time.thread_time) -> Outcome:
    """Run a case in a folder in memory, if there is one; `cpu` as in `SimulatedRay`, `latency` of storage in s."""
    memory = Path("/dev/shm")  # its files are not in the memory of this process
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return Simulation(case, folder, SimulatedRay(cpu), latency).drive()


def told(case: Case, outcome: Outcome) -> list[str]:
    """The figures of a case, in lines."""
    units, ticks = len(outcome.spans), np.array(outcome.ticks) * 1e3
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(outcome.requests.items()))
    seconds, efficiency = outcome.ended - outcome.begun, outcome.efficiency(case.evaluators)
    return [
        f"{case.name}: {case.concepts} x {case.vectors} vectors, {case.evaluators} evaluators, {case.seconds:g} s each",
        f"  {units} units in {seconds:.0f} s, efficiency {efficiency:.3f}",
        f"  driver: {np.median(ticks):.2f} ms a tick, 99th percentile {np.percentile(ticks, 99):.2f}, most "
        f"{ticks.max():.0f} ({len(ticks)} ticks); {outcome.driver_seconds / units * 1e3:.2f} ms a unit, or "
        f"{units / outcome.driver_seconds:.0f} units a second",
        f"  publications: {len(outcome.publications)}, the longest {max(outcome.publications):.1f} s; "
        f"{outcome.publisher_seconds / units * 1e3:.2f} ms a unit; requests: {requests}",
        f"  tail {outcome.tail:.1f} s; memory grew by {outcome.grown / 1e6:.0f} MB",
    ]


CASES = (
    Case("study"),
    Case("long chain", vectors=10_000, concepts=1, vector_seconds=0.015),
    Case("short units", vectors=300, seconds=1.0, vector_seconds=0.05, loading=2.0),
)


def main(arguments: list[str] | None = None) -> None:
    """The cases that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"one of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the evaluators and of the vectors")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for whole in CASES:
        if options.only in (None, whole.name):
            smaller = {name: max(1, int(getattr(whole, name) * options.scale)) for name in ("evaluators", "vectors")}
            case = dataclasses.replace(whole, **smaller)
            print("\n".join(told(case, simulate(case))), flush=True)


def _resident() -> int:
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    sys.exit(exit_code(main))
