"""The page's server: on loopback only, for its own page only, with nothing from the network.

`GET /state` is what the page may choose from; `POST /write` answers with lines of JSON as tokens come. Another site's
script cannot ask: a request whose Host or Origin is not this server's own is refused, which also ends DNS rebinding,
and a POST must be JSON, which no form can send.
"""

import contextlib
import dataclasses
import errno
import json
import threading
from collections.abc import Generator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from melbo_ray.errors import UserError, first_line
from melbo_ray.play.stage import Stage

HOST = "127.0.0.1"
MOST_TOKENS = 256
_MOST_BYTES = 1 << 18
_SECONDS = 30.0
_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/play.js": ("play.js", "text/javascript; charset=utf-8"),
    "/play.css": ("play.css", "text/css; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Ask(BaseModel):
    """What the page asks to be written."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    concept: str
    """Concept of the chain."""
    n: Annotated[int, Field(ge=0)]
    """Index of the vector; the base is 0."""
    norm: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    """Norm of the vector and of the random direction (residual-stream units); null for the vector's own."""
    prompt: str
    """What the user says."""
    length: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 48
    """Maximum length of each text, tokens."""


class PlayServer(ThreadingHTTPServer):
    """Serves the page of a run on 127.0.0.1.

    Args:
        stage: the run and its model.
        port: port; 0 for any that is free.

    Raises:
        UserError: the port is taken or may not be had.
    """

    daemon_threads = True

    def __init__(self, stage: Stage, port: int = 0) -> None:
        self.stage = stage
        # One model, which writes for one request at a time; the page ends its last request before the next.
        self.writing = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "it is taken" if taken else first_line(error)
            raise UserError(f"cannot listen on port {port} of {HOST}: {why}; give another --port") from None
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def state(self) -> dict[str, Any]:
        """What the page may choose from: norms by concept and index, prompts, facts about the run."""
        stage = self.stage
        concepts = {
            name: {"prompt": stage.prompt(name), "norms": [round(float(norm), 4) for norm in vectors.norm]}
            for name, vectors in stage.vectors.items()
        }
        facts = {"run": stage.manifest.run_id, "model": stage.manifest.model, "layer": stage.layer}
        return {"concepts": concepts, "facts": facts, "most_tokens": MOST_TOKENS}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that closes its connection is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    server: Any  # the PlayServer
    server_version, sys_version = "melbo-ray", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        if not self._own():
            return
        path = self.path.partition("?")[0]
        if path in _PAGES:
            name, kind = _PAGES[path]
            self._send(HTTPStatus.OK, kind, (files("melbo_ray") / "play/page" / name).read_bytes())
        elif path == "/state":
            self._json(HTTPStatus.OK, self.server.state())
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        if not self._own():
            return
        if self.path != "/write" or self.headers.get_content_type() != "application/json":
            self._json(HTTPStatus.NOT_FOUND, {"error": "expected a POST of JSON to /write"})
            return
        try:
            size = int(self.headers.get("Content-Length", ""))
            if not 0 <= size <= _MOST_BYTES:
                raise ValueError
            ask = Ask.model_validate_json(self.rfile.read(size))
            directions = self.server.stage.directions(ask.concept, ask.n, ask.norm)
        except ValidationError as error:
            first = error.errors()[0]
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"})
        except ValueError:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"expected a body of at most {_MOST_BYTES} bytes"})
        except UserError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        else:
            self._stream(ask, directions)

    def _stream(self, ask: Ask, directions: dict[str, Any]) -> None:
        self._begin(HTTPStatus.OK, "application/x-ndjson; charset=utf-8")
        with self.server.writing, contextlib.suppress(ConnectionError, TimeoutError):
            for name, theta in directions.items():
                self._line({"name": name, "norm": float(theta.norm())})
            with contextlib.closing(self._lines(ask, directions)) as lines:
                for line in lines:
                    self._line(line)

    def _lines(self, ask: Ask, directions: dict[str, Any]) -> Generator[dict[str, Any]]:
        try:
            for event in self.server.stage.write(ask.prompt, directions, ask.length):
                yield dataclasses.asdict(event)
        except UserError as error:
            yield {"error": str(error)}

    def _own(self) -> bool:
        """Whether the request is for this server by name and from its own page, if from a page; else it is refused."""
        origin = self.headers.get("Origin")
        known = self.headers.get("Host") in self.server.hosts
        if known and origin in (None, f"http://{self.headers.get('Host')}"):
            return True
        self._json(HTTPStatus.FORBIDDEN, {"error": f"this server answers its own page alone, {self.server.url}"})
        return False

    def _line(self, value: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(value).encode() + b"\n")
        self.wfile.flush()

    def _json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, "application/json", json.dumps(value).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._begin(status, kind)
        self.wfile.write(body)

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.close_connection = True
        self.send_response(status)
        for name, value in {"Content-Type": kind, **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: prompts and addresses are the person's own."""
