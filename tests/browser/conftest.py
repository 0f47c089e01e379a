import shutil

import pytest
from playwright.sync_api import sync_playwright

# Chromium's own calls home are refused by a closed network, many at a time.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser):
    """Open a report; whatever it asks of the network or complains of in the console fails the test at its end."""
    pages, complaints = [], []

    def open_report(path, address="", width=1400, scheme="light", **options):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        page.allowed = []
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append((page, message.text)) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append((page, str(error))))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else complaints.append((page, request.url))
            ),
        )
        page.goto(f"file://{path}{address}")
        page.wait_for_selector("body[data-ready]")
        pages.append(page)
        return page

    yield open_report
    for page in pages:
        page.close()
    assert [text for page, text in complaints if not any(allowed in text for allowed in page.allowed)] == []
