"""What is simulated of a cluster beside Ray: the distance to storage, and actors that sleep and write rows."""

import functools
import itertools
import random
import string
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.simulated_ray import SimulatedRay, Takes
from melbo_ray.cluster.results import Evaluated, Found
from melbo_ray.runs import schema
from melbo_ray.runs.checks import EXACT
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.storage import Storage
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.vectors import BaseVector, SteeringVector, row

ROWS = {"kl": 1, "generations": 4, "generalization": 32, "dose": 12, "presence": 4}
"""Rows of a vector in each table, as in a study with 32 prompts."""
_CHARACTERS = 200
# Threads of a kind, by the beginning of their names: those that read, and those that merge parts.
_AT_ONCE = {"storage": 32, "parts": 8}
_WORKERS_A_HOST, _CHECKS = 8, 8


class DistantStorage(Storage):
    """A folder whose requests take as long as those to S3: 25 ms, log-normally, and one in 200 half a second more.

    The driver's clock waits for its requests; those of actors are in their durations; and those of publications, which
    go on beside the driver, are added up: where several threads make requests, as many wait at once.
    """

    def __init__(self, url: str, ray: SimulatedRay, requests: dict[str, int], latency: float) -> None:
        super().__init__(url)
        self._ray, self._requests, self._latency, self._dice = ray, requests, latency, random.Random(0)
        self.waited: float | None = None

    def draw(self) -> float:
        """Seconds of a request."""
        return self._latency * (self._dice.lognormvariate(0.0, 0.5) + 20 * (self._dice.random() < 0.005))

    def _request(self, kind: str) -> None:
        if self._ray.in_event:
            return
        self._requests[kind] = self._requests.get(kind, 0) + 1
        if self.waited is not None:
            thread = threading.current_thread().name.partition("_")[0]
            self.waited += self.draw() / _AT_ONCE.get(thread, 1)
        else:
            self._ray.spend(self.draw())

    def beside(self, work: Callable[[], Any]) -> float:
        """Do work that is none of the driver's; returns the seconds that it takes: its CPU time and its requests."""
        self.waited, cpu = 0.0, time.process_time()
        work()
        seconds, self.waited = self.waited + time.process_time() - cpu, None
        return seconds

    def put(self, name: str, data: bytes) -> None:
        """As in `Storage`."""
        self._request("put")
        super().put(name, data)

    def swap(self, name: str, data: bytes, version: str | None) -> None:
        """As in `Storage`."""
        if version is None:
            self._request("put")
        super().swap(name, data, version)

    def get(self, name: str) -> bytes | None:
        """As in `Storage`."""
        self._request("get")
        return super().get(name)

    def version(self, name: str) -> str | None:
        """As in `Storage`."""
        self._request("head")
        return super().version(name)

    def names(self, folder: str = "") -> list[str]:
        """As in `Storage`."""
        found = super().names(folder)
        for _ in range(0, len(found) + 1, 1000):
            self._request("list")
        return found

    def delete(self, names: Iterable[str]) -> None:
        """As in `Storage`."""
        left = list(names)
        for _ in range(0, len(left), 1000):
            self._request("delete")
        super().delete(left)


class Cluster:
    """What simulated actors have in common.

    Args:
        ray: the simulation.
        run: the run, in a `DistantStorage`.
        vectors: vectors of each chain.
        seconds: mean duration of a unit, s.
        vector_seconds: duration of the search for a vector, s.
        loading: mean seconds until an actor is ready.
        d_model: dimension of the vectors.

    Attributes:
        spans: begin and end of every unit of evaluation, s.
    """

    def __init__(
        self,
        ray: SimulatedRay,
        run: Run,
        vectors: int,
        seconds: float,
        vector_seconds: float,
        loading: float,
        d_model: int,
    ) -> None:
        self.ray, self.run, self.vectors, self.seconds = ray, run, vectors, seconds
        self.vector_seconds, self.loading, self.d_model = vector_seconds, loading, d_model
        self.spans: list[tuple[float, float]] = []
        self._numbers = itertools.count()
        self._dice, self._draws = random.Random(1), np.random.default_rng(1)
        self._empty = schema.table("failures", [])
        self._rows = {
            name: schema.table(name, [_facts(name, self._dice, i) for i in range(n)]) for name, n in ROWS.items()
        }

    def worker(
        self, _url: str, _run_id: str, _config: Any, _concepts: Any, _threads: int, whole: bool, _packed: Any
    ) -> Any:
        """An actor, to the driver a class."""
        return _Worker(self, whole, next(self._numbers))

    def takes(self, seconds: float, call: Any, *arguments: Any, writes: bool = True) -> Takes:
        """A call of an actor that varies by a tenth, and ends with a request to storage if it `writes`."""
        latency = self.run.storage.draw() if writes else 0.0  # ty: ignore[missing-attribute]
        return Takes(max(0.0, seconds * self._dice.gauss(1.0, 0.1)) + latency, functools.partial(call, *arguments))

    def theta(self) -> torch.Tensor:
        """A vector."""
        return torch.from_numpy(self._draws.standard_normal(self.d_model, dtype=np.float32))

    def commit(self, unit: Unit) -> None:
        """Write the rows of a unit of evaluation of one vector."""
        rows = self._rows[unit.evaluation]
        keys = {"kind": pa.array([unit.kind] * len(rows)), "index": pa.array([unit.first] * len(rows), pa.int32())}
        for name, values in keys.items():
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
        self.run.commit(unit, {unit.evaluation: rows, "failures": self._empty})


class _Worker:
    """A `Worker` to the driver."""

    def __init__(self, cluster: Cluster, whole: bool, number: int) -> None:
        self._cluster, self._whole, self._number = cluster, whole, number

    def ready(self) -> Takes:
        check: Any = {"error": 1e-7, "tolerance": 1e-4, "compared": 100, "verdict": EXACT, "reason": ""}
        facts = {
            "fingerprints": {"fingerprint": "simulated"}, "host": f"host-{self._number // _WORKERS_A_HOST}",
            "device": "simulated", "role": "evaluator" if self._whole else "chain",
            "checks": {f"check {i}": check for i in range(_CHECKS)},
        }  # fmt: skip
        return self._cluster.takes(self._cluster.loading, lambda: facts)

    def progress(self) -> Takes:
        return Takes(0.0, lambda: 0)

    def find_base(self, concept: str) -> Takes:
        return self._cluster.takes(10 * self._cluster.seconds, self._base, concept)

    def _base(self, concept: str) -> None:
        base = row("run", "base", BaseVector(self._cluster.theta()))
        self._cluster.run.commit(Unit.base(concept), {"vectors": schema.table("vectors", [base])})

    def evaluate(self, unit: Unit, _theta: np.ndarray, _base: np.ndarray, _failed: Mapping[int, int]) -> Takes:
        return self._cluster.takes(self._cluster.seconds, self._evaluated, unit, self._cluster.ray.clock())

    def _evaluated(self, unit: Unit, begun: float) -> Evaluated:
        self._cluster.commit(unit)
        self._cluster.spans.append((begun, self._cluster.ray.clock()))
        return Evaluated(0, 0)

    def chains(self, concepts: Sequence[str]) -> Iterator[Takes]:
        for index in range(1, self._cluster.vectors + 1):
            for concept in concepts:
                yield self._cluster.takes(self._cluster.vector_seconds, self._found, concept, index)
        for concept in [*concepts]:
            yield Takes(0.0, functools.partial(Found, concept, None, "num_vectors"))

    def _found(self, concept: str, index: int) -> Found:
        theta = self._cluster.theta()
        certificate: dict[str, Any] = {
            "norm": float(theta.norm()), "loss": 0.1, "relative_loss": 0.1, "relative_loss_from_0": 0.1,
            "relative_loss_from_1": 0.1, "evaluations": 40, "stop_reason": "converged", "max_abs_cos": 0.0,
            "seconds": 1.0, "seed": index,
        }  # fmt: skip
        vector = SteeringVector(index=index, theta=theta, **certificate)
        self._cluster.run.commit(
            Unit.vector(concept, index), {"vectors": schema.table("vectors", [row("run", "chain", vector)])}
        )
        return Found(concept, vector)


def _facts(table: str, dice: random.Random, place: int) -> dict[str, Any]:
    """A row of the usual size."""
    letters = string.ascii_lowercase + " "
    values = {
        "string": lambda: f"prompt_{place}", "float": dice.random, "double": dice.random, "int32": lambda: place,
        "int64": lambda: place, "bool": lambda: True, "list<item: float>": lambda: [dice.random() for _ in range(10)],
        "list<item: string>": lambda: dice.choices(letters, k=10), "list<item: int32>": lambda: [1, 2],
    }  # fmt: skip
    found = {field.name: values[str(field.type).replace("element", "item")]() for field in schema.SCHEMAS[table]}
    text = {"text": "".join(dice.choices(letters, k=_CHARACTERS))} if table == "generations" else {}
    return found | text | {"run_id": "run", "kind": "chain", "index": 1}
