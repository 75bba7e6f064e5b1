"""The pages in a browser, opened as files and served: contents, search, keys and layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from browser import chromium, go, open_site, serving, text_of
from synthetic import Size, write_synthetic

from fastadapt.features.site import export
from fastadapt.features.store.store import Store


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as instance:
        yield instance


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return a store of two kinds of units with three layers each."""
    folder = tmp_path_factory.mktemp("small") / "features"
    size = Size(3, 300, 4, 2, texts=40, text_tokens=300, vocabulary=800, described=20, classed=40)
    write_synthetic(folder, size)
    (folder / "base").mkdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["units"]["base"] = manifest["units"]["adapter"]
    for name in ("features", "examples", "lens"):  # no scales, as of neurons
        shutil.copy(folder / "adapter" / f"{name}.parquet", folder / "base")
        listed = manifest["files"][f"adapter/{name}.parquet"]
        manifest["files"][f"base/{name}.parquet"] = listed
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Store.open(folder)


@pytest.fixture(scope="module")
def file(store: Store) -> str:
    """Return the address of the store's pages as files."""
    site = export(store)
    assert site is not None
    return (site / "index.html").as_uri()


@pytest.fixture(scope="module")
def server(store: Store, file: str) -> Iterator[str]:
    """Return the address of the store's pages on a server."""
    with serving(store) as address:
        yield address


@pytest.fixture(params=["file", "server"])
def address(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def rows_of(store: Store) -> list[dict[str, Any]]:
    """Return the rows of ``features``, with the scales of those that have them."""
    scales = {(r["layer"], r["feature"]): r for r in store.read("scales").to_pylist()}
    rows = store.read("features").to_pylist()
    return [row | scales.get((row["layer"], row["feature"]), {}) for row in rows]


def expected(store: Store, test: Any) -> int:
    rows = rows_of(store)
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


MATCHES: list[tuple[str, Any]] = [
    ("", lambda row, *_: row["count"] > 0),
    ("dead=1", lambda *_: True),
    ("layer=1", lambda row, *_: row["layer"] == 1 and row["count"] > 0),
    ("from=1%25&to=0.05", lambda row, *_: 0.01 <= row["density"] <= 0.05),
    (
        "region=5",
        lambda row, *_: row["count"] > 0 and row["by_region"][5] == max(row["by_region"]),
    ),
    (
        "origin=1",  # strengthened
        lambda row, *_: (
            "base_scale" in row
            and (row["base_scale"] < row["target_scale"] and row["base_share"] > 0.2)
        ),
    ),
    (
        "token=Wait",
        lambda row, up, *_: row["count"] > 0 and any(t.strip() == "wait" for t in up),
    ),
    (
        "q=wait",
        lambda row, up, _, said: (
            row["count"] > 0 and (any("wait" in t for t in up) or "wait" in said)
        ),
    ),
    (
        "q=fires+feature",
        lambda row, up, _, said: row["count"] > 0 and "fires" in said and "feature" in said,
    ),
    (
        'class=["domain"]',
        lambda row, up, named, _: row["count"] > 0 and named and named["class"] == "domain",
    ),
    (
        'class=["domain","math"]&layer=2',
        lambda row, up, named, _: (
            row["count"] > 0 and named and (named["layer"], named["subclass"]) == (2, "math")
        ),
    ),
]


def test_the_list_shows_the_matching_units(browser: Any, store: Store, file: str) -> None:
    tab = open_site(browser, file, "#/?q=nobodysaysthis")
    tab.marked("whole")
    assert text_of(tab, "#nothing p") == "No unit matches."
    for query, test in MATCHES:
        go(tab, f"#/?{query}")
        count = expected(store, test)
        assert text_of(tab, "#count") == f"{count:,} of 900 features", query
        assert tab.page.get_attribute("#grid", "aria-rowcount") == str(count + 1)
        assert tab.page.locator("#nothing").is_hidden()
        assert count > 0
    # Bounds are inclusive for densities that float32 rounds up or down.
    densities = {r["density"] for r in store.read("features").to_pylist() if r["count"]}
    for sign in (1, -1):
        density = next(d for d in densities if sign * (float(np.float32(d)) - d) > 0)
        go(tab, f"#/?from={density}&to={density}")
        count = sum(r["density"] == density for r in store.read("features").to_pylist())
        assert text_of(tab, "#count") == f"{count:,} of 900 features"
    assert tab.complaints == []


def written(row: dict[str, Any]) -> np.float32:
    """Return the contribution of a feature: density × mean activation × norm."""
    return np.float32(row["density"] * row["mean"] * row["norm"])


SORTS: list[tuple[str, Any]] = [
    ("", lambda r: (-written(r), r["layer"], r["feature"])),
    ("densest", lambda r: (-np.float32(r["density"]), r["layer"], r["feature"])),
    ("rarest", lambda r: (np.float32(r["density"]), -r["layer"], -r["feature"])),
    ("max", lambda r: (-r["max"], r["layer"], r["feature"])),
    ("weakest", lambda r: (r["max"], -r["layer"], -r["feature"])),
    ("shared", lambda r: (-np.float32(r["base_share"]), r["layer"], r["feature"])),
    ("opposed", lambda r: (np.float32(r["base_share"]), -r["layer"], -r["feature"])),
    ("index", lambda r: (r["layer"], r["feature"])),
]


@pytest.mark.slow
def test_the_list_is_sorted(browser: Any, store: Store, file: str) -> None:
    tab = open_site(browser, file, "#/?q=nobodysaysthis")
    tab.marked("whole")
    for sort, key in SORTS:
        go(tab, f"#/?sort={sort}")
        listed = [r for r in rows_of(store) if r["count"]]
        if sort in ("shared", "opposed"):  # without those that have none
            listed = [r for r in listed if "base_share" in r]
        rows = sorted(listed, key=key)
        names = [f"{row['layer']} / {row['feature']}" for row in rows]
        shown = tab.page.locator("#rows .row:not([hidden]) .name").all_text_contents()
        assert shown[:12] == names[:12], sort
        tab.page.focus("#grid")
        tab.page.keyboard.press("End")
        assert text_of(tab, ".row[aria-selected=true] .name") == names[-1]
        box = tab.page.locator(".row[aria-selected=true]").bounding_box()
        frame = tab.page.locator("#grid").bounding_box()
        assert frame["y"] <= box["y"] <= frame["y"] + frame["height"] - box["height"] + 1
    assert tab.complaints == []


@pytest.mark.quick("file")
def test_keys_lead_from_the_list_to_a_page_and_back(browser: Any, address: str) -> None:
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
    page.wait_for_function(
        "() => document.querySelector('.places .note').textContent.startsWith('3 of')"
    )
    page.keyboard.press("w")
    assert page.locator("#feature.short").count() == 0
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    assert page.get_attribute(".row[aria-selected=true]", "aria-rowindex") == "4"
    assert page.input_value("#q") == "wait"
    page.keyboard.press("Enter")
    page.wait_for_selector("#feature:not([hidden])")
    page.keyboard.press("/")
    page.wait_for_function("() => document.activeElement.id === 'q'")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.locator("dialog[open]").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.click("#clear")
    page.wait_for_function("() => location.hash === '#/'")
    assert tab.complaints == []


def test_a_page_shows_the_unit_of_the_store(browser: Any, store: Store, address: str) -> None:
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
        assert example["region"] in facts
        assert example["domain"] in facts
    lens = store.read("lens", layer=2, features=[unit["feature"]]).to_pylist()[0]
    tokens = [t.replace("␣", " ") for t in tab.page.locator(".lens .token").all_text_contents()]
    wanted = [*lens["promoted_tokens"], *lens["suppressed_tokens"]]
    assert tokens == [t.replace("\n", "↵") for t in wanted]
    assert tab.complaints == []


def test_a_page_says_what_the_base_writes(browser: Any, store: Store, file: str) -> None:
    scales = store.read("scales", layer=2).to_pylist()
    row = next(r for r in scales if r["base_scale"] < -1 and r["target_scale"] > 1)
    tab = open_site(browser, file, f"#/2/{row['feature']}")
    names = tab.page.locator(".tile span").all_text_contents()
    tile = tab.page.locator(".tile").nth(names.index("In the base"))
    share = tile.locator("b").text_content()
    assert share.startswith("−")
    assert float(share[1:-1]) == pytest.approx(-100 * row["base_share"], rel=0.05)
    assert tile.locator("i").text_content() == "opposed"
    line = text_of(tab, "main > .note")
    for scale in ("base_scale", "target_scale", "difference_scale"):
        shown = f"{abs(row[scale]):.3g}"
        assert shown.rstrip("0").rstrip(".") in line, (scale, line)
    assert "fine-tuning removed what the base's writes against it" in line
    without = min(set(range(300)) - {r["feature"] for r in scales})
    go(tab, f"#/2/{without}")
    assert tab.page.locator("main > .note").count() == 0
    assert tab.complaints == []


def test_a_dead_unit_has_a_page(browser: Any, store: Store, file: str) -> None:
    dead = next(row for row in store.read("features").to_pylist() if not row["count"])
    tab = open_site(browser, file, f"#/{dead['layer']}/{dead['feature']}")
    assert "No activation on these texts." in text_of(tab, ".charts")
    assert tab.page.locator(".examples .none").all_text_contents() == ["No examples."] * 2
    assert tab.page.locator(".tile b").all_text_contents()[:4] == ["0%", "0", "0", "0"]
    assert tab.complaints == []


@pytest.mark.slow
def test_another_kind_of_unit_is_shown(browser: Any, file: str) -> None:
    tab = open_site(browser, file)
    links = tab.page.locator("#kinds a")
    assert links.all_text_contents() == ["Adapter", "Base MLP"]
    links.nth(1).click()
    tab.page.wait_for_function(
        "() => document.getElementById('count').textContent.endsWith('900 neurons')"
    )
    assert tab.page.evaluate("location.hash") == "#/base"
    tab.page.keyboard.press("Home")
    tab.page.keyboard.press("Enter")
    tab.marked("feature")
    assert "neuron" in text_of(tab, "#feature h2")
    assert tab.complaints == []


@pytest.mark.slow
def test_filters_without_a_match_are_reset(browser: Any, file: str) -> None:
    tab = open_site(browser, file, "#/?q=nobodysaysthis&dead=1&layer=2&sort=max")
    tab.marked("whole")
    tab.page.click("#nothing button")
    tab.page.wait_for_function("() => document.getElementById('nothing').hidden")
    assert tab.page.evaluate("location.hash") == "#/"
    tab.page.fill("input[name=from]", "many")
    tab.page.wait_for_selector("input[name=from][aria-invalid=true]")
    assert tab.complaints == []


@pytest.mark.quick("430")
@pytest.mark.parametrize("width", [1300, 430])
def test_nothing_is_wider_than_the_window(browser: Any, file: str, width: int) -> None:
    tab = open_site(browser, file, width=width)
    for fragment in ("#/1/17", "#/?q=nobodysaysthis", "#/2/3"):
        go(tab, fragment)
        tab.page.wait_for_timeout(200)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.page.evaluate("document.body.scrollWidth") <= width
