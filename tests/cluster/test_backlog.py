"""What is due of a concept."""

import itertools

import numpy as np
import pytest

import melbo_ray.cluster.backlog
from melbo_ray.cluster.backlog import Backlog
from melbo_ray.runs.work_unit import Unit, cover


@pytest.fixture
def backlog():
    """Twenty vectors, every one with `kl` and, as a chain, with `geometry`."""
    found = Backlog("code", ["kl", "geometry"], 8, {}, stop_reason="num_vectors")
    found.add_vector("base", 0, np.ones(2))
    for index in range(1, 21):
        found.add_vector("chain", index, np.ones(2))
    for unit in itertools.chain.from_iterable(iter(found.due, [])):
        cover(found.done, unit)
    return found


def failure(evaluation, kind, index):
    return {"evaluation": evaluation, "kind": kind, "index": index, "attempts": 2}


def test_what_has_failed_is_due_again_and_nothing_else(backlog):
    backlog.retry([failure("kl", "chain", index) for index in (3, 4, 12)] + [failure("kl", "unsteered", 0)])
    assert backlog.due() == [
        Unit("code", "kl", "unsteered", 0, 0),
        Unit("code", "kl", "chain", 3, 4),
        Unit("code", "kl", "chain", 12, 12),
    ]


@pytest.mark.parametrize(("share", "index", "kind"), [("chain", 7, "chain"), ("summary", 0, "summary-of-20")])
def test_of_an_evaluation_of_the_whole_chain_the_item_that_failed_is_due(backlog, share, index, kind):
    backlog.retry([failure("geometry", share, index)])
    assert backlog.due() == [Unit("code", "geometry", kind, index, index)]


def test_how_often_a_unit_has_failed_before_is_known(backlog):
    backlog.retry([failure("kl", "chain", 3), failure("kl", "unsteered", 0), failure("geometry", "summary", 0)])
    assert backlog.failed(Unit("code", "kl", "chain", 1, 8)) == {3: 2}
    assert backlog.failed(Unit("code", "kl", "unsteered", 0, 0)) == {0: 2}
    assert backlog.failed(Unit("code", "geometry", "summary-of-20", 0, 0)) == {0: 2}
    assert backlog.failed(Unit("code", "kl", "chain", 9, 16)) == {}


def test_what_has_failed_and_is_not_asked_any_more_is_not_due(backlog):
    backlog.retry([failure("dose", "chain", 3)])
    assert backlog.due() == []


def sampled(sample, most, found, ended=None, evals=("kl", "greedy", "dose")):
    """A concept whose chain has `found` vectors of `most`, and evaluations of a sample."""
    backlog = Backlog("code", list(evals), 8, {}, sample, most, stop_reason=ended)
    backlog.add_vector("base", 0, np.ones(2))
    for index in range(1, found + 1):
        backlog.add_vector("chain", index, np.ones(2))
    return backlog


def asked(backlog, name):
    """The vectors of the chain in what is due."""
    units = [unit for unit in backlog.due() if (unit.evaluation, unit.kind) == (name, "chain")]
    return [index for unit in units for index in range(unit.first, unit.last + 1)]


@pytest.mark.parametrize(("sample", "most"), [(64, 895), (64, 100), (7, 24), (1, 24), (24, 24), (99, 24)])
def test_a_sample_is_even_and_of_the_size_asked_for_and_kl_and_greedy_texts_are_of_all(sample, most):
    backlog = sampled(sample, most, most, "num_vectors")
    chosen = asked(backlog, "dose")
    assert asked(backlog, "kl") == asked(backlog, "greedy") == list(range(1, most + 1))
    assert (len(chosen), chosen[0]) == (min(sample, most), 1)
    gaps = set(np.diff([*chosen, most + 1]))
    assert max(gaps) - min(gaps) <= 1


def test_a_sample_does_not_depend_on_when_it_is_asked_for_and_no_unit_is_handed_out_twice():
    """As the driver does: whatever is new of what is due at every vector, done late or at once."""
    for at_once in (True, False):
        backlog, issued = sampled(20, 50, 0), []
        for index in range(1, 51):
            backlog.add_vector("chain", index, np.ones(2))
            if index == 50:
                backlog.stop_reason = "num_vectors"
            new = [unit for unit in backlog.due() if unit not in issued]
            issued += new
            for unit in new if at_once else ():
                cover(backlog.done, unit)
        done = [i for u in issued if (u.evaluation, u.kind) == ("dose", "chain") for i in range(u.first, u.last + 1)]
        assert done == asked(sampled(20, 50, 50, "num_vectors"), "dose")


@pytest.mark.parametrize("found", [5, 19, 23, 41, 59])
def test_where_the_chain_ends_early_the_sample_is_filled_up_evenly(found):
    running, ended = sampled(20, 60, found), sampled(20, 60, found, "max_relative_loss")
    before = [unit for unit in running.due() if unit.evaluation == "dose"]
    chosen = asked(ended, "dose")
    assert len(chosen) == len(set(chosen)) == min(20, found)
    assert set(before) <= set(ended.due())
    assert max(np.diff([0, *sorted(chosen), found + 1])) <= 3
    for unit in before:
        cover(ended.done, unit)
    assert {*asked(ended, "dose"), *(i for unit in before for i in range(unit.first, unit.last + 1))} >= set(chosen)
    for unit in ended.due():
        cover(ended.done, unit)
    assert ended.due() == []
    assert len(ended._done("dose")) == min(20, found)


def test_a_chain_that_may_go_on_has_its_sample_not_filled_up():
    assert asked(sampled(4, 40, 11, "unfinished"), "dose") == [1, 11]


def test_progress_counts_what_is_asked_for():
    backlog = sampled(5, 20, 20, "num_vectors", ["kl", "dose", "geometry"])
    assert backlog.evaluations(20) == (0, 2 + 20 + 2 + 5 + 20 + 1)
    assert backlog.units(20) == (0, 2 + 20 / 8 + 2 + 5 / 8 + 1 + 1)
    assert backlog.evaluated() == 0
    for unit in backlog.due():
        if unit.evaluation == "kl":
            cover(backlog.done, unit)
    assert backlog.evaluated() == 15
    for unit in itertools.chain.from_iterable(iter(backlog.due, [])):
        cover(backlog.done, unit)
    assert backlog.evaluated() == 20
    assert backlog.evaluations(20) == (50, 50)
    done, wanted = backlog.units(20)
    assert done == wanted


def test_a_larger_sample_asks_for_what_is_missing_only():
    backlog = sampled(5, 20, 20, "num_vectors")
    for unit in backlog.due():
        cover(backlog.done, unit)
    backlog.sample = 10
    assert asked(backlog, "dose") == [3, 7, 11, 15, 19]
    backlog.sample = None
    assert len(asked(backlog, "dose")) == 15


@pytest.mark.parametrize(("sample", "batch"), [(None, 8), (13, 8), (13, 1), (200, 3)])
def test_what_each_vector_makes_due_is_together_what_is_due_of_the_chain(sample, batch):
    growing = sampled(sample, 100, 0)
    growing.batch = batch
    found = list(growing.due())
    for index in range(1, 62):
        growing.add_vector("chain", index, np.ones(2))
        found += growing.newly_due()
        assert sorted(found) == sorted(growing.due())


def test_a_vector_makes_due_what_it_completes_however_long_the_chain_is(monkeypatch):
    looked_at = []
    monkeypatch.setattr(melbo_ray.cluster.backlog, "covers", lambda _done, unit: looked_at.append(unit) or False)
    for found in (16, 1600):
        looked_at.clear()
        backlog = sampled(20, 2000, found)
        assert [(unit.first, unit.last) for unit in backlog.newly_due()][:2] == [(found - 7, found)] * 2
        assert len(looked_at) <= 8 * 3
