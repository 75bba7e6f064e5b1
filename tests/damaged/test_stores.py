"""Damaged stores of features, read by the commands that open a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from damage import PROOF, Damage, command, ends_well, raw, sweep, variants

from fastadapt.errors import UserError
from fastadapt.features.site import export
from fastadapt.features.store import schema
from fastadapt.features.store.sets import FeatureSet, save_set
from fastadapt.features.store.store import Store, write_manifest, write_table

from stores import StoreText, make_store  # isort: skip

LISTED = ("texts", "tokens", "adapter/features", "adapter/examples", "adapter/lens")
ADDED = tuple(
    f"adapter/{name}"
    for name in ("descriptions", "scores", "classes", "overlap", "effects", "scales")
)
UNIT = {"layer": 1, "feature": 3}
JUDGED: dict[str, dict[str, Any]] = {
    "descriptions": {
        "variant": "top", "judge": "made", "description": "fires on w3", "shown": [0, 1],
    },
    "scores": {
        "variant": "top", "judge": "made", "positives": 5, "negatives": 5, "true_positives": 4,
        "true_negatives": 3, "accuracy": 0.7,
    },
    "classes": {"judge": "made", "class": "domain", "subclass": "math", "reason": "sums"},
    "overlap": {"target": 0.75, "base": 0.5},
    "effects": {"delta_kl": -0.01, "positions": 117},
    "scales": {
        "base_share": -0.4, "base_scale": -0.8, "target_scale": 2.0, "difference_scale": 1.5,
        "positions": 117,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "features"
    rng = np.random.default_rng(1)
    texts = [
        StoreText(list(rng.integers(0, 30, 40)), [2] * 10 + [5] * 30, "math") for _ in range(3)
    ]
    activations = [np.maximum(rng.normal(size=(2, 40, 6)) - 1, 0).astype(np.float32) for _ in texts]
    store = make_store(folder, texts, activations, [f"w{i}" for i in range(30)]).store
    for name, row in JUDGED.items():
        rows = pa.Table.from_pylist([{**UNIT, **row}], schema=schema.TABLES[name])
        store.add(name, rows)
    features = FeatureSet.from_pairs(
        [(0, 1), (1, 3)], adapter="0" * 64, shape=(2, 6), expression="by hand"
    )
    save_set(store, features, "some")
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "features"))


def never(_: Damage, __: Any) -> bool:
    return False


def flips(damage: Damage, _: Any) -> bool:
    """Accept bit flips in a part of a file, which is read without its SHA-256."""
    return damage.name.startswith("bit flip")


@pytest.fixture
def pages(folder: Path) -> list[object]:
    return ["features", "export", folder, "--output", folder.parent / "pages"]


@pytest.mark.quick("texts")
@pytest.mark.parametrize("table", LISTED)
def test_check_catches_every_flip_and_truncation(folder: Path, table: str) -> None:
    path = folder / f"{table}.parquet"
    sweep(path, list(raw(path.read_bytes())), command("features", "check", folder), never)


@pytest.mark.parametrize("table", LISTED)
def test_whole_reads_and_pages_catch_every_one(
    folder: Path, table: str, pages: list[object]
) -> None:
    path = folder / f"{table}.parquet"
    cases = list(raw(path.read_bytes(), seed=1))
    kind, _, last = table.rpartition("/")

    def read() -> Any:
        return Store.open(folder).read(last, kind or "adapter")  # type: ignore[arg-type]

    sweep(path, cases, read, never)
    sweep(path, cases[::4], command(*pages), never)


@pytest.mark.parametrize("table", LISTED)
def test_parts_that_are_read_end_well(folder: Path, table: str) -> None:
    path = folder / f"{table}.parquet"
    kind, _, last = table.rpartition("/")
    cases = list(raw(path.read_bytes(), count=30, seed=2))

    def part() -> Any:
        store = Store.open(folder)
        return store.read(last, layer=1, features=[3]) if kind else store.read(last)

    sweep(path, cases, part, flips)


@pytest.mark.quick("adapter/lens-how0", "adapter/features-how4")
@pytest.mark.parametrize(
    ("table", "how"),
    [
        ("adapter/lens", ["--promotes", "w1", "w2", "w3"]),
        ("adapter/examples", ["--at", "thinking", "--share", "0.1"]),
        ("adapter/examples", ["--before", "w1", "w2", "--share", "0.01"]),
        ("adapter/features", ["--random", "some"]),
        ("adapter/features", ["--sql", "SELECT layer, feature FROM features WHERE count > 1"]),
        ("tokens", ["--before", "w1", "w2", "w4", "--share", "0.01"]),
        ("adapter/classes", ["--classes", "math"]),
    ],
)
def test_selections_end_well(folder: Path, table: str, how: list[str]) -> None:
    path = folder / f"{table}.parquet"
    call = command("features", "select", folder, "new", *how, "--overwrite")
    names = (str(folder), "the set")  # a flip may leave a selection empty
    # A query does not read all columns, so bit flips in other columns are accepted.
    sweep(path, list(raw(path.read_bytes(), seed=3)), call, flips, names)


@pytest.mark.quick("adapter/scores")
@pytest.mark.parametrize("table", ADDED)
def test_tables_of_judges_end_well(folder: Path, table: str, pages: list[object]) -> None:
    path = folder / f"{table}.parquet"
    cases = list(raw(path.read_bytes(), seed=4))
    sweep(path, cases, command("features", "check", folder), flips)
    sweep(path, cases[::3], command(*pages), flips)


# --- contents -------------------------------------------------------------------------------------


def contents(table: pa.Table) -> Iterator[tuple[str, str, pa.Table]]:
    """Yield tables with a column of another type or an impossible value: (column, how, table)."""
    for index, name in enumerate(table.column_names):
        column = table[name]
        others = {
            "strings": pa.array(["x"] * len(table)),
            "bools": pa.array([True] * len(table)),
            "nulls": pa.nulls(len(table), column.type),
            "doubles": pa.array([0.5] * len(table), pa.float64()),
            "lists of strings": pa.array([["x"]] * len(table)),
            "short lists": pa.array([[]] * len(table), column.type)
            if pa.types.is_list(column.type)
            else pa.array([[1]] * len(table)),
        }
        kind = column.type.value_type if pa.types.is_list(column.type) else column.type
        bad: list[Any] = []
        if pa.types.is_integer(kind):
            bad = [-1, 100]
        elif pa.types.is_floating(kind):
            bad = [float("nan"), float("inf"), -0.5]
        for value in bad:
            plain = column.to_pylist()
            plain[-1] = [value, *plain[-1][1:]] if isinstance(plain[-1], list) else value
            others[f"one {value}"] = pa.array(plain, column.type)
        yield name, "removed", table.remove_column(index)
        for how, other in others.items():
            if not other.type.equals(column.type) or not other.equals(column.combine_chunks()):
                yield name, how, table.set_column(index, pa.field(name, other.type), other)


def sign(folder: Path) -> None:
    """Rewrite the manifest with the hashes of the current files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [folder / name for name in manifest.pop("files")]
    del manifest["schema_version"]
    write_manifest(folder, manifest, files)


SCALES = ("base_share", "base_scale", "target_scale", "difference_scale")
#: Changes that no reader can detect from the rows, or that no reader checks.
FREE = {
    *(("count", how) for how in ("one 100",)),
    *(("rank", how) for how in ("one 100",)),
    *((name, "one 100") for name in ("priority", "shown", "positives", "negatives")),
    *((name, "one 100") for name in ("true_positives", "true_negatives", "by_domain", "by_tenth")),
    *((name, "one -0.5") for name in ("promoted_logits", "suppressed_logits", "delta_kl")),
    *((name, "one -0.5") for name in SCALES),
    *((name, "doubles") for name in ("delta_kl", *SCALES)),
    ("positions", "one 100"),
    *((name, "doubles") for name in ("accuracy", "target", "base")),
    ("domain", "nulls"), ("subclass", "nulls"), ("domain", "strings"), ("accuracy", "one nan"),
    *((name, "one 100") for name in ("start", "histogram", "by_region")),
}  # fmt: skip


@pytest.mark.quick("adapter/features", "adapter/examples")
@pytest.mark.parametrize("table", [*LISTED, *ADDED])
def test_signed_contents_that_cannot_be(folder: Path, table: str, pages: list[object]) -> None:
    path = folder / f"{table}.parquet"
    wrong, n = [], 0
    sound = path.read_bytes(), (folder / "manifest.json").read_bytes()
    for column, how, rows in islice(contents(pq.read_table(path)), 0, None, 1 if PROOF else 8):
        n += 1
        pq.write_table(rows, path)
        sign(folder)
        damage = Damage(f"{column} {how}", b"", column, how)

        def text(damage: Damage, _: Any) -> bool:
            return (damage.key, damage.value) in FREE or _same_type(table, damage)

        for argv in (["features", "check", folder], pages if n % 5 == 0 else None):
            if argv is not None:
                # The pages read only part of the columns, so any result is accepted.
                valid = text if argv is not pages else lambda *_: True
                said = ends_well(command(*argv), damage, path, valid=valid)
                wrong += [f"{argv[1]}: {said}"] if said else []
        path.write_bytes(sound[0])
        (folder / "manifest.json").write_bytes(sound[1])
    print(f"{n} tables of {table} with one column that cannot be")
    assert not wrong, "\n".join(wrong)


def _same_type(table: str, damage: Damage) -> bool:
    """Return whether text was replaced by other text, which no reader can detect."""
    fields = {**schema.TABLES, **schema.SHARED}[table.rpartition("/")[2]]
    column_type = fields.field(damage.key).type
    free = {"description", "judge", "reason", "class", "subclass", "id", "string"}
    if damage.value == "strings":
        return damage.key in free and pa.types.is_string(column_type)
    return damage.key == "shown" and damage.value == "short lists"


# --- documents ------------------------------------------------------------------------------------

#: Keys of a manifest that are only reported, or that may be any text or list of texts.
REPORTED = {
    "run", "adapter", "target", "base", "source", "digest", "settings", "top", "uniform", "before",
    "after", "seed", "demeaned", "versions", "lens", "pair", "domains",
}  # fmt: skip


def test_manifest(folder: Path, pages: list[object]) -> None:
    path = folder / "manifest.json"
    accepted: list[Damage] = []

    def valid(damage: Damage, _: Any) -> bool:
        accepted.append(damage)
        known = damage.key in REPORTED or damage.key in ("texts", "tokens", "edges")
        listed = damage.key.endswith(".parquet") or damage.key in ("bytes", "sha256")
        return known or listed or damage.name.startswith("bit flip")

    # If a file contradicts the manifest, the message names that file.
    names: tuple[str, ...]
    names = ("manifest.json", ".parquet", "no adapter units")
    sweep(path, variants(path), command("features", "sets", folder), valid, names)
    cases = list(accepted)
    free = {*REPORTED, "texts.parquet"}

    def reported(damage: Damage, _: Any) -> bool:
        return damage.key in free or damage.name.startswith("bit flip")

    names = (str(folder), *names)
    sweep(path, cases, command("features", "check", folder), reported, names)
    sweep(path, cases[::6], command(*pages), lambda *_: True, names)


@pytest.mark.slow
def test_sets(folder: Path) -> None:
    path = folder / "sets" / "some.json"
    cases = variants(path)
    reported = {"name", "adapter", "made", "n_layers", "n_features"}

    def valid(damage: Damage, _: Any) -> bool:
        sizes = damage.key in ("n_layers", "n_features") and damage.value == 10**9
        size = damage.name == "size removed"  # the list has a length
        return damage.key in reported or sizes or size or damage.name.startswith("bit flip")

    # A set of another adapter is valid: sets are not removed when features are collected again.
    sweep(path, cases, command("features", "check", folder), valid)
    ablate = command("intervene", folder, "--ablate", path, "--output", folder / "o")
    sweep(path, cases, ablate, never, ("some.json", str(folder)))


def test_the_site_s_record(folder: Path) -> None:
    from fastadapt.features.site.pages import is_current

    store = Store.open(folder)
    site = export(store)
    assert site is not None
    assert is_current(store, site)
    path = site / "site.json"
    sweep(path, variants(path), lambda: is_current(store, site), lambda _, current: not current)
    assert is_current(store, site)


def test_a_judge_s_kept_answers(tmp_path: Path) -> None:
    from fastadapt.features.autointerp.judges.reply_cache import ReplyCache

    calls, request = ReplyCache(tmp_path), {"model": "m", "messages": [{"role": "user"}]}
    calls.put(request, "yes", {"tokens": 3})
    path = next(tmp_path.rglob("*.json"))
    assert calls.get(request) == "yes"
    # An unreadable reply counts as missing.
    valid = lambda _, reply: reply is None or isinstance(reply, str)  # noqa: E731
    sweep(path, variants(path), lambda: calls.get(request), valid)


# --- other damage ---------------------------------------------------------------------------------


def test_a_sound_store_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastadapt.cli.main import main

    assert main(["features", "check", str(folder)]) == 0
    said = capsys.readouterr().out
    for name in (*LISTED, *ADDED):
        assert f"{name}.parquet" in said
    assert "sets/some.json" in said


def test_check_names_everything(folder: Path) -> None:
    (folder / "tokens.parquet").unlink()
    (folder / "adapter" / "lens.parquet").write_bytes(b"")
    (folder / "sets" / "some.json").write_text("{")
    with pytest.raises(Exception, match="defects: 4") as raised:
        command("features", "check", folder)()
    for name in ("tokens.parquet: the file is missing", "adapter/lens.parquet", "sets/some.json"):
        assert name in str(raised.value)


def test_30_million_layers_are_refused_at_once(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, n in (("n_layers", 30_000_000), ("n_features", 30_000_000), ("n_layers", 9_999)):
        changed = json.loads(json.dumps(manifest))
        changed["units"]["adapter"][key] = n
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"manifest\.json: units.*adapter.*{key}"):
            Store.open(folder)


def test_a_hash_is_taken_once_and_again_after_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastadapt.features.store import store as module

    read: list[Path] = []
    real = module.digest_of_input

    def noted(path: Path) -> Any:
        read.append(path)
        return real(path)

    monkeypatch.setattr(module, "digest_of_input", noted)
    store = Store.open(folder)
    store.read("lens", layer=0)
    assert not read
    for _ in range(3):
        store.read("lens")
    assert read == [store.path("lens")]
    rows = store.read("lens")
    write_table(rows.slice(1), store.path("lens"), schema.LENS)
    with pytest.raises(UserError, match=r"lens\.parquet is not the file that was collected"):
        store.read("lens")


def test_a_footer_is_believed_where_its_pages_hold_it(tmp_path: Path) -> None:
    """A long run of one value is valid, even if it takes very few bytes."""
    from fastadapt.io import parquet

    path = tmp_path / "long.parquet"
    rows = pa.table({"a": pa.array(np.zeros(3_000_000, np.int32))})
    pq.write_table(rows, path, compression="zstd", row_group_size=3_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_ROWS_PER_BYTE", 1)
        assert parquet.read_table(path).num_rows == 3_000_000


@pytest.mark.parametrize("query", ["SELECT '\ud800' AS layer, 1 AS feature", "\udcff"])
def test_half_a_character_in_sql(folder: Path, query: str) -> None:
    with pytest.raises(UserError, match="half a surrogate pair"):
        command("features", "select", folder, "new", "--sql", query)()


def test_regions_and_texts_are_places(folder: Path) -> None:
    store = Store.open(folder)
    rows = store.read("examples")
    column = pc.add(rows["text"], pa.scalar(3, pa.int32()))
    index = rows.schema.get_field_index("text")
    write_table(rows.set_column(index, "text", column), store.path("examples"), schema.EXAMPLES)
    with pytest.raises(UserError, match=r"examples\.parquet: the column 'text': expected 0 to 2"):
        store.read("examples", layer=0)
