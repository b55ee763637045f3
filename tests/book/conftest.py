"""The built book behind a server of its own, and one Chromium for all tests.

The browser is the one that is installed; nothing is downloaded. Every request that a page makes is
kept, and one that leaves this machine is refused, so a page that needs somebody else's server fails
here and not at a reader's.
"""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tools import book

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
DESKTOP = {"width": 1440, "height": 900}
PROBES = Path(__file__).with_name("probes.js")
SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks", "qlora_lab")
FLAGS = [
    "--no-sandbox",  # needed as root, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(book.ROOT / "tests" / "book"):
            item.add_marker(pytest.mark.browser)


def browser_path() -> str | None:
    """Return the installed Chromium or Chrome, or None."""
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    return (found + [path for path in MAC if os.path.exists(path)] + [None])[0]


def newest_source() -> float:
    """Return when a source of the book was last changed."""
    times = []
    for name in SOURCES:
        path = book.ROOT / name
        files = [path] if path.is_file() else path.rglob("*")
        times += [file.stat().st_mtime for file in files if "__pycache__" not in file.parts]
    return max(times)


@pytest.fixture(scope="session")
def html():
    """The folder of the built book, built now if it is missing or older than its sources."""
    index = book.HTML / "index.html"
    book.HTML.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(book.HTML.parent / "html.lock"):  # of several workers, one builds
        if not index.exists() or index.stat().st_mtime < newest_source():
            book.build()
    return book.HTML


@pytest.fixture(scope="session")
def address(html):
    """Where the built book is served."""
    server = book.serve(0, html)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def chromium():
    """The browser; without one, a skip with a reason, or in CI an error."""
    path = browser_path()
    if path is None:
        reason = "no Chromium or Chrome is installed (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Reader:
    """A page in the browser, with all that it asked for and complained of."""

    def __init__(self, page, address: str):
        self.page = page
        self.address = address
        self.outside: list[str] = []
        self.failed: list[str] = []
        self.errors: list[str] = []
        page.route("**/*", self._gate)
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", self._response)

    def _gate(self, route) -> None:
        url = route.request.url
        if url.startswith((self.address, "data:", "blob:")):
            route.continue_()
        else:
            self.outside.append(url)
            route.abort()

    def _console(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text}")

    def _response(self, response) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")

    def open(self, name: str) -> None:
        """Go to a page of the book and wait until its formulas are set."""
        self.page.goto(f"{self.address}/{name}")
        self.page.wait_for_function(
            "() => !window.MathJax || !MathJax.startup || MathJax.startup.promise"
        )
        self.page.evaluate("() => window.MathJax?.startup?.promise")


@pytest.fixture(scope="session")
def reading(chromium, address):
    """Open a new reader: `with reading(size, mode) as reader`."""

    @contextmanager
    def reading(size=DESKTOP, mode="light"):
        context = chromium.new_context(viewport=size, color_scheme=mode, reduced_motion="reduce")
        context.set_default_timeout(60_000)
        context.add_init_script(path=PROBES)
        try:
            yield Reader(context.new_page(), address)
        finally:
            context.close()

    return reading
