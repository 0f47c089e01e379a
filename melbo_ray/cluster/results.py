"""What workers give to the driver."""

from dataclasses import dataclass, field

from melbo_ray.runs.checks import Check
from melbo_ray.search.vectors import SteeringVector


@dataclass(frozen=True)
class Found:
    """A result of a chain: a vector, or the reason why it stopped; and its worker's peak memory, bytes."""

    concept: str
    vector: SteeringVector | None
    stop_reason: str | None = None
    peak_memory: int = 0


@dataclass(frozen=True)
class Evaluated:
    """The result of a unit: its number of failures, and its worker's peak memory (bytes), host and later checks."""

    failures: int
    peak_memory: int
    host: str = ""
    checks: dict[str, Check] = field(default_factory=dict)
