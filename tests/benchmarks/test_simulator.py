"""The simulator runs the real driver, pool and run: what they do for a unit does not grow with the study."""

import dataclasses
import itertools
import sys
from collections import Counter

import pytest

from benchmarks import simulator
from benchmarks.simulator import Case, simulate, told

SMALL = Case("small", vectors=30, concepts=2, evaluators=6, vector_seconds=1.0, d_model=64, evals=("kl", "dose"))


@pytest.fixture
def calls():
    """Seconds as a clock of the calls of functions so far, of which a million take one."""
    made = [0]

    def count(_frame, event, _argument):
        made[0] += event in ("call", "c_call")

    sys.setprofile(count)
    yield lambda: made[0] / 1e6
    sys.setprofile(None)


def test_every_unit_is_done_once_and_the_evaluators_are_busy():
    kept, looks = [], itertools.count()

    class Simulation(simulator.Simulation):
        def _finish(self, names):
            seconds = super()._finish(names)
            kept.append({name: [self.run.read("kl", name), self.run.fresh()] for name in names})
            return seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "Simulation", Simulation)
        outcome = simulate(SMALL, cpu=lambda: next(looks) / 1e9)
    for rows, fresh in kept[0].values():
        found = Counter(zip(rows["kind"].to_pylist(), rows["index"].to_pylist(), strict=True))
        assert set(found) == {("base", 0), ("unsteered", 0), *(("chain", i) for i in range(1, 31))}
        assert (set(found.values()), fresh) == ({1}, [])
    assert len(outcome.spans) == 2 * 2 * 32
    assert outcome.efficiency(6) > 0.9
    assert all("nan" not in line for line in told(SMALL, outcome))


def test_what_the_driver_does_for_a_unit_does_not_grow_with_the_chain(calls):
    short, long = (
        simulate(dataclasses.replace(SMALL, vectors=vectors, concepts=1, evals=("kl",)), cpu=calls)
        for vectors in (40, 320)
    )
    per_unit = [outcome.driver_seconds / len(outcome.spans) for outcome in (short, long)]
    assert per_unit[1] < 1.25 * per_unit[0]
    read = [outcome.requests["get"] / len(outcome.spans) for outcome in (short, long)]
    assert read[1] < 1.25 * read[0]
    assert long.requests["delete"] < 0.2 * len(long.spans)
    assert long.requests["put"] < 0.5 * len(long.spans)
