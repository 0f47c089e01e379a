"""The queue of a run's units, which gives an evaluator those of the study that it is at."""

from collections import deque

from melbo_ray.runs.work_unit import Task, Unit


class UnitQueue:
    """The units that wait, by study; adding and taking one takes constant time."""

    def __init__(self) -> None:
        self._first: deque[Unit] = deque()
        self._by_study: dict[str, deque[Unit]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, unit: Unit, again: bool = False) -> None:
        """Append a unit; one that is to be done `again` comes first, and so does the search for a base."""
        self._size += 1
        if again or unit.task is Task.BASE:
            self._first.append(unit)
        else:
            self._by_study.setdefault(unit.study, deque()).append(unit)

    def take(self, study: str) -> Unit:
        """Remove and return a unit, of this study if there is one, else of the study that has waited longest."""
        self._size -= 1
        if self._first:
            return self._first.popleft()
        name = study if study in self._by_study else next(iter(self._by_study))
        units = self._by_study[name]
        unit = units.popleft()
        if not units:
            del self._by_study[name]
        return unit
