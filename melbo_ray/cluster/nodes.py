"""The nodes of a cluster, as Ray lists them: what they hold, and which of them a layout has to wait for."""

from collections.abc import Iterable, Mapping
from typing import Any

from melbo_ray.cluster.resources import CHAIN, EVAL, Resources, Roles, options, shares
from melbo_ray.config import Config


def nodes_alive(nodes: Iterable[Mapping[str, Any]]) -> tuple[Resources, Roles]:
    """The resources of the nodes alive among those of `ray.nodes()`: of all, and by role."""
    alive = [node for node in nodes if node["Alive"]]
    labels = {node["Labels"]["role"] for node in alive if "role" in node["Labels"]}
    roles = {role: _total(node for node in alive if node["Labels"].get("role") == role) for role in labels}
    return _total(alive), roles


def awaited(config: Config, chains: int, cluster: Resources, roles: Roles) -> tuple[str, dict[str, Any]] | None:
    """The node that a layout has to wait for, in words and as Ray options of what runs there; None if it need not.

    What an actor takes is seen from the node that it is meant for: a study of GPU machines would otherwise be laid out
    on whatever is up first. Only evaluators whose GPUs are known from the chain's node need no node of their own yet.

    Args:
        config: options of the run.
        chains: number of chains to run.
        cluster: total resources of the cluster.
        roles: resources by role.
    """
    for role in (CHAIN, EVAL) if chains else (EVAL,):
        gpus, place = _gpus_asked(config, role), roles.get(role) if roles else cluster
        if place and place.get("CPU") and (not gpus or place.get("GPU")):
            continue
        if roles and role == EVAL and chains and shares(config, cluster.get("GPU", 0.0), True)[1]:
            continue
        needs = "a GPU" if gpus else "CPUs"
        what = f"a node with {needs} and the label role={role}" if roles else f"a node with {needs}"
        return what, options(1, gpus, bool(roles), role)
    return None


def _gpus_asked(config: Config, role: str) -> float:
    """GPUs of an actor as far as the options name them; 0 if they do not."""
    share = config.chain_gpus if role == CHAIN else config.eval_gpus
    if share is None and config.device != "cpu":
        return 1.0 if config.device == "cuda" or config.chain_gpus or config.eval_gpus else 0.0
    return share or 0.0


def _total(nodes: Iterable[Mapping[str, Any]]) -> Resources:
    resources = [node["Resources"] for node in nodes]
    kinds = {what for each in resources for what in each if what in ("CPU", "GPU", "memory")}
    total = {what: sum(each.get(what, 0.0) for each in resources) for what in kinds}
    return total | {
        f"largest_node_{what}": max((each.get(what, 0.0) for each in resources), default=0.0)
        for what in ("CPU", "GPU", "memory")
    }
