"""Units of work: what is written at once under a name that says what it is; and which of them a run has done."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

_PART_SIZE = 512
WHOLE: Final = "whole"
"""The scope of an evaluation, and the kind of its unit, that is asked of a chain as a whole and not of each vector."""

Coverage = dict[str, dict[str, dict[str, list[list[int]]]]]
"""The indices that are done, as spans with both ends: by concept, evaluation and kind."""


class Task(Enum):
    """What a unit is: a search for a vector, or an evaluation of those found."""

    BASE = "base"
    CHAIN = "chain"
    EVALUATION = "evaluation"


@dataclass(frozen=True, order=True)
class Unit:
    """Work whose rows appear together: a search for one vector, or one evaluation of consecutive vectors of one kind.

    Attributes:
        concept: its name.
        evaluation: name of the evaluation; of the other tasks, `base` and `chain`.
        kind: `chain`, `base`, …, or `whole` for an evaluation of the chain as a whole, which replaces earlier ones.
        first: index of the first vector.
        last: index of the last one.
    """

    concept: str
    evaluation: str
    kind: str
    first: int
    last: int

    @classmethod
    def base(cls, concept: str) -> "Unit":
        """Finding the base of a concept."""
        return cls(concept, Task.BASE.value, "base", 0, 0)

    @classmethod
    def vector(cls, concept: str, index: int) -> "Unit":
        """One vector of a concept's chain."""
        return cls(concept, Task.CHAIN.value, "chain", index, index)

    @property
    def task(self) -> Task:
        """What is done."""
        return {"base": Task.BASE, "chain": Task.CHAIN}.get(self.evaluation, Task.EVALUATION)

    @property
    def name(self) -> str:
        """The object it is written to."""
        return f"units/{self.concept}/{self.evaluation}.{self.kind}.{self.first:06d}-{self.last:06d}.zip"

    @classmethod
    def of(cls, name: str) -> "Unit":
        """The unit that is written to `name`."""
        _, concept, file = name.split("/")
        evaluation, kind, span, _ = file.split(".")
        first, last = span.split("-")
        return cls(concept, evaluation, kind, int(first), int(last))

    def part(self, table: str) -> str:
        """The published part of `table` that its rows go to."""
        number = 0 if self.kind == WHOLE else part_number(self.first)
        return f"{table}/concept={self.concept}/part-{self.evaluation}-{number:05d}.parquet"


def part_number(index: int) -> int:
    """The published part that a vector's rows go to: no unit may lie across a border, or two parts could have a row."""
    return max(index - 1, 0) // _PART_SIZE


def cover(coverage: Coverage, unit: Unit) -> None:
    """Note the unit's indices as done, as few spans; for `whole`, in place of what was noted."""
    kinds = coverage.setdefault(unit.concept, {}).setdefault(unit.evaluation, {})
    spans = sorted([*([] if unit.kind == WHOLE else kinds.get(unit.kind, [])), [unit.first, unit.last]])
    merged: list[list[int]] = []
    for first, last in spans:
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    kinds[unit.kind] = merged


def uncover(coverage: Coverage, unit: Unit) -> None:
    """Note the unit's indices as not done; for `whole`, all of them."""
    around = [] if unit.kind == WHOLE else spans_of(coverage, unit)
    rest = [
        span
        for first, last in around
        for span in ([first, min(last, unit.first - 1)], [max(first, unit.last + 1), last])
        if span[0] <= span[1]
    ]
    coverage.setdefault(unit.concept, {}).setdefault(unit.evaluation, {})[unit.kind] = rest


def covers(coverage: Coverage, unit: Unit) -> bool:
    """Whether every index of the unit is noted as done."""
    return any(first <= unit.first and unit.last <= last for first, last in spans_of(coverage, unit))


def spans_of(coverage: Coverage, unit: Unit) -> list[list[int]]:
    """The indices of the unit's kind that are noted as done."""
    return coverage.get(unit.concept, {}).get(unit.evaluation, {}).get(unit.kind, [])


def progress(published: Coverage, fresh: Iterable[Unit]) -> Coverage:
    """What is done of a run: published and fresh together."""
    done = copy.deepcopy(published)
    for unit in fresh:
        cover(done, unit)
    return done


def count(coverage: Coverage, concept: str, evaluation: str, kind: str) -> int:
    """How many indices are done."""
    return sum(last - first + 1 for first, last in coverage.get(concept, {}).get(evaluation, {}).get(kind, []))
