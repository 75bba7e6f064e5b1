"""Opening of stores, SQL queries that can read only the store, and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stores import StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.features.store.schema import FEATURES
from fastadapt.features.store.selection import SelectConfig, select
from fastadapt.features.store.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    texts = [
        StoreText(list(rng.integers(0, 30, 40)), [2] * 10 + [5] * 30, "math") for _ in range(3)
    ]
    activations = [np.maximum(rng.normal(size=(2, 40, 6)) - 1, 0).astype(np.float32) for _ in texts]
    make_store(tmp_path / "features", texts, activations, [f"w{i}" for i in range(30)])
    return tmp_path


def test_a_run_finds_its_store_and_rows_of_one_feature(folder: Path) -> None:
    store = Store.open(folder)
    assert store.kinds == ["adapter"]
    assert store.shape("adapter") == (2, 6)
    rows = store.read("examples", layer=1, features=[3]).to_pylist()
    assert {(row["layer"], row["feature"]) for row in rows} == {(1, 3)}
    counts = store.read("features", columns=["count"], layer=1, features=[3])["count"].to_pylist()
    assert len([row for row in rows if row["sample"] == "top"]) == min(20, counts[0])


def test_a_store_prints_its_folder_and_sizes(folder: Path) -> None:
    store = Store.open(folder)
    assert repr(store) == f"Store({str(folder / 'features')!r}, adapter=(2, 6))"


def test_sql_reads_the_store_and_nothing_else(folder: Path) -> None:
    import duckdb

    connection = Store.open(folder).connect()
    actual = connection.execute("SELECT count(*) FROM features JOIN lens USING (layer, feature)")
    assert actual.fetchone() == (12,)
    with pytest.raises(duckdb.PermissionException):
        connection.execute("SELECT * FROM read_text('/etc/hostname')")
    with pytest.raises(duckdb.InvalidInputException):
        connection.execute("SET enable_external_access = true")


NAMES = ["l1[0.1]", "lam*", "a?b", "it's", "50%", "{x,y}", "lr=0.1", "layer=1", "a b", "a\\b", "~x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_this_store_alone(folder: Path, name: str) -> None:
    """Names that are glob patterns do not match siblings, and ``key=value`` adds no column."""
    import duckdb

    siblings = ["l10", "l11", "lambda", "aab"]
    for other in (*siblings, name):
        shutil.copytree(folder / "features", folder / other / "features")
    store = Store.open(folder / name)
    connection = store.connect()
    assert connection.execute("SELECT count(*) FROM features").fetchone() == (12,)
    columns = [row[0] for row in connection.execute("DESCRIBE features").fetchall()]
    assert columns == store.read("features").column_names == FEATURES.names
    assert len(store.read("features", layer=1)) == 6
    path = str(folder / "l10" / "features" / "adapter" / "features.parquet")
    with pytest.raises(duckdb.PermissionException):
        connection.execute(f"SELECT * FROM read_parquet('{path}')")
    sql = SelectConfig(sql="SELECT layer, feature FROM features")
    assert len(select(store, sql)) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "has no features yet"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "adapter" / "lens.parquet").unlink(), "lens.parquet is missing"),
        (
            lambda f: (f / "manifest.json").write_text(json.dumps({"schema_version": 9})),
            "schema_version is 9",
        ),
    ],
)
def test_damaged_stores_are_refused(folder: Path, change: object, message: str) -> None:
    change(folder / "features")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        Store.open(folder)


def test_a_store_of_another_adapter_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="collected from other adapters"):
        Store.open(folder, adapter="1" * 64)
    assert Store.open(folder, adapter="0" * 64).kinds == ["adapter"]


def test_units_out_of_range_are_refused(folder: Path) -> None:
    store = Store.open(folder)
    with pytest.raises(UserError, match="layer: expected 0 to 1, got 2"):
        store.check_unit("adapter", 2, 0)
    with pytest.raises(UserError, match="feature: expected 0 to 5, got -1"):
        store.check_unit("adapter", 0, -1)
    with pytest.raises(UserError, match="no features or neurons of kind base"):
        store.shape("base")
