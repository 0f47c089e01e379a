"""The page of `melbo-ray play` in a real browser: pick, slide, type, share; hostile text stays text."""

import re
import threading

import pytest
from playwright.sync_api import expect

from melbo_ray.play.server import PlayServer
from melbo_ray.play.stage import NAMES, NextTokens, Stage, Text
from tests.families import tiny
from tests.stages import stage, write_run

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>abc\u202edcba"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("runs"), concepts=("alien", "code"), num_vectors=4)
    with PlayServer(stage(run, tiny())) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def open_page(browser, server):
    """Open the page at an address; whatever it asks of others or complains of fails the test at its end."""
    pages, complaints = [], []

    def open_page(address="", width=1400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((server.url, "data:")) else complaints.append(r.url))
        page.goto(server.url + address)
        page.wait_for_selector("body[data-state=ready]")
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert complaints == []


def texts(page):
    return [page.locator(f"#{name} pre").text_content() for name in NAMES]


def expected(server, concept, n, norm, prompt, length):
    acting = server.stage
    events = acting.write(prompt, acting.directions(concept, n, norm), length)
    return {event.name: event.text for event in events if isinstance(event, Text) and event.finish_reason}


@pytest.mark.parametrize("width", [1400, 400])
def test_pick_slide_type_and_share(open_page, server, width):
    page = open_page("#concept=alien&length=3", width)
    expect(page.locator("#n")).to_have_value("1")
    assert page.locator("#vector tbody tr").count() == 10
    page.select_option("#concept", "code")
    page.locator("#chain").fill("3")
    page.locator("#norm").fill("2.1")
    page.fill("#prompt", "Why is it so?")
    page.press("#prompt", "Tab")
    expect(page.locator("#vector h2")).to_have_text("θₙ, code n = 3")
    expect(page.locator("#vector .quiet")).to_contain_text("norm 2.1, KL from base")
    expect(page.locator("#base .quiet")).to_contain_text("norm 3, KL from base 0 nats")
    page.wait_for_selector("body[data-state=ready]")
    shown = expected(server, "code", 3, 2.1, "Why is it so?", 3)
    for name, text in shown.items():
        visible = re.sub(r"⟨U\+([0-9A-F]{4})⟩", lambda found: chr(int(found[1], 16)), texts(page)[NAMES.index(name)])
        assert visible.removesuffix(" …") == text
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    again = open_page("#" + page.url.partition("#")[2], width)
    assert texts(again) == texts(page)
    expect(again.locator("#prompt")).to_have_value("Why is it so?")
    page.click("#own")
    expect(page.locator("#norm-told")).to_have_text("6 (its own)")
    page.wait_for_selector("body[data-state=ready]")


def test_what_a_model_writes_stays_text(open_page, monkeypatch):
    def hostile(*_):
        for name in NAMES:
            yield NextTokens(name, [(HOSTILE, 0.5)], 0.1)
            yield Text(name, HOSTILE, "stop")

    monkeypatch.setattr(Stage, "write", hostile)
    page = open_page("#concept=<img src=x onerror=alert(1)>&n=99&norm=-3&length=x")
    assert all(text.startswith("<img src=x") and "⟨U+202E⟩" in text for text in texts(page))
    assert page.locator("#panels img, #panels script, #controls img").count() == 0
    assert page.title() == "melbo-ray play"
    expect(page.locator("#n")).to_have_value("4")


def test_an_error_is_said(open_page, monkeypatch):
    page = open_page("#length=2&prompt=%20")
    expect(page.locator("#said")).to_contain_text("prompt is empty")
