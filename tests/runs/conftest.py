"""The storages that runs are tried on: a folder, memory, a real S3 server."""

import uuid

import pytest

from melbo_ray.runs.run_store import Run
from tests.s3 import environment, serve


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="module")
def s3(server):
    """The server, and the environment that leads to it."""
    with environment(server.environment):
        yield server


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Botocore tries as often as ever, but at once: its pauses are random and double every time."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.fixture(params=["local", "memory", "s3"])
def url(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "runs" / "one")
    if request.param == "s3":
        request.getfixturevalue("s3")
        return f"s3://bucket/{uuid.uuid4().hex}/one"
    return f"memory://{uuid.uuid4().hex}/one"


@pytest.fixture
def run(url):
    return Run.open(url)
