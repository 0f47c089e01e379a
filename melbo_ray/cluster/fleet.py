"""Several runs of one model on one pool of evaluators: one loop for all."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.member import Member
from melbo_ray.cluster.metrics import Metrics
from melbo_ray.cluster.pool import Pool
from melbo_ray.cluster.resources import Layout
from melbo_ray.cluster.session import Deaths, WaitNotice
from melbo_ray.cluster.shared_worker import SharedWorker
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.runs.run_store import Run
from melbo_ray.search.vectors import SteeringVector

# Runs whose chains have ended and that still evaluate; more of them would only fill the driver's memory.
_MOST_WITHOUT_CHAIN = 4


class Fleet:
    """Drives runs of one model: as many chains at a time as the layout has chain actors, and one pool for all.

    While a chain is under way, the base of the next run is sought; its chain begins as soon as the other has ended, and
    evaluations go on meanwhile: evaluators idle only when nothing is left to do.

    Args:
        config: options of the cluster and of the model, the same for every run.
        layout: resources of the actors.
        worker: class of the actors.
        clock: monotonic time, s.

    Attributes:
        layout: as given; may be replaced while the fleet is driven.
        pool: the evaluators.
        members: the runs under way, by run id.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        worker: type = SharedWorker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout, self._worker = layout, worker
        self._notice = WaitNotice(clock)
        self.pool = Pool(self._start, self._call, config.min_evaluators, Deaths(), clock)
        self.members: dict[str, Member] = {}
        self._metrics, self._evaluated = Metrics(), 0

    def member(
        self,
        run: Run,
        run_id: str,
        config: Config,
        concepts: Sequence[Concept],
        backlogs: dict[str, Backlog],
        layout: Layout,
        tick: Callable[[Driver], None],
    ) -> Member:
        """The driver of a run in this fleet; arguments as of `Driver`."""
        return Member(self.pool, run, run_id, config, concepts, backlogs, layout, tick, self._worker)

    def drive(
        self,
        starts: Iterable[Callable[[], Member]],
        ended: Callable[[Member], None],
        tick: Callable[["Fleet"], None],
    ) -> None:
        """Drive runs until all are finished.

        Args:
            starts: open a run each, when its turn comes.
            ended: called with a run that is finished.
            tick: called in every iteration of the loop; raises to end all runs.

        Raises:
            UserError: as `Driver.drive`, of any run.
        """
        waiting, ahead = deque(starts), deque[Member]()
        try:
            while waiting or self.members:
                while (waiting or ahead) and self._free():
                    (ahead.popleft() if ahead else self._prepare(waiting.popleft())).begin()
                if waiting and not ahead:
                    ahead.append(self._prepare(waiting.popleft()))
                chains = any(member.chain_actors for member in self.members.values())
                most = self.layout.most_beside_chains if chains else self.layout.most_evaluators
                self.pool.scale(most, full=any(member.held_back for member in self.members.values()))
                self.pool.dispatch()
                self._wait()
                self._tick()
                for member in [member for member in self.members.values() if member.finished]:
                    del self.members[member.run_id]
                    self._evaluated += member.evaluations
                    ended(member)
                tick(self)
        finally:
            self.pool.close()
            for member in self.members.values():
                member.close()

    def wait_notice(self) -> str | None:
        """As `Driver.wait_notice`, for all runs."""
        return self._notice.line(bool(self.pool.ready), self.layout.evaluator)

    def backlogs(self) -> dict[str, Backlog]:
        """The backlogs of the runs under way, by run id and concept."""
        return {f"{m.run_id} {name}": backlog for m in self.members.values() for name, backlog in m.backlogs.items()}

    def newest(self) -> dict[str, SteeringVector]:
        """The newest vectors of the runs under way, by run id and concept."""
        return {f"{m.run_id} {name}": vector for m in self.members.values() for name, vector in m.last.items()}

    def _free(self) -> bool:
        """Whether another run may begin: there is a chain actor for it, and few others only wait for evaluators."""
        slots = max(1, self.layout.chain_actors)
        chains = sum(member.chain_actors for member in self.members.values())
        return chains < slots and len(self.members) <= slots + _MOST_WITHOUT_CHAIN

    def _prepare(self, start: Callable[[], Member]) -> Member:
        member = start()
        self.members[member.run_id] = member
        member.prepare()
        return member

    def _start(self) -> Any:
        return next(iter(self.members.values())).start_evaluator()

    def _call(self, actor: Any, piece: Any) -> Any:
        return self._member(piece).call(actor, piece)

    def _wait(self) -> None:
        evaluators = self.pool.refs()
        streams = {ref: (m, chain) for m in self.members.values() for ref, chain in m.streams().items()}
        waiting = [*evaluators, *streams]
        ray.wait(waiting, num_returns=1, timeout=1.0)
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]:
            if ref in streams:
                member, chain = streams[ref]
                member.collect(chain)
            elif (done := self.pool.collect(evaluators[ref])) is not None:
                self._complete(done.unit, done.result)
        self.pool.requeue_stragglers()
        exhausted: list[Any] = self.pool.take_exhausted()
        for piece in exhausted:
            self._member(piece).fail(piece)

    def _member(self, piece: Any) -> Member:
        return self.members[piece.run_id]

    def _complete(self, piece: Any, result: Any) -> None:
        if piece is not None:
            registered, result = result
            self._member(piece).complete(piece, result, registered)
        elif (member := self.members.get(result["run_id"])) is not None:
            member.complete(None, None, result)

    def _tick(self) -> None:
        for member in self.members.values():
            member.tick()
        evaluated = self._evaluated + sum(member.evaluations for member in self.members.values())
        self._metrics.show(self.backlogs(), self.newest(), self.pool.backlog, evaluated)
