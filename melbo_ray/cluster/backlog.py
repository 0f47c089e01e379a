"""The backlog of a concept: which vectors and controls lack which evaluations, in units with fixed boundaries."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from melbo_ray.evals.catalog import CONTROLS, EVALUATIONS, SAMPLED, Share
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
        block: the option of this name.
        attempts: number of failed attempts, by evaluation, kind (or share) and index.
        theta: every known vector, by kind and index.
        stop_reason: why the chain ended; None while it is running.
        stages: what is done of the search for the base, by stage.
    """

    concept: str
    names: Sequence[str]
    batch: int
    done: Coverage
    sample: int | None = None
    most: int = 0
    block: int = 1
    attempts: dict[tuple[str, str, int], int] = field(default_factory=dict)
    theta: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    stop_reason: str | None = None
    stages: list[str] = field(default_factory=list)

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
                self.attempts[name, kind, index] = row["attempts"]
                for covered in self.done.get(self.concept, {}).get(name, {}):
                    if (unit := Unit(self.concept, name, covered, index, index)).share == kind:
                        uncover(self.done, unit)

    def due(self) -> list[Unit]:
        """Every unit that can run now and is not done: full batches, and once the chain has ended the remainder."""
        if self.base is None:
            return [Unit.stage(self.concept, len(self.stages))]
        units = []
        for name in self.names:
            for share in EVALUATIONS[name].shares:
                units += self._of_share(name, share)
            if EVALUATIONS[name].scope == WHOLE:
                continue
            for kind in CONTROLS:
                units += self._batches(name, kind, range(1), {0: False})
            last = self.found if self.stop_reason is not None else self.found // self.batch * self.batch
            units += self._batches(name, "chain", range(1, last + 1), self._asked(name, last))
        return units

    def newly_due(self) -> list[Unit]:
        """Those of the units due for which the newest vector was lacking: the batches that it completes.

        Shares whose items are final at this length are among them.
        """
        if self.base is None:
            return []
        shares = [(name, own) for name in self.names for own in EVALUATIONS[name].shares if own.settled == self.found]
        units = [unit for name, share in shares for unit in self._of_share(name, share)]
        if self.found % self.batch:
            return units
        names = [name for name in self.names if EVALUATIONS[name].scope != WHOLE]
        first, last = self.found - self.batch + 1, self.found
        for name in names:
            units += self._batches(name, "chain", range(first, last + 1), self._asked(name, last, first))
        return units

    def released(self, unit: Unit) -> list[Unit]:
        """The units due that waited for this one."""
        return [
            due
            for name in self.names
            for share in EVALUATIONS[name].shares
            if share.after == unit.evaluation or (share.in_turn and name == unit.evaluation)
            for due in self._of_share(name, share)
        ]

    def vectors(self, unit: Unit) -> np.ndarray | None:
        """The unit's vectors, (n, d_model) float32; None for a share, whose worker reads the chain from the run."""
        if EVALUATIONS[unit.evaluation].scope == WHOLE:
            return None
        if unit.kind == "unsteered":
            return np.zeros_like(self.base)[None]
        kind = self.theta[unit.kind]
        return np.stack([kind[index] for index in range(unit.first, unit.last + 1)])

    def failed(self, unit: Unit) -> dict[int, int]:
        """Number of earlier failures of the unit's evaluation, by index."""
        keys = {index: (unit.evaluation, unit.share, index) for index in range(unit.first, unit.last + 1)}
        return {index: self.attempts[key] for index, key in keys.items() if key in self.attempts}

    def failures(self, unit: Unit, run_id: str, error: str, attempts: int) -> list[dict[str, Any]]:
        """The rows of the table `failures` for a unit that failed `attempts` times more."""
        failed, facts = self.failed(unit), {"run_id": run_id, "kind": unit.share, "evaluation": unit.evaluation}
        return [
            facts | {"error": error, "index": index, "attempts": attempts + failed.get(index, 0)}
            for index in range(unit.first, unit.last + 1)
        ]

    def evaluated(self) -> int:
        """Number of chain vectors that have every per-vector evaluation requested for them."""
        lacking: set[int] = set()
        for name in (name for name in self.names if EVALUATIONS[name].scope == "vector"):
            lacking |= self._asked(name, self.found).keys() - self._done(name)
        return self.found - len(lacking)

    def evaluations(self, goal: int) -> tuple[int, int]:
        """Numbers of evaluations of vectors done and requested, for a chain of `goal` vectors.

        The items of an evaluation of the whole chain count like vectors.
        """
        done = wanted = 0
        for each_done, each_wanted, _ in self._counts(goal):
            done, wanted = done + each_done, wanted + each_wanted
        return done, wanted

    def units(self, goal: int) -> tuple[float, float]:
        """Numbers of units done and requested, for a chain of `goal` vectors; a partly done batch counts as a fraction.

        Units take about the same time, so these numbers estimate the time left.
        """
        done = wanted = 0.0
        for each_done, each_wanted, size in self._counts(goal):
            done, wanted = done + each_done / size, wanted + each_wanted / size
        return done, wanted

    def _counts(self, goal: int) -> Iterator[tuple[int, int, int]]:
        """Indices done and requested, and indices per unit, of every evaluation's controls and vectors, or shares."""
        for name in self.names:
            for share in EVALUATIONS[name].shares:
                done, wanted = count(self.done, self.concept, name, share.kind(goal)), len(share.items(goal))
                yield done, wanted, max(1, min(wanted, share.size(self.batch, self.block)))
            if EVALUATIONS[name].scope == WHOLE:
                continue
            yield sum(count(self.done, self.concept, name, kind) for kind in CONTROLS), len(CONTROLS), 1
            asked = self._asked(name, goal).keys()
            yield len(asked & self._done(name)), len(asked), self.batch

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

    def _of_share(self, name: str, share: Share) -> Iterator[Unit]:
        """The units of a share that can run now and are not done; of one whose units run in turn, the next."""
        final = self.stop_reason is not None or (share.settled is not None and self.found >= share.settled)
        if not (final and self.found):
            return
        if share.after and share.after in self.names and not self._has(share.after):
            return
        items, size = share.items(self.found), share.size(self.batch, self.block)
        units = self._batches(name, share.kind(self.found), items, dict.fromkeys(items, False), size)
        yield from itertools.islice(units, 1 if share.in_turn else None)

    def _has(self, name: str) -> bool:
        """Whether every row of an evaluation is there: of the whole chain, or of each of its shares."""
        items = [(share.kind(self.found), share.items(self.found)) for share in EVALUATIONS[name].shares]
        needed = items or [("chain", range(1, self.found + 1))]
        return all(covers(self.done, Unit(self.concept, name, kind, each[0], each[-1])) for kind, each in needed)

    def _batches(
        self, name: str, kind: str, indices: Sequence[int], asked: Mapping[int, bool], size: int | None = None
    ) -> Iterator[Unit]:
        """Units of at most a batch with fixed boundaries, split where a part ends and around indices that are done.

        Vectors that fill a sample up form their own units, because the sample's units may already be running.
        """
        size = size or self.batch
        for start in range(0, len(indices), size):
            missing = [
                i
                for i in indices[start : start + size]
                if i in asked and not covers(self.done, Unit(self.concept, name, kind, i, i))
            ]
            # Consecutive indices share the difference between an index and its position in `missing`.
            for _, group in itertools.groupby(
                enumerate(missing), lambda pair: (pair[1] - pair[0], part_number(pair[1]), asked[pair[1]])
            ):
                stretch = [index for _, index in group]
                yield Unit(self.concept, name, kind, stretch[0], stretch[-1])
