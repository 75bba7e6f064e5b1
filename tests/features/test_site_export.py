"""Exports: contents of the shards, atomic replacement, and detection of outdated pages."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import zlib
from collections import Counter
from importlib import resources
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stores import StoreText, make_store

import fastadapt.features.site.pages as exporting
from fastadapt.errors import RunError, UserError
from fastadapt.features.site import export
from fastadapt.features.site.pages import STATIC, is_current
from fastadapt.features.site.shards import TYPES
from fastadapt.features.store.schema import (
    CLASSES,
    DESCRIPTIONS,
    EFFECTS,
    REGIONS,
    SCALES,
    SCORES,
    TENTHS,
)
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import locked

_CALL = re.compile(r'fastadapt\.shard\("([a-z0-9-]+)","([0-9a-f]+)","([A-Za-z0-9+/=]+)"\);\n')


def unpack(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Unpack a shard, by the format in the docstring of shards.py."""
    call = _CALL.fullmatch(path.read_text("ascii"))
    assert call is not None
    assert call[1] == path.stem
    raw = zlib.decompress(base64.b64decode(call[3]))
    end = 4 + int.from_bytes(raw[:4], "little")
    head, columns = json.loads(raw[4:end]), {}
    for name, kind, n in head["columns"]:
        dtype = np.dtype(TYPES[kind])
        planes = np.frombuffer(raw[end : end + n * dtype.itemsize], np.uint8)
        columns[name] = planes.reshape(dtype.itemsize, n).T.copy().view(dtype).reshape(-1)
        end += n * dtype.itemsize
    assert end == len(raw)
    return head["facts"], columns


@pytest.fixture
def store(tmp_path: Path) -> Store:
    rng = np.random.default_rng(3)
    regions = [0, 1, 2, 2, 3, 4, *[5] * 25, 6, 7, 7]
    texts = [
        StoreText(list(rng.integers(0, 30, 34)), regions, domain)
        for domain in ("math", "code", None, "math")
    ]
    activations = [
        np.maximum(rng.normal(size=(2, 34, 70)) - 1.5, 0).astype(np.float32) for _ in texts
    ]
    for one in activations:
        one[1, :, 4] = 0  # never fires
    return make_store(tmp_path / "features", texts, activations, [f"w{i}" for i in range(30)]).store


def judge(store: Store) -> None:
    """Add descriptions, a score and a class of feature 3 of layer 1."""
    unit = {"layer": 1, "feature": 3, "judge": "made"}
    rows = [
        {**unit, "variant": variant, "description": f"of {variant}", "shown": [0]}
        for variant in ("uniform", "top")
    ]
    store.add("descriptions", pa.Table.from_pylist(rows, schema=DESCRIPTIONS))
    counts = dict.fromkeys(("positives", "negatives", "true_positives", "true_negatives"), 0)
    score = {**unit, "variant": "top", **counts, "accuracy": float("nan")}
    store.add("scores", pa.Table.from_pylist([score], schema=SCORES))
    classed = {**unit, "class": "domain", "subclass": "math", "reason": "it says so"}
    store.add("classes", pa.Table.from_pylist([classed], schema=CLASSES))


def test_effects_are_columns_and_notes(store: Store) -> None:
    """A negative effect is a measured value, below those above 0 and above no value."""
    effects = {"layer": [1, 1], "feature": [3, 5], "delta_kl": [0.25, -0.5], "positions": [99, 99]}
    store.add("effects", pa.table(effects).cast(EFFECTS))
    data = export(store) / "data"  # type: ignore[operator]
    _, index = unpack(data / "adapter-1.js")
    measured = np.flatnonzero(np.isfinite(index["effect"]))
    assert {int(i): index["effect"][i] for i in measured} == {3: 0.25, 5: -0.5}
    assert index["effect"].min() == -np.inf
    notes = unpack(data / "adapter-1-0.js")[0]["notes"]
    assert {unit: tables["effects"][0]["delta_kl"] for unit, tables in notes.items()} == {
        "3": 0.25,
        "5": -0.5,
    }


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_negative_effects_are_shown_and_sorted_above_none() -> None:
    folder = resources.files("fastadapt.features.site") / "static"
    scripts = [(folder / f"{name}.js").read_text() for name in ("dom", "units", "list")]
    check = """
      const units = new Units({ kind: "adapter", layers: 2, features: 3 });
      const names = ["count", "density", "max", "contribution", "region", "class"];
      const others = Object.fromEntries(names.map((name) => [name, [1, 0, 1]]));
      [[-Infinity, -0.5, 0], [0.25, -2e-4, -Infinity]].forEach((effect, layer) =>
        units.insert(layer, { facts: {}, columns: { ...others, effect, described: [] } }));
      const shown = (column) => (unit) =>
        formatNumber(List.prototype.measured.call({ units, column }, unit));
      const order = Array.from(units.order("effect"));
      console.log(JSON.stringify(
        [order, order.map(shown("effect")), [0, 1].map(shown("contribution"))]));
    """
    script = "\n".join([*scripts, check])
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        [3, 2, 4, 1, 0, 5],
        ["0.25", "0", "−2.0e−4", "−0.5", "–", "–"],
        ["1", "–"],
    ]


def test_scales_are_columns(store: Store) -> None:
    row = {"base_share": -0.5, "base_scale": -1.0, "target_scale": 2.0, "difference_scale": 0.75}
    units = [{"layer": 1, "feature": 3, **row, "positions": 9}]
    store.add("scales", pa.Table.from_pylist(units, schema=SCALES))
    data = export(store) / "data"  # type: ignore[operator]
    facts, _ = unpack(data / "site.js")
    assert "scales" in facts["kinds"][0]["tables"]
    _, index = unpack(data / "adapter-1.js")
    assert np.flatnonzero(index["origin"] != 255).tolist() == [3]
    assert facts["origins"][index["origin"][3]] == "opposed"
    assert np.flatnonzero(~np.isnan(index["base_share"])).tolist() == [3]
    _, detail = unpack(data / "adapter-1-0.js")
    assert {name: detail[name][3] for name in row if name != "base_share"} == {
        name: value for name, value in row.items() if name != "base_share"
    }
    assert index["base_share"][3] == -0.5
    store.path("scales").unlink()
    data = export(store) / "data"  # type: ignore[operator]
    assert "base_share" not in unpack(data / "adapter-1.js")[1]


def test_shards_have_the_units_of_the_store(store: Store) -> None:
    site = export(store)
    assert site == store.folder.resolve() / "site"
    facts, _ = unpack(site / "data" / "site.js")
    (kind,) = facts["kinds"]
    rows = {(r["layer"], r["feature"]): r for r in store.read("features").to_pylist()}
    lens = {(r["layer"], r["feature"]): r for r in store.read("lens").to_pylist()}
    examples: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in store.read("examples").to_pylist():
        examples.setdefault((row["layer"], row["feature"]), []).append(row)
    seen = 0
    for layer in range(kind["layers"]):
        _, index = unpack(site / "data" / f"adapter-{layer}.js")
        for low in range(0, kind["features"], kind["span"]):
            part = low // kind["span"]
            _, detail = unpack(site / "data" / f"adapter-{layer}-{part}.js")
            n = detail["examples"].size
            example = window = fired = 0
            for i in range(n):
                feature, row = low + i, rows[layer, low + i]
                assert index["count"][feature] == row["count"]
                assert index["density"][feature] == np.float32(row["density"])
                assert index["max"][feature] == np.float32(row["max"])
                written = np.float32(row["density"] * row["mean"] * row["norm"])
                assert index["contribution"][feature] == written
                most = int(np.argmax(row["by_region"])) if row["count"] else 255
                assert index["region"][feature] == most
                for name in ("histogram", "by_domain", "by_region", "by_tenth"):
                    assert detail[name].reshape(n, -1)[i].tolist() == row[name]
                assert detail["norm"][i] == np.float32(row["norm"])
                of_lens = lens[layer, feature]
                promoted = index["promoted"].reshape(kind["features"], -1)[feature]
                assert promoted.tolist() == of_lens["promoted"]
                for name in ("promoted_logits", "suppressed", "suppressed_logits"):
                    assert detail[name].reshape(n, -1)[i].tolist() == of_lens[name]
                unit_examples = examples.get((layer, feature), [])
                assert detail["examples"][i] == len(unit_examples)
                for held in unit_examples:
                    assert detail["example_sample"][example] == (held["sample"] == "uniform")
                    assert REGIONS[detail["example_region"][example]] == held["region"]
                    code = detail["example_domain"][example]
                    assert (None if code == 255 else facts["domains"][code]) == held["domain"]
                    for name in ("text", "position", "start", "value"):
                        assert detail[f"example_{name}"][example] == np.float32(held[name])
                    length, n_fires = (
                        int(detail[f"example_{c}"][example]) for c in ("tokens", "fires")
                    )
                    tokens = detail["window_token"][window : window + length]
                    assert tokens.tolist() == held["tokens"]
                    values = np.zeros(length, np.float32)
                    positions = detail["fires_at"][fired : fired + n_fires]
                    values[positions] = detail["fires_value"][fired : fired + n_fires]
                    assert values.tolist() == held["values"]
                    example, window, fired = example + 1, window + length, fired + n_fires
                    seen += 1
            assert example == detail["example_text"].size
            assert window == detail["window_token"].size
            assert fired == detail["fires_at"].size
    assert seen == sum(map(len, examples.values())) > 1000
    assert len(list((site / "data").glob("adapter-0-*.js"))) == 2


def test_totals_are_those_of_the_texts(store: Store) -> None:
    site = export(store)
    assert site is not None
    facts, _ = unpack(site / "data" / "site.js")
    by_region: Counter[int] = Counter()
    by_tenth: Counter[int] = Counter()
    by_domain: Counter[str] = Counter()
    for text in store.read("texts").to_pylist():
        thinking = [i for i, r in enumerate(text["regions"]) if REGIONS[r] == "thinking"]
        by_region.update(text["regions"])
        by_tenth.update(i * TENTHS // len(thinking) for i in range(len(thinking)))
        by_domain[text["domain"]] += len(text["tokens"])
    assert facts["totals"] == {
        "region": [by_region[i] for i in range(len(REGIONS))],
        "tenth": [by_tenth[i] for i in range(TENTHS)],
        "domain": [by_domain[name] for name in facts["domains"]],
    }
    assert facts["domains"] == ["code", "math"]


def test_results_of_judges_are_exported_and_outdate_the_pages(store: Store) -> None:
    site = export(store)
    assert site is not None
    assert is_current(store, site)
    judge(store)
    assert not is_current(store, site)
    assert export(store) == site
    assert is_current(store, site)
    facts, index = unpack(site / "data" / "adapter-1.js")
    assert index["described"].tolist() == [3]
    assert facts["descriptions"] == ["of top"]
    assert index["class"][3] == 0
    assert (np.delete(index["class"], 3) == 255).all()
    about, _ = unpack(site / "data" / "site.js")
    assert about["kinds"][0]["classes"] == [["domain", "math"]]
    notes = unpack(site / "data" / "adapter-1-0.js")[0]["notes"]
    assert list(notes) == ["3"]
    assert sorted(d["variant"] for d in notes["3"]["descriptions"]) == ["top", "uniform"]
    assert notes["3"]["scores"][0]["accuracy"] is None  # NaN is no JSON


def test_pages_are_outdated_after_a_new_collection_or_damage(store: Store) -> None:
    site = export(store)
    assert site is not None
    manifest = store.folder / "manifest.json"
    before = manifest.read_text()
    manifest.write_text(before.replace("runs/made", "runs/other"))
    assert not is_current(Store.open(store.folder), site)
    manifest.write_text(before)
    assert is_current(store, site)
    (site / "site.json").write_text("{")
    assert not is_current(store, site)


def test_pages_are_replaced_atomically(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    site = export(store)
    assert site is not None
    (site / "data" / "old.js").write_text("of another export")
    stop = Event()
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        stop.set()

    assert export(store, progress=progress, stop=stop) is None
    assert calls == [(1, 2)]
    assert (site / "data" / "old.js").is_file()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_static", full)
        with pytest.raises(RunError, match="cannot be written: No space left"):
            export(store)
    assert (site / "data" / "old.js").is_file()
    export(store)
    assert not (site / "data" / "old.js").exists()
    assert [p.name for p in store.folder.iterdir() if p.name.startswith(".tmp")] == []


def test_leftovers_of_a_killed_export_are_removed(store: Store) -> None:
    killed, living = (store.folder / f".tmp-site-{digit * 32}" for digit in "01")
    for left in (killed, living):
        (left / "data").mkdir(parents=True)
    with locked(living / ".lock"):
        site = export(store)
    assert site is not None
    assert not killed.exists()
    assert living.is_dir()
    assert not (site / ".lock").exists()


def test_a_folder_with_other_contents_is_refused(store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not exported pages"):
        export(store, mine)
    with pytest.raises(UserError, match="is not a folder"):
        export(store, mine / "thesis.tex")
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert export(store, tmp_path / "new" / "pages") == (tmp_path / "new" / "pages").resolve()


def test_kinds_that_the_store_lacks_are_refused(store: Store) -> None:
    with pytest.raises(UserError, match="no features or neurons of kind base"):
        export(store, kinds=["base"])
    with pytest.raises(UserError, match="kinds: expected one or more of adapter"):
        export(store, kinds=[])


def test_an_inconsistent_store_is_refused(store: Store) -> None:
    store.manifest["units"]["adapter"]["n_features"] = 60
    with pytest.raises(UserError, match="'feature': expected 0 to 59, got 69"):
        export(store)
    assert not (store.folder / "site").exists()


@pytest.mark.parametrize("table", ["texts", "tokens", "adapter/examples"])
def test_a_truncated_table_is_refused(store: Store, table: str) -> None:
    path = store.folder / f"{table}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path.name} is not the file that was collected"):
        export(store)
    assert [p.name for p in store.folder.iterdir() if "site" in p.name] == []


def test_files_of_an_export(store: Store) -> None:
    site = export(store)
    assert site is not None
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    data = (
        "site",
        "tokens",
        "texts",
        *(f"adapter-{n}{p}" for n in (0, 1) for p in ("", "-0", "-1")),
    )
    assert files == {*STATIC, "style.css", "site.json", *(f"data/{name}.js" for name in data)}
