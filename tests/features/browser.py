"""A browser for tests of pages, with its errors and requests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from fastadapt.features.site import serve
from fastadapt.features.store.store import Store

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass
class Tab:
    """A page of the browser.

    Attributes:
        page: Playwright's page.
        complaints: errors and warnings of the console, uncaught errors, dialogs, failed requests.
        requests: addresses of all requests.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def marked(self, name: str) -> float:
        """Wait for a performance mark; return its seconds from the start of the navigation."""
        self.page.wait_for_function(
            "name => performance.getEntriesByName(name).length > 0", arg=name, timeout=30_000
        )
        milliseconds = self.page.evaluate("n => performance.getEntriesByName(n)[0].startTime", name)
        return float(milliseconds) / 1000


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser of Playwright; skip the test if none is installed."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra dev)")
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        pytest.skip(f"needs a browser: one of {', '.join(_NAMES)} on the PATH")
    # Chromium's sandbox does not run as root. Tests open only their own pages.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        try:
            yield browser
        finally:
            browser.close()


def open_tab(browser: Any, *, width: int = 1300, height: int = 900, **context: Any) -> Tab:
    """Return a new empty tab."""
    page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
    tab = Tab(page)

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            tab.complaints.append(f"{message.type}: {message.text}")

    def on_dialog(dialog: Any) -> None:
        tab.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", on_console)
    page.on("dialog", on_dialog)
    page.on("pageerror", lambda error: tab.complaints.append(f"error: {error}"))
    page.on("requestfailed", lambda request: tab.complaints.append(f"failed: {request.url}"))
    page.on("request", lambda request: tab.requests.append(request.url))
    return tab


def text_of(tab: Tab, selector: str = "body") -> str:
    return str(tab.page.text_content(selector))


def open_site(browser: Any, address: str, fragment: str = "", **options: Any) -> Tab:
    tab = open_tab(browser, **options)
    tab.page.goto(f"{address}{fragment}")
    tab.marked("feature" if "/" in fragment.strip("#/").split("?")[0] else "rows")
    return tab


def go(tab: Tab, fragment: str) -> None:
    """Change the fragment of the address, and wait until the page is drawn."""
    tab.page.evaluate(
        """fragment => new Promise((done) => {
          const drawn = () => setTimeout(() => requestAnimationFrame(done));
          addEventListener("hashchange", drawn, { once: true });
          location.hash = fragment;
        })""",
        fragment,
    )


@contextmanager
def serving(source: Store | Path) -> Iterator[str]:
    """Serve a store's pages in a thread, and yield their address."""
    stop, ready, addresses = Event(), Event(), []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    options = {"port": 0, "ready": on_ready, "stop": stop}
    thread = Thread(target=serve, args=(source,), kwargs=options)
    thread.start()
    try:
        assert ready.wait(60)
        yield addresses[0]
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
