"""Which nodes a layout waits for, and how it follows those that join later."""

import time

import pytest
import ray
from ray._private.worker import global_worker
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster

from melbo_ray.cluster.nodes import awaited, nodes_alive
from melbo_ray.cluster.resources import grown, lay_out
from melbo_ray.cluster.session import connected, resources, wait_for_nodes
from melbo_ray.config import Config
from tests.cluster.test_driver import NO_DEMANDS


def node(cpus=8.0, gpus=0.0, role=None, alive=True):
    """A node as `ray.nodes()` has it."""
    held = {"CPU": cpus, "memory": 8e9, "node:here": 1.0} | ({"GPU": gpus} if gpus else {})
    return {"Alive": alive, "Resources": held, "Labels": {"role": role} if role else {}}


HEAD, GPU = node(0.0, role="head"), node(gpus=1.0)
CHAIN, EVAL = node(gpus=1.0, role="chain"), node(gpus=1.0, role="eval")
CPU_CHAIN, CPU_EVAL = node(role="chain"), node(role="eval")


@pytest.mark.parametrize(
    ("nodes", "chains", "options", "what", "gpus"),
    [
        # cluster.yaml with only its head up: the head is no place for a chain.
        ([HEAD], 1, {}, "CPUs and the label role=chain", 0),
        ([HEAD], 1, {"device": "cuda"}, "a GPU and the label role=chain", 1),
        ([HEAD], 1, {"eval_gpus": 0.25}, "a GPU and the label role=chain", 1),
        ([HEAD], 1, {"chain_gpus": 0.5, "eval_gpus": 0.25}, "a GPU and the label role=chain", 0.5),
        ([HEAD, CPU_CHAIN], 1, {"device": "cuda"}, "a GPU and the label role=chain", 1),
        # Evaluators on GPUs start their node by their own demand; on CPUs their node tells its cores and memory.
        ([HEAD, CHAIN], 1, {}, None, 0),
        ([HEAD, CPU_CHAIN], 1, {}, "CPUs and the label role=eval", 0),
        ([HEAD, CPU_CHAIN, CPU_EVAL], 1, {}, None, 0),
        ([HEAD, CHAIN], 1, {"eval_gpus": 0}, "CPUs and the label role=eval", 0),
        # Evaluations alone.
        ([HEAD, CHAIN], 0, {}, "CPUs and the label role=eval", 0),
        ([HEAD, EVAL], 0, {}, None, 0),
        # No labels.
        ([node()], 1, {}, None, 0),
        ([node(0.0)], 1, {}, "CPUs", 0),
        ([node()], 1, {"device": "cuda"}, "a GPU", 1),
        ([node()], 1, {"chain_gpus": 0, "eval_gpus": 0.5}, "a GPU", 0.5),
        ([node()], 1, {"device": "cpu"}, None, 0),
        ([node(), GPU], 1, {"device": "cuda"}, None, 0),
        ([node(), {**GPU, "Alive": False}], 1, {"device": "cuda"}, "a GPU", 1),
    ],
)
def test_a_layout_waits_for_the_node_that_tells_what_its_actors_take(nodes, chains, options, what, gpus):
    found = awaited(Config(**options), chains, *nodes_alive(nodes))
    if what is None:
        assert found is None
    else:
        assert (found[0], found[1]["num_gpus"]) == (f"a node with {what}", gpus)
        assert found[1].get("label_selector", {}).get("role") in (what.rpartition("role=")[2], None)


def laid_out(nodes, chains=1, **options):
    return lay_out(Config(**options), chains, NO_DEMANDS, *nodes_alive(nodes))


def test_where_nodes_have_roles_chains_and_evaluators_are_counted_on_their_own():
    found = laid_out([HEAD, CHAIN], chains=4)
    # The whole GPU: what a chain left of it would look free to an autoscaler that does not read labels.
    assert (found.chain["num_gpus"], found.chain_actors) == (1, 1)
    assert (found.evaluator["num_gpus"], found.most_beside_chains) == (1, 1)
    found = laid_out([HEAD, CHAIN, *[EVAL] * 3], eval_gpus=0.25)
    assert (found.most_beside_chains, found.most_evaluators) == (12, 12)
    found = laid_out([HEAD, CPU_CHAIN, *[CPU_EVAL] * 3])
    assert (found.chain["num_cpus"], found.most_beside_chains, found.most_evaluators) == (4, 24, 24)


def test_evaluators_grow_with_the_cluster_and_those_of_lost_nodes_stay_asked_for():
    config = Config()
    first = laid_out([GPU, GPU])
    assert (first.most_beside_chains, first.most_evaluators) == (1, 2)
    more = grown(first, config, *nodes_alive([GPU] * 5))
    assert (more.most_beside_chains, more.most_evaluators) == (4, 5)
    assert (more.chain, more.evaluator, more.chain_actors) == (first.chain, first.evaluator, first.chain_actors)
    assert grown(more, config, *nodes_alive([GPU])) == more
    assert grown(first, Config(max_evaluators=2), *nodes_alive([GPU] * 5)).most_evaluators == 2


def demands():
    """What an autoscaler is asked for: (GPUs, role)."""
    state = get_cluster_resource_state(global_worker.gcs_client)  # ty: ignore[missing-attribute]
    requests = [each.request for each in state.pending_resource_requests]
    return [
        (request.resources_bundle.get("GPU"), request.label_selectors[0].label_constraints[0].label_values[0])
        for request in requests
        if request.label_selectors
    ]


def test_a_study_waits_for_the_nodes_of_its_roles_and_an_autoscaler_hears_of_it(ray_of_our_own, monkeypatch):
    head = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "labels": {"role": "head"}, "include_dashboard": False}
    )
    config, looks = Config(device="cuda"), []

    def autoscaled(cluster, roles):
        """Starts the node that is asked for, once the demand has come through."""
        if (1.0, "chain") in demands() and "chain" not in roles:
            head.add_node(num_cpus=1, num_gpus=1, labels={"role": "chain"})
        looks.append(roles)
        return awaited(config, 1, cluster, roles)

    monkeypatch.setenv("RAY_ADDRESS", head.address)
    monkeypatch.setattr("melbo_ray.cluster.session._LOOK_EVERY", 0.1)
    monkeypatch.setattr("melbo_ray.cluster.session._QUIET", 0.0)
    lines = []
    try:
        with connected() as fixed:
            assert not fixed
            wait_for_nodes(autoscaled, lines.append)
            layout = lay_out(config, 1, NO_DEMANDS, *resources())
            deadline = time.monotonic() + 20  # what is free is told a little later than what there is
            while "GPU" not in ray.available_resources() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert ray.available_resources()["GPU"] == 1
            head.add_node(num_cpus=4, num_gpus=3, labels={"role": "eval"})
            head.wait_for_nodes()
            later = grown(layout, config, *resources())
    finally:
        head.shutdown()
    assert "chain" not in looks[0]
    assert "waiting for a node with a GPU and the label role=chain" in lines[0]
    assert "the cluster has 1 node alive" in lines[0]
    assert (layout.chain["num_gpus"], layout.chain["label_selector"]) == (1, {"role": "chain"})
    assert (layout.most_evaluators, later.most_evaluators) == (1, 3)
