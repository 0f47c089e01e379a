"""The connection to a Ray cluster, and the results of its actors."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import ray
import torch
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from melbo_ray.cluster.nodes import nodes_alive
from melbo_ray.cluster.resources import Resources, Roles
from melbo_ray.errors import Terminated, UserError, first_line
from melbo_ray.host import cores

_QUIET, _LOOK_EVERY, _PROBED_FOR = 10.0, 1.0, 60.0
_OBJECT_STORE = 512 << 20
_USELESS = (torch.AcceleratorError, torch.OutOfMemoryError)
LOST = (RayActorError, ObjectLostError, OutOfMemoryError, *_USELESS)
"""Errors of an actor that is dead, unreachable, or whose GPU failed: it is killed, and its unit requeued."""
FULL = (OutOfMemoryError, torch.OutOfMemoryError)
"""Those of an actor for which memory did not suffice."""


@contextlib.contextmanager
def connected() -> Generator[bool]:
    """Connect to the cluster at RAY_ADDRESS (which `ray job submit` sets), or start a cluster of this machine alone.

    Yields whether the cluster is known never to grow, which only holds for the one started here.

    Raises:
        UserError: the cluster cannot be reached, refuses the token, or does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": max(2, cores())}
        # Ray reserves 30 % of the memory for objects by default; a run's objects are single vectors.
        options["object_store_memory"] = _OBJECT_STORE
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", **options)
    except SystemExit:  # what Ray makes of SIGTERM
        raise Terminated from None
    except Exception as error:  # Ray raises bare ones where a node does not come up in time
        raise UserError(f"cannot join the Ray cluster at {address or 'this machine'}: {first_line(error)}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own handler aborts
    try:
        yield address is None
    finally:
        ray.shutdown()


def resources() -> tuple[Resources, Roles]:
    """The resources of the nodes that are alive: of all, and by role."""
    return nodes_alive(ray.nodes())


def gpu_memory() -> float | None:
    """The memory of the cluster's smallest GPU, bytes; None if there is none, or a node does not tell within a minute.

    Ray does not know it, so a task that takes nothing asks torch on one node of each type of GPU.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    kinds = {
        frozenset(name for name in node["Resources"] if name.startswith("accelerator_type:")): node for node in nodes
    }
    probe = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_least_gpu_memory)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in kinds.values()]
    asked = [probe.options(scheduling_strategy=place).remote() for place in places]
    if not asked or len(ray.wait(asked, num_returns=len(asked), timeout=_PROBED_FOR)[0]) < len(asked):
        return None
    try:
        return min(ray.get(asked))
    except (RayError, ValueError):  # a node that is lost, or whose torch sees no GPU
        return None


def _least_gpu_memory() -> float:
    return min(float(torch.cuda.get_device_properties(i).total_memory) for i in range(torch.cuda.device_count()))


def wait_for_nodes(
    missing: Callable[[Resources, Roles], tuple[str, dict[str, Any]] | None], say: Callable[[str], object]
) -> None:
    """Wait until no node is missing, and ask the autoscaler for the one that is.

    Args:
        missing: the node to wait for, from `resources`: in words, and the Ray options of what would run there.
        say: prints a line, after 10 s and then at growing intervals.
    """
    notice = WaitNotice()
    placeholder: tuple[dict[str, Any], Any] | None = None
    while (found := missing(*resources())) is not None:
        what, takes = found
        if placeholder is None or placeholder[0] != takes:
            # A task that cannot be placed is what an autoscaler answers to.
            placeholder = takes, ray.remote(lambda: None).options(max_retries=0, **takes).remote()
        if (line := notice.waited(f"for {what}")) is not None:
            say(line)
        time.sleep(_LOOK_EVERY)
    if placeholder is not None:
        ray.cancel(placeholder[1], force=True)


def fetch(ref: Any) -> Any:
    """Get an actor's result; errors that the driver handles are raised unwrapped, without Ray's traceback."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, FileExistsError, *_USELESS)):
            raise error.cause from None
        raise


def _cluster_line() -> str:
    """A line on the cluster's total and free resources."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    have, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get('CPU', 0.0):g} of {have.get('CPU', 0.0):g} CPUs"]
    if have.get("GPU"):
        parts.append(f"{free.get('GPU', 0.0):g} of {have['GPU']:g} GPUs")
    parts.append(f"{free.get('memory', 0.0) / 1e9:.1f} of {have.get('memory', 0.0) / 1e9:.1f} GB")
    return f"the cluster has {nodes} node{'s' * (nodes != 1)} alive, with {', '.join(parts)} free"


class WaitNotice:
    """Reports how long no worker has been at work: first after 10 s, then at growing intervals."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since, self._next = clock, clock(), _QUIET

    def line(self, at_work: bool, takes: Mapping[str, Any]) -> str | None:
        """The report if one is due, else None; `takes` are the Ray options of the worker that the run waits for."""
        if at_work:
            self._since, self._next = self._clock(), _QUIET
            return None
        needs = f"{takes['num_cpus']:g} CPUs, {takes['num_gpus']:g} GPUs and {takes.get('memory', 0) / 1e9:.1f} GB"
        return self.waited("for a worker", f": it takes {needs}")

    def waited(self, what: str, why: str = "") -> str | None:
        """The report on the time waited for `what` if one is due, else None."""
        seconds = self._clock() - self._since
        if seconds < self._next:
            return None
        self._next = 3 * seconds
        return f"waiting {what} for {seconds:.0f} s{why}; {_cluster_line()}"


class Deaths:
    """Counts consecutive actor deaths, with no result between them; too many end the run."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def reset(self) -> None:
        """Restart the count, after a result."""
        self._in_a_row = 0

    def count(self, error: BaseException, bearable: int) -> None:
        """Count a death.

        Raises:
            UserError: more than `bearable` consecutive deaths.
        """
        self._in_a_row += 1
        if self._in_a_row > bearable:
            raise UserError(
                f"{self._in_a_row} workers died one after another, the last one so: {first_line(error)} "
                "(out of memory? see Ray's logs); the same command resumes"
            )
