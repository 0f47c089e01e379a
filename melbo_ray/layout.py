"""How a run is laid out on what the cluster has: how many actors of which size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from melbo_ray.config import Config, UserError
from melbo_ray.products import MOST_PACKED

_MOST_THREADS = 8
# What a process with torch, transformers and Ray takes beside the weights, and what activations add to them.
_PROCESS_BYTES, _WEIGHTS_FACTOR = 800 << 20, 1.3


@dataclass(frozen=True)
class Layout:
    """What the actors take of the cluster.

    Attributes:
        chain_actors: how many; the concepts are dealt out to them.
        chain: Ray options of a chain actor.
        evaluator: Ray options of an evaluator.
        chain_threads: torch threads of a chain actor.
        evaluator_threads: torch threads of an evaluator.
        most_beside_chains: evaluators at most while chain actors are there.
        most_evaluators: evaluators at most when they are gone.
    """

    chain_actors: int
    chain: dict[str, Any]
    evaluator: dict[str, Any]
    chain_threads: int
    evaluator_threads: int
    most_beside_chains: int
    most_evaluators: int


def lay_out(
    config: Config,
    concepts: int,
    weight_bytes: int,
    cluster: Mapping[str, float],
    roles: bool,
    fixed: bool = False,
) -> Layout:
    """The layout for `concepts` chains of a model of `weight_bytes` on a cluster's total resources.

    On the CPU a chain actor has half of a machine's cores and evaluators one each. With GPUs the shares are those of
    the configuration; where it gives none, an actor takes half of the one GPU, or one of several.
    `roles`: the nodes carry labels `role: chain` and `role: eval`, and actors go where they belong.
    `fixed`: the cluster cannot grow.

    Raises:
        UserError: CUDA is asked for, and the cluster has no GPU; or it is fixed and too small to begin.
    """
    cpus, gpus = cluster.get("CPU", 1.0), cluster.get("GPU", 0.0)
    chain_gpus, eval_gpus = _shares(config, gpus)
    if chain_gpus:
        free = gpus - config.min_evaluators * eval_gpus
        actors = min(concepts, max(1, int(free // chain_gpus)))
        chain_cpus = threads = 1
    else:
        actors = min(concepts, max(1, int(cpus // 4)))
        chain_cpus = threads = max(1, min(int(cluster.get("largest_node_CPU", cpus) // 2), _MOST_THREADS))
    if cpus < 2:
        chain_cpus = 0.5
    evaluator_cpus = min(1.0, cpus / 2)
    # Packed for its products, a worker on the CPU holds the weights about twice more.
    packed = 2 * weight_bytes if weight_bytes <= MOST_PACKED else 0
    memory = 0 if eval_gpus else int(weight_bytes * _WEIGHTS_FACTOR) + packed + _PROCESS_BYTES
    chain = _options(chain_cpus, chain_gpus, 0 if chain_gpus else memory, roles, "chain")
    evaluator = _options(evaluator_cpus, eval_gpus, memory, roles, "eval")
    if fixed:
        _check_room(chain if actors else {}, evaluator, cluster)

    def room(taken: int) -> int:
        rooms = [
            int((have - taken * chain.get(what, 0)) // evaluator[what])
            for what, have in (("num_cpus", cpus), ("num_gpus", gpus), ("memory", cluster.get("memory", 0.0)))
            if evaluator.get(what)
        ]
        most = config.max_evaluators if config.max_evaluators is not None else min(rooms)
        return max(most, config.min_evaluators)

    return Layout(actors, chain, evaluator, threads, 1, room(actors), room(0))


def _shares(config: Config, gpus: float) -> tuple[float, float]:
    """The GPUs of a chain actor and of an evaluator."""
    asked = config.chain_gpus or config.eval_gpus
    if config.device.startswith("cuda") and not gpus and not asked:
        raise UserError("CUDA was asked for and the cluster has no GPU: use --device cpu or auto")
    share = 0.0 if config.device == "cpu" or not (gpus or asked) else 0.5 if gpus == 1 else 1.0
    chain, evaluator = (share if given is None else given for given in (config.chain_gpus, config.eval_gpus))
    return chain, evaluator


def _check_room(chain: Mapping[str, Any], evaluator: Mapping[str, Any], cluster: Mapping[str, float]) -> None:
    """Refuse what would wait for ever: a chain actor holds its place while an evaluator finds its base."""
    largest = cluster.get("largest_node_GPU", cluster.get("GPU", 0.0))
    for name, actor in (("chain", chain), ("eval", evaluator)):
        if actor.get("num_gpus", 0) > largest:
            raise UserError(f"--{name}-gpus is {actor['num_gpus']:g}, and there are {largest:g} GPUs: 0 is the CPU")
    gpus, bytes_ = (chain.get(what, 0) + evaluator.get(what, 0) for what in ("num_gpus", "memory"))
    if gpus > cluster.get("GPU", 0.0):
        raise UserError(
            f"a chain actor and an evaluator take {gpus:g} GPUs together, and there are {cluster['GPU']:g}: "
            "give smaller --chain-gpus and --eval-gpus, or 0 for the CPU"
        )
    if bytes_ > cluster.get("memory", math.inf):
        raise UserError(
            f"a chain actor and an evaluator need {bytes_ / 1e9:.1f} GB of memory together, and Ray found "
            f"{cluster['memory'] / 1e9:.1f} GB to be free: free some, or take a machine with more"
        )


def _options(cpus: float, gpus: float, memory: int, roles: bool, role: str) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if memory:
        options["memory"] = memory
    if roles:
        options["label_selector"] = {"role": role}
    return options
