"""The page's server answers its own page alone, one line where input is bad, and lines of JSON as tokens come."""

import http.client
import json
import threading

import pytest

from melbo_ray import UserError
from melbo_ray.play.server import HOST, PlayServer
from melbo_ray.play.stage import NAMES
from tests.stages import stage, write_run

ASK = {"concept": "code", "n": 2, "norm": 4.0, "prompt": "How?", "length": 3}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with PlayServer(stage(write_run(tmp_path_factory.mktemp("runs")))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    """Status, headers, and body."""
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    found = answer.status, dict(answer.headers), answer.read()
    connection.close()
    return found


def post(server, body, **headers):
    given = body if isinstance(body, bytes) else json.dumps(body)
    return ask(server, "POST", "/write", given, **({"Content_Type": "application/json"} | headers))


def test_it_listens_on_loopback_alone_and_forbids_its_page_everything_else(server):
    assert server.server_address[0] == "127.0.0.1"
    status, headers, body = ask(server, "GET", "/")
    assert (status, b"play.js" in body) == (200, True)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
    for path in ("/play.js", "/play.css", "/state"):
        assert ask(server, "GET", path)[0] == 200
    for path in ("/../server.py", "/nothing", "//evil"):
        assert ask(server, "GET", path)[0] == 404


def test_what_may_be_chosen_is_that_of_the_run(server):
    state = json.loads(ask(server, "GET", "/state")[2])
    assert state["concepts"] == {"code": {"prompt": "How?", "norms": [3, 4, 5, 6, 7]}}
    assert state["facts"] == {"run": "study", "model": "tiny", "layer": 1}


def test_lines_come_for_every_direction_norms_first_and_texts_to_their_end(server):
    status, headers, body = post(server, ASK, Origin=server.url.rstrip("/"))
    lines = [json.loads(line) for line in body.splitlines()]
    assert (status, headers["Content-Type"]) == (200, "application/x-ndjson; charset=utf-8")
    assert [line["norm"] for line in lines[:4]] == pytest.approx([4.0, 3.0, 4.0, 0.0])
    assert [line["name"] for line in lines[4:8]] == list(NAMES)
    assert all(len(line["tokens"]) == 10 for line in lines[4:8])
    assert {line["name"] for line in lines if line.get("finish_reason")} == set(NAMES)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
    ],
    ids=str,
)
def test_another_sites_page_gets_nothing(server, headers):
    for found in (ask(server, "GET", "/state", **headers), post(server, ASK, **headers)):
        assert found[0] == 403
        assert "Access-Control-Allow-Origin" not in found[1]
        assert b"code" not in found[2]


def test_its_other_name_is_its_own(server):
    host = f"localhost:{server.server_port}"
    assert ask(server, "GET", "/state", Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (ASK | {"n": -1}, "n: "),
        (ASK | {"n": 99}, "no vector 99"),
        (ASK | {"concept": "stem"}, "no vectors of concept"),
        (ASK | {"norm": -1}, "norm: "),
        (ASK | {"norm": 1e9}, "norm: "),
        (ASK | {"length": 10_000}, "length: "),
        (ASK | {"more": 1}, "more: "),
    ],
)
def test_bad_requests_are_one_line(server, body, said):
    status, _, answer = post(server, body)
    error = json.loads(answer)["error"]
    assert (status, "\n" in error) == (400, False)
    assert said in error


def test_what_no_form_may_send_and_no_body_may_exceed(server):
    assert ask(server, "POST", "/write", json.dumps(ASK), Content_Type="text/plain")[0] == 404
    assert ask(server, "POST", "/write", b"", Content_Type="application/json", Content_Length="99999999")[0] == 400
    assert ask(server, "PUT", "/write")[0] == 501


def test_an_error_after_the_beginning_is_a_line(server):
    lines = [json.loads(line) for line in post(server, ASK | {"prompt": " "})[2].splitlines()]
    assert "prompt is empty" in lines[-1]["error"]


def test_a_taken_port_is_one_error(server):
    with pytest.raises(UserError, match=f"cannot listen on port {server.server_port} of 127.0.0.1: it is taken"):
        PlayServer(server.stage, server.server_port)
    with pytest.raises(UserError, match="cannot listen on port 99999"):
        PlayServer(server.stage, 99999)
