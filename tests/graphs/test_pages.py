"""The pages of graphs in a browser, opened as files and served: contents, state, keys, layout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from browser import Tab, chromium, open_tab, text_of
from documents import KINDS, TOKENS, make_document, write_document
from synthetic import Size, write_synthetic

from fastadapt.errors import UserError
from fastadapt.graphs.site import export, find_graphs, serve


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as instance:
        yield instance


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with a store and a graph."""
    folder = tmp_path_factory.mktemp("graphs") / "run"
    size = Size(3, 300, 4, 2, texts=40, text_tokens=300, vocabulary=800, described=300)
    write_synthetic(folder / "features", size)
    write_document(folder / "graphs" / "first.json")
    return folder


@pytest.fixture(scope="module")
def graph(run: Path) -> Any:
    return json.loads((run / "graphs" / "first.json").read_text())


@pytest.fixture(scope="module")
def file(run: Path) -> str:
    """Return the address of the run's pages as files."""
    site = export(find_graphs([run]), run / "site")
    return (site / "index.html").as_uri()


def opened(browser: Any, address: str, fragment: str = "", **options: Any) -> Tab:
    tab = open_tab(browser, **options)
    tab.page.goto(f"{address}{fragment}")
    tab.marked("features")
    return tab


def whole(tab: Tab, selector: str) -> int:
    return int(tab.page.locator(selector).count())


def wait_for(tab: Tab, part: str) -> None:
    """Wait until the address has a part."""
    tab.page.wait_for_function("part => location.hash.includes(part)", arg=part)


ALL = "#/0?nodes=100&edges=100"


def test_every_node_and_edge_of_the_file_is_drawn(browser: Any, graph: Any, file: str) -> None:
    tab = opened(browser, file, ALL)
    assert whole(tab, "#picture .node") == len(graph["nodes"]) + 1
    edges = [(row, i) for row in graph["rows"] for i in range(len(row["sources"]))]
    assert whole(tab, "#picture .edge") == len(edges)
    for kind in KINDS:
        count = sum(node["kind"] == kind for node in graph["nodes"])
        assert whole(tab, f"#picture .node.{kind.replace(' ', '-')}") == count > 0
    negative = sum(row["weights"][i] < 0 for row, i in edges)
    assert whole(tab, "#picture .edge.lowers") == negative > 0

    # Size is influence: the area beyond the smallest radius is in proportion to it.
    features = [i for i, node in enumerate(graph["nodes"]) if node["kind"] == "feature"]
    radius = tab.page.locator("#picture .node.feature circle")
    shown = tab.page.locator("#picture .node.feature").evaluate_all(
        "a => a.map(e => e.dataset.item)"
    )
    assert sorted(map(int, shown)) == features
    largest = max(node["influence"] for node in graph["nodes"])
    for i, text in zip(
        shown, radius.evaluate_all("a => a.map(e => e.getAttribute('r'))"), strict=True
    ):
        share = graph["nodes"][int(i)]["influence"] / largest
        assert ((float(text) - 3) / 10) ** 2 == pytest.approx(share, abs=1e-6)
    assert tab.complaints == []
    assert all(url.startswith("file://") for url in tab.requests)


def test_thresholds_leave_the_largest(browser: Any, graph: Any, file: str) -> None:
    tab = opened(browser, file, "#/0?nodes=50&edges=30")
    influence = [node["influence"] for node in graph["nodes"]]
    order = sorted(range(len(influence)), key=lambda i: -influence[i])
    n, total = 0, 0.0
    while total < 0.5 * sum(influence) - 1e-9:
        total += influence[order[n]]
        n += 1
    shown = tab.page.locator("#picture .node").evaluate_all("a => a.map(e => +e.dataset.item)")
    assert sorted(shown) == sorted([*order[:n], len(influence)])
    few = whole(tab, "#picture .edge")
    tab.page.keyboard.press("}")
    wait_for(tab, "edges=35")
    assert whole(tab, "#picture .edge") > few
    tab.page.keyboard.press("[")
    wait_for(tab, "nodes=45")
    assert whole(tab, "#picture .node") <= n
    assert tab.complaints == []


def test_the_panel_of_a_node(browser: Any, graph: Any, file: str) -> None:
    target = len(graph["nodes"])
    tab = opened(browser, file, f"#/0?node={target}")
    row = graph["rows"][0]
    labels = tab.page.locator("#panel .edges .edge-line").all_text_contents()
    assert len(labels) == 12
    tab.page.click("#panel .more")
    items = tab.page.locator("#panel .edge-line").evaluate_all("a => a.map(e => +e.dataset.item)")
    assert items == row["sources"]
    (heads,) = tab.page.locator("#panel .heads").all_text_contents()
    first = row["weights"][0]
    for head, part in (("no head", 0.25), ("head 1.0", 0.5), ("head 2.3", -0.1)):
        percent = re.search(rf"{head} (−?[\d.]+)%", heads)
        assert percent is not None
        assert float(percent[1].replace("−", "-")) == pytest.approx(100 * part / first, rel=0.06)
    assert "p of ␣463%" in text_of(tab, "#panel .facts")  # the probability of " 4", 0.625

    feature = row["sources"][[graph["nodes"][i]["kind"] for i in row["sources"]].index("feature")]
    tab.page.click(f"#panel .edge-line[data-item='{feature}']")
    node = graph["nodes"][feature]
    name = f"Feature {node['layer']}/{node['feature']}"
    tab.page.wait_for_function(
        "n => document.querySelector('#panel h2').textContent === n", arg=name
    )
    (mine,) = [row for row in graph["rows"] if row["node"] == feature]
    outputs = [row["node"] for row in graph["rows"] if feature in row["sources"]]
    sections = tab.page.locator("#panel section")
    for section, count in ((1, len(mine["sources"])), (2, len(outputs))):
        lines = sections.nth(section).locator(".edge-line").count()
        assert lines == min(12, count)
    if feature in graph["evidence"]["samples"][0]["nodes"]:
        assert "measured effect" in text_of(tab, "#panel .facts")
    assert tab.complaints == []


def test_features_resolve_to_their_pages(browser: Any, run: Path, graph: Any, file: str) -> None:
    from fastadapt.features.store.store import Store

    store = Store.open(run)
    features = [i for i, node in enumerate(graph["nodes"]) if node["kind"] == "feature"]
    for i in features[::4]:  # one of each layer
        node = graph["nodes"][i]
        place = {"layer": node["layer"], "features": [node["feature"]]}
        tab = opened(browser, file, f"#/0?node={i}&pins={i}")
        (said,) = store.read("descriptions", **place).to_pylist()
        assert text_of(tab, "#panel .description") == said["description"]
        tab.page.keyboard.press("Enter")
        tab.marked("feature")
        assert text_of(tab, "#feature h2") == f"Layer {node['layer']}, feature {node['feature']}"
        (stats,) = store.read("features", **place).to_pylist()
        assert tab.page.locator("#feature .tile b").all_text_contents()[1] == f"{stats['count']:,}"
        examples = store.read("examples", **place).num_rows
        assert tab.page.locator("#feature article").count() == examples
        tab.page.keyboard.press("Escape")
        tab.page.wait_for_selector("#graph:not([hidden])")
        assert tab.page.evaluate("location.hash") == f"#/0?node={i}&pins={i}"
        assert tab.complaints == []
        tab.page.context.close()


def test_signs_of_components_that_form_a_chain(browser: Any, file: str) -> None:
    # The last component reads the first of its layer, which the file lists before it.
    document = make_document(stream="ranks")
    place = {"layer": 1, "position": 2, "activation": 1.0, "influence": 0.5}
    nodes = [{**place, "kind": "rank component", "feature": i} for i in range(2)]
    nodes.append({**place, "kind": "token", "layer": -1, "feature": -1})
    edges = ((None, {0: 0.25, 1: -0.75}), (0, {2: 1.0}), (1, {0: 1.0}))
    rows = [
        {**document["rows"][0], "node": node, "size": 1.0, "sources": list(into)}
        | {"weights": list(into.values())}
        for node, into in edges
    ]
    document |= {"nodes": nodes, "rows": rows, "heads": [], "evidence": None}
    tab = opened(browser, file)
    signed = tab.page.evaluate("file => Array.from(new Graph(file).signed)", document)
    assert signed == [-0.5, -0.75, -0.5, 1.0]  # both components, the token, the target


@pytest.mark.slow
def test_keys_pins_and_groups_are_in_the_address(browser: Any, graph: Any, file: str) -> None:
    tab = opened(browser, file)
    page = tab.page
    order = sorted(range(len(graph["nodes"])), key=lambda i: -graph["nodes"][i]["influence"])
    for i in range(3):
        page.keyboard.press("j")
        wait_for(tab, f"node={order[i]}")
        page.keyboard.press("p")
    pins = ".".join(map(str, order[:3]))
    wait_for(tab, f"pins={pins}")
    assert whole(tab, "#picture .pinned") == 3
    assert whole(tab, "#groups .box") == 4
    page.keyboard.press("g")
    wait_for(tab, "group=")
    assert whole(tab, "#groups .box") == 2
    page.fill("#groups input", "digits: & more")
    page.keyboard.press("Tab")
    wait_for(tab, "digits")
    address = page.evaluate("location.href")

    again = opened(browser, address)
    assert whole(again, "#picture .pinned") == 3
    assert again.page.input_value("#groups input") == "digits: & more"
    assert whole(again, "#picture .selected") == 1
    into = {row["node"]: row for row in graph["rows"]}[None]
    flows = [
        abs(weight) / into["size"]
        for i, weight in zip(into["sources"], into["weights"], strict=True)
        if i in order[:3]
    ]
    again.page.hover("#groups .box rect >> nth=0")
    tips = again.page.locator("#groups path").evaluate_all("a => a.map(e => e.dataset.tip)")
    assert len(tips) == bool(flows)
    share = float(re.search(r"([\d.]+)% of the target", tips[0])[1])  # type: ignore[index]
    assert share == pytest.approx(100 * sum(flows), rel=0.06)
    again.page.keyboard.press("Escape")
    again.page.wait_for_function("() => !location.hash.includes('node=')")
    again.page.keyboard.press("ArrowUp")
    again.page.wait_for_function(
        "n => location.hash.includes(`node=${n}`)", arg=len(graph["nodes"])
    )
    again.page.keyboard.press("ArrowDown")
    wait_for(again, f"node={into['sources'][0]}")
    again.page.keyboard.press("?")
    assert whole(again, "dialog[open]") == 1
    assert again.complaints == tab.complaints == []


def test_an_address_with_unknown_items(browser: Any, graph: Any, file: str) -> None:
    n = len(graph["nodes"])
    tab = opened(browser, file, f"#/0?node={n + 1}&pins=1.{n}.99999&group=1.99999:a&group=7:b")
    assert whole(tab, "#picture .pinned") == 1
    assert whole(tab, "#picture .selected") == 0
    assert whole(tab, "#groups input") == 1
    assert tab.page.locator("#trouble").is_hidden()
    assert tab.complaints == []


def test_the_evidence_is_that_of_the_file(browser: Any, graph: Any, file: str) -> None:
    tab = opened(browser, file)
    tiles = tab.page.locator("#evidence .tile b").all_text_contents()
    for text, value in zip(tiles, list(graph["flow"].values())[:2], strict=False):
        assert float(text.rstrip("%")) == pytest.approx(100 * value, rel=0.06)
    text = text_of(tab, "#evidence")
    for part in ("+3", "0.9 [0.8, 1]", "3 strongest", "undo 30%", "patterns, gates, norms"):
        assert part in text
    assert tab.complaints == []


def test_texts_are_not_markup(browser: Any, file: str) -> None:
    tab = opened(browser, file, ALL)
    places = tab.page.locator("#picture .place").evaluate_all("a => a.map(e => e.dataset.tip)")
    assert len(places) == len(TOKENS)
    assert places[3].startswith("</script><img src=x onerror=alert(1)>")
    assert whole(tab, "img") == 0
    assert tab.complaints == []


@pytest.mark.quick("430")
@pytest.mark.parametrize("width", [1300, 430])
def test_nothing_is_wider_than_the_window(browser: Any, file: str, width: int) -> None:
    tab = opened(browser, file, "#/0?nodes=100&edges=100&node=3&pins=3.4.5", width=width)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_several_graphs_without_features_on_a_server(browser: Any, tmp_path: Path) -> None:
    names = [write_document(tmp_path / f"{i}.json", seed=i) for i in range(2)]
    target = make_document(stream="target", logits=[[]])
    del target["evidence"]
    (tmp_path / "2.json").write_text(json.dumps(target))
    stop, ready, addresses = Event(), Event(), []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    files = find_graphs([*names, tmp_path / "2.json"])
    options = {"port": 0, "ready": on_ready, "stop": stop}
    thread = Thread(target=serve, args=(files,), kwargs=options)
    thread.start()
    try:
        assert ready.wait(60)
        tab = open_tab(browser)
        tab.page.goto(addresses[0])
        tab.marked("graphs")
        assert tab.page.locator("#graphs tbody tr").count() == 3
        tab.page.click("#graphs tbody tr:nth-child(3) a")
        tab.marked("graph")
        assert "stream target" in text_of(tab, "#subtitle")
        assert "No ablations were measured" in text_of(tab, "#evidence")
        tab.page.keyboard.press("j")
        tab.page.wait_for_selector("#panel h2")
        assert whole(tab, "#open") == 0  # no store, so no pages of features
        tab.page.goto(f"{addresses[0]}#/7")
        tab.page.wait_for_selector("#trouble:not([hidden])")
        assert text_of(tab, "#trouble") == "No graph 7: expected 0 to 2."
        assert tab.complaints == []
    finally:
        stop.set()
        thread.join(10)


def test_graphs_of_other_adapters_and_other_folders_are_refused(run: Path, tmp_path: Path) -> None:
    from fastadapt.features.store.store import Store

    other = write_document(tmp_path / "other.json", adapter="1" * 64)
    with pytest.raises(UserError, match="this graph is of other adapters than"):
        export([other], tmp_path / "site", store=Store.open(run))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds files that are not exported pages"):
        export([other], tmp_path / "full")
    export([other], tmp_path / "site")
    export([other], tmp_path / "site")  # an export is replaced
    with pytest.raises(UserError, match="or a run with graphs; make one with"):
        find_graphs([tmp_path])
