"""How actors are laid out on what a cluster has."""

import re

import pytest

from melbo_ray.cli import flags
from melbo_ray.cluster.memory import Demand, Demands
from melbo_ray.cluster.resources import Packed, lay_out
from melbo_ray.config import Config
from melbo_ray.errors import UserError

GIB = 1 << 30
LAPTOP = {"CPU": 2.0, "memory": 16.0 * GIB}
BIG = {"CPU": 64.0, "GPU": 8.0, "memory": 500.0 * GIB, "largest_node_CPU": 32.0}


ALL = Packed()
ONE_GPU = {"CPU": 8.0, "GPU": 1.0, "memory": 64.0 * GIB}


def layout(cluster, concepts=1, weights=GIB // 2, roles=None, fixed=False, allowed=ALL, **options):
    demands = Demands(
        Demand(weights, 0, weights, weights // 2, weights // 2), Demand(weights, 0, weights, weights, weights)
    )
    return lay_out(Config(**options), concepts, demands, cluster, roles or {}, fixed, allowed)


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
    one = layout(ONE_GPU)
    assert (one.chain["num_gpus"], one.evaluator["num_gpus"], one.most_beside_chains) == (0.5, 0.5, 1)
    several = layout(BIG)
    assert (several.chain["num_gpus"], several.evaluator["num_gpus"], several.most_beside_chains) == (1.0, 1.0, 7)
    assert layout(BIG, device="cpu").chain["num_gpus"] == 0


# Of weights of 4 GiB a chain actor takes 6 GiB of a GPU and an evaluator 8, each half a GiB more for CUDA itself.
@pytest.mark.parametrize(
    ("gigabytes", "chain", "evaluator", "beside"),
    [
        (80, 0.0903, 0.2274, 4),  # no more than four, whatever fits
        (32, 0.2257, 0.3871, 2),
        (24, 0.301, 0.699, 1),
        (17, 0.4249, 0.5751, 1),
        (16, 0.5, 0.5, 1),  # both do not fit: as where nothing is known
        (None, 0.5, 0.5, 1),
    ],
)
def test_evaluators_divide_what_the_chain_leaves_of_a_single_gpu(gigabytes, chain, evaluator, beside):
    cluster = ONE_GPU | ({"GPU_memory": gigabytes * GIB} if gigabytes else {})
    found = layout(cluster, weights=4 * GIB)
    assert (found.chain["num_gpus"], found.evaluator["num_gpus"]) == pytest.approx((chain, evaluator), abs=1e-4)
    assert found.most_beside_chains == beside
    if gigabytes not in (16, None):
        usable = 0.9 * gigabytes
        assert found.chain["num_gpus"] * usable >= 6.5
        assert found.evaluator["num_gpus"] * usable >= 8.5
        assert found.chain["num_gpus"] + beside * found.evaluator["num_gpus"] <= 1


def test_of_several_gpus_a_chain_has_its_own_and_evaluators_share_the_others():
    found = layout(BIG | {"GPU_memory": 24 * GIB}, weights=4 * GIB)
    assert (found.chain["num_gpus"], found.evaluator["num_gpus"]) == (1, 0.5)
    assert (found.most_beside_chains, found.most_evaluators) == (14, 16)
    roles = layout(ONE_GPU | {"GPU_memory": 24 * GIB}, weights=4 * GIB, roles={"chain": ONE_GPU, "eval": ONE_GPU})
    assert (roles.chain["num_gpus"], roles.evaluator["num_gpus"]) == (1, 0.5)


def test_shares_that_are_given_stand_whatever_a_gpu_holds():
    found = layout(ONE_GPU | {"GPU_memory": 80 * GIB}, weights=4 * GIB, chain_gpus=0.5)
    assert (found.chain["num_gpus"], found.evaluator["num_gpus"]) == (0.5, 0.125)
    found = layout(ONE_GPU | {"GPU_memory": 80 * GIB}, weights=4 * GIB, eval_gpus=0.3)
    assert found.evaluator["num_gpus"] == 0.3
    assert layout(ONE_GPU | {"GPU_memory": 80 * GIB}, device="cpu").evaluator["num_gpus"] == 0


def test_as_many_evaluators_as_memory_holds():
    assert layout({"CPU": 64.0, "memory": 22.0 * GIB}, weights=5 * GIB).most_evaluators == 2


def test_more_evaluators_than_there_is_room_for_are_asked_of_an_autoscaler():
    assert layout(LAPTOP, max_evaluators=12, eval_gpus=1, chain_gpus=1).most_beside_chains == 12
    assert layout(LAPTOP, min_evaluators=3).most_beside_chains == 3


def test_roles_pin_the_actors():
    found = layout(BIG, roles={"chain": BIG, "eval": BIG})
    assert found.chain["label_selector"] == {"role": "chain"}
    assert found.evaluator["label_selector"] == {"role": "eval"}
    assert "label_selector" not in layout(BIG).chain


def test_cuda_on_a_cluster_without_gpus():
    with pytest.raises(UserError, match="no GPU"):
        layout(LAPTOP, device="cuda")


@pytest.mark.parametrize(
    ("cluster", "options", "shares"),
    [
        (ONE_GPU, {"chain_gpus": 0.25}, (0.25, 0.5)),
        (ONE_GPU, {"eval_gpus": 0.25}, (0.5, 0.25)),
        (ONE_GPU, {"chain_gpus": 0}, (0, 0.5)),
        (ONE_GPU, {"chain_gpus": 0, "eval_gpus": 0}, (0, 0)),
        (BIG, {"eval_gpus": 0.25}, (1, 0.25)),
        (BIG, {"eval_gpus": 0}, (1, 0)),
        (LAPTOP, {"eval_gpus": 0.25}, (1, 0.25)),  # of an autoscaler, as long as it has no GPU
        (LAPTOP, {"eval_gpus": 0}, (0, 0)),
    ],
)
def test_a_share_that_is_not_given_is_the_usual_one(cluster, options, shares):
    found = layout(cluster, **options)
    assert (found.chain["num_gpus"], found.evaluator["num_gpus"]) == shares


@pytest.mark.parametrize(
    ("cluster", "options", "message"),
    [
        (ONE_GPU, {"chain_gpus": 1, "eval_gpus": 0.25}, r"1\.25 GPUs together, and there are 1"),
        (ONE_GPU, {"chain_gpus": 1}, r"1\.5 GPUs together"),
        (LAPTOP, {"eval_gpus": 1, "chain_gpus": 0}, "--eval-gpus is 1, and there are 0 GPUs"),
        (BIG | {"largest_node_GPU": 1.0}, {"eval_gpus": 2}, "--eval-gpus is 2, and there are 1 GPUs"),
        ({"CPU": 2.0, "memory": 2.5 * GIB}, {}, r"need 2\.9 GB of memory together"),
    ],
)
def test_what_can_never_begin_is_refused_unless_the_cluster_may_grow(cluster, options, message):
    layout(cluster, **options)
    with pytest.raises(UserError) as caught:
        layout(cluster, fixed=True, **options)
    assert re.search(message, flags(str(caught.value)))
    assert "\n" not in str(caught.value)


def test_evaluations_alone_need_no_room_for_a_chain():
    found = layout(ONE_GPU, concepts=0, fixed=True, chain_gpus=1, eval_gpus=0.5)
    assert (found.chain_actors, found.most_evaluators) == (0, 2)


# In units of the weights W a chain asks for 1.5 W and W packed, an evaluator for 2 W and W packed; a process 0.47 GiB.
@pytest.mark.parametrize(
    ("memory", "cpus", "packed"),
    [
        (13.0, 2.0, Packed(True, True)),
        (10.0, 2.0, Packed(True, False)),  # one packed evaluator fits beside the chain, but not two when it is gone
        (8.5, 2.0, Packed(False, False)),
        (5.0, 2.0, Packed(False, False)),  # too small for any evaluator
        (21.0, 16.0, Packed(True, False)),  # more evaluators rather than packed ones
        (22.0, 16.0, Packed(False, False)),  # the chain's copies would keep one out
    ],
)
def test_weights_are_packed_where_that_keeps_no_actor_out(memory, cpus, packed):
    found = layout({"CPU": cpus, "memory": memory * GIB}, weights=2 * GIB)
    assert found.packed == packed
    plain = layout({"CPU": cpus, "memory": memory * GIB}, weights=2 * GIB, allowed=Packed(False, False))
    assert (found.chain["memory"] > plain.chain["memory"]) is packed.chain
    assert (found.evaluator["memory"] > plain.evaluator["memory"]) is packed.evaluator
    assert (found.most_beside_chains, found.most_evaluators) == (plain.most_beside_chains, plain.most_evaluators)


def test_packed_copies_are_given_up_before_a_study_is_refused():
    enough = {"CPU": 2.0, "memory": 8.0 * GIB}
    found = layout(enough, weights=2 * GIB, fixed=True)
    assert found.packed == Packed(False, False)
    assert found.chain["memory"] + found.evaluator["memory"] <= enough["memory"]
    with pytest.raises(UserError, match="of memory together"):
        layout(enough | {"memory": 7.5 * GIB}, weights=2 * GIB, fixed=True)


@pytest.mark.parametrize("before", [Packed(True, False), Packed(False, True), Packed(False, False)])
def test_a_resumed_run_packs_no_more_than_before(before):
    assert layout({"CPU": 2.0, "memory": 100.0 * GIB}, allowed=before).packed == before


def test_what_is_packed_does_not_change_where_it_is_not_used():
    assert layout(BIG).packed == Packed(True, True)  # on GPUs
    assert layout({"CPU": 2.0, "memory": 4.5 * GIB}, concepts=0, weights=2 * GIB).packed == Packed(True, False)


def test_an_actor_must_fit_on_one_node():
    spread = {"CPU": 8.0, "memory": 64.0 * GIB, "largest_node_CPU": 2.0, "largest_node_memory": 6.0 * GIB}
    assert layout(spread, weights=2 * GIB).packed == Packed(True, False)
