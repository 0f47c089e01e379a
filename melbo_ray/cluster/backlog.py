"""The backlog of a concept: which vectors and controls lack which evaluations, in units with fixed boundaries."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from melbo_ray.evals.catalog import CONTROLS, EVALUATIONS, SAMPLED
from melbo_ray.runs.work_unit import WHOLE, Coverage, Unit, count, covers, part_number, spans_of, uncover
from melbo_ray.search.vectors import StoredVectors

UNFINISHED = "unfinished"
"""The stop reason of a chain that this job does not extend, though another job may."""


@dataclass
class Backlog:
    """The units due for one concept: it grows as vectors are found and shrinks as units are completed.

    Attributes:
        concept: its name.
        names: names of the requested evaluations.
        batch: vectors per unit.
        done: the indices that storage holds.
        sample: number of chain vectors that the sampled evaluations cover; None for the whole chain.
        most: maximum length of the chain, over which the sample is spread.
        attempts: number of failed attempts, by evaluation, kind and index.
        theta: every known vector, by kind and index.
        stop_reason: why the chain ended; None while it is running.
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
        """Number of vectors in the chain; their indices are 1 to `found`."""
        return len(self.theta.get("chain", {}))

    def add_vector(self, kind: str, index: int, theta: np.ndarray) -> None:
        """Record a vector that storage holds."""
        self.theta.setdefault(kind, {})[index] = theta

    def add_stored(self, stored: StoredVectors) -> None:
        """Record every vector that storage holds."""
        if stored.base is not None:
            self.add_vector("base", 0, stored.base.theta.numpy())
        for vector in stored.chain:
            self.add_vector("chain", vector.index, vector.theta.numpy())

    def retry(self, failures: Iterable[Mapping[str, Any]]) -> None:
        """Mark failed evaluations, given as rows of the table `failures`, as due again."""
        for row in failures:
            name, kind, index = row["evaluation"], row["kind"], row["index"]
            if name in self.names:
                whole = EVALUATIONS[name].scope == WHOLE
                self.attempts[name, kind, 0 if whole else index] = row["attempts"]
                uncover(self.done, Unit(self.concept, name, WHOLE if whole else kind, index, index))

    def due(self) -> list[Unit]:
        """Every unit that can run now and is not done: full batches, and once the chain has ended the remainder."""
        if self.base is None:
            return [Unit.base(self.concept)]
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

    def newly_due(self) -> list[Unit]:
        """Those of the units due for which the newest vector was lacking: the batches that it completes."""
        if self.base is None or self.found % self.batch:
            return []
        names = [name for name in self.names if EVALUATIONS[name].scope != WHOLE]
        first, last = self.found - self.batch + 1, self.found
        indices = range(first, last + 1)
        return [
            unit for name in names for unit in self._batches(name, "chain", indices, self._asked(name, last, first))
        ]

    def vectors(self, unit: Unit) -> np.ndarray:
        """The unit's vectors, (n, d_model) float32."""
        if unit.kind == "unsteered":
            return np.zeros_like(self.base)[None]
        kind = self.theta["chain" if unit.kind == WHOLE else unit.kind]
        return np.stack([kind[index] for index in range(unit.first, unit.last + 1)])

    def failed(self, unit: Unit) -> dict[int, int]:
        """Number of earlier failures of the unit's evaluation, by index; for the whole chain, under index 0."""
        kind, indices = ("chain", range(1)) if unit.kind == WHOLE else (unit.kind, range(unit.first, unit.last + 1))
        return {i: self.attempts[key] for i in indices if (key := (unit.evaluation, kind, i)) in self.attempts}

    def evaluated(self) -> int:
        """Number of chain vectors that have every per-vector evaluation requested for them."""
        lacking: set[int] = set()
        for name in (name for name in self.names if EVALUATIONS[name].scope == "vector"):
            lacking |= self._asked(name, self.found).keys() - self._done(name)
        return self.found - len(lacking)

    def evaluations(self, goal: int) -> tuple[int, int]:
        """Numbers of per-vector evaluations done and requested, for a chain of `goal` vectors.

        An evaluation of the whole chain counts once per vector.
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
        """Numbers of units done and requested, for a chain of `goal` vectors; a partly done batch counts as a fraction.

        Units take about the same time, so these numbers estimate the time left.
        """
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

    def _asked(self, name: str, last: int, first: int = 1) -> dict[int, bool]:
        """An evaluation's vectors from `first` to `last`; True for one added because the chain ended before `most`.

        Membership of the sample depends on the index alone: the first vector of each of `sample` equal shares of `most`
        vectors. If the chain ended early, further vectors fill the sample up evenly.
        """
        if self.sample is None or name not in SAMPLED:
            return dict.fromkeys(range(first, last + 1), False)
        share = [index * self.sample // self.most for index in range(first - 2, last)]
        asked = {first + i: False for i in range(last + 1 - first) if share[i + 1] != share[i]}
        if self.stop_reason not in (None, UNFINISHED):
            rest = [index for index in range(1, last + 1) if index not in asked]
            lacking = min(self.sample - len(asked), len(rest))
            asked |= {rest[place * len(rest) // lacking]: True for place in range(lacking)}
        return asked

    def _done(self, name: str) -> set[int]:
        spans = spans_of(self.done, Unit(self.concept, name, "chain", 0, 0))
        return {index for first, last in spans for index in range(first, last + 1)}

    def _batches(self, name: str, kind: str, indices: range, asked: Mapping[int, bool]) -> Iterator[Unit]:
        """Units of at most a batch with fixed boundaries, split where a part ends and around indices that are done.

        Vectors that fill a sample up form their own units, because the sample's units may already be running.
        """
        for start in range(0, len(indices), self.batch):
            missing = [
                i
                for i in indices[start : start + self.batch]
                if i in asked and not covers(self.done, Unit(self.concept, name, kind, i, i))
            ]
            # Consecutive indices share the difference between an index and its position in `missing`.
            for _, group in itertools.groupby(
                enumerate(missing), lambda pair: (pair[1] - pair[0], part_number(pair[1]), asked[pair[1]])
            ):
                stretch = [index for _, index in group]
                yield Unit(self.concept, name, kind, stretch[0], stretch[-1])
