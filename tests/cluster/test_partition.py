"""A node that is cut off from the others, while it goes on working: separate hosts in network namespaces."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from ray._raylet import GcsClient  # ty: ignore[missing-module-member]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # ty: ignore[missing-module-member]

from melbo_ray.runs.run_store import Run
from tests.cluster.chaos import SHORT_PATIENCE
from tests.cluster.tiny_study import REPOSITORY, rows
from tests.s3 import environment, serve

# A documentation network (RFC 5737): nobody's address.
HEAD, HERE, WORKER = "198.51.100.1", "198.51.100.254", "198.51.100.1{}"
RAY = str(Path(sys.executable).parent / "ray")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Network namespaces that are hosts on one bridge, which stands in the namespace `head` and which we are on too.

    Attributes:
        prefix: of every name that is ours.
        nodes: the Ray node of each host, by name of the host.
    """

    prefix: str = f"mb{os.getpid()}"
    nodes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def add(self, host: str, address: str) -> None:
        ip("netns", "add", f"{self.prefix}{host}")
        ip("-n", f"{self.prefix}{host}", "link", "set", "lo", "up")
        if host == "head":
            ip("-n", f"{self.prefix}head", "link", "add", "bridge", "type", "bridge")
            self._address(["-n", f"{self.prefix}head"], "bridge", address)
        else:
            self._plug(host, f"{self.prefix}{host}", "eth0")
            self._address(["-n", f"{self.prefix}{host}"], "eth0", address)
        # Ray finds out its own address by asking for a way to somewhere.
        ip("-n", f"{self.prefix}{host}", "route", "add", "default", "dev", "bridge" if host == "head" else "eth0")

    def join(self, address: str) -> None:
        """Be on the bridge ourselves."""
        self._plug("here", str(os.getpid()), self.prefix)
        self._address([], self.prefix, address)

    def start(self, host: str, *command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(["ip", "netns", "exec", f"{self.prefix}{host}", *command], **options)

    def ray(self, host: str, folder: Path, *options: str) -> None:
        """A Ray node with a folder of its own, as separate hosts have: by default they would share their sockets."""
        (folder / host).mkdir()
        command = [RAY, "start", "--block", f"--temp-dir={folder / host}", *options]
        with (folder / f"{host}.log").open("w") as log:
            self.nodes[host] = self.start(host, *command, stdout=log, stderr=log, start_new_session=True)

    def cut(self, host: str) -> None:
        """Nothing passes to or from the host any more."""
        ip("-n", f"{self.prefix}head", "link", "set", host, "down")

    def workers(self, host: str, title: str) -> list[psutil.Process]:
        """The actors' processes on a host with this title."""
        found = []
        for process in psutil.Process(self.nodes[host].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if process.cmdline()[0].startswith(title):
                    found.append(process)
        return found

    def end(self) -> None:
        processes = []
        for node in self.nodes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
            node.terminate()
        # A node that is cut off waits for an answer.
        for process in psutil.wait_procs(processes, timeout=4)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        subprocess.run(["ip", "link", "delete", self.prefix], check=False, capture_output=True)
        for host in ("head", "one", "two"):
            subprocess.run(["ip", "netns", "delete", f"{self.prefix}{host}"], check=False, capture_output=True)

    def _plug(self, port: str, namespace: str, name: str) -> None:
        head = ["-n", f"{self.prefix}head", "link"]
        ip(*head, "add", port, "type", "veth", "peer", "name", name, "netns", namespace)
        ip(*head, "set", port, "master", "bridge", "up")

    def _address(self, where: list[str], link: str, address: str) -> None:
        ip(*where, "addr", "add", f"{address}/24", "dev", link)
        ip(*where, "link", "set", link, "up")


@pytest.fixture
def hosts():
    """Three hosts: a head without CPUs and two workers, each a Ray node."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2: apt-get install iproute2, and run as root")
    hosts, folder = Hosts(), Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT_PATIENCE.items():
            patch.setenv(name, value)
        # Nobody else is on this network, and the token that other tests leave would be asked for on some hosts only.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        try:
            try:
                hosts.add("head", HEAD)
                hosts.join(HERE)
                hosts.add("one", WORKER.format(1))
                hosts.add("two", WORKER.format(2))
            except subprocess.CalledProcessError as error:
                pytest.skip(
                    f"no network namespaces here: {error.stderr.strip()}; allow CAP_SYS_ADMIN and CAP_NET_ADMIN"
                )
            yield hosts, folder
        finally:
            hosts.end()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(hosts, tmp_path):
    """The hosts as a Ray cluster, with an S3 server that all of them reach."""
    network, folder = hosts
    with serve(tmp_path, HERE) as s3, environment(s3.environment):
        options = ["--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        network.ray("head", folder, "--head", f"--node-ip-address={HEAD}", *options)
        _wait_for(1, folder)
        for number, host in enumerate(("one", "two"), 1):
            options = [f"--node-ip-address={WORKER.format(number)}", "--num-cpus=2"]
            network.ray(host, folder, f"--address={HEAD}:6379", *options)
        _wait_for(3, folder)
        yield network


def test_a_node_that_is_cut_off_loses_and_doubles_nothing(tiny, undisturbed, cluster):
    url = "s3://bucket/partition/run"
    command = tiny.command("ortho", "s3://bucket/partition", "run")
    variables = os.environ | {"RAY_ADDRESS": f"{HEAD}:6379"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    study = cluster.start("head", *command, cwd=REPOSITORY, env=variables, **pipe)
    try:
        chain = _the_host_of_the_chain(cluster, url, study)
        cluster.cut(chain)
        said, _ = study.communicate(timeout=150)
    finally:
        study.kill()
    assert study.returncode == 0, said
    assert rows(url) == rows(undisturbed[1])
    assert _alive() == 2  # the node was not only slow


def _alive():
    """How many nodes the head believes alive."""
    known = GcsClient(address=f"{HEAD}:6379").get_all_node_info().values()
    return sum(node.state == GcsNodeInfo.GcsNodeState.ALIVE for node in known)


def _wait_for(nodes, folder):
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # Ray raises bare ones while a head is coming up
            if _alive() == nodes:
                return
        time.sleep(0.5)
    raise TimeoutError(f"{nodes} nodes: {[log.read_text()[-2000:] for log in folder.glob('*.log')]}")


def _the_host_of_the_chain(cluster, url, study):
    """Where the chain runs, once it has found five vectors and before it has all forty."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert study.poll() is None, study.communicate()
        found = sum(unit.evaluation == "chain" for unit in Run.open(url).fresh())
        assert found < 40, "the chain was too fast"
        for host in ("one", "two"):
            if found >= 5 and cluster.workers(host, "ray::Worker.chains"):
                return host
        time.sleep(0.05)
    raise TimeoutError("no chain")
