"""What is due of a concept: which vectors and controls still lack which evaluations, in units of fixed borders."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from melbo_ray.evals import EVALUATIONS
from melbo_ray.units import WHOLE, Coverage, Unit, block_of, count, covers, uncover

CONTROLS = ("base", "unsteered")
"""The kinds of one vector each, index 0, that every vector is compared with; `unsteered` is the vector 0."""


@dataclass
class Agenda:
    """What is due of one concept: grows as vectors appear, shrinks as units are handed out.

    Attributes:
        concept: its name.
        names: of the evaluations wanted.
        batch: vectors in a unit.
        done: what storage has.
        theta: every vector known, by kind and index.
        stop_reason: why the chain ended; None while it goes on.
    """

    concept: str
    names: Sequence[str]
    batch: int
    done: Coverage
    theta: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    stop_reason: str | None = None

    @property
    def base(self) -> np.ndarray | None:
        """θ₀, once it is known."""
        return self.theta.get("base", {}).get(0)

    @property
    def found(self) -> int:
        """How many vectors the chain has; they are 1 to `found`."""
        return len(self.theta.get("chain", {}))

    def learn(self, kind: str, index: int, theta: np.ndarray) -> None:
        """Note a vector that is durable."""
        self.theta.setdefault(kind, {})[index] = theta

    def retry(self, failures: Iterable[Mapping[str, Any]]) -> None:
        """Make due again what has failed, given as rows of the table `failures`."""
        for row in failures:
            name, kind, index = row["evaluation"], row["kind"], row["index"]
            if name in self.names:
                kind = WHOLE if EVALUATIONS[name].scope == "chain" else kind
                uncover(self.done, Unit(self.concept, name, kind, index, index))

    def due(self) -> list[Unit]:
        """Every unit that can run now and is not done: whole batches, and at the chain's end what is left."""
        if self.base is None:
            return []
        units = []
        for name in self.names:
            if EVALUATIONS[name].scope == "chain":
                if self.stop_reason is not None and self.found:
                    units.append(Unit(self.concept, name, WHOLE, 1, self.found))
                continue
            for kind in CONTROLS:
                units += self._batches(name, kind, range(1))
            last = self.found if self.stop_reason is not None else self.found // self.batch * self.batch
            units += self._batches(name, "chain", range(1, last + 1))
        return [unit for unit in units if not covers(self.done, unit)]

    def vectors(self, unit: Unit) -> np.ndarray:
        """The unit's vectors, (n, d_model) float32."""
        if unit.kind == "unsteered":
            return np.zeros_like(self.base)[None]
        kind = self.theta["chain" if unit.kind == WHOLE else unit.kind]
        return np.stack([kind[index] for index in range(unit.first, unit.last + 1)])

    def evaluated(self) -> int:
        """How many vectors of the chain have every evaluation that is asked of single vectors."""
        names = [name for name in self.names if EVALUATIONS[name].scope == "vector"]
        return min((count(self.done, self.concept, name, "chain") for name in names), default=self.found)

    def evaluations(self, goal: int) -> tuple[int, int]:
        """How many evaluations of single directions are done, and of how many when the chain has `goal` vectors.

        One of the whole chain counts once for each vector.
        """
        done = sum(
            count(self.done, self.concept, name, kind) for name in self.names for kind in (*CONTROLS, "chain", WHOLE)
        )
        single = sum(EVALUATIONS[name].scope == "vector" for name in self.names)
        return done, single * len(CONTROLS) + len(self.names) * goal

    def units(self, goal: int) -> tuple[float, float]:
        """How many units of evaluation are done, a batch begun in part, and of how many: each takes about as long."""
        done, wanted = 0.0, 0.0
        for name in self.names:
            if EVALUATIONS[name].scope == "chain":
                done, wanted = done + bool(count(self.done, self.concept, name, WHOLE)), wanted + 1
            else:
                done += sum(count(self.done, self.concept, name, kind) for kind in CONTROLS)
                done += count(self.done, self.concept, name, "chain") / self.batch
                wanted += len(CONTROLS) + goal / self.batch
        return done, wanted

    def _batches(self, name: str, kind: str, indices: range) -> Iterator[Unit]:
        """Batches with fixed borders, cut where a part ends; of one that was begun otherwise, the stretches missing."""
        for start in range(0, len(indices), self.batch):
            missing = [
                i
                for i in indices[start : start + self.batch]
                if not covers(self.done, Unit(self.concept, name, kind, i, i))
            ]
            # Neighbours share the difference between an index and its place among the missing.
            for _, group in itertools.groupby(enumerate(missing), lambda pair: (pair[1] - pair[0], block_of(pair[1]))):
                stretch = [index for _, index in group]
                yield Unit(self.concept, name, kind, stretch[0], stretch[-1])
