"""What Ray's dashboard shows of a run."""

import time
from collections.abc import Mapping

from ray.util.metrics import Gauge

from melbo_ray.cluster.backlog import Agenda
from melbo_ray.search.vectors import SteeringVector

_GAUGES = {
    "vectors_found": "vectors the chain has",
    "vectors_evaluated": "vectors with all their evaluations",
    "loss": "loss of the newest vector",
    "backlog": "evaluation units waiting or in hand, all concepts",
    "evaluations_per_second": "vectors evaluated a second since the start, all concepts and evaluations",
}


class Metrics:
    """The gauges of one driver."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._gauges = {name: Gauge(f"melbo_{name}", text, tag_keys=("concept",)) for name, text in _GAUGES.items()}

    def show(
        self, agendas: Mapping[str, Agenda], last: Mapping[str, SteeringVector], backlog: int, evaluations: int
    ) -> None:
        """Set every gauge to where the run stands."""
        for name, agenda in agendas.items():
            self._gauges["vectors_found"].set(agenda.found, {"concept": name})
            self._gauges["vectors_evaluated"].set(agenda.evaluated(), {"concept": name})
            if name in last:
                self._gauges["loss"].set(last[name].loss, {"concept": name})
        rate = evaluations / (time.monotonic() - self._started)
        self._gauges["backlog"].set(backlog, {"concept": "all"})
        self._gauges["evaluations_per_second"].set(rate, {"concept": "all"})
