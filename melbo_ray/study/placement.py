"""The layout of a study on the nodes that its cluster has by now."""

import dataclasses
import time
from functools import partial

from rich.console import Console

from melbo_ray.cluster.nodes import awaited
from melbo_ray.cluster.resources import GPU_MEMORY, Layout, grown, lay_out
from melbo_ray.cluster.session import gpu_memory, resources, wait_for_nodes
from melbo_ray.config import Config
from melbo_ray.runs.manifest import Packed
from melbo_ray.study.preflight import Checked

_LOOK_EVERY = 10.0


def place(checked: Checked, chains: int, fixed: bool, allowed: Packed, console: Console) -> Layout:
    """The layout on the nodes that are alive, after the wait for those without which there is none.

    Args:
        checked: the checked configuration.
        chains: number of chains to run.
        fixed: whether the cluster is known never to grow.
        allowed: as in `lay_out`.
        console: is told what is waited for, and what is done without.
    """

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    if not fixed:
        wait_for_nodes(partial(awaited, checked.config, chains), say)
    cluster, roles = resources()
    unsaid = checked.config.device != "cpu" and None in (checked.config.chain_gpus, checked.config.eval_gpus)
    if unsaid and cluster.get("GPU") and (memory := gpu_memory()) is not None:
        cluster = {**cluster, GPU_MEMORY: memory}
    layout = lay_out(checked.config, chains, checked.demands, cluster, roles, fixed=fixed, allowed=allowed)
    if GPU_MEMORY in cluster:
        say(
            f"the smallest GPU has {cluster[GPU_MEMORY] / 1e9:.0f} GB: a chain actor takes "
            f"{layout.chain['num_gpus']:g} of one, an evaluator {layout.evaluator['num_gpus']:g}"
        )
    if layout.packed != allowed:
        say(_unpacked_line(layout.packed))
    if not fixed and _on_cpus_unasked(checked.config, layout):
        say(
            "no node of the cluster has a GPU: this study runs on its CPUs to the end "
            "(--device cuda waits for a GPU, --device cpu means the CPUs)"
        )
    return layout


class Growth:
    """Follows the nodes that join a cluster later, unless it is `fixed`."""

    def __init__(self, config: Config, fixed: bool) -> None:
        self._config, self._fixed, self._next = config, fixed, time.monotonic() + _LOOK_EVERY

    def follow(self, layout: Layout) -> Layout:
        """The layout, with more evaluators where nodes have joined; it looks for them every 10 s."""
        if self._fixed or time.monotonic() < self._next:
            return layout
        self._next = time.monotonic() + _LOOK_EVERY
        return grown(layout, self._config, *resources())


def _on_cpus_unasked(config: Config, layout: Layout) -> bool:
    """Whether actors run on the CPU because there is no GPU, and not because they were asked to."""
    unsaid = config.device == "auto" and None in (config.chain_gpus, config.eval_gpus)
    return unsaid and not layout.chain["num_gpus"] and not layout.evaluator["num_gpus"]


def _unpacked_line(packed: Packed) -> str:
    """The line printed if some weights are not packed, which is slower and changes the last bits of results."""
    without = " and ".join(name for name, yes in dataclasses.asdict(packed).items() if not yes)
    return f"memory is short for packed copies of the weights: none for {without}, which costs time only"
