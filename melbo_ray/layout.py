"""How a run is laid out on what the cluster has: how many actors of which size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from melbo_ray.config import Config, UserError

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


def lay_out(config: Config, concepts: int, weight_bytes: int, cluster: Mapping[str, float], roles: bool) -> Layout:
    """The layout for `concepts` chains of a model of `weight_bytes` on a cluster's total resources.

    On the CPU a chain actor has half of a machine's cores and evaluators one each. With GPUs the shares are those of
    the configuration; where it gives none, the chain and the evaluators share one GPU, or take one each.
    `roles`: the nodes carry labels `role: chain` and `role: eval`, and actors go where they belong.

    Raises:
        UserError: CUDA is asked for, and the cluster has no GPU.
    """
    cpus, gpus = cluster.get("CPU", 1.0), cluster.get("GPU", 0.0)
    asked = config.chain_gpus or config.eval_gpus
    if config.device.startswith("cuda") and not gpus and not asked:
        raise UserError("CUDA was asked for and the cluster has no GPU: use --device cpu or auto")
    if asked or (gpus and config.device != "cpu"):
        share = 0.5 if gpus == 1 else 1.0
        chain_gpus = config.chain_gpus if asked else share
        eval_gpus = config.eval_gpus if asked else share
    else:
        chain_gpus = eval_gpus = 0.0
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
    memory = 0 if eval_gpus else int(weight_bytes * _WEIGHTS_FACTOR) + _PROCESS_BYTES
    chain = _options(chain_cpus, chain_gpus, 0 if chain_gpus else memory, roles, "chain")
    evaluator = _options(evaluator_cpus, eval_gpus, memory, roles, "eval")

    def room(taken: int) -> int:
        rooms = [
            int((have - taken * chain.get(what, 0)) // evaluator[what])
            for what, have in (("num_cpus", cpus), ("num_gpus", gpus), ("memory", cluster.get("memory", 0.0)))
            if evaluator.get(what)
        ]
        most = config.max_evaluators if config.max_evaluators is not None else min(rooms)
        return max(most, config.min_evaluators)

    return Layout(actors, chain, evaluator, threads, 1, room(actors), room(0))


def _options(cpus: float, gpus: float, memory: int, roles: bool, role: str) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if memory:
        options["memory"] = memory
    if roles:
        options["label_selector"] = {"role": role}
    return options
