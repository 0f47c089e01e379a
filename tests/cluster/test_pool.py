"""The pool of evaluators, with actors in simulated time."""

import itertools

import pytest

from benchmarks.simulated_ray import SimulatedRay, Takes
from melbo_ray.cluster import pool
from melbo_ray.cluster.pool import Pool
from melbo_ray.cluster.session import Deaths
from melbo_ray.runs.work_unit import Unit


class Actor:
    """Loads for as long as its number in `loading` says; a unit takes `seconds` by its evaluation, and may hang."""

    def __init__(self, place, number):
        self.place, self.number, self.passes, self.begun = place, number, 0, 0.0

    def ready(self):
        return Takes(self.place.loading.get(self.number, 1.0), lambda: "ready")

    def evaluate(self, unit):
        self.begun = self.place.ray.clock()
        self.place.begun.append((self.number, unit))
        seconds = self.place.seconds[unit.evaluation]
        return Takes(seconds, lambda: self.place.done.append(unit))

    def progress(self):
        """As many passes as seconds of its unit, unless that hangs after some seconds."""
        passes = int(min(self.place.ray.clock() - self.begun, self.place.hangs_after))
        return Takes(0.1, lambda: passes)


class Place:
    """A pool in simulated time."""

    def __init__(self, least=1, seconds=(("kl", 4.0),), hangs_after=1e9, loading=()):
        self.ray, self.seconds, self.hangs_after = SimulatedRay(cpu=lambda: 0.0), dict(seconds), hangs_after
        self.loading, self.begun, self.done = dict(loading), [], []
        numbers = itertools.count()
        actors = self.ray.remote(lambda: Actor(self, next(numbers)))
        self.pool = Pool(
            actors.remote, lambda actor, unit: actor.evaluate.remote(unit), least, Deaths(), self.ray.clock
        )

    def run(self, seconds, most=4):
        """The driver's loop for some seconds."""
        until = self.ray.clock() + seconds
        with self.ray:
            while self.ray.clock() < until:
                self.pool.scale(most)
                self.pool.dispatch()
                refs = self.pool.refs()
                for ref in self.ray.wait(list(refs), timeout=1.0)[0]:
                    self.pool.collect(refs[ref])
                self.pool.requeue_stragglers()


def units(count, evaluation="kl", concept="code", first=1):
    return [Unit(concept, evaluation, "chain", i, i) for i in range(first, first + count)]


def test_a_slow_unit_that_progresses_is_left_alone_however_long_it_takes():
    place = Place(seconds=[("kl", 4.0), ("dose", 50_000.0)])
    place.pool.add(units(1) + units(1, "dose"))
    place.run(50_100)
    assert place.done == units(1) + units(1, "dose")
    assert len(place.begun) == 2


@pytest.mark.parametrize("hangs_after", [0, 300])
def test_a_unit_without_progress_is_given_to_another_evaluator(hangs_after):
    place = Place(seconds=[("kl", 50_000.0)], hangs_after=hangs_after)
    place.pool.add(units(1))
    place.run(hangs_after + 1.6 * pool._FIRST_PATIENCE)
    assert [number for number, _ in place.begun] == [0, 1]
    place.run(1.4 * pool._FIRST_PATIENCE)
    assert len(place.begun) == 2  # it is more patient the second time


def test_an_evaluator_that_does_not_tell_its_progress_hangs(monkeypatch):
    monkeypatch.setattr(Actor, "progress", lambda _: Takes(1e9, lambda: 0))
    place = Place(seconds=[("kl", 50_000.0)])
    place.pool.add(units(1))
    place.run(1.1 * pool._FIRST_PATIENCE)
    assert len(place.begun) == 2


def test_where_units_are_known_to_be_short_patience_is():
    place = Place(seconds=[("kl", 4.0)])
    place.pool.add(units(20))
    place.run(60)
    assert len(place.done) == 20
    place.seconds["kl"], place.hangs_after = 50_000.0, 0
    place.pool.add(units(1, first=21))
    place.run(1.6 * pool._LEAST_PATIENCE)
    assert len(place.begun) == 22


def test_of_evaluators_without_a_unit_those_that_load_are_stopped_first():
    place = Place(loading={1: 1e9, 2: 1e9, 3: 1e9})
    place.pool.add(units(4))
    place.run(60)
    assert (len(place.done), len(place.pool), place.pool.ready) == (4, 1, 1)


def test_an_evaluator_goes_on_with_its_concept():
    place = Place(least=2)
    place.pool.add(unit for pair in zip(units(8, concept="a"), units(8, concept="b"), strict=True) for unit in pair)
    place.run(60, most=2)
    assert len(place.done) == 16
    changes = 0
    for number in (0, 1):
        concepts = [unit.concept for actor, unit in place.begun if actor == number]
        changes += sum(one != other for one, other in itertools.pairwise(concepts))
    assert changes <= 2


def test_the_search_for_a_base_comes_before_everything():
    place = Place(seconds=[("kl", 4.0), ("base", 4.0)])
    place.pool.add([*units(8), Unit.base("other")])
    place.run(20, most=1)
    assert place.begun[0][1] == Unit.base("other")


def test_while_the_chains_wait_the_pool_doubles_to_its_most():
    place, sizes = Place(), []
    place.pool.add(units(64))
    with place.ray:
        for _ in range(100):
            place.pool.scale(300, full=True)
            sizes.append(len(place.pool))
            refs = place.pool.refs()
            for ref in place.ray.wait(list(refs), timeout=1.0)[0]:
                place.pool.collect(refs[ref])
    assert sizes[0] == 64  # what drains them in 10 s
    assert 128 in sizes


def test_a_pool_holds_no_more_for_more_units():
    place = Place(seconds=[("kl", 0.01)])
    for _ in range(3):
        place.pool.add(units(1000))
        place.run(20)
        (durations,) = place.pool._seconds.values()
        assert (len(durations.recent), len(place.pool._queue), place.pool._queue._by_study) == (20, 0, {})
    assert len(place.done) == 3000
