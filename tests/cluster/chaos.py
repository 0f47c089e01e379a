"""Kills, from a seed: evaluators, the chain actor, nodes, the driver; and storage that fails and stalls."""

import contextlib
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from ray._private.node import Node
from ray.cluster_utils import Cluster

from tests.cluster.tiny_study import REPOSITORY
from tests.s3 import Faults

NODES: Any = ({"num_cpus": 2}, {"num_cpus": 1})
SHORT_PATIENCE = {
    "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
"""With these in its environment Ray knows within seconds that a node is dead."""
KINDS = ("evaluator", "chain", "driver", "node", "storage fails", "storage stalls")


@contextlib.contextmanager
def cluster() -> Generator[Cluster]:
    """A head without CPUs and two nodes, on this machine; a dead node is known as dead within seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT_PATIENCE.items():
            patch.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for node in NODES:
                nodes.add_node(**node)
            yield nodes
        finally:
            nodes.shutdown()


@dataclass
class Chaos:
    """A study under attack; `run` returns when it has ended.

    Attributes:
        command: the job.
        url: where the run will be.
        cluster: what it runs on.
        faults: of the way to its storage.
        seed: of every choice.
        kills: how many; the kinds come in a random order, the chain first of all, since it ends long before the rest.
        every: units written between two kills, on the average.
    """

    command: list[str]
    url: str
    cluster: Cluster
    faults: Faults
    seed: int
    kills: int
    every: float
    tally: Counter = field(default_factory=Counter)

    def run(self, seconds: float) -> None:
        """Kill until there have been enough, while units are written at a pace that leaves time to; then let it end."""
        dice = random.Random(self.seed)
        kinds = ["chain", *(kind for _ in range(self.kills) for kind in dice.sample(KINDS, len(KINDS)))]
        deadline = time.monotonic() + seconds
        self.faults.pace = 0.5
        driver = self.start()
        for kind in kinds[: self.kills]:
            target = self.faults.units + dice.randint(1, round(2 * self.every) - 1)
            while self.faults.units < target and driver.poll() is None:
                assert time.monotonic() < deadline, f"only {self.tally} and {self.faults.units} units in time"
                self._heal()
                time.sleep(0.05)
            time.sleep(dice.random())
            if driver.poll() is not None:
                break
            driver = self._strike(kind, dice, driver)
        self.faults.pace = 0.0
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"after {self.tally} it does not end"
            self._heal()
            time.sleep(0.2)
        assert driver.returncode == 0, driver.communicate()

    def _strike(self, kind: str, dice: random.Random, driver: subprocess.Popen) -> subprocess.Popen:
        if kind in ("evaluator", "chain"):
            given_up = time.monotonic() + 5
            while not (victims := self._workers("ray::Worker.chains" if kind == "chain" else "ray::Worker")):
                if driver.poll() is not None:
                    return driver
                if time.monotonic() > given_up:
                    kind = "evaluator"  # the chain has found all its vectors
                time.sleep(0.1)
            with contextlib.suppress(psutil.NoSuchProcess):
                dice.choice(victims).kill()
        elif kind == "node":
            self._replace(dice.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)))
        elif kind == "driver":
            driver.kill()
            driver.communicate()
            driver = self.start()
        elif kind == "storage fails":
            self.faults.waiting += [dice.choice([(503, "SlowDown"), (500, "InternalError")]) for _ in range(15)]
        else:
            self.faults.waiting += [2.0] * 4
        self.tally[kind] += 1
        return driver

    def _replace(self, node: Node) -> None:
        cpus: Any = {"num_cpus": node._ray_params.num_cpus}
        self.cluster.remove_node(node, allow_graceful=False)
        self.cluster.add_node(**cpus)

    def _heal(self) -> None:
        """Put a new node in the place of one that died of itself, as an autoscaler does."""
        for node in list(self.cluster.worker_nodes):
            if node.all_processes["raylet"][0].process.poll() is not None:
                self._replace(node)

    def start(self) -> subprocess.Popen:
        """A driver of the study."""
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        return subprocess.Popen(
            self.command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _workers(self, title: str) -> list[psutil.Process]:
        """The actors' processes with this title, all of them children of the raylets that we started."""
        found = []
        for node in self.cluster.worker_nodes:
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            for process in raylet.children():
                with contextlib.suppress(psutil.Error, IndexError):
                    if process.cmdline()[0].startswith(title):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)
