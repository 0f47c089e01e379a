"""The storages that runs are tried on: a folder, memory, real servers of S3's, GCS's and Azure's protocols."""

import errno
import uuid

import pytest

from melbo_ray.runs.run_store import Run
from tests import emulators
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


@pytest.fixture(scope="session")
def gcs():
    with emulators.gcs():
        yield emulators.GCS


@pytest.fixture(scope="session")
def azure():
    with emulators.azure():
        yield emulators.AZURE


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Botocore tries as often as ever, but at once: its pauses are random and double every time."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links, such as FAT."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)


@pytest.fixture(params=["local", "linkless", "memory", "s3", "gcs", "azure"])
def url(request, tmp_path):
    return place(request, tmp_path)


@pytest.fixture(params=["s3", "gcs", "azure"])
def bucket_url(request, tmp_path):
    return place(request, tmp_path)


@pytest.fixture(params=["local", "memory", "s3"])
def run(request, tmp_path):
    return Run.open(place(request, tmp_path))


def place(request, tmp_path):
    """A new folder on the storage that the fixture's parameter names."""
    if request.param in ("local", "linkless"):
        request.getfixturevalue("no_links" if request.param == "linkless" else "tmp_path")
        return str(tmp_path / "runs" / "one")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/one"
    server = request.getfixturevalue(request.param)
    return f"{'s3://bucket' if request.param == 's3' else server}/{uuid.uuid4().hex}/one"
