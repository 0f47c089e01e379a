"""The driver of a run on Ray: chain actors, a pool of evaluators, one `ray.wait` loop.

Every actor is a `work.Worker` and may die at any time: what it finished is in storage, what it had in hand is handed
out again, and a new actor takes its place. Ray itself restarts no actor and retries no task: a retried generator that
resumes from storage would skip by position and lose vectors in silence.
"""

import contextlib
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.metrics import Gauge

from melbo_ray import tables
from melbo_ray.agenda import Agenda
from melbo_ray.concepts import Concept
from melbo_ray.config import Config, UserError
from melbo_ray.layout import Layout
from melbo_ray.model import first_line
from melbo_ray.store import WHOLE, Run, Unit, cover
from melbo_ray.work import Found, Worker, cores, stored_vectors

_BACKLOG = 64
_ATTEMPTS = 10
_DEATHS_IN_A_ROW = 5
_DRAIN_SECONDS = 10.0
_FIRST_PATIENCE, _PATIENCE_FACTOR, _LEAST_PATIENCE = 7200.0, 5.0, 60.0
_LOST = (RayActorError, ObjectLostError, OutOfMemoryError)
_GAUGES = {
    "vectors_found": "vectors the chain has",
    "vectors_evaluated": "vectors with all their evaluations",
    "loss": "loss of the newest vector",
    "backlog": "evaluation units waiting or in hand, all concepts",
    "evaluations_per_second": "vectors evaluated a second since the start, all concepts and evaluations",
}


@dataclass(eq=False)
class _Evaluator:
    """An actor of the pool: `ref` is its `ready` probe, then what it has in hand."""

    actor: Any
    ref: Any
    work: Unit | None = None
    ready: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Chain:
    """A chain actor: `ref` is its `ready` probe, then None until the bases are found, then the stream of vectors."""

    actor: Any
    concepts: list[str]
    ref: Any
    streaming: bool = False


class Driver:
    """Does everything that is due of a run.

    Args:
        run: where it is stored; leased by the caller.
        run_id: its name.
        config: its options.
        concepts: what is studied.
        agendas: what is due of each concept; one without `stop_reason` has a chain to run.
        layout: what the actors take of the cluster.
        tick: called in every turn of the loop; raises where the run must end.
        worker: what the actors are.
    """

    def __init__(
        self,
        run: Run,
        run_id: str,
        config: Config,
        concepts: Sequence[Concept],
        agendas: dict[str, Agenda],
        layout: Layout,
        tick: Callable[["Driver"], None],
        worker: type = Worker,
    ) -> None:
        self.run, self.run_id, self.config, self.agendas, self.layout = run, run_id, config, agendas, layout
        self.last: dict[str, Found] = {}
        self.hardware: dict[str, str] = {}
        self.fingerprint: str | None = None
        self.failures = self.evaluations = 0
        self._tick, self._worker = tick, worker
        self._arguments = (run.storage.url, run_id, config, list(concepts))
        self._pool: list[_Evaluator] = []
        self._chains: list[_Chain] = []
        self._queue: deque[Unit] = deque()
        self._issued: set[Unit] = set()
        self._attempts: Counter[Unit] = Counter()
        self._seconds: dict[str, list[float]] = {}
        self._deaths = 0
        self._started = time.monotonic()
        self._gauges = {name: Gauge(f"melbo_{name}", text, tag_keys=("concept",)) for name, text in _GAUGES.items()}

    @property
    def evaluators(self) -> int:
        """Evaluators at work or ready to."""
        return sum(member.ready for member in self._pool)

    @property
    def backlog(self) -> int:
        """Units waiting or in hand."""
        return len(self._queue) + sum(member.work is not None for member in self._pool)

    def drive(self) -> None:
        """Return when nothing is due any more.

        Raises:
            UserError: what no other worker would do better: bad input, storage that refuses, workers that always die.
        """
        try:
            self._start_chains([name for name, agenda in self.agendas.items() if agenda.stop_reason is None])
            for agenda in self.agendas.values():
                self._enlist(agenda)
            while self.backlog or self._chains:
                self._size_pool()
                self._dispatch()
                self._wait()
                self._drop_stragglers()
                self._measure()
                self._tick(self)
        finally:
            for member in [*self._pool, *self._chains]:
                ray.kill(member.actor)

    def _enlist(self, agenda: Agenda) -> None:
        due = [Unit(agenda.concept, "base", "base", 0, 0)] if agenda.base is None else agenda.due()
        new = [unit for unit in due if unit not in self._issued]
        self._issued.update(new)
        self._queue.extend(new)

    def _start_chains(self, concepts: list[str]) -> None:
        """Chain actors load their model while the bases are found."""
        for i in range(self.layout.chain_actors):
            if share := concepts[i :: self.layout.chain_actors]:
                actor = self._actor(self.layout.chain, self.layout.chain_threads)
                self._chains.append(_Chain(actor, share, actor.ready.remote()))

    def _actor(self, options: dict[str, Any], threads: int) -> Any:
        worker = ray.remote(self._worker).options(max_restarts=0, max_task_retries=0, **options)
        return worker.remote(*self._arguments, threads)

    def _size_pool(self) -> None:
        """As many evaluators as empty the backlog in some seconds, within the bounds; idle ones go."""
        seconds = [value for values in self._seconds.values() for value in values[-20:]]
        each = sum(seconds) / len(seconds) if seconds else _DRAIN_SECONDS
        most = self.layout.most_beside_chains if self._chains else self.layout.most_evaluators
        wanted = min(max(math.ceil(self.backlog * each / _DRAIN_SECONDS), self.config.min_evaluators), most)
        while len(self._pool) < wanted:
            actor = self._actor(self.layout.evaluator, self.layout.evaluator_threads)
            self._pool.append(_Evaluator(actor, actor.ready.remote()))
        for member in [m for m in self._pool if m.work is None and _age(m) > _DRAIN_SECONDS]:
            if len(self._pool) > wanted and not self._queue:
                self._dismiss(member)

    def _dispatch(self) -> None:
        for member in self._pool:
            if not self._queue:
                return
            if member.ready and member.work is None:
                unit = self._queue.popleft()
                member.work, member.since = unit, time.monotonic()
                if unit.evaluation == "base":
                    member.ref = member.actor.find_base.remote(unit.concept)
                else:
                    agenda = self.agendas[unit.concept]
                    member.ref = member.actor.evaluate.remote(unit, agenda.vectors(unit), agenda.base)

    def _wait(self) -> None:
        for chain in self._chains:
            if chain.ref is None and all(self.agendas[name].base is not None for name in chain.concepts):
                options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 8}
                chain.ref = chain.actor.chains.options(**options).remote(chain.concepts)
                chain.streaming = True
        evaluators = {member.ref: member for member in self._pool if member.ref is not None}
        short = self.backlog < max(_BACKLOG, 2 * len(self._pool))
        chains = {c.ref: c for c in self._chains if c.ref is not None and (short or not c.streaming)}
        ready, _ = ray.wait([*evaluators, *chains], num_returns=1, timeout=1.0)
        for ref in ready:
            if ref in evaluators:
                self._hear_evaluator(evaluators[ref])
            else:
                self._hear_chain(chains[ref])

    def _hear_evaluator(self, member: _Evaluator) -> None:
        try:
            result = _get(member.ref)
        except _LOST as error:
            self._dismiss(member)
            self._bury(error)
            return
        self._deaths = 0
        unit, seconds, member.ref, member.work = member.work, _age(member), None, None
        member.since = time.monotonic()
        if unit is None:
            member.ready = True
            self._meet(result)
            return
        cover(self.agendas[unit.concept].done, unit)
        if unit.evaluation == "base":
            self._learn_stored(self.agendas[unit.concept])
            return
        self._seconds.setdefault(unit.evaluation, []).append(seconds)
        self.evaluations += unit.last - unit.first + 1
        self.failures += result

    def _hear_chain(self, chain: _Chain) -> None:
        try:
            if chain.streaming:
                self._note(_get(next(chain.ref)), chain)
            else:
                self._meet(_get(chain.ref))
                chain.ref = None
        except StopIteration:
            self._end(chain)
        except (*_LOST, FileExistsError) as error:
            self._bury(error)
            self._end(chain)
            for name in chain.concepts:
                self._learn_stored(self.agendas[name])
            self._start_chains([name for name in chain.concepts if self.agendas[name].stop_reason is None])

    def _note(self, found: Found, chain: _Chain) -> None:
        self._deaths = 0
        agenda = self.agendas[found.concept]
        if found.vector is None:
            agenda.stop_reason = found.stop_reason
            chain.concepts.remove(found.concept)
        else:
            agenda.learn("chain", found.vector.index, found.vector.theta.numpy())
            self.last[found.concept] = found
        self._enlist(agenda)

    def _learn_stored(self, agenda: Agenda) -> None:
        for kind, vectors in stored_vectors(self.run, agenda.concept).items():
            for index, vector in vectors.items():
                agenda.learn(kind, index, vector.theta.numpy())
        self._enlist(agenda)

    def _meet(self, worker: dict[str, str]) -> None:
        """Every worker must have read the same weights."""
        if self.fingerprint not in (None, worker["fingerprint"]):
            raise UserError(
                f"the model {self.config.model!r} on {worker['host']} has other weights than this run was begun with: "
                "give its revision, or start a new run"
            )
        self.fingerprint = worker["fingerprint"]
        self.hardware[worker["host"]] = worker["device"]

    def _dismiss(self, member: _Evaluator) -> None:
        self._pool.remove(member)
        ray.kill(member.actor)
        if member.work is not None:
            self._retry(member.work)

    def _retry(self, unit: Unit) -> None:
        """Hand a unit out again, first of all; one that has taken too many workers with it is filed as failed."""
        self._attempts[unit] += 1
        if self._attempts[unit] < _ATTEMPTS:
            self._queue.appendleft(unit)
            return
        if unit.evaluation == "base":
            raise UserError(f"finding the base of {unit.concept!r} ended its worker {_ATTEMPTS} times")
        keys = {"run_id": self.run_id, "kind": "chain" if unit.kind == WHOLE else unit.kind}
        facts = {"evaluation": unit.evaluation, "error": "its worker died or hung", "attempts": _ATTEMPTS}
        rows = [keys | {"index": index} | facts for index in range(unit.first, unit.last + 1)]
        self.run.commit(unit, {"failures": tables.table("failures", rows)})
        cover(self.agendas[unit.concept].done, unit)
        self.failures += len(rows)

    def _bury(self, error: BaseException) -> None:
        self._deaths += 1
        if self._deaths >= _DEATHS_IN_A_ROW + len(self._pool):
            raise UserError(
                f"{self._deaths} workers died one after another, the last one so: {first_line(error)} "
                "(out of memory? see Ray's logs); the same command resumes"
            )

    def _end(self, chain: _Chain) -> None:
        self._chains.remove(chain)
        ray.kill(chain.actor)

    def _drop_stragglers(self) -> None:
        """A unit that takes far longer than others of its kind is taken from its worker and handed out again."""
        for member in [m for m in self._pool if m.work is not None and m.work.evaluation != "base"]:
            known = self._seconds.get(member.work.evaluation) if member.work.kind != WHOLE else None
            patience = max(_LEAST_PATIENCE, _PATIENCE_FACTOR * max(known)) if known else _FIRST_PATIENCE
            if _age(member) > patience * 2 ** self._attempts[member.work]:
                self._dismiss(member)

    def _measure(self) -> None:
        """Ray's dashboard metrics."""
        for name, agenda in self.agendas.items():
            self._gauges["vectors_found"].set(agenda.found, {"concept": name})
            self._gauges["vectors_evaluated"].set(agenda.evaluated(), {"concept": name})
            if name in self.last:
                self._gauges["loss"].set(self.last[name].vector.loss, {"concept": name})
        rate = self.evaluations / (time.monotonic() - self._started)
        self._gauges["backlog"].set(self.backlog, {"concept": "all"})
        self._gauges["evaluations_per_second"].set(rate, {"concept": "all"})


def address() -> str | None:
    """The Ray cluster to use (`ray job submit` names it to what it starts); None for one on this machine alone."""
    return os.environ.get("RAY_ADDRESS") or None


@contextlib.contextmanager
def connected() -> Iterator[tuple[dict[str, float], bool]]:
    """Be on the cluster: its total resources, and whether its nodes are labelled with roles.

    Raises:
        UserError: the cluster cannot be reached, or refuses the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address():
            ray.init(address=address(), **options)
        else:
            ray.init(address="local", include_dashboard=False, num_cpus=max(2, cores()), **options)
    except (ConnectionError, RayError) as error:
        raise UserError(f"cannot join the Ray cluster at {address() or 'this machine'}: {first_line(error)}") from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        largest = max(node["Resources"].get("CPU", 0.0) for node in nodes)
        yield ray.cluster_resources() | {"largest_node_CPU": largest}, any("role" in node["Labels"] for node in nodes)
    finally:
        ray.shutdown()


def _get(ref: Any) -> Any:
    """What a worker answers; its UserError as itself, without Ray's traceback around it."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | FileExistsError):
            raise error.cause from None
        raise


def _age(member: _Evaluator) -> float:
    return time.monotonic() - member.since
