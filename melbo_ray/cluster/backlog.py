"""What is due of a concept: which vectors and controls still lack which evaluations, in units of fixed borders."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from melbo_ray.evals.catalog import CONTROLS, EVALUATIONS, SAMPLED
from melbo_ray.runs.work_unit import WHOLE, Coverage, Unit, block_of, count, covers, spans_of, uncover
from melbo_ray.search.vectors import StoredVectors

UNFINISHED = "unfinished"
"""The stop reason of a chain that nobody runs on now, and somebody may."""


@dataclass
class Agenda:
    """What is due of one concept: grows as vectors appear, shrinks as units are handed out.

    Attributes:
        concept: its name.
        names: of the evaluations wanted.
        batch: vectors in a unit.
        done: what storage has.
        sample: of how many vectors of the chain all is asked that is not asked of every one; None for all of them.
        most: vectors that the chain may have, which the sample is spread over.
        attempts: how often an evaluation of a vector has failed, by evaluation, kind and index.
        theta: every vector known, by kind and index.
        stop_reason: why the chain ended; None while it goes on.
    """

    concept: str
    names: Sequence[str]
    batch: int
    done: Coverage
    sample: int | None = None
    most: int = 0
    attempts: dict[tuple[str, str, int], int] = field(default_factory=dict)
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

    def learn_stored(self, stored: StoredVectors) -> None:
        """Note every vector that is durable."""
        if stored.base is not None:
            self.learn("base", 0, stored.base.theta.numpy())
        for vector in stored.chain:
            self.learn("chain", vector.index, vector.theta.numpy())

    def retry(self, failures: Iterable[Mapping[str, Any]]) -> None:
        """Make due again what has failed, given as rows of the table `failures`."""
        for row in failures:
            name, kind, index = row["evaluation"], row["kind"], row["index"]
            if name in self.names:
                whole = EVALUATIONS[name].scope == WHOLE
                self.attempts[name, kind, 0 if whole else index] = row["attempts"]
                uncover(self.done, Unit(self.concept, name, WHOLE if whole else kind, index, index))

    def due(self) -> list[Unit]:
        """Every unit that can run now and is not done: whole batches, and at the chain's end what is left."""
        if self.base is None:
            return []
        units = []
        for name in self.names:
            if EVALUATIONS[name].scope == WHOLE:
                if self.stop_reason is not None and self.found:
                    units.append(Unit(self.concept, name, WHOLE, 1, self.found))
                continue
            for kind in CONTROLS:
                units += self._batches(name, kind, range(1), {0: False})
            last = self.found if self.stop_reason is not None else self.found // self.batch * self.batch
            units += self._batches(name, "chain", range(1, last + 1), self._asked(name, last))
        return [unit for unit in units if not covers(self.done, unit)]

    def vectors(self, unit: Unit) -> np.ndarray:
        """The unit's vectors, (n, d_model) float32."""
        if unit.kind == "unsteered":
            return np.zeros_like(self.base)[None]
        kind = self.theta["chain" if unit.kind == WHOLE else unit.kind]
        return np.stack([kind[index] for index in range(unit.first, unit.last + 1)])

    def failed(self, unit: Unit) -> dict[int, int]:
        """How often the unit's evaluation has failed before, by index; of the whole chain under index 0."""
        kind, indices = ("chain", range(1)) if unit.kind == WHOLE else (unit.kind, range(unit.first, unit.last + 1))
        return {i: self.attempts[key] for i in indices if (key := (unit.evaluation, kind, i)) in self.attempts}

    def evaluated(self) -> int:
        """How many vectors of the chain have every evaluation that is asked of them singly."""
        lacking: set[int] = set()
        for name in (name for name in self.names if EVALUATIONS[name].scope == "vector"):
            lacking |= self._asked(name, self.found).keys() - self._done(name)
        return self.found - len(lacking)

    def evaluations(self, goal: int) -> tuple[int, int]:
        """How many evaluations of single directions are done, and of how many when the chain has `goal` vectors.

        One of the whole chain counts once for each vector.
        """
        done = wanted = 0
        for name in self.names:
            done += sum(count(self.done, self.concept, name, kind) for kind in (*CONTROLS, WHOLE))
            if EVALUATIONS[name].scope == WHOLE:
                wanted += goal
            else:
                asked = self._asked(name, goal).keys()
                done, wanted = done + len(asked & self._done(name)), wanted + len(CONTROLS) + len(asked)
        return done, wanted

    def units(self, goal: int) -> tuple[float, float]:
        """How many units of evaluation are done, a batch begun in part, and of how many: each takes about as long."""
        done, wanted = 0.0, 0.0
        for name in self.names:
            if EVALUATIONS[name].scope == WHOLE:
                done, wanted = done + bool(count(self.done, self.concept, name, WHOLE)), wanted + 1
            else:
                done += sum(count(self.done, self.concept, name, kind) for kind in CONTROLS)
                asked = self._asked(name, goal).keys()
                done += len(asked & self._done(name)) / self.batch
                wanted += len(CONTROLS) + len(asked) / self.batch
        return done, wanted

    def _asked(self, name: str, last: int) -> dict[int, bool]:
        """Of which vectors up to `last` an evaluation is asked; whether only because the chain ended before `most`.

        A sample depends on an index alone: the first of each of `sample` equal shares of the vectors that there may be.
        Where the chain has ended with fewer, it is filled up evenly.
        """
        if self.sample is None or name not in SAMPLED:
            return dict.fromkeys(range(1, last + 1), False)
        share = [index * self.sample // self.most for index in range(-1, last)]
        asked = {index: False for index in range(1, last + 1) if share[index] != share[index - 1]}
        if self.stop_reason not in (None, UNFINISHED):
            rest = [index for index in range(1, last + 1) if index not in asked]
            lacking = min(self.sample - len(asked), len(rest))
            asked |= {rest[place * len(rest) // lacking]: True for place in range(lacking)}
        return asked

    def _done(self, name: str) -> set[int]:
        spans = spans_of(self.done, Unit(self.concept, name, "chain", 0, 0))
        return {index for first, last in spans for index in range(first, last + 1)}

    def _batches(self, name: str, kind: str, indices: range, asked: Mapping[int, bool]) -> Iterator[Unit]:
        """Batches with fixed borders, cut where a part ends; of one that was begun otherwise, the stretches missing.

        What fills a sample up stands in units of its own: those of the sample may be in hand.
        """
        for start in range(0, len(indices), self.batch):
            missing = [
                i
                for i in indices[start : start + self.batch]
                if i in asked and not covers(self.done, Unit(self.concept, name, kind, i, i))
            ]
            # Neighbours share the difference between an index and its place among the missing.
            for _, group in itertools.groupby(
                enumerate(missing), lambda pair: (pair[1] - pair[0], block_of(pair[1]), asked[pair[1]])
            ):
                stretch = [index for _, index in group]
                yield Unit(self.concept, name, kind, stretch[0], stretch[-1])
