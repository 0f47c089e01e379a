"""The pool of evaluators: it scales with its backlog and requeues the unit of an actor that dies."""

import math
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import ray

from melbo_ray.cluster.session import FULL, LOST, Deaths, fetch
from melbo_ray.cluster.unit_queue import UnitQueue
from melbo_ray.errors import UserError, first_line
from melbo_ray.runs.work_unit import Unit

ATTEMPTS = 10
PROGRESS = "progress"
"""The concurrency group of an evaluator in which it tells its progress while it is at work."""
_DRAIN_SECONDS = 10.0
# Evaluators in a row for which memory did not suffice while they loaded: once may be chance, on a GPU that others use.
_MOST_UNFIT = 5
_FIRST_PATIENCE, _PATIENCE_FACTOR, _LEAST_PATIENCE = 600.0, 5.0, 60.0
_RECENT = 20


@dataclass(eq=False)
class _Evaluator:
    """An actor of the pool; `ref` is its `ready` call, then that of the unit assigned to it.

    Attributes:
        since: when its current call began, or it became idle.
        study: study of its newest unit, of which it holds what evaluations share.
        asked: when it was last asked for its progress in the current call.
        answer: reference to the answer.
        progress: the answer before that.
    """

    actor: Any
    ref: Any
    since: float
    work: Unit | None = None
    ready: bool = False
    study: str = ""
    asked: float | None = None
    answer: Any = None
    progress: int | None = None


@dataclass
class _Durations:
    """The durations of the units of one evaluation, s: the newest, and the longest ever."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        self.recent.append(seconds)
        self.longest = max(self.longest, seconds)


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
        self._queue = UnitQueue()
        self._attempts: Counter[Unit] = Counter()
        self._exhausted: list[Unit] = []
        self._seconds: dict[str, _Durations] = {}
        self._ready = self._busy = 0
        self._next_look = 0.0
        self._unfit, self._room = 0, 1 << 30

    def __len__(self) -> int:
        return len(self._members)

    @property
    def ready(self) -> int:
        """Number of evaluators that have registered."""
        return self._ready

    @property
    def backlog(self) -> int:
        """Number of units queued or assigned."""
        return len(self._queue) + self._busy

    def add(self, units: Iterable[Unit]) -> None:
        """Append units to the queue."""
        for unit in units:
            self._queue.add(unit)

    def scale(self, most: int, full: bool = False) -> None:
        """Scale the pool to drain the backlog in about 10 s, to at most `most` evaluators.

        While the backlog is `full`, so that the chains wait and it cannot grow, the pool doubles, whenever all its
        actors are ready. Of actors without a unit those that still load are stopped first.
        """
        seconds = [value for durations in self._seconds.values() for value in durations.recent]
        each = sum(seconds) / len(seconds) if seconds else _DRAIN_SECONDS
        wanted = max(math.ceil(self.backlog * each / _DRAIN_SECONDS), self._least, 2 * self.ready if full else 0)
        wanted = min(wanted, most, self._room)
        while len(self._members) < wanted:
            actor = self._start()
            self._members.append(_Evaluator(actor, actor.ready.remote(), self._clock()))
        if len(self._members) > wanted and not self._queue:
            spare = [m for m in self._members if m.work is None and self._age(m) > _DRAIN_SECONDS]
            for member in sorted(spare, key=lambda m: m.ready)[: len(self._members) - wanted]:
                self._stop(member)

    def dispatch(self) -> None:
        """Assign queued units to idle evaluators, which go on with the study that they were at."""
        for member in [m for m in self._members if m.ready and m.work is None][: len(self._queue)]:
            member.work, member.since = self._queue.take(member.study), self._clock()
            member.study, member.asked, member.answer, member.progress = member.work.study, None, None, None
            member.ref = self._call(member.actor, member.work)
            self._busy += 1

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
            self._seconds.setdefault(member.work.sort, _Durations()).add(self._age(member))
        done = Done(member.work, result)
        self._busy -= member.work is not None
        self._ready += not member.ready
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
        """Stop evaluators that hang, and requeue their units.

        One hangs if its progress is the same, or not told, at two moments half its patience apart. The patience is five
        times the longest duration of a unit of this sort, a minute at least, and doubles with every attempt. A
        unit that takes longer and progresses is left alone.
        """
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + 1.0
        for member, unit in [(m, m.work) for m in self._members if m.work is not None]:
            asked = member.since if member.asked is None else member.asked
            if now - asked < _LEAST_PATIENCE / 2 or now - asked < self._patience(unit) / 2:
                continue
            progress = self._answered(member)
            if member.answer is not None and progress in (None, member.progress):
                self._stop(member)
                continue
            # The first question of a unit has no answer yet, and a progress that no pass can have.
            member.progress = -1 if progress is None else progress
            member.answer = member.actor.progress.options(concurrency_group=PROGRESS).remote()
            member.asked = now

    def _patience(self, unit: Unit) -> float:
        """Seconds without progress after which an evaluator hangs."""
        known = self._seconds.get(unit.sort)
        patience = max(_LEAST_PATIENCE, _PATIENCE_FACTOR * known.longest) if known else _FIRST_PATIENCE
        return patience * 2 ** self._attempts[unit]

    def _answered(self, member: _Evaluator) -> int | None:
        """The progress that an evaluator was last asked for; None if it has not answered."""
        if member.answer is None or not ray.wait([member.answer], timeout=0)[0]:
            return None
        try:
            return fetch(member.answer)
        except LOST:
            return None

    def take_exhausted(self) -> list[Unit]:
        """The units that have used up their attempts since the last call."""
        found, self._exhausted = self._exhausted, []
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
        self._ready -= member.ready
        if member.work is not None:
            self._busy -= 1
            self._attempts[member.work] += 1
            if self._attempts[member.work] < ATTEMPTS:
                self._queue.add(member.work, again=True)
            else:
                self._exhausted.append(member.work)
