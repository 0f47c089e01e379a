"""The driver of a run: chain actors and a pool of evaluators in one `ray.wait` loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from melbo_ray.cluster.backlog import Agenda
from melbo_ray.cluster.metrics import Metrics
from melbo_ray.cluster.pool import ATTEMPTS, Pool
from melbo_ray.cluster.resources import Layout
from melbo_ray.cluster.session import LOST, Deaths, Silence, answer
from melbo_ray.cluster.worker import Found, Worker
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.runs import checks, schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import WHOLE, Task, Unit, cover
from melbo_ray.search.vectors import SteeringVector, stored_vectors

_BACKLOG = 64
_STREAM = {"num_returns": "streaming", "_generator_backpressure_num_objects": 8}


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
        clock: seconds, from any beginning.

    Attributes:
        pool: the evaluators.
        last: the newest vector of each concept.
        hardware: device by host.
        checks: what the workers' self-checks came to, the worst by role, host and name.
        fingerprints: of the model and of its layers up to the target; every worker must have the same.
        failures: vectors that could not be evaluated.
        peak_memory: the most that a `chain` actor and an `evaluator` have taken, bytes.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.run_id, self.config, self.agendas, self.layout = run, run_id, config, agendas, layout
        self.last: dict[str, SteeringVector] = {}
        self.hardware: dict[str, str] = {}
        self.checks: checks.Checks = {}
        self.fingerprints: dict[str, str] = {}
        self.peak_memory: dict[str, int] = {}
        self._tick, self._worker, self._concepts = tick, worker, list(concepts)
        self._deaths, self._silence = Deaths(), Silence(clock)
        self.pool = Pool(self._start_evaluator, self._evaluate, config.min_evaluators, self._deaths, clock)
        self._chains: list[_Chain] = []
        self._issued: set[Unit] = set()
        self.failures = self._evaluations = 0
        self._metrics = Metrics()

    def drive(self) -> None:
        """Return when nothing is due any more.

        Raises:
            UserError: what no other worker would do better: bad input, storage that refuses, workers that always die.
        """
        try:
            running = [name for name, agenda in self.agendas.items() if agenda.stop_reason is None]
            for i in range(self.layout.chain_actors):
                self._start_chain(running[i :: self.layout.chain_actors])
            for agenda in self.agendas.values():
                self._enlist(agenda)
            while self.pool.backlog or self._chains:
                self.pool.resize(self.layout.most_beside_chains if self._chains else self.layout.most_evaluators)
                self.pool.dispatch()
                self._wait()
                self.pool.drop_stragglers()
                for unit in self.pool.hopeless():
                    self._give_up(unit)
                self._metrics.show(self.agendas, self.last, self.pool.backlog, self._evaluations)
                self._tick(self)
        finally:
            self.pool.close()
            for chain in self._chains:
                ray.kill(chain.actor)

    def silence(self) -> str | None:
        """A line that says what is waited for, where for some time no worker has been there."""
        at_work = bool(self.pool.ready) or any(chain.streaming for chain in self._chains)
        return self._silence.told(at_work, self.layout.evaluator)

    def _actor(self, options: dict[str, Any], threads: int, whole: bool, packed: bool) -> Any:
        # Ray hides no GPU from an actor that takes none.
        config = self.config if options.get("num_gpus") else self.config.model_copy(update={"device": "cpu"})
        worker = ray.remote(self._worker).options(max_restarts=0, max_task_retries=0, **options)
        return worker.remote(self.run.storage.url, self.run_id, config, self._concepts, threads, whole, packed)

    def _start_evaluator(self) -> Any:
        return self._actor(self.layout.evaluator, self.layout.evaluator_threads, True, self.layout.packed.evaluator)

    def _start_chain(self, concepts: list[str]) -> None:
        """A chain actor for some concepts, where there are any; it loads its model while the bases are found."""
        if concepts:
            layout = self.layout
            actor = self._actor(layout.chain, layout.chain_threads, False, layout.packed.chain)
            self._chains.append(_Chain(actor, concepts, actor.ready.remote()))

    def _enlist(self, agenda: Agenda) -> None:
        due = [Unit.base(agenda.concept)] if agenda.base is None else agenda.due()
        new = [unit for unit in due if unit not in self._issued]
        self._issued.update(new)
        self.pool.add(new)

    def _evaluate(self, actor: Any, unit: Unit) -> Any:
        if unit.task is Task.BASE:
            return actor.find_base.remote(unit.concept)
        agenda = self.agendas[unit.concept]
        return actor.evaluate.remote(unit, agenda.vectors(unit), agenda.base, agenda.failed(unit))

    def _wait(self) -> None:
        for chain in self._chains:
            if chain.ref is None and all(self.agendas[name].base is not None for name in chain.concepts):
                chain.ref, chain.streaming = chain.actor.chains.options(**_STREAM).remote(chain.concepts), True
        evaluators = self.pool.refs()
        # With nobody to evaluate there is no waiting: the chain may hold what the evaluators need.
        short = self.pool.backlog < max(_BACKLOG, 2 * len(self.pool)) or not self.pool.ready
        chains = {c.ref: c for c in self._chains if c.ref is not None and (short or not c.streaming)}
        waiting = [*evaluators, *chains]
        ray.wait(waiting, num_returns=1, timeout=1.0)
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
            if ref in chains:
                self._hear_chain(chains[ref])
            elif (done := self.pool.hear(evaluators[ref])) is not None:
                self._finish(done.unit, done.result)

    def _finish(self, unit: Unit | None, result: Any) -> None:
        if unit is None:
            self._meet(result)
            return
        agenda = self.agendas[unit.concept]
        cover(agenda.done, unit)
        if unit.task is Task.BASE:
            self._learn_stored(agenda)
        else:
            self._evaluations += unit.last - unit.first + 1
            self.failures += result.failures
            self._grew("evaluator", result.peak_memory)

    def _hear_chain(self, chain: _Chain) -> None:
        try:
            if chain.streaming:
                self._note(answer(next(chain.ref)), chain)
            else:
                self._meet(answer(chain.ref))
                chain.ref = None
            self._deaths.none()
        except StopIteration:
            self._end(chain)
        except (*LOST, FileExistsError) as error:
            self._deaths.one_more(error, bearable=4 + len(self.pool))
            self._end(chain)
            for name in chain.concepts:
                self._learn_stored(self.agendas[name])
            self._start_chain([name for name in chain.concepts if self.agendas[name].stop_reason is None])

    def _end(self, chain: _Chain) -> None:
        self._chains.remove(chain)
        ray.kill(chain.actor)

    def _note(self, found: Found, chain: _Chain) -> None:
        self._grew("chain", found.peak_memory)
        agenda = self.agendas[found.concept]
        if found.vector is None:
            agenda.stop_reason = found.stop_reason
            chain.concepts.remove(found.concept)
        else:
            agenda.learn("chain", found.vector.index, found.vector.theta.numpy())
            self.last[found.concept] = found.vector
        self._enlist(agenda)

    def _learn_stored(self, agenda: Agenda) -> None:
        agenda.learn_stored(stored_vectors(self.run, agenda.concept))
        self._enlist(agenda)

    def _meet(self, worker: dict[str, Any]) -> None:
        """Every worker must have read the same weights, those that hold a part of the model the same part."""
        self.hardware[worker["host"]] = worker["device"]
        checks.merge(self.checks, worker["role"], worker["host"], worker["checks"])
        for name, value in worker["fingerprints"].items():
            if self.fingerprints.setdefault(name, value) != value:
                raise UserError(
                    f"the model {self.config.model!r} on {worker['host']} has other weights than this run was begun "
                    "with: give its revision, or start a new run"
                )

    def _give_up(self, unit: Unit) -> None:
        """File a unit as failed that has taken too many workers with it."""
        agenda = self.agendas[unit.concept]
        if unit.task is Task.BASE:
            raise UserError(f"finding the base of {unit.concept!r} ended its worker {ATTEMPTS} times")
        whole, failed = unit.kind == WHOLE, agenda.failed(unit)
        keys = {"run_id": self.run_id, "kind": "chain" if whole else unit.kind}
        facts = {"evaluation": unit.evaluation, "error": "its worker died or hung"}
        rows = [
            keys | {"index": index} | facts | {"attempts": ATTEMPTS + failed.get(index, 0)}
            for index in (range(1) if whole else range(unit.first, unit.last + 1))
        ]
        # Of the whole chain, the rows of a shorter one go.
        empty = {name: schema.table(name, []) for name in EVALUATIONS[unit.evaluation].tables}
        self.run.commit(unit, empty | {"failures": schema.table("failures", rows)})
        cover(agenda.done, unit)
        self.failures += len(rows)

    def _grew(self, role: str, peak: int) -> None:
        self.peak_memory[role] = max(peak, self.peak_memory.get(role, 0))
