"""The pool of evaluators: it scales with its backlog and requeues the unit of an actor that dies."""

import math
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray

from melbo_ray.cluster.session import FULL, LOST, Deaths, fetch
from melbo_ray.errors import UserError, first_line
from melbo_ray.runs.work_unit import WHOLE, Unit

ATTEMPTS = 10
_DRAIN_SECONDS = 10.0
# Evaluators in a row for which memory did not suffice while they loaded: once may be chance, on a GPU that others use.
_MOST_UNFIT = 5
_FIRST_PATIENCE, _PATIENCE_FACTOR, _LEAST_PATIENCE = 7200.0, 5.0, 60.0


@dataclass(eq=False)
class _Evaluator:
    """An actor of the pool; `ref` is its `ready` call, then that of the unit assigned to it."""

    actor: Any
    ref: Any
    since: float
    work: Unit | None = None
    ready: bool = False


@dataclass(frozen=True)
class Done:
    """A result of an evaluator: of its `ready` call (`unit` is None), or of its unit."""

    unit: Unit | None
    result: Any


class Pool:
    """Evaluators and their backlog of units.

    Args:
        start: starts an actor, whose `ready` the pool calls.
        call: assigns a unit to an actor and returns the reference to its result.
        least: evaluators kept when the backlog is empty.
        deaths: the driver's count of consecutive actor deaths.
        clock: monotonic time, s.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        call: Callable[[Any, Unit], Any],
        least: int,
        deaths: Deaths,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._call, self._least, self._deaths, self._clock = start, call, least, deaths, clock
        self._members: list[_Evaluator] = []
        self._queue: deque[Unit] = deque()
        self._attempts: Counter[Unit] = Counter()
        self._seconds: dict[str, list[float]] = {}
        self._unfit, self._room = 0, 1 << 30

    def __len__(self) -> int:
        return len(self._members)

    @property
    def ready(self) -> int:
        """Number of evaluators that have registered."""
        return sum(member.ready for member in self._members)

    @property
    def backlog(self) -> int:
        """Number of units queued or assigned."""
        return len(self._queue) + sum(member.work is not None for member in self._members)

    def add(self, units: Iterable[Unit]) -> None:
        """Append units to the queue."""
        self._queue.extend(units)

    def scale(self, most: int) -> None:
        """Scale the pool to drain the backlog in about 10 s, to at most `most` evaluators; stop idle actors."""
        seconds = [value for values in self._seconds.values() for value in values[-20:]]
        each = sum(seconds) / len(seconds) if seconds else _DRAIN_SECONDS
        wanted = min(max(math.ceil(self.backlog * each / _DRAIN_SECONDS), self._least), most, self._room)
        while len(self._members) < wanted:
            actor = self._start()
            self._members.append(_Evaluator(actor, actor.ready.remote(), self._clock()))
        for member in [m for m in self._members if m.work is None and self._age(m) > _DRAIN_SECONDS]:
            if len(self._members) > wanted and not self._queue:
                self._stop(member)

    def dispatch(self) -> None:
        """Assign queued units to idle evaluators."""
        for member in self._members:
            if self._queue and member.ready and member.work is None:
                member.work, member.since = self._queue.popleft(), self._clock()
                member.ref = self._call(member.actor, member.work)

    def refs(self) -> dict[Any, _Evaluator]:
        """The pending references, with their evaluators."""
        return {member.ref: member for member in self._members if member.ref is not None}

    def collect(self, member: _Evaluator) -> Done | None:
        """Collect a result; None if the actor died, in which case its unit is requeued.

        Raises:
            UserError: an error that another worker would meet too, or too many consecutive deaths.
        """
        try:
            result = fetch(member.ref)
        except LOST as error:
            self._stop(member)
            if isinstance(error, FULL) and not member.ready:
                self._count_unfit(error)
            self._deaths.count(error, bearable=4 + len(self._members))
            return None
        self._deaths.reset()
        if not member.ready:
            self._unfit = 0
        if member.work is not None:
            self._seconds.setdefault(member.work.evaluation, []).append(self._age(member))
        done = Done(member.work, result)
        member.ready, member.ref, member.work, member.since = True, None, None, self._clock()
        return done

    def _count_unfit(self, error: BaseException) -> None:
        """After several in a row that memory did not suffice to load, start no more than are at work.

        Raises:
            UserError: none is at work.
        """
        self._unfit += 1
        if self._unfit < _MOST_UNFIT or self._room <= self.ready:
            return
        said = f"memory does not suffice for {'another' if self.ready else 'an'} evaluator: {self._unfit} in a row "
        said += f"could not load the model ({first_line(error)})"
        if not self.ready:
            raise UserError(f"{said}: give each a larger share with `eval_gpus`, or 0 for the CPU")
        self._room = self.ready
        warnings.warn(f"{said}; the run goes on with {self.ready}", stacklevel=2)

    def requeue_stragglers(self) -> None:
        """Stop evaluators whose unit takes far longer than earlier ones of its evaluation, and requeue the units."""
        for member, unit in [(m, m.work) for m in self._members if m.work is not None]:
            known = self._seconds.get(unit.evaluation) if unit.kind != WHOLE else None
            patience = max(_LEAST_PATIENCE, _PATIENCE_FACTOR * max(known)) if known else _FIRST_PATIENCE
            if self._age(member) > patience * 2 ** self._attempts[unit]:
                self._stop(member)

    def take_exhausted(self) -> list[Unit]:
        """Remove from the queue and return the units that have used up their attempts."""
        found = [unit for unit in self._queue if self._attempts[unit] >= ATTEMPTS]
        for unit in found:
            self._queue.remove(unit)
        return found

    def close(self) -> None:
        """Stop every evaluator."""
        for member in self._members:
            ray.kill(member.actor)

    def _age(self, member: _Evaluator) -> float:
        """Seconds since its current call began, or since it became idle."""
        return self._clock() - member.since

    def _stop(self, member: _Evaluator) -> None:
        """Kill an evaluator and requeue its unit, if it has one."""
        self._members.remove(member)
        ray.kill(member.actor)
        if member.work is not None:
            self._attempts[member.work] += 1
            self._queue.appendleft(member.work)
