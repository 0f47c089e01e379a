"""`ray job submit` as the README has it, against a real head that asks for a token."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from melbo_ray.store import Run
from tests.cluster.conftest import REPOSITORY, rows
from tests.s3 import environment, free_port, serve

SECRETS = ("hunter2secret", "tester")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("weed")) as server, environment(server.environment):
        yield server


@pytest.fixture(scope="module")
def head(s3, ray_of_our_own):
    """A head with its dashboard, in a process session of its own; its machine has the credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.delenv("PYTHONPATH")
        # What activating the environment does: `ray` here and `python` on the head are those of these tests.
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        subprocess.run(["ray", "get-auth-token", "--generate"], check=True, capture_output=True)
        folder, port, dashboard = tempfile.mkdtemp(prefix="ray", dir="/tmp"), free_port(), free_port()
        command = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
        command += ["--num-cpus=2", f"--temp-dir={folder}", f"--ray-client-server-port={free_port()}"]
        # The agent that starts jobs has one fixed port by default, which another Ray on this machine may have.
        command += [f"--dashboard-agent-listen-port={free_port()}"]
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


def submit(head, command, **variables):
    line = ["ray", "job", "submit", "--address", head, "--working-dir", ".", "--runtime-env", "runtime-env.yaml", "--"]
    line += ["python", *command[1:]]
    env = os.environ | variables
    return subprocess.run(line, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_a_submitted_study_ends_in_object_storage_and_tells_no_credential(head, tiny, undisturbed):
    done = submit(head, tiny.command("ortho", "s3://bucket/submitted", "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "vectors found",
        "results: s3://bucket/submitted/run",
        "report:  s3://bucket/submitted/run/report.html",
    ):
        assert line in done.stdout
    assert rows("s3://bucket/submitted/run") == rows(undisturbed[1])
    listed = subprocess.run(
        ["ray", "job", "list", "--address", head, "--log-style=record"], capture_output=True, text=True, check=True
    )
    run = Run.open("s3://bucket/submitted/run")
    told = [done.stdout, done.stderr, listed.stdout, json.dumps(run.manifest())]
    told += [run.storage.get(name).decode() for name in run.storage.names("lease")]
    assert not any(secret in text for text in told for secret in SECRETS)


def test_without_the_token_nothing_is_submitted(head, tiny):
    done = submit(head, tiny.command("ortho", "s3://bucket/refused", "run"), RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Unauthorized" in done.stdout + done.stderr or "401" in done.stdout + done.stderr
    assert Run.open("s3://bucket/refused/run").manifest() is None


def test_results_into_the_unpacked_copy_are_refused(head, tiny):
    done = submit(head, tiny.command("ortho", "runs", "run"))
    assert done.returncode != 0
    assert "error: --storage is 'runs': a submitted job runs in an unpacked copy" in done.stdout


def _wait_for(url, node):
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert node.poll() is None, "the head did not start"
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=2):
            return
        time.sleep(0.2)
    raise TimeoutError(url)
