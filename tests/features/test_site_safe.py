"""Hostile texts are shown as text; tested in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from browser import chromium, go, open_site, serving, text_of
from stores import StoreText, make_store

from fastadapt.features.site import export
from fastadapt.features.store.schema import CLASSES, DESCRIPTIONS, OVERLAP, SCORES
from fastadapt.features.store.store import Store

#: Texts that try to inject markup or scripts, and the text that is shown if it differs.
HOSTILE: list[tuple[str, str | None]] = [
    ("<script>alert(1)</script>", None),
    ("</script><script>alert(2)</script>", None),
    ("--></script><!--<script>alert(3)", None),
    ("<img src=x onerror=alert(4)>", None),
    ('"><svg onload=alert(5)>', None),
    ("' onmouseover='alert(6)' x='", None),
    ("&lt;b&gt;bold&lt;/b&gt; &amp;#60; &#x3c;", None),
    ("`${alert(7)}`", None),
    ("');alert(8);//", None),
    ('\\");alert(9);//', None),
    ("javascript:alert(10)", None),
    ("data:text/html,<script>alert(11)</script>", None),
    ("<a href=javascript:alert(12)>a</a>", None),
    ("<style>*{display:none}</style>", None),
    ("</style><link rel=stylesheet href=//evil.example/a.css>", None),
    ("<iframe srcdoc='<script>alert(13)</script>'></iframe>", None),
    ("<base href=//evil.example/>", None),
    ("<meta http-equiv=refresh content='0;url=//evil.example'>", None),
    ("expression(alert(14));}body{background:url(//evil.example/b)}", None),
    ("{{constructor.constructor('alert(15)')()}}", None),
    ("__proto__", None),
    ("a\u2028alert(16)\u2029b", "a⟨U+2028⟩alert(16)⟨U+2029⟩b"),
    ("a\u202etxt.exe\u202c\u2066b", "a⟨U+202E⟩txt.exe⟨U+202C⟩⟨U+2066⟩b"),
    ("nul\x00l\x1b[31m\x7f", "nul⟨U+0000⟩l⟨U+001B⟩[31m⟨U+007F⟩"),
    ("zero\u200bwidth\ufeff\U000e0041", "zero⟨U+200B⟩width⟨U+FEFF⟩⟨U+E0041⟩"),
    ("Z\u0351\u036b\u0343\u036a\u0302" * 8, None),
]
SHOWN = [shown or text for text, shown in HOSTILE]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as instance:
        yield instance


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pages of a store whose texts are all hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "features"
    strings = [text for text, _ in HOSTILE]
    n = len(strings)
    texts = [
        StoreText(list(range(n)), [2] * 5 + [5] * (n - 5), strings[i], strings[i]) for i in range(n)
    ]
    rng = np.random.default_rng(0)
    activations = [rng.random((1, n, n)).astype(np.float32) + 0.1 for _ in texts]
    promoted = {(0, i): [i] for i in range(n)}
    store = make_store(
        folder,
        texts,
        activations,
        strings,
        promoted=promoted,
        run=strings[0],
        pair={"target": strings[3], "base": strings[4]},
    ).store
    descriptions, scores, classes, overlap = [], [], [], []
    for i, text in enumerate(strings):
        unit = {"layer": 0, "feature": i}
        judged = {**unit, "variant": "top", "judge": text}
        descriptions.append({**judged, "description": text, "shown": [0]})
        counts = dict.fromkeys(("positives", "negatives", "true_positives", "true_negatives"), 5)
        scores.append({**judged, **counts, "accuracy": 1.0})
        overlap.append({**unit, "target": 0.5, "base": 0.25})
        classes.append({**unit, "judge": text, "class": text, "subclass": text, "reason": text})
    for name, rows, schema in (
        ("descriptions", descriptions, DESCRIPTIONS),
        ("scores", scores, SCORES),
        ("classes", classes, CLASSES),
        ("overlap", overlap, OVERLAP),
    ):
        store.add(name, pa.Table.from_pylist(rows, schema=schema))
    site = export(store)
    assert site is not None
    return site


@pytest.mark.slow
def test_hostile_text_is_shown_as_text(browser: Any, hostile: Path) -> None:
    assert len(HOSTILE) >= 20
    address = (hostile / "index.html").as_uri()
    tab = open_site(browser, address)
    listed = text_of(tab, "#grid")
    options = tab.page.locator("select[name=class] option").all_text_contents()
    for shown in SHOWN:
        assert shown in listed
        assert f"{shown}: {shown}" in options
    ids: set[str] = set()
    for i, shown in enumerate(SHOWN):
        go(tab, f"#/0/{i}")
        name = f"Layer 0, feature {i}"
        tab.page.wait_for_function("n => document.querySelector('h2').textContent === n", arg=name)
        assert text_of(tab, "blockquote") == shown
        assert text_of(tab, "header.unit .state") == f"{shown}: {shown}"
        assert shown in text_of(tab, ".said figcaption")  # the judge
        assert shown in text_of(tab, "main > .note")  # the reason
        assert text_of(tab, ".lens .token").replace("␣", " ") == shown
        windows = "".join(tab.page.locator("article .window").all_text_contents())
        facts = "".join(tab.page.locator("article header").all_text_contents())
        charts = text_of(tab, ".charts")
        assert charts.endswith("agreementwith the target50%with the base25%")
        for other in SHOWN:
            assert other in windows  # every token
            assert other in charts  # every domain
        ids.update(other for other in SHOWN if f"{other} · token" in facts)
        peak = tab.page.locator("article .peak").first
        peak.scroll_into_view_if_needed()
        tab.page.wait_for_timeout(50)  # scrolling hides the tooltip
        peak.hover()
        tab.page.wait_for_selector("#tip:not([hidden])")
        assert any(shown in text_of(tab, "#tip") for shown in SHOWN)
        assert tab.page.locator("article img, article svg, article script, iframe").count() == 0
        assert tab.page.evaluate("document.querySelectorAll('script').length") == 8
        assert tab.complaints == []
    assert ids == set(SHOWN)
    files = {path.resolve().as_uri() for path in hostile.rglob("*")}
    requested = {request.split("#")[0] for request in tab.requests if request != "data:,"}
    assert requested <= files


def test_hostile_addresses_show_an_error_or_a_list(browser: Any, hostile: Path) -> None:
    tab = open_site(browser, (hostile / "index.html").as_uri())
    for fragment in (
        "#/9/9",
        "#/0/99",
        "#/-1/0",
        "#/constructor/1/1",
        "#/0/0/0",
        "#/<img src=x onerror=alert(1)>/1",
    ):
        go(tab, fragment)
        assert "expected layers 0 to 0, features 0 to 25." in text_of(tab, "#trouble"), fragment
    for query in ("q=%3Cscript%3E", "token=__proto__", "sort=__proto__", "class=%7B", "layer=9e9"):
        go(tab, f"#/?{query}")
        assert "of 26 features" in text_of(tab, "#count"), query
        assert tab.page.locator("#trouble").is_hidden(), query
    assert tab.complaints == []


def test_pages_of_another_site_read_no_data(browser: Any, hostile: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><p>hello")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    other = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=other.serve_forever, daemon=True).start()
    page = browser.new_context().new_page()
    load = """address => new Promise((done) => {
      window.fastadapt = { shard: () => done("read") };
      const script = document.createElement("script");
      script.src = address + "data/site.js";
      script.onerror = () => done("refused");
      document.head.append(script);
    })"""
    with serving(Store.open(hostile.parent)) as address:
        page.goto(f"http://localhost:{other.server_port}/")  # another site than 127.0.0.1
        assert page.evaluate(load, address) == "refused"
    page.context.close()
    other.shutdown()
    other.server_close()
