"""A search in stages: what each stage finds is kept in storage, where any worker continues it."""

import io
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

import torch

from melbo_ray.runs.storage import Storage

T = TypeVar("T")
Stages = Generator[str, None, T]
"""A search that yields after every stage, telling what is done; it returns what it finds."""
Once = Callable[[str, Callable[[], Any]], Any]
"""Called with a stage's name and the function that computes it; returns the result, which may be an earlier call's.

A result consists of tensors on the CPU, numbers and strings, in lists, tuples and dictionaries.
"""


def compute(name: str, make: Callable[[], T]) -> T:
    """The `Once` of a search that keeps nothing."""
    return make()


def finish(stages: Stages[T]) -> T:
    """Run all stages; returns what they find."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value


class Kept(Generic[T]):
    """A search whose stages are kept in storage; of two workers that compute the same stage, the first one's counts.

    Args:
        search: begins the search.
        storage: the storage.
        folder: folder of the search in it.

    Attributes:
        found: what the search has found, once `advance` has returned None.
    """

    found: T

    def __init__(self, search: Callable[[Once], Stages[T]], storage: Storage, folder: str) -> None:
        self._stages, self._storage, self._folder, self._computed = search(self._once), storage, folder, 0

    def advance(self) -> str | None:
        """Compute the first stage that is not kept; returns what is done then, or None at the end of the search."""
        before = self._computed
        try:
            while True:
                done = next(self._stages)
                if self._computed > before:
                    return done
        except StopIteration as end:
            self.found = end.value
            return None

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        path = f"{self._folder}/{name}.pt"
        if (data := self._storage.get(path)) is None:
            buffer = io.BytesIO()
            torch.save(make(), buffer)
            self._computed += 1
            data = buffer.getvalue()
            if not self._storage.create(path, data):
                data = self._storage.get(path)
        return torch.load(io.BytesIO(data or b""), weights_only=True)
