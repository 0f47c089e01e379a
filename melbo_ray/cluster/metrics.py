"""The gauges of a run on Ray's dashboard."""

import time
from collections.abc import Callable, Mapping

from ray.util.metrics import Gauge

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.search.vectors import SteeringVector

_EVERY = 5.0
_GAUGES = {
    "vectors_found": "length of the chain",
    "vectors_evaluated": "vectors with all their evaluations",
    "loss": "loss of the newest vector",
    "backlog": "evaluation units waiting or in hand, all concepts",
    "evaluations_per_second": "vectors evaluated a second since the start, all concepts and evaluations",
}


class Metrics:
    """The gauges that one driver sets."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._next = clock()
        self._gauges = {name: Gauge(f"melbo_{name}", text, tag_keys=("concept",)) for name, text in _GAUGES.items()}

    def show(
        self, backlogs: Mapping[str, Backlog], last: Mapping[str, SteeringVector], units: int, evaluations: int
    ) -> None:
        """Set every gauge, at most every few seconds.

        Args:
            backlogs: the backlog of each concept.
            last: the newest vector of each concept.
            units: number of units in the pool's backlog.
            evaluations: number of vectors evaluated so far.
        """
        if self._clock() < self._next:
            return
        self._next = self._clock() + _EVERY
        for name, backlog in backlogs.items():
            self._gauges["vectors_found"].set(backlog.found, {"concept": name})
            self._gauges["vectors_evaluated"].set(backlog.evaluated(), {"concept": name})
            if name in last:
                self._gauges["loss"].set(last[name].loss, {"concept": name})
        rate = evaluations / max(self._clock() - self._started, 1.0)
        self._gauges["backlog"].set(units, {"concept": "all"})
        self._gauges["evaluations_per_second"].set(rate, {"concept": "all"})
