"""Units of work, which are written atomically under fixed names, and the coverage of a run by units."""

import bisect
import copy
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

_PART_SIZE = 512
WHOLE: Final = "whole"
"""The scope of an evaluation of a chain as a whole instead of single vectors.

Also the kind of the one unit that earlier releases ran for it (`study/upgrade.py`).
"""
_OF = "-of-"

Coverage = dict[str, dict[str, dict[str, list[list[int]]]]]
"""The indices done by concept, evaluation and kind, as spans that include both ends."""


class Task(Enum):
    """The task of a unit: the search for a base or a chain vector, or an evaluation."""

    BASE = "base"
    CHAIN = "chain"
    EVALUATION = "evaluation"


@dataclass(frozen=True, order=True)
class Unit:
    """Work whose rows are written together: the search for one vector, or one evaluation of consecutive vectors.

    Attributes:
        concept: name of the concept.
        evaluation: name of the evaluation, or `base` or `chain` for the search for a vector.
        kind: kind of the vectors, or the share of an evaluation of a whole chain (`catalog.Share`), with the chain's
            length (`of_chain`) if the rows depend on it: they replace those of a shorter chain.
        first: index of the first vector, or the first item of the share.
        last: index of the last vector, or the last item.
    """

    concept: str
    evaluation: str
    kind: str
    first: int
    last: int

    @classmethod
    def base(cls, concept: str) -> "Unit":
        """The search for the base of a concept."""
        return cls(concept, Task.BASE.value, "base", 0, 0)

    @classmethod
    def stage(cls, concept: str, number: int) -> "Unit":
        """A stage of the search for the base, counted by a driver; the last one writes `Unit.base`."""
        return cls(concept, Task.BASE.value, "stage", number, number)

    @classmethod
    def vector(cls, concept: str, index: int) -> "Unit":
        """The search for one vector of a concept's chain."""
        return cls(concept, Task.CHAIN.value, "chain", index, index)

    @property
    def task(self) -> Task:
        """The task of the unit."""
        return {"base": Task.BASE, "chain": Task.CHAIN}.get(self.evaluation, Task.EVALUATION)

    @property
    def share(self) -> str:
        """The kind without the chain's length."""
        return self.kind.partition(_OF)[0]

    @property
    def sort(self) -> str:
        """Units of one sort take about the same time."""
        return f"{self.evaluation}.{self.share}{f'.{self.first}' if self.task is Task.BASE else ''}"

    @property
    def chain(self) -> int:
        """Length of the chain that the rows depend on; 0 if they depend on none."""
        return int(self.kind.partition(_OF)[2] or 0)

    @property
    def study(self) -> str:
        """Name of what the unit's worker computes once and keeps for others: the concept."""
        return self.concept

    @property
    def name(self) -> str:
        """Name of the object that the unit is written to."""
        return f"units/{self.concept}/{self.evaluation}.{self.kind}.{self.first:06d}-{self.last:06d}.zip"

    @classmethod
    def of(cls, name: str) -> "Unit":
        """The unit whose object is `name`."""
        _, concept, file = name.split("/")
        evaluation, kind, span, _ = file.split(".")
        first, last = span.split("-")
        return cls(concept, evaluation, kind, int(first), int(last))

    def part(self, table: str) -> str:
        """Name of the part of `table` that receives the unit's rows."""
        own, number = (f".{self.share}", 0) if self.chain else ("", part_number(self.first))
        return f"{table}/concept={self.concept}/part-{self.evaluation}{own}-{number:05d}.parquet"


def of_chain(share: str, length: int) -> str:
    """The kind of units of a share whose rows depend on the chain's length."""
    return f"{share}{_OF}{length}"


def part_number(index: int) -> int:
    """Number of the part that receives a vector's rows; units must not cross parts, or two parts could hold a row."""
    return max(index - 1, 0) // _PART_SIZE


def cover(coverage: Coverage, unit: Unit) -> None:
    """Mark the unit's indices as done, with merged spans."""
    kinds = coverage.setdefault(unit.concept, {}).setdefault(unit.evaluation, {})
    spans = sorted([*kinds.get(unit.kind, []), [unit.first, unit.last]])
    merged: list[list[int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    kinds[unit.kind] = merged


def uncover(coverage: Coverage, unit: Unit) -> None:
    """Mark the unit's indices as not done."""
    rest = [
        span
        for first, last in spans_of(coverage, unit)
        for span in ([first, min(last, unit.first - 1)], [max(first, unit.last + 1), last])
        if span[0] <= span[1]
    ]
    coverage.setdefault(unit.concept, {}).setdefault(unit.evaluation, {})[unit.kind] = rest


def covers(coverage: Coverage, unit: Unit) -> bool:
    """Whether all indices of the unit are done."""
    spans = spans_of(coverage, unit)
    place = bisect.bisect_right(spans, unit.first, key=lambda span: span[0]) - 1
    return place >= 0 and unit.last <= spans[place][1]


def spans_of(coverage: Coverage, unit: Unit) -> list[list[int]]:
    """The spans that are done for the unit's evaluation and kind."""
    return coverage.get(unit.concept, {}).get(unit.evaluation, {}).get(unit.kind, [])


def progress(published: Coverage, fresh: Iterable[Unit]) -> Coverage:
    """The coverage of a run by published and fresh units together."""
    done = copy.deepcopy(published)
    for unit in fresh:
        cover(done, unit)
    return done


def count(coverage: Coverage, concept: str, evaluation: str, kind: str) -> int:
    """Number of indices that are done."""
    return sum(last - first + 1 for first, last in coverage.get(concept, {}).get(evaluation, {}).get(kind, []))
