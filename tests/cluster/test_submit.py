"""`ray job submit` as docs/cluster.md has it, against a real head that asks for a token."""

import collections
import contextlib
import os
import re
import subprocess
import threading
import urllib.request

import pytest

from melbo_ray.runs.run_store import Run
from tests.cluster.head import head as head_of_our_own
from tests.cluster.head import submission
from tests.cluster.tiny_study import REPOSITORY, rows
from tests.s3 import environment, free_port, serve

SECRETS = ("hunter2secret", "tester")


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("weed")) as server, environment(server.environment):
        yield server


@pytest.fixture(scope="module")
def metrics():
    """The port where the head exports its metrics."""
    return free_port()


@pytest.fixture(scope="module")
def head(s3, ray_of_our_own, metrics):
    """A head whose machine has the credentials."""
    with head_of_our_own(metrics) as address:
        yield address


def submit(head, command, **variables):
    line, env = submission(head, command), os.environ | variables
    return subprocess.run(line, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False)


@contextlib.contextmanager
def watched(port):
    """While it lasts, the metrics are read every half second, as Prometheus would; every value of ours, by name."""
    seen, over = collections.defaultdict(list), threading.Event()

    def watch():
        while not over.wait(0.5):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                for name, labels, value in re.findall(r"^ray_melbo_(\w+){(.*)} (\S+)$", page.read().decode(), re.M):
                    seen[name, *re.findall(r'concept="(\w+)"', labels)].append(float(value))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def test_a_submitted_study_ends_in_object_storage_and_tells_no_credential(head, metrics, tiny, undisturbed):
    with watched(metrics) as seen:
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
    told = [done.stdout, done.stderr, listed.stdout, run.manifest().model_dump_json()]
    told += [run.storage.get(name).decode() for name in run.storage.names("lease")]
    assert not any(secret in text for text in told for secret in SECRETS)
    found, evaluated = seen["vectors_found", "code"], seen["vectors_evaluated", "code"]
    assert found == sorted(found)
    assert found[-1] == 40
    assert 0 < max(evaluated) <= 40
    losses = [row["loss"] for row in rows("s3://bucket/submitted/run")["code", "vectors"]]
    assert set(seen["loss", "code"]) <= set(losses)
    assert max(seen["backlog", "all"]) > 0
    assert max(seen["evaluations_per_second", "all"]) > 0


def test_without_the_token_nothing_is_submitted(head, tiny):
    done = submit(head, tiny.command("ortho", "s3://bucket/refused", "run"), RAY_AUTH_MODE="disabled")
    assert done.returncode != 0
    assert "Unauthorized" in done.stdout + done.stderr or "401" in done.stdout + done.stderr
    assert Run.open("s3://bucket/refused/run").manifest() is None


def test_results_into_the_unpacked_copy_are_refused(head, tiny):
    done = submit(head, tiny.command("ortho", "runs", "run"))
    assert done.returncode != 0
    assert "error: --storage is 'runs': a submitted job runs in an unpacked copy" in done.stdout
