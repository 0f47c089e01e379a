"""What the pool does of itself where memory holds fewer evaluators than were asked for; no actor is started."""

from types import SimpleNamespace

import pytest
import torch

from melbo_ray.cluster import pool
from melbo_ray.cluster.session import Deaths
from melbo_ray.errors import UserError


@pytest.fixture
def started(monkeypatch):
    """(evaluators that memory holds) → the pool after some turns of the driver, and the number of actors started."""
    monkeypatch.setattr(pool.ray, "kill", lambda _actor: None)

    def run(fit, turns=20, most=4, chain_finds=True):
        alive = []

        def start():
            alive.append(len(alive))
            return SimpleNamespace(ready=SimpleNamespace(remote=lambda place=alive[-1]: place))

        def fetch(place):
            if place >= fit:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
            return {}

        monkeypatch.setattr(pool, "fetch", fetch)
        deaths = Deaths()
        evaluators = pool.Pool(start, lambda _actor, _unit: None, most, deaths)
        for _ in range(turns):
            evaluators.scale(most)
            for member in list(evaluators.refs().values()):
                evaluators.collect(member)
                if chain_finds:
                    deaths.reset()
        return evaluators, len(alive)

    return run


def test_a_model_that_fits_nowhere_ends_the_run_with_one_line_though_its_chain_goes_on(started):
    with pytest.raises(UserError, match=r"for an evaluator: 5 in a row .*\(CUDA out of memory\.\): give") as caught:
        started(fit=0)
    assert "\n" not in str(caught.value)


def test_where_memory_holds_some_evaluators_the_run_goes_on_with_them_and_loads_no_more(started):
    with pytest.warns(UserWarning, match="for another evaluator: 5 in a row .* goes on with 2") as told:
        evaluators, count = started(fit=2)
    assert len(told) == 1
    assert (len(evaluators), evaluators.ready) == (2, 2)
    assert count < 10


def test_where_all_fit_all_are_started(started):
    evaluators, count = started(fit=4)
    assert (len(evaluators), evaluators.ready, count) == (4, 4, 4)
