"""The layout of a run on a cluster: the number of actors and their resources."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from melbo_ray.cluster.memory import USABLE, Demand, Demands
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.runs.manifest import ALL_PACKED, Packed

_MOST_THREADS = 8
CHAIN, EVAL = "chain", "eval"
"""Values of the node label `role`: nodes of the chain actors, and of the evaluators."""

GPU_MEMORY = "GPU_memory"
"""The key of the memory of the cluster's smallest GPU, bytes, among its resources, where it is known."""
# Processes on one GPU take turns at it, so more of them are not taken to be faster; and what CUDA itself holds of each.
_MOST_ON_A_GPU, _CONTEXT = 4, 0.5 * 2**30
# Ray counts GPUs to four decimals.
_PARTS = 10_000

Resources = Mapping[str, float]
"""Resources of several nodes: `CPU`, `GPU`, `memory` (bytes); of the largest node as `largest_node_CPU`, …."""
Roles = Mapping[str, Resources]
"""Resources of the nodes of each role; empty if no node carries the label."""


@dataclass(frozen=True)
class Layout:
    """Number and resources of the actors.

    Attributes:
        chain_actors: number of chain actors, among which the concepts are distributed.
        chain: Ray options of a chain actor.
        evaluator: Ray options of an evaluator.
        chain_threads: torch threads of a chain actor.
        evaluator_threads: torch threads of an evaluator.
        most_beside_chains: maximum number of evaluators while chain actors run.
        most_evaluators: maximum number of evaluators once the chains have ended.
        packed: which kinds of worker hold packed copies of their weights.
    """

    chain_actors: int
    chain: dict[str, Any]
    evaluator: dict[str, Any]
    chain_threads: int
    evaluator_threads: int
    most_beside_chains: int
    most_evaluators: int
    packed: Packed


def lay_out(
    config: Config,
    concepts: int,
    demands: Demands,
    cluster: Resources,
    roles: Roles,
    fixed: bool = False,
    allowed: Packed = ALL_PACKED,
) -> Layout:
    """The layout of a run on a cluster.

    On the CPU a chain actor gets half of a node's cores and an evaluator one core. On GPUs the shares are those of the
    configuration, by default those of `shares`.
    Weights are packed if that displaces no actor, the chain's first, because every step of a chain runs through them.

    Args:
        config: options of the run.
        concepts: number of chains to run.
        demands: memory of the workers.
        cluster: total resources of the cluster.
        roles: resources by role, to whose nodes (`role: chain`, `role: eval`) actors are then bound.
        fixed: whether the cluster is known never to grow.
        allowed: what the run has packed so far; a resumed run packs no more.

    Raises:
        UserError: CUDA was requested and the cluster has no GPU; or the cluster is fixed and too small.
    """
    for_chains, for_evaluators = _places(cluster, roles)
    cpus = for_chains.get("CPU", 1.0)
    chain_gpus, eval_gpus = shares(config, cluster.get("GPU", 0.0), bool(roles), demands, cluster.get(GPU_MEMORY))
    if chain_gpus:
        free = for_chains.get("GPU", 0.0) - (0 if roles else config.min_evaluators * eval_gpus)
        actors = min(concepts, max(1, int(free // chain_gpus)))
        chain_cpus = threads = 1
    else:
        actors = min(concepts, max(1, int(cpus // 4)))
        chain_cpus = threads = max(1, min(int(for_chains.get("largest_node_CPU", cpus) // 2), _MOST_THREADS))
    if cpus < 2:
        chain_cpus = 0.5
    evaluator_cpus = min(1.0, for_evaluators.get("CPU", 2.0) / 2)
    chain = options(chain_cpus, chain_gpus, bool(roles), CHAIN)
    evaluator = options(evaluator_cpus, eval_gpus, bool(roles), EVAL)

    def room(packed: Packed) -> tuple[int, int]:
        """Number of evaluators that fit beside the chain actors, and without them."""
        return _rooms(*_with_memory(chain, evaluator, demands, packed), actors, cluster, roles)

    packed = _packed(allowed, Packed(bool(actors and not chain_gpus), not eval_gpus), room)
    chain, evaluator = _with_memory(chain, evaluator, demands, packed)
    if fixed:
        _check_room(chain if actors else {}, evaluator, cluster)
    beside, after = (_most(config, rooms) for rooms in room(packed))
    return Layout(actors, chain, evaluator, threads, 1, beside, after, packed)


def grown(layout: Layout, config: Config, cluster: Resources, roles: Roles) -> Layout:
    """The layout with as many evaluators as the cluster holds by now, and no fewer than before.

    The evaluators of nodes that were lost stay asked for, so that an autoscaler replaces these nodes.
    """
    rooms = _rooms(layout.chain, layout.evaluator, layout.chain_actors, cluster, roles)
    beside, after = (_most(config, room) for room in rooms)
    return dataclasses.replace(
        layout,
        most_beside_chains=max(beside, layout.most_beside_chains),
        most_evaluators=max(after, layout.most_evaluators),
    )


def _places(cluster: Resources, roles: Roles) -> tuple[Resources, Resources]:
    """The resources of the nodes of the chain actors, and of those of the evaluators."""
    return (roles.get(CHAIN, {}), roles.get(EVAL, {})) if roles else (cluster, cluster)


def _rooms(
    chain: Mapping[str, Any], evaluator: Mapping[str, Any], actors: int, cluster: Resources, roles: Roles
) -> tuple[int, int]:
    """Number of evaluators that fit beside the chain actors, and without them."""
    _, place = _places(cluster, roles)
    return _room(chain, evaluator, place, 0 if roles else actors), _room(chain, evaluator, place, 0)


def _most(config: Config, room: int) -> int:
    return max(config.max_evaluators or room, config.min_evaluators)


def _packed(allowed: Packed, on_cpu: Packed, room: Callable[[Packed], tuple[int, int]]) -> Packed:
    """The most that can be packed without reducing the number of evaluators, of which at least one must fit.

    Workers on a GPU pack nothing, so their flags stay as allowed.
    """
    nothing = Packed(allowed.chain and not on_cpu.chain, allowed.evaluator and not on_cpu.evaluator)
    for packed in (allowed, Packed(allowed.chain, nothing.evaluator)):
        if room(packed) == room(nothing) and min(room(packed)) >= 1:
            return packed
    return nothing


def _with_memory(
    chain: Mapping[str, Any], evaluator: Mapping[str, Any], demands: Demands, packed: Packed
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The Ray options of both actors, with the memory of those on the CPU."""
    asked = demands.chain.on_cpu(packed.chain), demands.evaluator.on_cpu(packed.evaluator)
    first, second = (
        {**options} if options["num_gpus"] else {**options, "memory": memory}
        for options, memory in zip((chain, evaluator), asked, strict=True)
    )
    return first, second


def _room(chain: Mapping[str, Any], evaluator: Mapping[str, Any], cluster: Resources, taken: int) -> int:
    """Number of evaluators that fit beside `taken` chain actors; 0 if either actor is too large for every node."""
    if max(evaluator.get("memory", 0), chain.get("memory", 0) if taken else 0) > cluster.get(
        "largest_node_memory", math.inf
    ):
        return 0
    return min(
        math.floor((cluster.get(have, 0.0) - taken * chain.get(what, 0)) / evaluator[what] + 1e-6)
        for what, have in (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory", "memory"))
        if evaluator.get(what)
    )


def shares(
    config: Config, gpus: float, roles: bool, demands: Demands | None = None, memory: float | None = None
) -> tuple[float, float]:
    """The GPUs of a chain actor and of an evaluator; with roles the two share no node, and so no GPU.

    By default a chain actor has a GPU of its own, or what its memory takes of a cluster's single one, and as many
    evaluators as fit divide a GPU, or what is left of the single one. Where the GPUs' `memory` is unknown or too small
    for both, it is a half of a single GPU each, and else a whole one.
    """
    asked = config.chain_gpus or config.eval_gpus
    if config.device.startswith("cuda") and not gpus and not asked:
        raise UserError("CUDA was asked for and the cluster has no GPU: use `device` cpu or auto")
    share = 0.0 if config.device == "cpu" or not (gpus or asked) else 0.5 if gpus == 1 and not roles else 1.0
    chain, evaluator = (share if given is None else given for given in (config.chain_gpus, config.eval_gpus))
    if share and demands and memory:
        alone = share == 1
        if config.chain_gpus is None and not alone:
            chain = math.ceil(_PARTS * _part(demands.chain, memory)) / _PARTS
        rest = 1.0 if alone else 1 - chain
        fitting = min(_MOST_ON_A_GPU, int(rest / _part(demands.evaluator, memory)))
        if fitting < 1:
            return shares(config, gpus, roles)
        if config.eval_gpus is None:
            evaluator = int(_PARTS * rest / fitting + 1e-6) / _PARTS
    return chain, evaluator


def _part(demand: Demand, memory: float) -> float:
    """The part of a GPU that a worker fills."""
    return (demand.on_gpu + _CONTEXT) / (USABLE * memory)


def _check_room(chain: Mapping[str, Any], evaluator: Mapping[str, Any], cluster: Resources) -> None:
    """Raise if one chain actor and one evaluator cannot be scheduled together: the evaluator finds the chain's base."""
    largest = cluster.get("largest_node_GPU", cluster.get("GPU", 0.0))
    for name, actor in (("chain", chain), ("eval", evaluator)):
        if actor.get("num_gpus", 0) > largest:
            raise UserError(f"`{name}_gpus` is {actor['num_gpus']:g}, and there are {largest:g} GPUs: 0 is the CPU")
    gpus, bytes_ = (chain.get(what, 0) + evaluator.get(what, 0) for what in ("num_gpus", "memory"))
    if gpus > cluster.get("GPU", 0.0):
        raise UserError(
            f"a chain actor and an evaluator take {gpus:g} GPUs together, and there are {cluster['GPU']:g}: "
            "give smaller `chain_gpus` and `eval_gpus`, or 0 for the CPU"
        )
    if bytes_ > cluster.get("memory", math.inf):
        raise UserError(
            f"a chain actor and an evaluator need {bytes_ / 1e9:.1f} GB of memory together, and Ray found "
            f"{cluster['memory'] / 1e9:.1f} GB to be free: free some, or take a machine with more"
        )


def options(cpus: float, gpus: float, roles: bool, role: str) -> dict[str, Any]:
    """The Ray options of an actor with these resources; with roles, on a node of its own."""
    asked: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    return asked | {"label_selector": {"role": role}} if roles else asked
