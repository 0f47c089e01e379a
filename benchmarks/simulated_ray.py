"""The part of Ray that the driver uses, as a simulation of discrete events: actors are objects, and nothing waits.

A method of a simulated actor returns `Takes`, or a generator of them where the driver asks for a stream. The simulated
time goes on with the CPU time of the driver's thread, so a slow driver keeps its simulated actors waiting. What this
module does itself takes none, as Ray's own work on a head is not simulated.
"""

import contextlib
import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from melbo_ray.cluster import driver, metrics, pool, session

_AHEAD = 8  # items of a stream that its reader has not taken, as the driver asks for


@dataclass(frozen=True)
class Takes:
    """A call of an actor: after `seconds` its result is that of `call`."""

    seconds: float
    call: Callable[[], Any]


class Reference:
    """A result that an actor owes."""

    def __init__(self, actor: "_Actor") -> None:
        self.actor, self.ready, self.value = actor, False, None


class _Stream:
    """The results of a generator; it runs ahead of its reader by a few."""

    def __init__(self, ray: "SimulatedRay", actor: "_Actor", items: Iterator[Takes]) -> None:
        self._ray, self.actor, self._items = ray, actor, items
        self._made: deque[Reference] = deque()
        self._ended = self._running = False
        self._go_on()

    @property
    def ready(self) -> bool:
        return bool(self._made) or self._ended

    def __next__(self) -> Reference:
        if not self._made:
            raise StopIteration
        found = self._made.popleft()
        self._go_on()
        return found

    def _go_on(self) -> None:
        if self._running or self._ended or len(self._made) >= _AHEAD:
            return
        item = next(self._items, None)
        if item is None:
            self._ended = True
            return
        self._running = True
        self._ray.after(item.seconds, lambda: self._made_one(item))

    def _made_one(self, item: Takes) -> "_Stream":
        made = Reference(self.actor)
        made.value, made.ready, self._running = item.call(), True, False
        self._made.append(made)
        self._go_on()
        return self


class _Actor:
    """A handle: `handle.method.remote(…)` begins a call."""

    def __init__(self, ray: "SimulatedRay", worker: Any) -> None:
        self._ray, self._worker, self.dead = ray, worker, False

    def __getattr__(self, name: str) -> "_Method":
        return _Method(self._ray, self, getattr(self._worker, name))


class _Method:
    def __init__(self, ray: "SimulatedRay", actor: _Actor, method: Callable) -> None:
        self._ray, self._actor, self._method = ray, actor, method

    def options(self, **_: Any) -> "_Method":
        return self

    def remote(self, *arguments: Any) -> Any:
        takes = self._method(*arguments)
        if not isinstance(takes, Takes):
            return _Stream(self._ray, self._actor, takes)
        made = Reference(self._actor)

        def end() -> Reference | None:
            if self._actor.dead:
                return None
            made.value, made.ready = takes.call(), True
            return made

        self._ray.after(takes.seconds, end)
        return made


class _ActorClass:
    """What Ray makes of a class."""

    def __init__(self, ray: "SimulatedRay", cls: Callable) -> None:
        self._ray, self._cls = ray, cls

    def options(self, **_: Any) -> "_ActorClass":
        return self

    def remote(self, *arguments: Any) -> _Actor:
        return _Actor(self._ray, self._cls(*arguments))


class SimulatedRay:
    """`ray` to driver, pool and session.

    Args:
        cpu: CPU time of the driver's thread, s.

    Attributes:
        in_event: whether what an actor does is being run now, and not the driver.
        driver_seconds: CPU time that the driver's thread has taken.
    """

    def __init__(self, cpu: Callable[[], float] = time.thread_time) -> None:
        self._cpu, self._mark = cpu, cpu()
        self._now = self.driver_seconds = 0.0
        self._events: list[tuple[float, int, Callable[[], Any]]] = []
        self._numbers = itertools.count()
        self.in_event = False

    def clock(self) -> float:
        """Simulated time, s."""
        return self._now if self.in_event else self._now + self._cpu() - self._mark

    def taken(self) -> float:
        """CPU time that the driver's thread has taken, s."""
        return self.driver_seconds + self._cpu() - self._mark

    def after(self, seconds: float, function: Callable[[], Any]) -> None:
        """Have a function run later; it may return the reference that it made ready."""
        heapq.heappush(self._events, (self.clock() + seconds, next(self._numbers), function))

    @contextlib.contextmanager
    def not_the_driver(self) -> Generator[None]:
        """What runs meanwhile takes none of the driver's time."""
        taken = self._cpu() - self._mark
        self._now += taken
        self.driver_seconds += taken
        try:
            yield
        finally:
            self._mark = self._cpu()

    def spend(self, seconds: float) -> None:
        """Have the driver wait for something."""
        self._now += seconds

    def remote(self, cls: Any = None, **_: Any) -> Any:
        """Ray's decorator; actors are made at once."""
        if cls is None:
            return self.remote
        return _ActorClass(self, cls)

    def wait(self, refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None) -> tuple[list, list]:
        """Ray's, except that the second list is empty."""
        with self.not_the_driver():
            ready = [ref for ref in refs if ref.ready]
            if not ready and timeout != 0:
                ready = self._wait(set(refs), self._now + (timeout or 1e9))
            return ready[:num_returns], []

    def _wait(self, refs: set[Any], until: float) -> list[Any]:
        self.in_event = True
        try:
            while self._events and self._events[0][0] <= until:
                self._now, _, function = heapq.heappop(self._events)
                if (made := function()) is not None and made in refs:
                    return [made]
        finally:
            self.in_event = False
        self._now = until
        return []

    def get(self, ref: Reference) -> Any:
        """Ray's."""
        if ref.actor.dead:
            raise session.LOST[0]
        return ref.value

    def kill(self, actor: _Actor) -> None:
        """Ray's."""
        actor.dead = True

    def nodes(self) -> list[dict]:
        """Ray's; a simulated cluster has none."""
        return []

    def cluster_resources(self) -> dict[str, float]:
        """Ray's; so it has nothing either."""
        return {}

    available_resources = cluster_resources

    def __enter__(self) -> "SimulatedRay":
        self._patches = contextlib.ExitStack()
        for module in (driver, pool, session):
            self._patches.enter_context(mock.patch.object(module, "ray", self))
        self._patches.enter_context(mock.patch.object(metrics, "Gauge", _Gauge))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()


class _Gauge:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def set(self, *_: Any) -> None:
        """Shown nowhere."""
