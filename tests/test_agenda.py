"""What is due of a concept."""

import numpy as np
import pytest

from melbo_ray.agenda import Agenda
from melbo_ray.units import WHOLE, Unit, cover


@pytest.fixture
def agenda():
    """Twenty vectors, every one with `kl` and, as a chain, with `geometry`."""
    found = Agenda("code", ["kl", "geometry"], 8, {}, stop_reason="num_vectors")
    found.learn("base", 0, np.ones(2))
    for index in range(1, 21):
        found.learn("chain", index, np.ones(2))
    for unit in found.due():
        cover(found.done, unit)
    assert found.due() == []
    return found


def failure(evaluation, kind, index):
    return {"evaluation": evaluation, "kind": kind, "index": index}


def test_what_has_failed_is_due_again_and_nothing_else(agenda):
    agenda.retry([failure("kl", "chain", index) for index in (3, 4, 12)] + [failure("kl", "unsteered", 0)])
    assert agenda.due() == [
        Unit("code", "kl", "unsteered", 0, 0),
        Unit("code", "kl", "chain", 3, 4),
        Unit("code", "kl", "chain", 12, 12),
    ]


@pytest.mark.parametrize("index", [0, 7])
def test_an_evaluation_of_the_whole_chain_that_failed_is_due_as_a_whole(agenda, index):
    agenda.retry([failure("geometry", "chain", index)])
    assert agenda.due() == [Unit("code", "geometry", WHOLE, 1, 20)]


def test_what_has_failed_and_is_not_asked_any_more_is_not_due(agenda):
    agenda.retry([failure("dose", "chain", 3)])
    assert agenda.due() == []
