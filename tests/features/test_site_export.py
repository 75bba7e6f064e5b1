"""Pages hold what the store says, are put in place as a whole, and know when they are old."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stores import MadeText, make_store

import fastadapt.features.site.pages as exporting
from fastadapt.errors import RunError, UserError
from fastadapt.features.site import export
from fastadapt.features.site.pages import STATIC, is_current
from fastadapt.features.site.shards import TYPES
from fastadapt.features.store.schema import CLASSES, DESCRIPTIONS, REGIONS, SCORES, TENTHS
from fastadapt.features.store.store import Store
from fastadapt.io.atomic import locked

_CALL = re.compile(r'fastadapt\.shard\("([a-z0-9-]+)","([0-9a-f]+)","([A-Za-z0-9+/=]+)"\);\n')


def unpack(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """What a shard holds, read as its docstring says."""
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
        MadeText(list(rng.integers(0, 30, 34)), regions, domain)
        for domain in ("math", "code", None, "math")
    ]
    activations = [
        np.maximum(rng.normal(size=(2, 34, 70)) - 1.5, 0).astype(np.float32) for _ in texts
    ]
    for one in activations:
        one[1, :, 4] = 0  # never fires
    return make_store(tmp_path / "features", texts, activations, [f"w{i}" for i in range(30)]).store


def judge(store: Store) -> None:
    """Adds what judges say of feature 3 of layer 1."""
    unit = {"layer": 1, "feature": 3, "judge": "made"}
    said = [
        {**unit, "variant": variant, "description": f"of {variant}", "shown": [0]}
        for variant in ("uniform", "top")
    ]
    store.add("descriptions", pa.Table.from_pylist(said, schema=DESCRIPTIONS))
    counts = dict.fromkeys(("positives", "negatives", "true_positives", "true_negatives"), 0)
    score = {**unit, "variant": "top", **counts, "accuracy": float("nan")}
    store.add("scores", pa.Table.from_pylist([score], schema=SCORES))
    classed = {**unit, "class": "domain", "subclass": "math", "reason": "it says so"}
    store.add("classes", pa.Table.from_pylist([classed], schema=CLASSES))


def test_every_unit_is_in_the_pages_as_it_is_in_the_store(store: Store) -> None:
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
                found = examples.get((layer, feature), [])
                assert detail["examples"][i] == len(found)
                for held in found:
                    assert detail["example_sample"][example] == (held["sample"] == "uniform")
                    assert REGIONS[detail["example_region"][example]] == held["region"]
                    code = detail["example_domain"][example]
                    assert (None if code == 255 else facts["domains"][code]) == held["domain"]
                    for name in ("text", "position", "start", "value"):
                        assert detail[f"example_{name}"][example] == np.float32(held[name])
                    length, some = (
                        int(detail[f"example_{c}"][example]) for c in ("tokens", "fires")
                    )
                    tokens = detail["window_token"][window : window + length]
                    assert tokens.tolist() == held["tokens"]
                    values = np.zeros(length, np.float32)
                    at = detail["fires_at"][fired : fired + some]
                    values[at] = detail["fires_value"][fired : fired + some]
                    assert values.tolist() == held["values"]
                    example, window, fired = example + 1, window + length, fired + some
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


def test_what_judges_said_is_there_and_makes_pages_old(store: Store) -> None:
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


def test_pages_are_old_when_the_store_is_collected_anew_or_they_are_cut(store: Store) -> None:
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


def test_pages_are_replaced_as_a_whole_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = export(store)
    assert site is not None
    (site / "data" / "old.js").write_text("of another export")
    stop = Event()
    told: list[tuple[int, int]] = []

    def one(done: int, total: int) -> None:
        told.append((done, total))
        stop.set()

    assert export(store, progress=one, stop=stop) is None
    assert told == [(1, 2)]
    assert (site / "data" / "old.js").is_file()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_write_static", full)
        with pytest.raises(RunError, match="cannot be written: No space left"):
            export(store)
    assert (site / "data" / "old.js").is_file()
    export(store)
    assert not (site / "data" / "old.js").exists()
    assert [p.name for p in store.folder.iterdir() if p.name.startswith(".tmp")] == []


def test_what_a_killed_export_left_is_cleared(store: Store) -> None:
    killed, living = (store.folder / f".tmp-site-{digit * 32}" for digit in "01")
    for left in (killed, living):
        (left / "data").mkdir(parents=True)
    with locked(living / ".lock"):
        site = export(store)
    assert site is not None
    assert not killed.exists()
    assert living.is_dir()
    assert not (site / ".lock").exists()


def test_a_folder_of_something_else_is_left_alone(store: Store, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is no site of features"):
        export(store, mine)
    with pytest.raises(UserError, match="is no folder"):
        export(store, mine / "thesis.tex")
    assert (mine / "thesis.tex").read_text() == "years of work"
    assert export(store, tmp_path / "new" / "pages") == (tmp_path / "new" / "pages").resolve()


def test_kinds_that_are_not_there_are_told(store: Store) -> None:
    with pytest.raises(UserError, match="no base units"):
        export(store, kinds=["base"])
    with pytest.raises(UserError, match="kinds: expected some of adapter"):
        export(store, kinds=[])


def test_a_store_that_contradicts_itself_is_told(store: Store) -> None:
    store.manifest["units"]["adapter"]["n_features"] = 60
    with pytest.raises(UserError, match="'feature': expected 0 to 59, got 69"):
        export(store)
    assert not (store.folder / "site").exists()


@pytest.mark.parametrize("table", ["texts", "tokens", "adapter/examples"])
def test_a_table_that_was_cut_off_is_told(store: Store, table: str) -> None:
    path = store.folder / f"{table}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{path.name} is not the file that was collected"):
        export(store)
    assert [p.name for p in store.folder.iterdir() if "site" in p.name] == []


def test_the_files_are_these(store: Store) -> None:
    site = export(store)
    assert site is not None
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    data = (
        "site",
        "tokens",
        "texts",
        *(f"adapter-{n}{p}" for n in (0, 1) for p in ("", "-0", "-1")),
    )
    assert found == {*STATIC, "style.css", "site.json", *(f"data/{name}.js" for name in data)}
