"""What workers do, in this process and without a driver: whoever does a unit, the rows are the same to the bit."""

import itertools

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.worker import Worker
from melbo_ray.config import Config
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import cover
from melbo_ray.search.vectors import stored_vectors
from melbo_ray.study.preflight import check
from tests.cluster.tiny_study import rows

STUDY = {
    "num_vectors": 3, "melbo_steps": 6, "candidates": 2, "max_evaluations": 4, "eval_batch": 2, "max_new_tokens": 3,
    "evals": "control,shuffled,composition,geometry,rescaled",
}  # fmt: skip


def by_workers(tiny, storage, workers):
    """The rows of a study, and the stages of its base; `workers` makes a worker for every stage and every unit."""
    checked = check(Config(**tiny.options(str(storage), "run", **STUDY)))
    config, url = checked.config, f"{storage}/run"
    of = workers(lambda: Worker(url, "run", config, checked.concepts, threads=1))
    stages = [*iter(lambda: next(of).find_base("code"), None)]
    list(next(of).chains(["code"]))
    backlog = Backlog("code", config.evals, config.eval_batch, {}, stop_reason="num_vectors")
    backlog.add_stored(stored_vectors(Run.open(url), "code"))
    assert backlog.base is not None
    for unit in itertools.chain.from_iterable(iter(backlog.due, [])):
        next(of).evaluate(unit, backlog.vectors(unit), backlog.base, backlog.failed(unit))
        cover(backlog.done, unit)
    return rows(url), stages


def test_a_study_whose_workers_take_turns_at_stages_and_units_is_that_of_one_worker(tiny, tmp_path):
    def one(make):
        return itertools.repeat(make())

    def many(make):
        return itertools.cycle([make(), make()])

    expected, stages = by_workers(tiny, tmp_path / "one", one)
    found, again = by_workers(tiny, tmp_path / "many", many)
    assert stages == again
    assert len(stages) > 4
    assert found.keys() == expected.keys()
    for table in expected:
        assert found[table] == expected[table], table
