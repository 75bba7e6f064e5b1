"""Selections against plain loops over what the store was made from."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from stores import Made, MadeText, make_store

from fastadapt.errors import UserError
from fastadapt.features.store import selection
from fastadapt.features.store.schema import CLASSES, MARKERS, REGIONS
from fastadapt.features.store.selection import SelectConfig, select
from fastadapt.features.store.sets import FeatureSet, save_set

L, F = 3, 40
STRINGS = [" Wait", "hmm", "waiter", "\tWAIT\n", "but", *(f"w{i}" for i in range(35))]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Features of densities from 0 to 1; each reads some tokens, positions or nothing."""
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
        values[0, 49, 6] = 1.0  # stands before nothing
        texts.append(MadeText([int(t) for t in tokens], regions, ("math", "code")[n % 2]))
        activations.append(values.astype(np.float32))
    promoted = {(1, 2): [7, 0], (1, 3): [2], (2, 0): [3], (2, 1): [8, 9, 10, 11, 4]}
    folder = tmp_path_factory.mktemp("run") / "features"
    return make_store(folder, texts, activations, STRINGS, promoted=promoted)


def test_promoted_tokens_are_compared_stripped_and_in_lower_case(made: Made) -> None:
    rows = made.store.read("lens").to_pylist()
    for top in (1, 2, 10):
        wanted = {
            (row["layer"], row["feature"])
            for row in rows
            if {t.strip().lower() for t in row["promoted_tokens"][:top]} & {"wait"}
        }
        assert set(selection.promoting(made.store, ["WAIT "], top)) == wanted
        assert ((1, 2) in wanted) == (top > 1)
        assert (2, 0) in wanted
        assert ((1, 3) in wanted) == bool({0, 3} & set(_row(rows, 1, 3)["promoted"][:top]))
    found = select(made.store, SelectConfig(hesitation=True))
    assert found.expression == "promotes wait, hmm, but, alternatively (top 10)"
    assert {(1, 2), (2, 0), (2, 1)} <= set(found)
    assert set(found) == set(selection.promoting(made.store))


def _row(rows: list[dict], layer: int, feature: int) -> dict:
    return next(row for row in rows if (row["layer"], row["feature"]) == (layer, feature))


def _shares(made: Made, holds: object) -> dict[tuple[int, int], float]:
    """Of each feature with examples, the share of the strongest for which ``holds``."""
    of: dict[tuple[int, int], list[bool]] = {}
    for row in made.store.read("examples").to_pylist():
        if row["sample"] == "top":
            of.setdefault((row["layer"], row["feature"]), []).append(holds(row))  # type: ignore[operator]
    return {pair: sum(told) / len(told) for pair, told in of.items()}


def test_template_positions_are_shares_of_the_strongest_examples(made: Made) -> None:
    for regions in (MARKERS, ("think start",), ("thinking", "answer")):
        for share in (0.8, 0.3, 1.0):
            shares = _shares(made, lambda row, r=regions: row["region"] in r)
            wanted = {pair for pair, of in shares.items() if of >= share}
            assert set(selection.standing_at(made.store, regions, share)) == wanted
    template = select(made.store, SelectConfig(template=True))
    assert {(0, 2), (0, 3), (0, 4)} <= set(template)
    assert (0, 5) not in template
    at = select(made.store, SelectConfig(at=("think start",)))
    assert (0, 3) in at
    assert (0, 2) not in at
    assert len(select(made.store, SelectConfig(at=REGIONS))) == len(selection.alive(made.store))


def test_preceding_tokens_are_those_of_the_text(made: Made) -> None:
    def before(row: dict) -> bool:
        text, place = made.texts[row["text"]], row["position"] + 1
        return place < len(text.tokens) and text.tokens[place] in (0, 3)

    shares = _shares(made, before)
    for share in (0.8, 0.05):
        wanted = {pair for pair, of in shares.items() if of >= share}
        assert set(selection.preceding(made.store, ["wait"], share)) == wanted
    found = select(made.store, SelectConfig(before=("wait",)))
    assert (0, 1) in found
    assert not {(0, 0), (0, 6)} & set(found)


def test_classes_and_subclasses(made: Made) -> None:
    with pytest.raises(UserError, match="no classes yet"):
        selection.of_class(made.store, ["reasoning"])
    told = {"judge": "j", "reason": ""}
    rows = [
        {"layer": 0, "feature": 1, "class": "domain", "subclass": "math", **told},
        {"layer": 0, "feature": 2, "class": "language", "subclass": None, **told},
        {"layer": 2, "feature": 1, "class": "reasoning", "subclass": "output", **told},
    ]
    made.store.add("classes", pa.Table.from_pylist(rows, schema=CLASSES))
    try:
        assert set(select(made.store, SelectConfig(classes=("language", "output")))) == {
            (0, 2),
            (2, 1),
        }
        assert set(selection.of_class(made.store, ["domain"])) == {(0, 1)}
    finally:
        made.store.path("classes").unlink()


def test_sql_is_one_select_of_features(made: Made) -> None:
    found = select(
        made.store, SelectConfig(sql="SELECT feature, layer FROM features WHERE\n layer=1")
    )
    assert set(found) == {(1, i) for i in range(F)}
    assert found.expression == "sql SELECT feature, layer FROM features WHERE layer=1"
    joined = (
        "WITH f AS (FROM features JOIN lens USING (layer, feature)) SELECT * FROM f WHERE max>1"
    )
    assert select(made.store, SelectConfig(sql=joined)).features


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
def test_other_sql_is_told(made: Made, query: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(made.store, SelectConfig(sql=query))
    assert not list(made.store.folder.glob("*.csv"))


def test_what_never_fired_can_be_left_out(made: Made) -> None:
    dead = {
        (row["layer"], row["feature"])
        for row in made.store.read("features").to_pylist()
        if not row["count"]
    }
    assert dead
    config = {"sql": "SELECT layer, feature FROM features"}
    assert len(select(made.store, SelectConfig(**config))) == L * F
    living = select(made.store, SelectConfig(**config, alive=True))
    assert set(living) == set(select(made.store, SelectConfig(**config))) - dead
    assert living.expression == "(sql SELECT layer, feature FROM features) & (alive)"


def test_random_features_match_in_density(made: Made) -> None:
    density = {
        (row["layer"], row["feature"]): row["density"]
        for row in made.store.read("features").to_pylist()
    }
    like = select(made.store, SelectConfig(sql="SELECT layer, feature FROM features WHERE layer=1 "
                                          "AND feature % 3 = 0 AND count > 0"))  # fmt: skip
    draws = [selection.matched(made.store, like, 2, seed) for seed in range(20)]
    assert len({draw.features for draw in draws}) == 20
    assert draws[0] == selection.matched(made.store, like, 2, 0)
    for draw in draws:
        assert len(draw) == 2 * len(like)
        assert not set(draw) & set(like)
    wanted = np.log(sorted(density[pair] for pair in [*like, *like]))
    found = np.mean([np.log(sorted(density[pair] for pair in draw)) for draw in draws], axis=0)
    assert np.abs(found - wanted).max() < np.log(2)
    assert abs(found.mean() - wanted.mean()) < 0.1
    with pytest.raises(UserError, match="other features to draw, got"):
        selection.matched(made.store, ~like, 1, 0)


def test_one_that_never_fired_is_matched_with_its_like(made: Made) -> None:
    density = {
        (row["layer"], row["feature"]): row["density"]
        for row in made.store.read("features").to_pylist()
    }
    dead = [pair for pair, of in density.items() if of == 0]
    assert len(dead) > 1
    like = FeatureSet.from_pairs(dead[:1], adapter="0" * 64, shape=(L, F), expression="dead")
    (drawn,) = selection.matched(made.store, like)
    assert drawn in dead[1:]


def test_named_sets_are_combined_and_drawn_like(made: Made) -> None:
    a = selection.promoting(made.store)
    b = selection.standing_at(made.store)
    save_set(made.store, a, "hesitation", overwrite=True)
    save_set(made.store, b, "template", overwrite=True)
    names = ("hesitation", "template")
    assert set(select(made.store, SelectConfig(union=names))) == set(a) | set(b)
    assert set(select(made.store, SelectConfig(intersection=names))) == set(a) & set(b)
    assert set(select(made.store, SelectConfig(difference=names))) == set(a) - set(b)
    drawn = select(made.store, SelectConfig(random="template", times=2, seed=4))
    assert drawn == selection.matched(made.store, b, 2, 4)
    assert drawn.expression == f"random like ({b.expression}), 2 times, seed 4"
    with pytest.raises(UserError, match="no set 'none'; saved sets: hesitation, template"):
        select(made.store, SelectConfig(union=("none",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected one of hesitation.*got none"),
        ({"hesitation": True, "template": True}, "got hesitation, template"),
        ({"at": ("nowhere",)}, "at: expected regions among bos"),
        ({"hesitation": True, "top": 11}, "top: expected 1 to 10"),
        ({"template": True, "share": 0.0}, "share: expected"),
        ({"random": "a", "times": 0}, "times: expected 1"),
    ],
)
def test_an_impossible_selection_is_told(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SelectConfig(**values)


def test_words_are_words(made: Made) -> None:
    for words in ("wait", [], [" "]):
        with pytest.raises(UserError, match="expected a list of words"):
            selection.promoting(made.store, words)
