"""A run of a release that evaluated a whole chain in one unit: it resumes, and no row is doubled."""

import numpy as np
import pytest

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import SCHEMAS, table
from melbo_ray.runs.work_unit import WHOLE, Unit, progress
from melbo_ray.study.upgrade import upgrade

NAME, OLD = "geometry", 12


def written(kind, indices, failures=()):
    empty = dict.fromkeys({*SCHEMAS["geometry"].names, *SCHEMAS["summary"].names, *SCHEMAS["failures"].names}, None)
    row = empty | {"run_id": "one", "kind": kind, "evaluation": NAME, "attempts": 1, "error": "NaN", "figure": "f"}
    return {
        name: table(name, [{c: (row | {"index": i})[c] for c in SCHEMAS[name].names} for i in of])
        for name, of in {"geometry": indices, "summary": [0] if indices else [], "failures": failures}.items()
    }


@pytest.fixture
def old(tmp_path):
    """(published, failures) → a run as an earlier release left it, and its manifest."""

    def make(published=True, failures=()):
        run, manifest = Run.open(str(tmp_path / "one")), Manifest(run_id="one")
        run.write_manifest(manifest)
        of = [] if failures else range(1, OLD + 1)
        run.commit(Unit("code", NAME, WHOLE, 1, OLD), written("chain", of, failures))
        run.commit(Unit("code", "kl", "chain", 1, OLD), {})
        if published:
            run.publish(manifest, lambda: None)
        return run, manifest

    return make


def resumed(run, manifest, found=OLD, ended="num_vectors"):
    """The backlog of a driver that takes the run up."""
    backlog = Backlog("code", [NAME], 8, progress(manifest.done, run.fresh()), stop_reason=ended)
    for index in range(found + 1):
        backlog.add_vector("chain" if index else "base", index, np.ones(2))
    upgrade(run, manifest, backlog)
    return backlog


def finish(run, manifest, backlog):
    """Every unit due, done and published; returns the indices of both tables."""
    while units := backlog.due():
        for unit in units:
            run.commit(unit, written("chain", [] if unit.share == "summary" else range(unit.first, unit.last + 1)))
        backlog.done = progress(manifest.done, run.fresh())
    run.publish(manifest, lambda: None)
    return run.read("geometry", "code")["index"].to_pylist(), run.read("failures", "code").num_rows


def test_what_covers_the_chain_as_it_is_stays(old):
    run, manifest = old()
    before = run.read("geometry", "code")
    backlog = resumed(run, manifest)
    assert backlog.due() == []
    assert backlog.evaluations(OLD) == (OLD + 1, OLD + 1)
    assert resumed(run, manifest).due() == []
    assert run.read("geometry", "code").equals(before)


@pytest.mark.parametrize(("found", "ended"), [(20, "num_vectors"), (OLD, None)])
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("adopted", [True, False])
def test_of_a_chain_that_goes_on_it_is_done_anew_and_nothing_is_doubled(old, found, ended, published, adopted):
    run, manifest = old(published)
    if adopted:  # resumed before, when the chain was as long as the evaluation
        resumed(run, manifest)
    backlog = resumed(run, manifest, found, ended)
    assert run.read("geometry", "code").num_rows == 0
    backlog.stop_reason = "num_vectors"
    assert finish(run, manifest, backlog) == (list(range(1, found + 1)), 0)
    assert WHOLE not in manifest.done["code"][NAME]


def test_what_failed_is_done_anew(old):
    run, manifest = old(failures=[0])
    assert finish(run, manifest, resumed(run, manifest)) == (list(range(1, OLD + 1)), 0)


@pytest.mark.parametrize("deaths", range(4))
def test_killed_anywhere_the_next_driver_completes_it(old, monkeypatch, deaths):
    run, manifest = old(failures=[0])
    calls = iter(range(9))

    def dying(write):
        def call(*args):
            if next(calls) >= deaths:
                raise KeyboardInterrupt
            return write(*args)

        return call

    with monkeypatch.context() as patch:
        for name in ("swap", "delete"):
            patch.setattr(run.storage, name, dying(getattr(run.storage, name)))
        if deaths < 3:
            with pytest.raises(KeyboardInterrupt):
                resumed(run, manifest)
        else:
            resumed(run, manifest)
    again = Run.open(run.storage.url)
    state = again.manifest()
    assert finish(again, state, resumed(again, state)) == (list(range(1, OLD + 1)), 0)


def test_every_evaluation_of_the_whole_chain_has_shares():
    assert all(bool(evaluation.shares) == (evaluation.scope == WHOLE) for evaluation in EVALUATIONS.values())
