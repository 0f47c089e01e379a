"""A Ray head that jobs are submitted to, as docs/cluster.md has it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.s3 import free_port


@contextlib.contextmanager
def head(metrics: int = 0) -> Generator[str]:
    """A head that asks for a token, in a process session of its own; the address of its dashboard.

    `metrics`: the port where it exports what Prometheus collects, every second.
    """
    folder, port, dashboard = tempfile.mkdtemp(prefix="ray", dir="/tmp"), free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.delenv("PYTHONPATH", raising=False)
        # What activating the environment does: `ray` here and `python` on the head are those of these tests.
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        subprocess.run(["ray", "get-auth-token", "--generate"], check=True, capture_output=True)
        command = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
        command += ["--num-cpus=2", f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}"]
        # The agent that starts jobs has one fixed port by default, which another Ray on this machine may have.
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={metrics or free_port()}"]
        node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            _wait_for(f"http://127.0.0.1:{dashboard}/api/version", node)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            node.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


def submission(address: str, command: list[str]) -> list[str]:
    """The command line that submits a job's command."""
    line = ["ray", "job", "submit", "--address", address, "--working-dir", ".", "--runtime-env", "runtime-env.yaml"]
    return [*line, "--", "python", *command[1:]]


def _wait_for(url: str, node: subprocess.Popen) -> None:
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert node.poll() is None, "the head did not start"
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2):
            return
        time.sleep(0.2)
    raise TimeoutError(url)
