"""Being on a Ray cluster, and what its actors answer."""

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
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from melbo_ray.errors import Terminated, UserError, first_line
from melbo_ray.host import cores

_QUIET = 10.0
_OBJECT_STORE = 512 << 20
_USELESS = (torch.AcceleratorError, torch.OutOfMemoryError)
LOST = (RayActorError, ObjectLostError, OutOfMemoryError, *_USELESS)
"""An actor is gone or out of reach, or its GPU fails it: it must end, and its work be handed out again."""


@contextlib.contextmanager
def connected() -> Generator[tuple[dict[str, float], bool, bool]]:
    """Be on the cluster that RAY_ADDRESS names (as `ray job submit` does), or on one that this machine is alone.

    Gives its total resources, with the CPUs, the GPUs and the memory of the largest node; whether its nodes are
    labelled with roles; and whether it can never grow: of one that others have started nobody knows.

    Raises:
        UserError: the cluster cannot be reached, refuses the token, or does not come up.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": max(2, cores())}
        # Ray would keep 30 % of the memory for objects; ours are vectors.
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
        nodes = [node for node in ray.nodes() if node["Alive"]]
        largest = {
            f"largest_node_{what}": max(node["Resources"].get(what, 0.0) for node in nodes)
            for what in ("CPU", "GPU", "memory")
        }
        roles = any("role" in node["Labels"] for node in nodes)
        yield ray.cluster_resources() | largest, roles, address is None
    finally:
        ray.shutdown()


def answer(ref: Any) -> Any:
    """What an actor answers; an error that the driver can deal with as itself, without Ray's traceback around it."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, FileExistsError, *_USELESS)):
            raise error.cause from None
        raise


def _standing() -> str:
    """What the cluster has and what of it is free, in words."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    have, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get('CPU', 0.0):g} of {have.get('CPU', 0.0):g} CPUs"]
    if have.get("GPU"):
        parts.append(f"{free.get('GPU', 0.0):g} of {have['GPU']:g} GPUs")
    parts.append(f"{free.get('memory', 0.0) / 1e9:.1f} of {have.get('memory', 0.0) / 1e9:.1f} GB")
    return f"the cluster has {nodes} node{'s' * (nodes != 1)} alive, with {', '.join(parts)} free"


class Silence:
    """For how long nobody has been at work: to be told after some seconds, then ever more rarely."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since, self._next = clock, clock(), _QUIET

    def told(self, at_work: bool, takes: Mapping[str, Any]) -> str | None:
        """A line that says so, where it is time to; `takes` are the Ray options of the worker that is waited for."""
        seconds = self._clock() - self._since
        if at_work:
            self._since, self._next = self._clock(), _QUIET
        if at_work or seconds < self._next:
            return None
        self._next = 3 * seconds
        needs = f"{takes['num_cpus']:g} CPUs, {takes['num_gpus']:g} GPUs and {takes.get('memory', 0) / 1e9:.1f} GB"
        return f"waiting for a worker for {seconds:.0f} s: it takes {needs}; {_standing()}"


class Deaths:
    """Counts actors that die one after another without anything done between; too many end the run."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def none(self) -> None:
        """Something was done."""
        self._in_a_row = 0

    def one_more(self, error: BaseException, bearable: int) -> None:
        """Note a death.

        Raises:
            UserError: it was one too many.
        """
        self._in_a_row += 1
        if self._in_a_row > bearable:
            raise UserError(
                f"{self._in_a_row} workers died one after another, the last one so: {first_line(error)} "
                "(out of memory? see Ray's logs); the same command resumes"
            )
