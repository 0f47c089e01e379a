"""The evaluators: a pool of actors that follows its backlog up and down, and loses no unit with an actor."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray

from melbo_ray.cluster.session import LOST, Deaths, answer
from melbo_ray.runs.work_unit import WHOLE, Unit

ATTEMPTS = 10
_DRAIN_SECONDS = 10.0
_FIRST_PATIENCE, _PATIENCE_FACTOR, _LEAST_PATIENCE = 7200.0, 5.0, 60.0


@dataclass(eq=False)
class _Evaluator:
    """An actor of the pool: `ref` is its `ready` probe, then what it has in hand, begun at `since`."""

    actor: Any
    ref: Any
    since: float
    work: Unit | None = None
    ready: bool = False


@dataclass(frozen=True)
class Done:
    """What an evaluator answered: what its `ready` says of it, or what its unit came to."""

    unit: Unit | None
    result: Any


class Pool:
    """Evaluators and the units they are to do.

    Args:
        start: makes an actor; the pool waits for its `ready`.
        call: hands a unit to an actor; the reference to its answer.
        least: evaluators kept even when there is nothing to do.
        deaths: the driver's count of actors that die.
        clock: seconds, from any beginning.
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

    def __len__(self) -> int:
        return len(self._members)

    @property
    def ready(self) -> int:
        """Evaluators at work or ready to."""
        return sum(member.ready for member in self._members)

    @property
    def backlog(self) -> int:
        """Units waiting or in hand."""
        return len(self._queue) + sum(member.work is not None for member in self._members)

    def add(self, units: Iterable[Unit]) -> None:
        """Units to do, after those that wait already."""
        self._queue.extend(units)

    def resize(self, most: int) -> None:
        """As many evaluators as empty the backlog in some seconds, within the bounds; idle ones go."""
        seconds = [value for values in self._seconds.values() for value in values[-20:]]
        each = sum(seconds) / len(seconds) if seconds else _DRAIN_SECONDS
        wanted = min(max(math.ceil(self.backlog * each / _DRAIN_SECONDS), self._least), most)
        while len(self._members) < wanted:
            actor = self._start()
            self._members.append(_Evaluator(actor, actor.ready.remote(), self._clock()))
        for member in [m for m in self._members if m.work is None and self._age(m) > _DRAIN_SECONDS]:
            if len(self._members) > wanted and not self._queue:
                self._dismiss(member)

    def dispatch(self) -> None:
        """A unit for everybody who has none."""
        for member in self._members:
            if self._queue and member.ready and member.work is None:
                member.work, member.since = self._queue.popleft(), self._clock()
                member.ref = self._call(member.actor, member.work)

    def refs(self) -> dict[Any, _Evaluator]:
        """What to wait for."""
        return {member.ref: member for member in self._members if member.ref is not None}

    def hear(self, member: _Evaluator) -> Done | None:
        """An answer that has come; None where an actor has died instead, whose unit waits again.

        Raises:
            UserError: the worker met what no other would do better, or too many have died.
        """
        try:
            result = answer(member.ref)
        except LOST as error:
            self._dismiss(member)
            self._deaths.one_more(error, bearable=4 + len(self._members))
            return None
        self._deaths.none()
        if member.work is not None:
            self._seconds.setdefault(member.work.evaluation, []).append(self._age(member))
        done = Done(member.work, result)
        member.ready, member.ref, member.work, member.since = True, None, None, self._clock()
        return done

    def drop_stragglers(self) -> None:
        """A unit that takes far longer than others of its kind is taken from its worker and handed out again."""
        for member, unit in [(m, m.work) for m in self._members if m.work is not None]:
            known = self._seconds.get(unit.evaluation) if unit.kind != WHOLE else None
            patience = max(_LEAST_PATIENCE, _PATIENCE_FACTOR * max(known)) if known else _FIRST_PATIENCE
            if self._age(member) > patience * 2 ** self._attempts[unit]:
                self._dismiss(member)

    def hopeless(self) -> list[Unit]:
        """The units that have taken too many workers with them; they wait no longer."""
        found = [unit for unit in self._queue if self._attempts[unit] >= ATTEMPTS]
        for unit in found:
            self._queue.remove(unit)
        return found

    def close(self) -> None:
        """End every evaluator."""
        for member in self._members:
            ray.kill(member.actor)

    def _age(self, member: _Evaluator) -> float:
        """Seconds since it began what it is at."""
        return self._clock() - member.since

    def _dismiss(self, member: _Evaluator) -> None:
        self._members.remove(member)
        ray.kill(member.actor)
        if member.work is not None:
            self._attempts[member.work] += 1
            self._queue.appendleft(member.work)
