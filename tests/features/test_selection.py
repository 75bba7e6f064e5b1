"""Selections, compared with plain loops over the sources of the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from stores import StoreData, StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.features.store import selection
from fastadapt.features.store.details import read_details
from fastadapt.features.store.scales import Scales, by_origin
from fastadapt.features.store.schema import CLASSES, MARKERS, REGIONS, SCALES
from fastadapt.features.store.selection import SelectConfig, select
from fastadapt.features.store.sets import FeatureSet, save_set

L, F = 3, 40
STRINGS = [" Wait", "hmm", "waiter", "\tWAIT\n", "but", *(f"w{i}" for i in range(35))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StoreData:
    """Features with densities from 0 to 1; some fire on tokens or positions, others randomly."""
    rng = np.random.default_rng(3)
    texts, activations = [], []
    for n in range(12):
        tokens = rng.integers(0, len(STRINGS), 50)
        regions = [0, 1, *[2] * 10, 3, 4, *[5] * 30, 6, *[7] * 5]
        values = rng.exponential(size=(L, 50, F))
        values *= rng.random((L, 50, F)) < (np.arange(F) / F) ** 2
        values[0, :, 0] = np.isin(tokens, [0, 3])
        values[0, :, 1] = np.append(np.isin(tokens, [0, 3])[1:], 0)  # before one of them
        values[0, :, 2] = [r in (3, 4) for r in regions]
        values[0, :, 3] = [r == 4 for r in regions]
        values[0, :, 4] = [50 * (r in (3, 4)) + rng.random() for r in regions]
        values[0, :, 5] = [r == 5 for r in regions]
        values[0, 49, 6] = 1.0  # at the last token
        texts.append(StoreText([int(t) for t in tokens], regions, ("math", "code")[n % 2]))
        activations.append(values.astype(np.float32))
    promoted = {(1, 2): [7, 0], (1, 3): [2], (2, 0): [3], (2, 1): [8, 9, 10, 11, 4]}
    folder = tmp_path_factory.mktemp("run") / "features"
    return make_store(folder, texts, activations, STRINGS, promoted=promoted)


def test_promoted_tokens_are_compared_stripped_and_in_lower_case(data: StoreData) -> None:
    rows = data.store.read("lens").to_pylist()
    for top in (1, 2, 10):
        wanted = {
            (row["layer"], row["feature"])
            for row in rows
            if {t.strip().lower() for t in row["promoted_tokens"][:top]} & {"wait"}
        }
        assert set(selection.promoting(data.store, ["WAIT "], top)) == wanted
        assert ((1, 2) in wanted) == (top > 1)
        assert (2, 0) in wanted
        assert ((1, 3) in wanted) == bool({0, 3} & set(_row(rows, 1, 3)["promoted"][:top]))
    selected = select(data.store, SelectConfig(hesitation=True))
    assert selected.expression == "promotes wait, hmm, but, alternatively (top 10)"
    assert {(1, 2), (2, 0), (2, 1)} <= set(selected)
    assert set(selected) == set(selection.promoting(data.store))


def _row(rows: list[dict], layer: int, feature: int) -> dict:
    return next(row for row in rows if (row["layer"], row["feature"]) == (layer, feature))


def _shares(data: StoreData, holds: object) -> dict[tuple[int, int], float]:
    """Return the share of each feature's strongest examples for which ``holds``."""
    results: dict[tuple[int, int], list[bool]] = {}
    for row in data.store.read("examples").to_pylist():
        if row["sample"] == "top":
            results.setdefault((row["layer"], row["feature"]), []).append(holds(row))  # type: ignore[operator]
    return {pair: sum(values) / len(values) for pair, values in results.items()}


def test_template_positions_are_shares_of_the_strongest_examples(data: StoreData) -> None:
    for regions in (MARKERS, ("think start",), ("thinking", "answer")):
        for share in (0.8, 0.3, 1.0):
            shares = _shares(data, lambda row, r=regions: row["region"] in r)
            wanted = {pair for pair, value in shares.items() if value >= share}
            assert set(selection.standing_at(data.store, regions, share)) == wanted
    start = select(data.store, SelectConfig(at=("think start",)))
    assert (0, 3) in start
    assert (0, 2) not in start
    assert len(select(data.store, SelectConfig(at=REGIONS))) == len(selection.alive(data.store))


def test_template_features_stand_at_one_position(data: StoreData) -> None:
    """Features that spread over several positions of the template are none."""

    def position(row: dict) -> tuple[str, int] | None:
        regions = data.texts[row["text"]].regions
        first = row["position"]
        while first and regions[first - 1] == regions[row["position"]]:
            first -= 1
        place = row["region"], row["position"] - first
        return place if place[0] in MARKERS or place == ("thinking", 0) else None

    results: dict[tuple[int, int], list[Any]] = {}
    for row in data.store.read("examples").to_pylist():
        if row["sample"] == "top":
            results.setdefault((row["layer"], row["feature"]), []).append(position(row))
    pooled = set(selection.standing_at(data.store, (*MARKERS, "thinking"), 0.3))
    for share in (0.8, 0.3, 1.0):
        wanted = {
            pair
            for pair, places in results.items()
            if any(places.count(p) / len(places) >= share for p in set(places) - {None})
        }
        assert set(selection.on_template(data.store, share)) == wanted
        assert (wanted < pooled) or share != 0.3  # the rule is narrower than that of regions
    template = select(data.store, SelectConfig(template=True))
    assert template == selection.on_template(data.store)
    assert (0, 3) in template
    assert (0, 5) not in template


def test_preceding_tokens_are_those_of_the_text(data: StoreData) -> None:
    def before(row: dict) -> bool:
        text, following = data.texts[row["text"]], row["position"] + 1
        return following < len(text.tokens) and text.tokens[following] in (0, 3)

    shares = _shares(data, before)
    for share in (0.8, 0.05):
        wanted = {pair for pair, value in shares.items() if value >= share}
        assert set(selection.preceding(data.store, ["wait"], share)) == wanted
    selected = select(data.store, SelectConfig(before=("wait",)))
    assert (0, 1) in selected
    assert not {(0, 0), (0, 6)} & set(selected)


def test_origins(data: StoreData) -> None:
    with pytest.raises(UserError, match="has no scales of adapter units"):
        select(data.store, SelectConfig(origin=("new",)))
    with pytest.raises(UserError, match=r"origin: expected origins among new, .*; got 'old'"):
        SelectConfig(origin=("old",))  # type: ignore[arg-type]
    scales = [(0, 31, 0.0, 1.0), (0, 32, 1.0, 2.0), (1, 30, -1.0, 0.5), (1, 31, 1.0, 1.0)]
    scales += [(2, 30, 0.2, 1.0), (2, 31, 0.21, 1.0), (2, 32, -0.2, 1.0), (2, 33, -0.21, 1.0)]
    rows = [
        {
            "layer": layer,
            "feature": feature,
            "base_share": base / max(abs(base), abs(target)),
            "base_scale": base,
            "target_scale": target,
            "difference_scale": 1.0,
            "positions": 9,
        }
        for layer, feature, base, target in scales
    ]
    data.store.add("scales", pa.Table.from_pylist(rows, schema=SCALES))
    try:
        for origin, wanted in {
            "new": {(0, 31), (2, 30), (2, 32)},
            "strengthened": {(0, 32), (2, 31)},
            "opposed": {(1, 30), (2, 33)},
            "absent": {(1, 31)},
        }.items():
            assert set(select(data.store, SelectConfig(origin=(origin,)))) == wanted  # type: ignore[arg-type]
        both = select(data.store, SelectConfig(origin=("new", "absent")))
        assert len(both) == 4
        assert both.expression == "origin new, absent"
        shares = by_origin(data.store)  # of contributions: density × mean, since the norms are 1
        sizes = {
            (row["layer"], row["feature"]): row["density"] * row["mean"]
            for row in data.store.read("features").to_pylist()
        }
        total = sum(sizes[layer, feature] for layer, feature, *_ in scales)
        assert shares["absent"] == pytest.approx(sizes[1, 31] / total)
        assert sum(shares.values()) == pytest.approx(1)
        (details,) = read_details(data.store, [(0, 32)])
        assert details.scales == Scales("strengthened", 0.5, 1.0, 2.0, 1.0, 9)
        assert read_details(data.store, [(0, 33)])[0].scales is None
    finally:
        data.store.path("scales").unlink()


def test_classes_and_subclasses(data: StoreData) -> None:
    with pytest.raises(UserError, match="no classes yet"):
        selection.of_class(data.store, ["reasoning"])
    common = {"judge": "j", "reason": ""}
    rows = [
        {"layer": 0, "feature": 1, "class": "domain", "subclass": "math", **common},
        {"layer": 0, "feature": 2, "class": "language", "subclass": None, **common},
        {"layer": 2, "feature": 1, "class": "reasoning", "subclass": "output", **common},
    ]
    data.store.add("classes", pa.Table.from_pylist(rows, schema=CLASSES))
    try:
        assert set(select(data.store, SelectConfig(classes=("language", "output")))) == {
            (0, 2),
            (2, 1),
        }
        assert set(selection.of_class(data.store, ["domain"])) == {(0, 1)}
    finally:
        data.store.path("classes").unlink()


def test_sql_is_one_select_of_features(data: StoreData) -> None:
    selected = select(
        data.store, SelectConfig(sql="SELECT feature, layer FROM features WHERE\n layer=1")
    )
    assert set(selected) == {(1, i) for i in range(F)}
    assert selected.expression == "sql SELECT feature, layer FROM features WHERE layer=1"
    joined = (
        "WITH f AS (FROM features JOIN lens USING (layer, feature)) SELECT * FROM f WHERE max>1"
    )
    assert select(data.store, SelectConfig(sql=joined)).features


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT 1; SELECT 2", "expected one SELECT"),
        ("COPY features TO 'x.csv'", "expected one SELECT"),
        ("CREATE TABLE a AS SELECT 1", "expected one SELECT"),
        ("   ", "expected one SELECT"),
        ("SELECT '\ud800'", "half a surrogate pair"),
        ("SELEC 1", "syntax error"),
        ("SELECT layer FROM features", "expected the columns layer and feature, got layer"),
        ("SELECT layer, feature FROM nothing", "nothing does not exist"),
        ("SELECT layer, feature FROM read_parquet('/etc/*')", "disabled|Permission"),
        ("SELECT layer, max AS feature FROM features", "expected integers"),
        ("SELECT NULL AS layer, feature FROM features", "expected integers"),
        ("SELECT true AS layer, feature FROM features", "expected integers"),
        ("SELECT 7 AS layer, 0 AS feature", "got feature 0 of layer 7"),
        ("SELECT layer, feature FROM features WHERE feature = ?", "arameter"),
    ],
)
def test_other_sql_is_refused(data: StoreData, query: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(data.store, SelectConfig(sql=query))
    assert not list(data.store.folder.glob("*.csv"))


def test_dead_features_can_be_excluded(data: StoreData) -> None:
    dead = {
        (row["layer"], row["feature"])
        for row in data.store.read("features").to_pylist()
        if not row["count"]
    }
    assert dead
    config: dict[str, Any] = {"sql": "SELECT layer, feature FROM features"}
    assert len(select(data.store, SelectConfig(**config))) == L * F
    living = select(data.store, SelectConfig(**config, alive=True))
    assert set(living) == set(select(data.store, SelectConfig(**config))) - dead
    assert living.expression == "(sql SELECT layer, feature FROM features) & (alive)"


def test_random_features_match_in_density(data: StoreData) -> None:
    density = {
        (row["layer"], row["feature"]): row["density"]
        for row in data.store.read("features").to_pylist()
    }
    like = select(data.store, SelectConfig(sql="SELECT layer, feature FROM features WHERE layer=1 "
                                          "AND feature % 3 = 0 AND count > 0"))  # fmt: skip
    draws = [selection.matched(data.store, like, 2, seed) for seed in range(20)]
    assert len({draw.features for draw in draws}) == 20
    assert draws[0] == selection.matched(data.store, like, 2, 0)
    for draw in draws:
        assert len(draw) == 2 * len(like)
        assert not set(draw) & set(like)
    wanted = np.log(sorted(density[pair] for pair in [*like, *like]))
    actual = np.mean([np.log(sorted(density[pair] for pair in draw)) for draw in draws], axis=0)
    assert np.abs(actual - wanted).max() < np.log(2)
    assert abs(actual.mean() - wanted.mean()) < 0.1
    with pytest.raises(UserError, match="other features to draw, got"):
        selection.matched(data.store, ~like, 1, 0)


def test_dead_features_are_matched_with_dead_ones(data: StoreData) -> None:
    density = {
        (row["layer"], row["feature"]): row["density"]
        for row in data.store.read("features").to_pylist()
    }
    dead = [pair for pair, value in density.items() if value == 0]
    assert len(dead) > 1
    like = FeatureSet.from_pairs(dead[:1], adapter="0" * 64, shape=(L, F), expression="dead")
    (drawn,) = selection.matched(data.store, like)
    assert drawn in dead[1:]
    assert "density" not in selection.matched(data.store, like).expression


def test_random_features_of_the_densest_fire_less_often(data: StoreData) -> None:
    """The features that are left are rarer, which the drawn set's expression says."""
    density = {
        (row["layer"], row["feature"]): row["density"]
        for row in data.store.read("features").to_pylist()
    }
    densest = sorted(density, key=lambda pair: -density[pair])[: len(density) // 3]
    like = FeatureSet.from_pairs(densest, adapter="0" * 64, shape=(L, F), expression="densest")
    drawn = selection.matched(data.store, like, 2)
    share = sum(density[pair] for pair in drawn) / (2 * sum(density[pair] for pair in like))
    assert share < 0.9
    assert selection.density_shares(data.store, like, [drawn, like]) == pytest.approx([share, 1])
    assert drawn.expression.endswith(f"2 times, seed 0, density {share:.2g} of the set's")


def test_saved_sets_are_combined_and_matched(data: StoreData) -> None:
    a = selection.promoting(data.store)
    b = selection.on_template(data.store)
    save_set(data.store, a, "hesitation", overwrite=True)
    save_set(data.store, b, "template", overwrite=True)
    names = ("hesitation", "template")
    assert set(select(data.store, SelectConfig(union=names))) == set(a) | set(b)
    assert set(select(data.store, SelectConfig(intersection=names))) == set(a) & set(b)
    assert set(select(data.store, SelectConfig(difference=names))) == set(a) - set(b)
    drawn = select(data.store, SelectConfig(random="template", times=2, seed=4))
    assert drawn == selection.matched(data.store, b, 2, 4)
    (share,) = selection.density_shares(data.store, b, [drawn])
    words = f"random like ({b.expression}), 2 times, seed 4, density {share:.2g} of the set's"
    assert drawn.expression == words
    with pytest.raises(UserError, match="no set 'none'; saved sets: hesitation, template"):
        select(data.store, SelectConfig(union=("none",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected one of features.*got none"),
        ({"hesitation": True, "template": True}, "got hesitation, template"),
        ({"at": ("nowhere",)}, "at: expected regions among bos"),
        ({"hesitation": True, "top": 11}, "top: expected 1 to 10"),
        ({"template": True, "share": 0.0}, "share: expected"),
        ({"random": "a", "times": 0}, "times: expected 1"),
    ],
)
def test_impossible_selections_are_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SelectConfig(**values)


def test_words_must_be_a_list_of_non_empty_texts(data: StoreData) -> None:
    for words in ("wait", [], [" "]):
        with pytest.raises(UserError, match="expected a list of one or more tokens, none blank"):
            selection.promoting(data.store, words)
