"""One run of several that share a pool of evaluators: its driver, without a loop of its own (`fleet`)."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import ray

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.pool import Pool
from melbo_ray.cluster.resources import Layout
from melbo_ray.cluster.shared_worker import Job
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit


@dataclass(frozen=True)
class Piece(Unit):  # ty: ignore[subclass-of-dataclass-with-order]
    """A unit in the shared pool, with the run that it belongs to."""

    run_id: str = ""

    @property
    def unit(self) -> Unit:
        """The unit as its run knows it."""
        return Unit(*dataclasses.astuple(self)[:-1])

    @property
    def study(self) -> str:
        """As of `Unit`: runs share none."""
        return f"{self.run_id} {self.concept}"


class _Share:
    """The shared pool as one run sees it."""

    def __init__(self, pool: Pool, run_id: str) -> None:
        self._pool, self._run_id, self.open = pool, run_id, 0

    def add(self, units: Iterable[Unit]) -> None:
        pieces = [Piece(*dataclasses.astuple(unit), self._run_id) for unit in units]
        self.open += len(pieces)
        self._pool.add(pieces)

    def __len__(self) -> int:
        return len(self._pool)

    @property
    def ready(self) -> int:
        return self._pool.ready

    @property
    def backlog(self) -> int:
        return self._pool.backlog


class Member(Driver):
    """The driver of one run in a fleet: it keeps the run's books and its chain actor, the fleet has the loop."""

    def __init__(
        self,
        pool: Pool,
        run: Run,
        run_id: str,
        config: Config,
        concepts: Sequence[Concept],
        backlogs: dict[str, Backlog],
        layout: Layout,
        tick: Callable[[Driver], None],
        worker: type,
    ) -> None:
        actors = min(1, sum(backlog.stop_reason is None for backlog in backlogs.values()))
        layout = dataclasses.replace(layout, chain_actors=actors)
        super().__init__(run, run_id, config, concepts, backlogs, layout, tick, worker)
        self.pool: Any = _Share(pool, run_id)
        self._begun = False
        options = config if layout.evaluator.get("num_gpus") else config.model_copy(update={"device": "cpu"})
        self._job = ray.put(Job(run.storage.url, run_id, options, list(concepts)))

    @property
    def chain_actors(self) -> int:
        """Number of chain actors that run."""
        return len(self._chain_actors)

    @property
    def evaluations(self) -> int:
        """Number of vectors evaluated."""
        return self._evaluations

    @property
    def finished(self) -> bool:
        """Whether it has begun, its chain has ended and nothing of it is queued or assigned."""
        return self._begun and not self._chain_actors and not self.pool.open

    def wait_notice(self) -> None:
        """Nothing: the fleet waits, not the run."""

    def prepare(self) -> None:
        """Queue what is due without a chain: the search for its base, or evaluations of what is found already."""
        for backlog in self.backlogs.values():
            self._enqueue(backlog.due())

    def begin(self) -> None:
        """Start the chain actor."""
        self._begun = True
        self._begin()

    def start_evaluator(self) -> Any:
        """Start an evaluator, which begins with this run."""
        return self._start_evaluator()

    def call(self, actor: Any, piece: Piece) -> Any:
        """Assign a unit to an evaluator."""

        def method(name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *args: actor.of_run.remote(self._job, name, *args))

        return self._evaluate(SimpleNamespace(evaluate=method("evaluate"), find_base=method("find_base")), piece.unit)

    def streams(self) -> dict[Any, Any]:
        """The references of its chain to wait for."""
        return self._chain_refs()

    def collect(self, chain: Any) -> None:
        """Take a result of its chain."""
        self._collect_from_chain(chain)

    def complete(self, piece: Piece | None, result: Any, registered: dict[str, Any] | None) -> None:
        """Record an evaluator of this run, and a unit that is done."""
        if registered is not None:
            self._register_worker(registered)
        if piece is not None:
            self._complete(piece.unit, result)
            self.pool.open -= 1

    def fail(self, piece: Piece) -> None:
        """Record a unit that lost too many evaluators as failed."""
        self._file_failures(piece.unit)
        self.pool.open -= 1

    def tick(self) -> None:
        """What the run does in every iteration of the loop."""
        self._tick(self)

    def close(self) -> None:
        """Stop its chain actor."""
        for chain in list(self._chain_actors):
            self._stop_chain_actor(chain)
