"""The driver of a run: chain actors and a pool of evaluators in one `ray.wait` loop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.metrics import Metrics
from melbo_ray.cluster.pool import ATTEMPTS, PROGRESS, Pool
from melbo_ray.cluster.resources import Layout
from melbo_ray.cluster.results import Found
from melbo_ray.cluster.session import LOST, Deaths, WaitNotice, fetch
from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.runs import checks, schema
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Task, Unit, cover
from melbo_ray.search.vectors import SteeringVector, stored_vectors

# Units in the backlog from which on the chain's results wait, so that evaluators catch up.
_FULL_BACKLOG = 64
_STREAM = {"num_returns": "streaming", "_generator_backpressure_num_objects": 8}


@dataclass(eq=False)
class _ChainActor:
    """A chain actor; `ref` is its `ready` call, then None until the bases are found, then its stream of vectors."""

    actor: Any
    concepts: list[str]
    ref: Any
    streaming: bool = False


class Driver:
    """Runs the chains of a run and evaluates its backlog.

    Args:
        run: the stored run; the caller holds its lease.
        run_id: name of the run.
        config: options of the run.
        concepts: the concepts under study.
        backlogs: the backlog of each concept; the chain of one without `stop_reason` is run.
        layout: resources of the actors.
        tick: called in every iteration of the loop; raises to end the run.
        worker: class of the actors.
        clock: monotonic time, s.

    Attributes:
        pool: the evaluators.
        last: the newest vector of each concept.
        hardware: device by host.
        checks: the worst self-check by role, host and name.
        fingerprints: hashes of the model and of its layers up to the target; all workers must agree.
        failures: number of failed evaluations of vectors.
        peak_memory: peak memory of the `chain` actors and of the `evaluator`s, bytes.
    """

    def __init__(
        self,
        run: Run,
        run_id: str,
        config: Config,
        concepts: Sequence[Concept],
        backlogs: dict[str, Backlog],
        layout: Layout,
        tick: Callable[["Driver"], None],
        worker: type = Worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.run_id, self.config, self.backlogs, self.layout = run, run_id, config, backlogs, layout
        self.last: dict[str, SteeringVector] = {}
        self.hardware, self.fingerprints, self.peak_memory = dict[str, str](), dict[str, str](), dict[str, int]()
        self.checks: checks.Checks = {}
        self._tick, self._worker, self._concepts = tick, worker, list(concepts)
        self._deaths, self._notice, self._metrics = Deaths(), WaitNotice(clock), Metrics(clock)
        self.pool = Pool(self._start_evaluator, self._evaluate, config.min_evaluators, self._deaths, clock)
        self._chain_actors: list[_ChainActor] = []
        self._issued: set[Unit] = set()
        self.failures = self._evaluations = 0

    def drive(self) -> None:
        """Run until every chain has ended and the backlog is empty.

        Raises:
            UserError: an error that another worker would meet too: bad input, storage that fails, workers that all die.
        """
        try:
            self._begin()
            while self.pool.backlog or self._chain_actors:
                most = self.layout.most_beside_chains if self._chain_actors else self.layout.most_evaluators
                self.pool.scale(most, full=self.held_back)
                self.pool.dispatch()
                self._wait()
                self.pool.requeue_stragglers()
                for unit in self.pool.take_exhausted():
                    self._file_failures(unit)
                self._metrics.show(self.backlogs, self.last, self.pool.backlog, self._evaluations)
                self._tick(self)
        finally:
            self.pool.close()
            for chain in self._chain_actors:
                ray.kill(chain.actor)

    def _begin(self) -> None:
        running, actors = [b.concept for b in self.backlogs.values() if b.stop_reason is None], self.layout.chain_actors
        for i in range(actors):
            self._start_chain(running[i::actors])
        for backlog in self.backlogs.values():
            self._enqueue(backlog.due())

    def wait_notice(self) -> str | None:
        """A line on the resources that the run waits for, when no worker has been at work for some time; else None."""
        streaming = any(chain.streaming for chain in self._chain_actors)
        return self._notice.line(bool(self.pool.ready) or streaming, self.layout.evaluator)

    def _actor(self, options: dict[str, Any], threads: int, whole: bool, packed: bool) -> Any:
        # Ray hides no GPU from an actor that takes none.
        config = self.config if options.get("num_gpus") else self.config.model_copy(update={"device": "cpu"})
        groups: Any = {"concurrency_groups": {PROGRESS: 1}} if whole else {}
        worker: Any = ray.remote(max_restarts=0, max_task_retries=0, **groups)(self._worker).options(**options)
        return worker.remote(self.run.storage.url, self.run_id, config, self._concepts, threads, whole, packed)

    def _start_evaluator(self) -> Any:
        return self._actor(self.layout.evaluator, self.layout.evaluator_threads, True, self.layout.packed.evaluator)

    def _start_chain(self, concepts: list[str]) -> None:
        """Start a chain actor for `concepts`, unless there are none; it loads its model while the bases are found."""
        if concepts:
            actor = self._actor(self.layout.chain, self.layout.chain_threads, False, self.layout.packed.chain)
            self._chain_actors.append(_ChainActor(actor, concepts, actor.ready.remote()))

    def _enqueue(self, units: list[Unit]) -> None:
        new = [unit for unit in units if unit not in self._issued]
        self._issued.update(new)
        self.pool.add(new)

    def _evaluate(self, actor: Any, unit: Unit) -> Any:
        if unit.task is Task.BASE:
            return actor.find_base.remote(unit.concept)
        backlog = self.backlogs[unit.concept]
        return actor.evaluate.remote(unit, backlog.vectors(unit), backlog.base, backlog.failed(unit))

    @property
    def held_back(self) -> bool:
        """Whether chains wait for the evaluators."""
        # Without an evaluator the chain must not wait: it may hold the resources that evaluators need.
        at_work = bool(self._chain_actors and self.pool.ready)
        return at_work and self.pool.backlog >= max(_FULL_BACKLOG, 2 * len(self.pool))

    def _chain_refs(self) -> dict[Any, _ChainActor]:
        """The references to wait for, with their chain actors; streams begin once their bases are known."""
        for chain in self._chain_actors:
            if chain.ref is None and all(self.backlogs[name].base is not None for name in chain.concepts):
                chain.ref, chain.streaming = chain.actor.chains.options(**_STREAM).remote(chain.concepts), True
        return {c.ref: c for c in self._chain_actors if c.ref is not None and not (c.streaming and self.held_back)}

    def _wait(self) -> None:
        evaluators, chains = self.pool.refs(), self._chain_refs()
        waiting = [*evaluators, *chains]
        ray.wait(waiting, num_returns=1, timeout=1.0)
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
            if ref in chains:
                self._collect_from_chain(chains[ref])
            elif (done := self.pool.collect(evaluators[ref])) is not None:
                self._complete(done.unit, done.result)

    def _complete(self, unit: Unit | None, result: Any) -> None:
        if unit is None:
            self._register_worker(result)
            return
        backlog = self.backlogs[unit.concept]
        if unit.task is Task.BASE:
            backlog.stages += [] if result is None else [result]
            self._load_stored(backlog)
        else:
            cover(backlog.done, unit)
            self._enqueue(backlog.released(unit))
            self._evaluations += unit.last - unit.first + 1
            self.failures += result.failures
            if result.checks:
                checks.merge(self.checks, "evaluator", result.host, result.checks)
            self._record_peak("evaluator", result.peak_memory)

    def _collect_from_chain(self, chain: _ChainActor) -> None:
        try:
            if chain.streaming:
                self._record_found(fetch(next(chain.ref)), chain)
            else:
                self._register_worker(fetch(chain.ref))
                chain.ref = None
            self._deaths.reset()
        except StopIteration:
            self._stop_chain_actor(chain)
        except (*LOST, FileExistsError) as error:
            self._deaths.count(error, bearable=4 + len(self.pool))
            self._stop_chain_actor(chain)
            for name in chain.concepts:
                self._load_stored(self.backlogs[name])
            self._start_chain([name for name in chain.concepts if self.backlogs[name].stop_reason is None])

    def _stop_chain_actor(self, chain: _ChainActor) -> None:
        self._chain_actors.remove(chain)
        ray.kill(chain.actor)

    def _record_found(self, found: Found, chain: _ChainActor) -> None:
        self._record_peak("chain", found.peak_memory)
        backlog = self.backlogs[found.concept]
        if found.vector is None:
            backlog.stop_reason = found.stop_reason
            chain.concepts.remove(found.concept)
        else:
            self.last[found.concept] = found.vector
            backlog.add_vector("chain", found.vector.index, found.vector.theta.numpy())
            if found.vector.index > backlog.found:
                # A worker of a killed driver stored a vector after this driver had listed them.
                self._load_stored(backlog)
        self._enqueue(backlog.newly_due() if backlog.stop_reason is None else backlog.due())

    def _load_stored(self, backlog: Backlog) -> None:
        backlog.add_stored(stored_vectors(self.run, backlog.concept))
        self._enqueue(backlog.due())

    def _register_worker(self, worker: dict[str, Any]) -> None:
        """Record a worker's device and self-check; its weights must be the run's, up to the target or all of them."""
        self.hardware[worker["host"]] = worker["device"]
        checks.merge(self.checks, worker["role"], worker["host"], worker["checks"])
        for name, value in worker["fingerprints"].items():
            if self.fingerprints.setdefault(name, value) != value:
                raise UserError(
                    f"the model {self.config.model!r} on {worker['host']} has other weights than this run was begun "
                    "with: give its revision, or start a new run"
                )

    def _file_failures(self, unit: Unit) -> None:
        """Record a unit that lost too many workers as failed.

        Raises:
            UserError: the unit is of the search for a base, without which the concept cannot go on.
        """
        backlog = self.backlogs[unit.concept]
        if unit.task is Task.BASE:
            raise UserError(f"a stage of finding the base of {unit.concept!r} ended its worker {ATTEMPTS} times")
        rows = backlog.failures(unit, self.run_id, "its worker died or hung", ATTEMPTS)
        # Empty tables replace the rows that a share of a shorter chain left.
        empty = {name: schema.table(name, []) for name in EVALUATIONS[unit.evaluation].tables}
        self.run.commit(unit, empty | {"failures": schema.table("failures", rows)})
        cover(backlog.done, unit)
        self._enqueue(backlog.released(unit))
        self.failures += len(rows)

    def _record_peak(self, role: str, peak: int) -> None:
        self.peak_memory[role] = max(peak, self.peak_memory.get(role, 0))
