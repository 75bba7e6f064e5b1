"""The pages in a real browser, opened as files and served: what is shown, found, and kept safe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from browser import Tab, chromium, open_tab
from stores import MadeText, make_store
from synthetic import Size, write_synthetic

from fastadapt.features.schema import CLASSES, DESCRIPTIONS, SCORES
from fastadapt.features.site import export, serve
from fastadapt.features.store import Store

#: Texts that try to be more than text, and how they are shown where that is not as they are.
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
    with chromium() as found:
        yield found


def text_of(tab: Tab, selector: str = "body") -> str:
    return str(tab.page.text_content(selector))


def open_site(browser: Any, address: str, fragment: str = "", **options: Any) -> Tab:
    tab = open_tab(browser, **options)
    tab.page.goto(f"{address}{fragment}")
    tab.marked("feature" if "/" in fragment.strip("#/").split("?")[0] else "rows")
    return tab


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of a store whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "features"
    strings = [text for text, _ in HOSTILE]
    n = len(strings)
    texts = [MadeText(list(range(n)), [2] * 5 + [5] * (n - 5), strings[i]) for i in range(n)]
    rng = np.random.default_rng(0)
    activations = [rng.random((1, n, n)).astype(np.float32) + 0.1 for _ in texts]
    promoted = {(0, i): [i] for i in range(n)}
    made = make_store(
        folder,
        texts,
        activations,
        strings,
        promoted=promoted,
        run=strings[0],
        pair={"target": strings[3], "base": strings[4]},
    )
    # The store's ids too; Parquet is written as collecting writes it.
    held = made.store.read("texts")
    ids = held.set_column(1, held.schema.field("id"), pa.array(strings))
    pa.parquet.write_table(ids, made.store.path("texts"))
    descriptions, scores, classes = [], [], []
    for i, text in enumerate(strings):
        unit = {"layer": 0, "feature": i}
        said = {**unit, "variant": "top", "judge": text}
        descriptions.append({**said, "description": text, "shown": [0]})
        counts = dict.fromkeys(("positives", "negatives", "true_positives", "true_negatives"), 5)
        scores.append({**said, **counts, "accuracy": 1.0})
        classes.append({**unit, "judge": text, "class": text, "subclass": text, "reason": text})
    for name, rows, schema in (
        ("descriptions", descriptions, DESCRIPTIONS),
        ("scores", scores, SCORES),
        ("classes", classes, CLASSES),
    ):
        made.store.add(name, pa.Table.from_pylist(rows, schema=schema))
    site = export(made.store)
    assert site is not None
    return site


def test_text_that_tries_to_break_out_is_shown_as_text(browser: Any, hostile: Path) -> None:
    assert len(HOSTILE) >= 20
    address = (hostile / "index.html").as_uri()
    tab = open_site(browser, address)
    listed = text_of(tab, "#grid")
    options = tab.page.eval_on_selector_all("select[name=class] option", "all => all.map(o => o.text)")
    for shown in SHOWN:
        assert shown in listed
        assert f"{shown}: {shown}" in options
    for i, shown in enumerate(SHOWN):
        tab = open_site(browser, address, f"#/0/{i}")
        assert text_of(tab, "blockquote") == shown
        assert text_of(tab, "header.unit .state") == f"{shown}: {shown}"
        assert shown in text_of(tab, ".said figcaption")  # the judge
        assert shown in text_of(tab, "main .note")  # the reason
        assert text_of(tab, ".lens .token").replace("␣", " ") == shown
        windows, facts = text_of(tab, "article .window"), text_of(tab, ".pair")
        charts = text_of(tab, ".charts")
        for other in SHOWN:
            assert other in windows  # every token
            assert other in charts  # every domain
        assert sum(other in facts for other in SHOWN) == len(SHOWN)  # ids
        tab.page.hover("article .peak")
        assert SHOWN[i] in text_of(tab) and not tab.page.locator("#tip").is_hidden()
        assert tab.page.locator("article img, article svg, article script, iframe").count() == 0
        assert tab.page.evaluate("document.querySelectorAll('script').length") == 7
        assert tab.complaints == []
        allowed = {path.resolve().as_uri() for path in hostile.rglob("*")}
        asked = {r.split("#")[0] for r in tab.requests if r != "data:,"}
        assert asked <= allowed
        tab.page.context.close()


@pytest.mark.parametrize("fragment", ["#/?q=%3Cscript%3E", "#/?token=__proto__", "#/?sort=__proto__"])
def test_hostile_queries_are_queries(browser: Any, hostile: Path, fragment: str) -> None:
    tab = open_site(browser, (hostile / "index.html").as_uri(), fragment)
    assert tab.complaints == []
    assert "of 26 features" in text_of(tab, "#count")


@pytest.mark.parametrize(
    "fragment",
    [
        "#/9/9",
        "#/0/99",
        "#/-1/0",
        "#/constructor/1/1",
        "#/0/0/0",
        "#/<img src=x onerror=alert(1)>/1",
    ],
)
def test_a_unit_that_is_not_there_is_told(browser: Any, hostile: Path, fragment: str) -> None:
    tab = open_tab(browser)
    tab.page.goto((hostile / "index.html").as_uri() + fragment)
    tab.marked("rows")
    assert "here: layers 0 to 0, features 0 to 25." in text_of(tab, "#trouble")
    assert tab.complaints == []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two kinds of unit, three layers."""
    folder = tmp_path_factory.mktemp("small") / "features"
    size = Size(3, 300, 4, 2, texts=40, text_tokens=300, vocabulary=800, described=20, classed=40)
    write_synthetic(folder, size)
    manifest = (folder / "manifest.json").read_text()
    units = '"adapter": {\n   "n_layers": 3,\n   "n_features": 300\n  }'
    assert units in manifest
    (folder / "manifest.json").write_text(
        manifest.replace(units, f"{units},\n  {units.replace('adapter', 'base')}")
    )
    (folder / "base").mkdir()
    for name in ("features", "examples", "lens"):
        (folder / "base" / f"{name}.parquet").write_bytes(
            (folder / "adapter" / f"{name}.parquet").read_bytes()
        )
    return Store.open(folder)


@pytest.fixture(scope="module", params=["file", "served"])
def address(request: pytest.FixtureRequest, store: Store) -> Iterator[str]:
    if request.param == "file":
        site = export(store)
        assert site is not None
        yield (site / "index.html").as_uri()
        return
    stop, ready, told = Event(), Event(), []

    def tell(place: str) -> None:
        told.append(place)
        ready.set()

    thread = Thread(target=serve, args=(store,), kwargs={"port": 0, "ready": tell, "stop": stop})
    thread.start()
    assert ready.wait(60)
    yield told[0]
    stop.set()
    thread.join(10)


def expected(store: Store, test: Any) -> int:
    rows = store.read("features").to_pylist()
    promoted = store.read("lens", columns=["promoted_tokens"])["promoted_tokens"].to_pylist()
    classes = {(r["layer"], r["feature"]): r for r in store.read("classes").to_pylist()}
    described = {
        (r["layer"], r["feature"]): r["description"] for r in store.read("descriptions").to_pylist()
    }
    return sum(
        bool(test(row, tokens, classes.get(unit), described.get(unit, "")))
        for row, tokens in zip(rows, promoted, strict=True)
        for unit in [(row["layer"], row["feature"])]
    )


@pytest.mark.parametrize(
    ("query", "test"),
    [
        ("", lambda row, *_: row["count"] > 0),
        ("dead=1", lambda *_: True),
        ("layer=1", lambda row, *_: row["layer"] == 1 and row["count"] > 0),
        ("from=1%25&to=0.05", lambda row, *_: 0.01 <= row["density"] <= 0.05),
        (
            "region=5",
            lambda row, *_: row["count"] > 0 and row["by_region"][5] == max(row["by_region"]),
        ),
        (
            "token=Wait",
            lambda row, up, *_: row["count"] > 0 and any(t.strip() == "wait" for t in up),
        ),
        (
            "q=wait",
            lambda row, up, _, said: row["count"] > 0
            and (any("wait" in t for t in up) or "wait" in said),
        ),
        (
            "q=fires+feature",
            lambda row, up, _, said: row["count"] > 0 and "fires" in said and "feature" in said,
        ),
        (
            'class=["domain"]',
            lambda row, up, found, _: row["count"] > 0 and found and found["class"] == "domain",
        ),
        (
            'class=["domain","math"]&layer=2',
            lambda row, up, found, _: row["count"] > 0
            and found
            and (found["layer"], found["subclass"]) == (2, "math"),
        ),
    ],
)
def test_the_list_has_what_matches(
    browser: Any, store: Store, address: str, query: str, test: Any
) -> None:
    tab = open_site(browser, address, f"#/?{query}")
    tab.marked("whole")
    count = expected(store, test)
    assert text_of(tab, "#count") == f"{count:,} of 900 features"
    assert tab.page.get_attribute("#grid", "aria-rowcount") == str(count + 1)
    assert tab.complaints == []
    assert count > 0


@pytest.mark.parametrize(
    ("sort", "key"),
    [
        ("", lambda r: (-np.float32(r["density"]), r["layer"], r["feature"])),
        ("rarest", lambda r: (np.float32(r["density"]), -r["layer"], -r["feature"])),
        ("max", lambda r: (-r["max"], r["layer"], r["feature"])),
        ("index", lambda r: (r["layer"], r["feature"])),
    ],
)
def test_the_list_is_sorted(browser: Any, store: Store, address: str, sort: str, key: Any) -> None:
    tab = open_site(browser, address, f"#/?sort={sort}")
    tab.marked("whole")
    rows = sorted((r for r in store.read("features").to_pylist() if r["count"]), key=key)
    names = [f"{row['layer']} / {row['feature']}" for row in rows]
    shown = tab.page.locator("#rows .row:not([hidden]) .name").all_text_contents()
    assert shown[:12] == names[:12]
    tab.page.focus("#grid")
    tab.page.keyboard.press("End")
    assert text_of(tab, ".row[aria-selected=true] .name") == names[-1]
    box = tab.page.locator(".row[aria-selected=true]").bounding_box()
    frame = tab.page.locator("#grid").bounding_box()
    assert frame["y"] <= box["y"] <= frame["y"] + frame["height"] - box["height"] + 1


def test_keys_lead_from_the_list_to_a_page_and_back(browser: Any, store: Store, address: str) -> None:
    tab = open_site(browser, address)
    page = tab.page
    tab.marked("whole")
    page.keyboard.press("/")
    page.keyboard.type("wait")
    page.wait_for_function("() => location.hash.includes('q=wait')")
    page.keyboard.press("Enter")
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    second = text_of(tab, ".row[aria-selected=true] .name")
    assert page.get_attribute(".row[aria-selected=true]", "aria-rowindex") == "3"
    page.keyboard.press("Enter")
    tab.marked("feature")
    layer, feature = second.split(" / ")
    assert text_of(tab, "#feature h2") == f"Layer {layer}, feature {feature}"
    assert page.evaluate("location.hash") == f"#/{layer}/{feature}?q=wait"
    assert text_of(tab, ".places .note").startswith("2 of ")
    page.keyboard.press("j")
    page.wait_for_function("() => document.querySelector('.places .note').textContent.startsWith('3 of')")
    page.keyboard.press("w")
    assert page.locator("#feature.short").count() == 0
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    assert page.get_attribute(".row[aria-selected=true]", "aria-rowindex") == "4"
    assert page.input_value("#q") == "wait"
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.click("#reset")
    page.wait_for_function("() => location.hash === '#/'")
    assert tab.complaints == []


def test_a_page_shows_what_the_store_says(browser: Any, store: Store, address: str) -> None:
    rows = store.read("features", layer=2).to_pylist()
    unit = next(row for row in rows if row["count"])
    tab = open_site(browser, address, f"#/2/{unit['feature']}")
    tiles = tab.page.locator(".tile b").all_text_contents()
    assert tiles[1] == f"{unit['count']:,}"
    examples = store.read("examples", layer=2, features=[unit["feature"]]).to_pylist()
    strings = store.read("tokens")["string"].to_pylist()
    texts = store.read("texts", columns=["id"])["id"].to_pylist()
    cards = tab.page.locator("article")
    assert cards.count() == len(examples) == 6
    for i, example in enumerate(examples):
        card = cards.nth(i)
        spans = card.locator(".window span")
        assert spans.count() == len(example["tokens"])
        drawn = spans.all_text_contents()
        assert [t.replace("↵", "") for t in drawn] == [
            strings[t].replace("\n\n", "\n") for t in example["tokens"]
        ]
        shares = spans.evaluate_all("all => all.map(s => s.style.getPropertyValue('--share'))")
        for share, value in zip(shares, example["values"], strict=True):
            assert (float(share) if share else 0) == pytest.approx(value / unit["max"], rel=1e-5)
        peak = spans.nth(example["position"] - example["start"])
        assert peak.get_attribute("class").split()[-1] == "peak"
        assert card.locator(".peak").count() == 1
        facts = card.locator("header").text_content()
        assert texts[example["text"]] in facts
        assert example["region"] in facts and example["domain"] in facts
    lens = store.read("lens", layer=2, features=[unit["feature"]]).to_pylist()[0]
    tokens = [t.replace("␣", " ") for t in tab.page.locator(".lens .token").all_text_contents()]
    wanted = [*lens["promoted_tokens"], *lens["suppressed_tokens"]]
    assert tokens == [t.replace("\n", "↵") for t in wanted]
    assert tab.complaints == []


def test_kinds_are_switched_and_counts_hold(browser: Any, store: Store, address: str) -> None:
    tab = open_site(browser, address)
    links = tab.page.locator("#kinds a")
    assert links.all_text_contents() == ["Adapter", "Base MLP"]
    links.nth(1).click()
    tab.page.wait_for_function("() => document.getElementById('count').textContent.endsWith('900 neurons')")
    assert tab.page.evaluate("location.hash") == "#/base"
    tab.page.keyboard.press("Home")
    tab.page.keyboard.press("Enter")
    tab.marked("feature")
    assert "neuron" in text_of(tab, "#feature h2")
    assert tab.complaints == []


def test_a_filter_without_matches_says_so(browser: Any, address: str) -> None:
    tab = open_site(browser, address, "#/?q=nobodysaysthis")
    tab.marked("whole")
    assert text_of(tab, "#nothing p") == "Nothing matches."
    tab.page.click("#nothing button")
    tab.page.wait_for_function("() => document.getElementById('nothing').hidden")
    assert tab.complaints == []


@pytest.mark.parametrize("width", [1300, 430])
@pytest.mark.parametrize("fragment", ["#/", "#/1/17", "#/?q=nobodysaysthis"])
def test_nothing_is_wider_than_the_window(browser: Any, address: str, width: int, fragment: str) -> None:
    tab = open_site(browser, address, fragment, width=width)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.page.evaluate("document.body.scrollWidth") <= width
