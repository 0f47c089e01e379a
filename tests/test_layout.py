"""How actors are laid out on what a cluster has."""

import pytest

from melbo_ray.config import Config, UserError
from melbo_ray.layout import lay_out

GIB = 1 << 30
LAPTOP = {"CPU": 2.0, "memory": 16.0 * GIB}
BIG = {"CPU": 64.0, "GPU": 8.0, "memory": 500.0 * GIB, "largest_node_CPU": 32.0}


def layout(cluster, concepts=1, weights=GIB // 2, roles=False, **options):
    return lay_out(Config(**options), concepts, weights, cluster, roles)


def test_a_laptop_has_one_chain_and_one_evaluator_and_two_when_the_chain_is_done():
    found = layout(LAPTOP)
    assert (found.chain_actors, found.chain_threads, found.most_beside_chains, found.most_evaluators) == (1, 1, 1, 2)
    assert (found.chain["num_cpus"], found.evaluator["num_cpus"]) == (1, 1)


def test_one_core_is_shared():
    found = layout({"CPU": 1.0, "memory": 8.0 * GIB})
    assert found.chain["num_cpus"] + found.evaluator["num_cpus"] <= 1


def test_four_concepts_share_one_chain_actor_on_a_laptop_and_have_their_own_on_four_gpus():
    assert layout(LAPTOP, concepts=4).chain_actors == 1
    found = layout(BIG, concepts=4, chain_gpus=1, eval_gpus=0.25)
    assert (found.chain_actors, found.most_beside_chains, found.most_evaluators) == (4, 16, 32)


def test_gpus_are_used_where_there_are_any_unless_the_cpu_is_asked_for():
    one = layout({"CPU": 8.0, "GPU": 1.0, "memory": 64.0 * GIB})
    assert (one.chain["num_gpus"], one.evaluator["num_gpus"], one.most_beside_chains) == (0.5, 0.5, 1)
    several = layout(BIG)
    assert (several.chain["num_gpus"], several.evaluator["num_gpus"], several.most_beside_chains) == (1.0, 1.0, 7)
    assert layout(BIG, device="cpu").chain["num_gpus"] == 0


def test_as_many_evaluators_as_memory_holds():
    assert layout({"CPU": 64.0, "memory": 20.0 * GIB}, weights=5 * GIB).most_evaluators == 2


def test_more_evaluators_than_there_is_room_for_are_asked_of_an_autoscaler():
    assert layout(LAPTOP, max_evaluators=12, eval_gpus=1, chain_gpus=1).most_beside_chains == 12
    assert layout(LAPTOP, min_evaluators=3).most_beside_chains == 3


def test_roles_pin_the_actors():
    found = layout(BIG, roles=True)
    assert found.chain["label_selector"] == {"role": "chain"}
    assert found.evaluator["label_selector"] == {"role": "eval"}
    assert "label_selector" not in layout(BIG).chain


def test_cuda_on_a_cluster_without_gpus():
    with pytest.raises(UserError, match="no GPU"):
        layout(LAPTOP, device="cuda")
