"""A real browser for tests of pages, and what it had to complain about."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        page: of Playwright.
        complaints: errors and warnings of the console, uncaught errors, dialogs, failed requests.
        requests: every address that was asked for.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def marked(self, name: str) -> float:
        """Seconds from the start of the navigation until the page made a mark, which it awaits."""
        self.page.wait_for_function(
            "name => performance.getEntriesByName(name).length > 0", arg=name, timeout=30_000
        )
        milliseconds = self.page.evaluate("n => performance.getEntriesByName(n)[0].startTime", name)
        return float(milliseconds) / 1000


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright; the test is skipped where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra dev)")
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser: one of {', '.join(_NAMES)} on the PATH")
    # Its sandbox does not run for root; what it opens is what the test wrote.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        try:
            yield browser
        finally:
            browser.close()


def open_tab(browser: Any, *, width: int = 1300, height: int = 900, **context: Any) -> Tab:
    """A new tab that nothing is in yet."""
    page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
    tab = Tab(page)

    def heard(message: Any) -> None:
        if message.type in ("error", "warning"):
            tab.complaints.append(f"{message.type}: {message.text}")

    def asked(dialog: Any) -> None:
        tab.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", heard)
    page.on("dialog", asked)
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
    """Another address of the same page, until it is drawn."""
    tab.page.evaluate(
        """fragment => new Promise((done) => {
          const drawn = () => setTimeout(() => requestAnimationFrame(done));
          addEventListener("hashchange", drawn, { once: true });
          location.hash = fragment;
        })""",
        fragment,
    )


@contextmanager
def serving(source: Store) -> Iterator[str]:
    """Serves a store's pages in a thread; yields their address."""
    stop, ready, told = Event(), Event(), []

    def tell(address: str) -> None:
        told.append(address)
        ready.set()

    thread = Thread(target=serve, args=(source,), kwargs={"port": 0, "ready": tell, "stop": stop})
    thread.start()
    try:
        assert ready.wait(60)
        yield told[0]
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()
