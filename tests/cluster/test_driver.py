"""The driver's pool of evaluators: it grows and shrinks with the backlog, and no unit is lost on a bad worker."""

import dataclasses
import time

import numpy as np
import pytest
import ray

from melbo_ray.cluster import driver, pool
from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.driver import Driver
from melbo_ray.cluster.memory import Demand, Demands
from melbo_ray.cluster.resources import lay_out
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from tests.cluster.simulated import D_MODEL, Event, Script, Sleeper

NO_DEMANDS = Demands(Demand(0, 0, 0, 0, 0), Demand(0, 0, 0, 0, 0))


@pytest.fixture(scope="module")
def ray_here(ray_of_our_own):
    ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def drive(ray_here, tmp_path):
    """(vectors, what the workers do, options) → (run, evaluators at each turn, the driver).

    The driver's clock runs `fast` times as fast as that of its workers.
    """

    def call(
        vectors,
        script=Script(),  # noqa: B008 - it is frozen
        stop_reason="num_vectors",
        chain_cpus=1,
        concepts=("code",),
        base=True,
        gpus=0,
        evals=("kl",),
        evaluator_cpus=1,
        tick=None,
        fast=1,
        **options,
    ):
        run = Run.open(str(tmp_path / "run"))
        run.storage.put("run.json", b"{}")
        script.write(run)
        config = Config(eval_batch=1, evals=list(evals), **options)
        backlogs = {concept: Backlog(concept, config.evals, 1, {}, stop_reason=stop_reason) for concept in concepts}
        for backlog in backlogs.values():
            if base:
                backlog.add_vector("base", 0, np.ones(D_MODEL, np.float32))
            for index in range(1, vectors + 1):
                backlog.add_vector("chain", index, np.full(D_MODEL, index, np.float32))
        layout = lay_out(config, len(concepts), NO_DEMANDS, {"CPU": 8.0, "memory": 64 << 30}, {})
        layout = dataclasses.replace(
            layout,
            chain={"num_cpus": chain_cpus, "num_gpus": gpus},
            evaluator=layout.evaluator | {"num_gpus": gpus, "num_cpus": evaluator_cpus},
        )
        sizes = []
        while ray.available_resources().get("CPU") != 8:  # what the last test's actors had is not free at once
            time.sleep(0.05)
        tick = tick or (lambda driven: sizes.append(driven.pool.ready))
        driving = Driver(run, "run", config, [], backlogs, layout, tick, Sleeper, lambda: fast * time.monotonic())
        driving.drive()
        return run, sizes, driving

    return call


def evaluated(run):
    """(kind, index) of every row, and nothing twice."""
    rows = [(row["kind"], row["index"]) for row in run.read("kl", "code").to_pylist()]
    assert len(rows) == len(set(rows))
    return set(rows)


def everything(vectors):
    return {("base", 0), ("unsteered", 0), *(("chain", index) for index in range(1, vectors + 1))}


def test_the_pool_follows_the_backlog_up_and_down_within_its_bounds(drive):
    last = Unit("code", "kl", "chain", 40, 40)
    script = Script(0.5, events=(Event.UNIT_LINGERS,), unit=last.name)
    run, sizes, _ = drive(40, script, min_evaluators=2, max_evaluators=4, fast=10)
    assert evaluated(run) == everything(40)
    assert (max(sizes), sizes[-1]) == (4, 2)


def test_a_unit_that_hangs_is_taken_away_and_done_by_another(drive):
    hanging = Unit("code", "kl", "chain", 5, 5)
    script = Script(0.05, events=(Event.UNIT_HANGS,), unit=hanging.name)
    run, _, driven = drive(8, script, max_evaluators=2, fast=60)
    assert evaluated(run) == everything(8)
    assert driven.failures == 0


def test_a_worker_whose_gpu_breaks_fails_nothing_and_is_replaced(drive):
    broken = Unit("code", "kl", "chain", 5, 5)
    script = Script(0.05, events=(Event.UNIT_BREAKS_GPU,), unit=broken.name)
    run, _, driven = drive(8, script, max_evaluators=1)
    assert evaluated(run) == everything(8)
    assert driven.failures == 0
    assert len([name for name in run.storage.names() if name.startswith("ready-")]) == 2


def test_a_unit_that_kills_every_worker_is_filed_as_failed_and_the_rest_goes_on(drive, monkeypatch):
    monkeypatch.setattr(pool, "ATTEMPTS", 3)
    monkeypatch.setattr(driver, "ATTEMPTS", 3)
    deadly = Unit("code", "kl", "chain", 5, 5)
    script = Script(0.05, events=(Event.UNIT_KILLS,), unit=deadly.name)
    run, _, driven = drive(8, script, max_evaluators=2)
    assert evaluated(run) == everything(8) - {("chain", 5)}
    (failure,) = run.read("failures", "code").to_pylist()
    assert (failure["kind"], failure["index"], failure["evaluation"], failure["attempts"]) == ("chain", 5, "kl", 3)
    assert driven.failures == 1


def test_a_share_of_a_chains_evaluation_that_kills_every_worker_is_one_failure(drive, monkeypatch):
    monkeypatch.setattr(pool, "ATTEMPTS", 2)
    monkeypatch.setattr(driver, "ATTEMPTS", 2)
    deadly = Unit("code", "geometry", "summary-of-8", 0, 0)
    script = Script(0.05, events=(Event.UNIT_KILLS,), unit=deadly.name)
    run, _, driven = drive(8, script, max_evaluators=2, evals=("kl", "geometry"))
    assert evaluated(run) == everything(8)
    (failure,) = run.read("failures", "code").to_pylist()
    assert (failure["kind"], failure["index"], failure["evaluation"]) == ("summary", 0, "geometry")
    assert driven.failures == 1


def test_a_chain_actor_that_has_read_other_weights_is_refused(drive):
    with pytest.raises(UserError, match="on here has other weights than this run was begun with"):
        drive(2, Script(0.05, events=(Event.CHAIN_HAS_OTHER_WEIGHTS,)), stop_reason=None)


def test_a_chain_that_has_the_last_of_the_cluster_ends_and_makes_room_for_its_evaluations(drive):
    run, sizes, _ = drive(70, stop_reason=None, chain_cpus=8)
    assert sizes[0] == 0
    assert evaluated(run) == everything(70)


@pytest.mark.parametrize("events", [(Event.CHAIN_DIES_EARLY,), (Event.CHAIN_DIES_EARLY, Event.BASE_FINDER_DIES)])
def test_a_base_that_is_known_before_its_finder_answers_is_no_evaluation(drive, events):
    run, _, driven = drive(2, Script(events=events), stop_reason=None, base=False)
    assert evaluated(run) == everything(2)
    assert driven.failures == 0


def test_a_base_is_found_though_the_search_kills_more_workers_than_a_stage_may(drive, monkeypatch):
    monkeypatch.setattr(pool, "ATTEMPTS", 2)
    run, _, driven = drive(2, Script(stages=3), base=False)
    assert driven.backlogs["code"].stages == ["stage 0", "stage 1", "stage 2"]
    assert evaluated(run) == everything(2)


def test_a_chain_actor_that_is_lost_is_replaced_by_one_with_the_same_share(drive):
    run, *_ = drive(0, Script(events=(Event.CHAIN_DIES,)), stop_reason=None, concepts=("a", "b", "c", "d"))
    shares = sorted(run.storage.get(name).decode() for name in run.storage.names() if name.startswith("share-"))
    assert shares in (["a,c", "a,c", "b,d"], ["a,c", "b,d", "b,d"])


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (0.5, "auto")])
def test_a_worker_that_takes_no_gpu_looks_for_none(drive, gpus, device):
    _, _, driven = drive(1, stop_reason=None, gpus=gpus)
    assert driven.hardware == {"here": device}


def test_a_cluster_that_has_room_for_nobody_is_told_of(drive):
    with pytest.raises(
        UserError, match=r"worker for \d+ s: it takes 100 CPUs.*; the cluster has 1 node alive, with 8 of 8 CPUs"
    ):
        drive(2, evaluator_cpus=100, tick=lambda driven: fail(driven.wait_notice()), fast=30)


def fail(line):
    if line is not None:
        raise UserError(line)


def test_a_cluster_at_work_is_not(drive):
    lines = []
    drive(
        3,
        Script(0.5),
        max_evaluators=1,
        tick=lambda driven: lines.append(driven.pool.ready and driven.wait_notice()),
        fast=30,
    )
    assert not any(lines)


def test_the_most_memory_of_either_role_is_known(drive):
    _, _, driven = drive(3, stop_reason=None)
    assert driven.peak_memory == {"chain": 700, "evaluator": 1003}
