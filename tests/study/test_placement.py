"""What a study says of the nodes that it runs on."""

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from melbo_ray.cluster.memory import Demand, Demands
from melbo_ray.config import Config
from melbo_ray.runs.manifest import ALL_PACKED
from melbo_ray.study import placement

NO_DEMANDS = Demands(Demand(0, 0, 0, 0, 0), Demand(0, 0, 0, 0, 0))


@pytest.fixture
def said(monkeypatch):
    """(options, GPUs of the cluster, whether it is fixed) → what is printed."""

    def call(options, gpus=0, fixed=False, memory=None):
        cluster = {"CPU": 4.0, "memory": 64e9} | ({"GPU": gpus} if gpus else {})
        monkeypatch.setattr(placement, "resources", lambda: (cluster, {}))
        monkeypatch.setattr(placement, "gpu_memory", lambda: memory)
        monkeypatch.setattr(placement, "wait_for_nodes", lambda missing, say: missing(cluster, {}) and say("waits"))
        out = StringIO()
        checked: Any = SimpleNamespace(config=Config(**options), demands=NO_DEMANDS)
        placement.place(checked, 1, fixed, ALL_PACKED, Console(file=out, width=200))
        return out.getvalue()

    return call


def test_a_study_is_never_silently_on_cpus(said):
    assert "no node of the cluster has a GPU" in said({})
    assert said({"device": "cpu"}) == said({"chain_gpus": 0, "eval_gpus": 0}) == said({}, gpus=2) == ""
    assert said({}, fixed=True) == ""  # this machine, whose devices its owner knows
    assert said({"eval_gpus": 0.5}) == "waits\n"


def test_what_is_taken_of_a_gpu_is_said_where_its_memory_is_known(said):
    line = "the smallest GPU has 24 GB: a chain actor takes 1 of one, an evaluator 0.25"
    assert line in said({}, gpus=2, memory=24e9)
    assert said({"chain_gpus": 1, "eval_gpus": 1}, gpus=2, memory=24e9) == ""


def test_nodes_that_join_are_looked_for_now_and_then(monkeypatch):
    looked = []
    monkeypatch.setattr(placement, "resources", lambda: ({"CPU": 8.0}, {}))
    monkeypatch.setattr(placement, "grown", lambda layout, config, *found: looked.append(found) or "grown")
    growth: Any = placement.Growth(Config(), fixed=False)
    assert growth.follow("layout") == "layout"
    growth._next = 0.0
    assert (growth.follow("layout"), growth.follow("layout")) == ("grown", "layout")
    assert looked == [({"CPU": 8.0}, {})]
    fixed: Any = placement.Growth(Config(), fixed=True)
    fixed._next = 0.0
    assert fixed.follow("layout") == "layout"
