"""Whatever is killed, the tables end up as those of a run that nothing happened to: row by row, to the bit."""

import time
import uuid

import pytest

from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.worker import Worker
from melbo_ray.config import Config
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import cover
from melbo_ray.search.vectors import stored_vectors
from melbo_ray.study.preflight import check
from tests.cluster.chaos import Chaos, cluster
from tests.cluster.tiny_study import rows
from tests.s3 import environment, faulty, serve

STUDY = {
    "num_vectors": 40,
    "max_evaluations": 60,
    "tolerance": 0,
    "eval_batch": 3,
    "sample": 9,
    "evals": "all",
}


LONG_STUDY = STUDY | {"num_vectors": 60, "evals": "all,why"}


def by_one_worker(tiny, storage, study):
    """The rows of a study by one worker in this process, one unit after the other: no driver, no Ray."""
    checked = check(Config(**tiny.options(str(storage), "run", **study)))
    worker = Worker(f"{storage}/run", "run", checked.config, checked.concepts, threads=1)
    while worker.find_base("code") is not None:
        pass
    list(worker.chains(["code"]))
    config = checked.config
    backlog = Backlog(
        "code", config.evals, config.eval_batch, {}, config.sample, config.num_vectors, stop_reason="num_vectors"
    )
    backlog.add_stored(stored_vectors(Run.open(f"{storage}/run"), "code"))
    assert backlog.base is not None
    while units := backlog.due():
        for unit in units:
            worker.evaluate(unit, backlog.vectors(unit), backlog.base, backlog.failed(unit))
            cover(backlog.done, unit)
    return rows(f"{storage}/run")


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory):
    """What the study must end up as."""
    return by_one_worker(tiny, tmp_path_factory.mktemp("expected"), STUDY)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A cluster of three nodes whose storage is a real S3 server behind a proxy that can fail."""
    with (
        serve(tmp_path_factory.mktemp("weed")) as s3,
        faulty(s3) as (through, faults),
        environment(through),
        cluster() as nodes,
    ):
        yield nodes, faults


def attack(tiny, place, study, seed, kills, every):
    nodes, faults = place
    storage = f"s3://bucket/{uuid.uuid4().hex}"
    return Chaos(tiny.command("ortho", storage, "run", **study), f"{storage}/run", nodes, faults, seed, kills, every)


def assert_survived(chaos, expected):
    chaos.faults.waiting.clear()
    found = rows(chaos.url)
    lost = {key: len(part) - len(found[key]) for key, part in expected.items() if len(part) != len(found[key])}
    print(f"seed {chaos.seed}: {chaos.tally.total()} kills {dict(chaos.tally)}; rows lost or doubled: {lost or 0}")
    assert not lost
    assert found == expected
    assert not Run.open(chaos.url).fresh()


def test_storage_that_refuses_ends_the_run_in_a_line_and_then_a_few_kills_of_every_kind_change_nothing(
    tiny, place, expected
):
    # This seed's driver is the last to be killed: one that begins takes storage that fails at its word.
    chaos = attack(tiny, place, STUDY, seed=69, kills=6, every=4)
    driver = chaos.start()
    begun = chaos.faults.units
    while chaos.faults.units < begun + 10:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    chaos.faults.waiting += [(403, "AccessDenied")] * 10_000
    said, _ = driver.communicate(timeout=120)
    chaos.faults.waiting.clear()
    assert driver.returncode == 2
    assert said.splitlines()[-1].startswith(f"error: storage {chaos.url}: access denied")
    chaos.run(seconds=400)
    assert_survived(chaos, expected)
    assert set(chaos.tally) >= {"evaluator", "chain", "driver", "node"}


@pytest.mark.chaos
def test_fifty_kills_change_nothing(tiny, place, tmp_path):
    expected = by_one_worker(tiny, tmp_path, LONG_STUDY)
    total, seed = 0, 100
    while total < 50:
        chaos = attack(tiny, place, LONG_STUDY, seed, kills=25, every=1)
        chaos.run(seconds=1500)
        assert_survived(chaos, expected)
        total += chaos.tally.total()
        seed += 1
