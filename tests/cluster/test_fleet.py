"""Several runs on one pool of evaluators, with workers that sleep: who does what when, and whose failures are whose."""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest
import ray

from melbo_ray.cluster import pool
from melbo_ray.cluster.backlog import Backlog
from melbo_ray.cluster.fleet import Fleet
from melbo_ray.cluster.resources import lay_out
from melbo_ray.config import Config
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from tests.cluster.simulated import D_MODEL, Event, Script, SharedSleeper
from tests.cluster.test_driver import NO_DEMANDS, evaluated, everything

VECTORS, RUNS = 6, ("a", "b", "c")


@pytest.fixture(scope="module")
def ray_here(cluster):
    ray.init(address=cluster["RAY_ADDRESS"], log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def drive(ray_here, tmp_path):
    """(script of each run) → (run by name, what was under way at every turn, the members as they ended)."""

    def call(scripts, base=False):
        config = Config(eval_batch=1, evals=["kl"])
        layout = lay_out(config, len(scripts), NO_DEMANDS, {"CPU": 2.0, "memory": 64 << 30}, {})
        layout = dataclasses.replace(
            layout, chain_actors=1, chain={"num_cpus": 0.1}, evaluator={"num_cpus": 0.1, "num_gpus": 0},
            most_beside_chains=2, most_evaluators=2,
        )  # fmt: skip
        together, runs, turns, ended = Fleet(config, layout, SharedSleeper), {}, [], []

        def start(name):
            def opened():
                run = runs[name] = Run.open(str(tmp_path / name))
                run.storage.put("run.json", b"{}")
                scripts[name].write(run)
                backlog = Backlog("code", ["kl"], 1, {})
                if base:
                    backlog.add_vector("base", 0, np.ones(D_MODEL, np.float32))
                for index in range(1, VECTORS + 1):
                    backlog.add_vector("chain", index, np.full(D_MODEL, index, np.float32))
                return together.member(run, name, config, [], {"code": backlog}, layout, lambda driver: None)

            return opened

        def tick(driven):
            chains = {name for name, member in driven.members.items() if member.chain_actors}
            turns.append((set(driven.members), chains, driven.pool.backlog))

        together.drive([start(name) for name in scripts], ended.append, tick)
        return runs, turns, ended

    return call


def test_runs_share_their_evaluators_and_the_next_begins_while_the_last_is_evaluated(drive):
    runs, turns, ended = drive({name: Script(0.1) for name in RUNS})
    assert sorted(member.run_id for member in ended) == list(RUNS)
    for run in runs.values():
        assert evaluated(run) == everything(VECTORS)
    # Two processes have evaluated everything.
    by = defaultdict(set)
    for name, run in runs.items():
        by[name] = {path for path in run.storage.names() if path.startswith("by-")}
    assert len(set().union(*by.values())) == 2
    # One chain at a time, and beside it a run whose base is sought or whose vectors are evaluated.
    assert all(len(chains) <= 1 for _, chains, _ in turns)
    assert any(chains and members - chains and backlog for members, chains, backlog in turns)
    # Every run knows who has evaluated for it.
    assert all(member.hardware == {"here": "cpu"} for member in ended)


def test_a_unit_that_kills_every_worker_fails_in_its_own_run_alone(drive, monkeypatch):
    monkeypatch.setattr(pool, "ATTEMPTS", 2)
    monkeypatch.setattr("melbo_ray.cluster.driver.ATTEMPTS", 2)
    deadly = Unit("code", "kl", "chain", 5, 5)
    scripts = {"a": Script(0.05), "b": Script(0.05, events=(Event.UNIT_KILLS,), unit=deadly.name)}
    runs, _, ended = drive(scripts, base=True)
    assert evaluated(runs["a"]) == everything(VECTORS)
    assert evaluated(runs["b"]) == everything(VECTORS) - {("chain", 5)}
    assert {member.run_id: member.failures for member in ended} == {"a": 0, "b": 1}
