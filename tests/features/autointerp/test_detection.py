"""Detection scores of planted features, and separation of shown, scored and silent texts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from planted import FAMILIES, PlantedActivations, planted
from stores import StoreData, StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.evaluation.statistics import wilson
from fastadapt.features.autointerp.activations import Places
from fastadapt.features.autointerp.describe import describe
from fastadapt.features.autointerp.detection import score, summarise
from fastadapt.features.autointerp.examples import DetectionCase, draw
from fastadapt.features.autointerp.judgements import read_judgements
from fastadapt.features.autointerp.judges.settings import DescribeConfig
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.autointerp.negatives import Corpus
from fastadapt.features.autointerp.units import Unit, Vocabulary, Window
from fastadapt.features.checking import check_store
from fastadapt.features.store.schema import SAMPLES
from fastadapt.features.store.store import Store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StoreData:
    return planted(tmp_path_factory.mktemp("planted") / "features")


@pytest.mark.quick("top-0", "uniform-0")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sample", SAMPLES)
def test_accuracy_of_planted_features(data: StoreData, sample: str, seed: int) -> None:
    config = DescribeConfig(samples=(sample,), seed=seed)  # type: ignore[arg-type]
    result = describe(data.store, TokenJudge(), config, PlantedActivations(data))
    assert result is not None
    layers = result["detection"]["adapter"][sample]["layers"]
    means = {
        family: layer["accuracy"]["mean"] for family, layer in zip(FAMILIES, layers, strict=True)
    }
    assert means["token"] >= 0.95
    assert means["pair"] >= 0.9
    assert abs(means["random"] - 0.5) <= 0.05
    assert all(layer["units"] == 40 for layer in layers)


def test_random_features_have_an_accuracy_of_one_half(data: StoreData) -> None:
    """No word predicts the activations of units that fire at random."""
    drawn = draw(data.store, DescribeConfig(), PlantedActivations(data))
    assert drawn is not None
    rng = np.random.default_rng(0)
    right = []
    for case in drawn.cases:
        if FAMILIES[case.unit.layer] == "random":
            for _ in range(20):
                words = set(rng.integers(0, 400, 3).tolist())
                predictions = [bool(words & set(window.tokens)) for window in case.texts]
                right += [a == b for a, b in zip(predictions, case.truth, strict=True)]
    assert abs(np.mean(right) - 0.5) <= 0.02


@pytest.mark.slow
def test_scored_texts_are_not_shown_and_silent_texts_are_silent(data: StoreData) -> None:
    config = DescribeConfig()
    drawn = draw(data.store, config, PlantedActivations(data))
    assert drawn is not None
    assert len(drawn.cases) == 2 * 120
    for case in drawn.cases:
        check_honest(case, data, config)


def check_honest(case: DetectionCase, data: StoreData, config: DescribeConfig) -> None:
    """Check a case by a loop over every token, independently of the library."""

    def tokens(windows: tuple[Window, ...]) -> set[tuple[int, int]]:
        return {
            (w.text, position)
            for w in windows
            for position in range(w.start, w.start + len(w.tokens))
        }

    assert not tokens(case.shown) & tokens(case.texts)
    assert not {w.tokens for w in case.shown} & {w.tokens for w in case.texts}
    assert sum(len(w.tokens) for w in case.texts) == len(tokens(case.texts))  # texts do not overlap
    assert len({w.tokens for w in case.texts}) == len(case.texts)  # texts are distinct
    truth = []
    for window in case.texts:
        whole, active = data.texts[window.text], data.activations[window.text]
        here = slice(window.start, window.start + len(window.tokens))
        assert list(window.tokens) == list(whole.tokens[here])
        truth.append(bool((active[case.unit.layer, here, case.unit.feature] > 0).any()))
    assert tuple(truth) == case.truth
    assert sum(truth) == config.scored
    assert len(truth) == 2 * config.scored
    shapes = {
        so: sorted(
            (len(w.tokens), w.start == 0, w.end == len(data.texts[w.text].tokens))
            for w, f in zip(case.texts, truth, strict=True)
            if f is so
        )
        for so in (True, False)
    }
    assert shapes[True] == shapes[False]
    assert config.min_shown <= len(case.shown) <= config.shown
    for window in case.shown:
        here = slice(window.start, window.start + len(window.tokens))
        fires = data.activations[window.text][case.unit.layer, here, case.unit.feature] > 0
        assert window.fires == tuple(fires.tolist())


def test_short_texts_and_dense_units(tmp_path: Path) -> None:
    """Windows as long as texts, many windows of one text, two words only, and equal texts."""
    rng = np.random.default_rng(3)
    texts: list[StoreText] = []
    activations: list[Any] = []
    for n in range(60):
        ids = rng.integers(0, 2, int(rng.integers(5, 60)))
        if n % 3 == 0 and n:
            ids = np.array(texts[n - 1].tokens)
        chances = np.array([0.002, 0.01, 0.02, 0.05, 0.1, 0.3, 0.9, 1])
        fires = (rng.random((1, len(ids), 8)) < chances) * rng.random((1, len(ids), 8))
        texts.append(StoreText(ids.tolist(), [7] * len(ids)))
        # Equal texts have equal activations, as in a model.
        same = activations[n - 1] if n % 3 == 0 and n else fires.astype(np.float32)
        activations.append(same)
    data = make_store(tmp_path / "f", texts, activations, [f"w{i}" for i in range(50)])
    config = DescribeConfig(before=4, after=2, min_shown=1, shown=4)
    drawn = draw(data.store, config, PlantedActivations(data))
    assert drawn is not None
    for case in drawn.cases:
        check_honest(case, data, config)
    counts = drawn.counts["adapter"][0]
    assert counts["judged"] >= 3
    assert counts["no silent text"] >= 1  # a unit that fires everywhere
    assert sum(counts.values()) == 8


@pytest.mark.slow
def test_equal_settings_draw_equal_cases(data: StoreData) -> None:
    one = draw(data.store, DescribeConfig(seed=4), PlantedActivations(data))
    two = draw(data.store, DescribeConfig(seed=4), PlantedActivations(data))
    alone = draw(data.store, DescribeConfig(seed=4, samples=("uniform",)), PlantedActivations(data))
    other = draw(data.store, DescribeConfig(seed=5), PlantedActivations(data))
    assert one is not None
    assert two is not None
    assert alone is not None
    assert other is not None
    assert one.cases == two.cases
    assert [c for c in one.cases if c.sample == "uniform"] == alone.cases
    assert one.cases != other.cases


def test_scores_equal_counts() -> None:
    unit = Unit("adapter", 0, 3)
    fires = [True, False, True, False]
    texts = tuple(Window(i, 0, (i,), (f,)) for i, f in enumerate(fires))
    row = score(DetectionCase(unit, "top", (), texts), "j", (True, True, False, False))
    assert (row["positives"], row["negatives"]) == (2, 2)
    assert (row["true_positives"], row["true_negatives"], row["accuracy"]) == (1, 1, 0.5)
    better = {**row, "true_positives": 2, "true_negatives": 2}
    means = summarise([row, better], 2, DescribeConfig().statistics)
    assert means["accuracy"]["mean"] == 6 / 8
    assert means["precision"]["mean"] == 3 / 4
    assert means["recall"]["mean"] == 3 / 4
    assert means["layers"][1]["units"] == 0
    assert means["layers"][1]["accuracy"] == {"mean": None, "low": None, "high": None}


@pytest.mark.parametrize("n", [2, 3, 30])
@pytest.mark.parametrize("right", [0, 1, 3, 5])
def test_equal_scores_of_units_have_a_wide_interval(n: int, right: int) -> None:
    texts = tuple(Window(i, 0, (i,), (i % 2 == 0,)) for i in range(10))
    predictions = tuple((i < 2 * right) == (i % 2 == 0) for i in range(10))
    rows = [
        score(DetectionCase(Unit("adapter", 0, i), "top", (), texts), "j", predictions)
        for i in range(n)
    ]
    config = DescribeConfig().statistics
    result = summarise(rows, 1, config)["accuracy"]
    assert result == pytest.approx(wilson(n * right / 5, n, config.level).plain())
    lone = summarise(rows[:1], 1, config)["accuracy"]
    assert lone == {"mean": pytest.approx(right / 5), "low": None, "high": None}


def test_tables_have_the_answers_of_the_judge(data: StoreData) -> None:
    config = DescribeConfig(units=5)
    result = describe(data.store, TokenJudge(), config, PlantedActivations(data))
    store = Store.open(data.store.folder)
    descriptions = store.read("descriptions").to_pylist()
    scores = store.read("scores").to_pylist()
    assert len(descriptions) == len(scores) == 2 * 15
    assert {row["variant"] for row in scores} == {"top", "uniform"}
    mean = np.mean([row["accuracy"] for row in scores if row["variant"] == "top"])
    assert result is not None
    assert result["detection"]["adapter"]["top"]["accuracy"]["mean"] == pytest.approx(mean)
    held = read_judgements(store)["judges"]["tokens"]["described"]
    assert held["detection"] == result["detection"]
    folder = store.folder
    assert "Detection by tokens" in (folder / "judgements.md").read_text()
    assert (folder / "judgements" / "detection-top-tokens.png").is_file()


def test_rows_of_other_judges_are_retained(data: StoreData) -> None:
    class Other(TokenJudge):
        name = "other"

    config = DescribeConfig(units=3, samples=("top",))
    for judge in (TokenJudge(), Other(), TokenJudge()):
        describe(data.store, judge, config, PlantedActivations(data))
    rows = data.store.read("scores").to_pylist()
    assert sorted(row["judge"] for row in rows) == ["other"] * 9 + ["tokens"] * 9


def test_judgements_of_an_earlier_collection_are_removed(tmp_path: Path) -> None:
    data = planted(tmp_path / "f", features=3, texts=60)
    describe(data.store, TokenJudge(), DescribeConfig(), PlantedActivations(data))
    assert read_judgements(data.store)["judges"]
    again = planted(tmp_path / "f", features=3, texts=60, seed=1)
    path = again.store.folder / "manifest.json"
    path.write_text(path.read_text().replace("made/target", "made/other"))
    assert not read_judgements(again.store)["judges"]


@pytest.mark.slow
def test_judgements_of_other_judges_are_checked(tmp_path: Path) -> None:
    """They are checked by ``features check``, and before any question."""
    data = planted(tmp_path / "f", features=3, texts=60)
    describe(data.store, TokenJudge(), DescribeConfig(), PlantedActivations(data))
    path = data.store.folder / "judgements.json"
    held = json.loads(path.read_text())
    part = held["judges"].pop("tokens")["described"]
    detection = part["detection"]["adapter"]
    odd: dict[str, dict[str, Any]] = {
        "settings": {**part, "settings": 5},
        "missing required field settings": {k: v for k, v in part.items() if k != "settings"},
        "samples": {**part, "settings": {**part["settings"], "samples": ["x/../../../y"]}},
        "detection": {**part, "detection": {"of": detection}},
        "missing keys: top": {**part, "detection": {"adapter": {"uniform": detection["uniform"]}}},
        "level": {**part, "level": "x"},
        "units": {
            **part,
            "detection": {"adapter": {"uniform": {**detection["uniform"], "units": -1}}},
        },
        "missing required field shares": {"collected": part["collected"], "level": 0.95},
    }
    for named, wrong in odd.items():
        kind = "classified" if "shares" in named else "described"
        held["judges"] = {"x" * 300: {kind: wrong}}
        path.write_text(json.dumps(held))
        with pytest.raises(UserError, match=rf"judgements\.json: judges.*{named}"):
            read_judgements(data.store)
        assert any(
            checked.wrong for checked in check_store(data.store) if checked.name == path.name
        )
    held["judges"] = {"x" * 300: {"described": part}}
    path.write_text(json.dumps(held))
    describe(data.store, TokenJudge(), DescribeConfig(), PlantedActivations(data))
    assert len(list((data.store.folder / "judgements").glob("*x-????????.png"))) == 2


def test_a_stopped_description_writes_nothing(data: StoreData, tmp_path: Path) -> None:
    fresh = planted(tmp_path / "f", features=3, texts=40)
    stop = Event()
    stop.set()
    config = DescribeConfig()
    assert describe(fresh.store, TokenJudge(), config, PlantedActivations(fresh), stop=stop) is None
    assert not fresh.store.has("scores")
    assert not (fresh.store.folder / "judgements.json").exists()


def test_a_store_without_activations_is_refused(tmp_path: Path) -> None:
    texts = [StoreText([1, 2, 3, 4], [7] * 4)]
    data = make_store(tmp_path / "f", texts, [np.zeros((1, 4, 2), np.float32)], ["a"] * 5)
    with pytest.raises(UserError, match="2 adapter units: too rare"):
        describe(data.store, TokenJudge(), DescribeConfig(), PlantedActivations(data))
    assert not data.store.has("descriptions")


def test_impossible_settings_are_refused() -> None:
    for wrong, named in [
        ({"units": 0}, "describe.units"),
        ({"min_density": 2.0}, "describe.min_density"),
        ({"min_shown": 11}, "describe.min_shown"),
        ({"samples": ()}, "describe.samples"),
        ({"samples": ("best",)}, "describe.samples"),
        ({"kinds": ("none",)}, "describe.kinds"),
    ]:
        with pytest.raises(UserError, match=named):
            DescribeConfig(**wrong)  # type: ignore[arg-type]


def test_a_token_that_the_vocabulary_lacks_is_named(data: StoreData) -> None:
    with pytest.raises(UserError, match="no token 4000"):
        Vocabulary(data.store).pieces([1, 4000])


def test_a_model_with_other_activations_than_the_store_is_refused(data: StoreData) -> None:
    class Shifted(PlantedActivations):
        def places(self, *given: Any, **named: Any) -> Places:
            result = super().places(*given, **named)
            return {unit: places[:0] for unit, places in result.items()}

    with pytest.raises(UserError, match="not the model that its features were collected from"):
        draw(data.store, DescribeConfig(), Shifted(data))


def test_ends_of_windows_do_not_predict_activations(tmp_path: Path) -> None:
    """Units fire anywhere, both ends of texts cut windows off, and no word predicts them."""
    begin, end, features = 1, 2, 40
    rng = np.random.default_rng(0)
    texts, activations = [], []
    for _ in range(300):
        n = int(rng.integers(40, 60))
        texts.append(StoreText([begin, *rng.integers(3, 400, n - 2).tolist(), end], [7] * n))
        fires = rng.random((1, n, features)) < 0.005
        activations.append(np.where(fires, rng.uniform(0.5, 2, fires.shape), 0).astype(np.float32))
    data = make_store(tmp_path / "f", texts, activations, [f"w{i}" for i in range(400)])
    config = DescribeConfig(before=20, after=10)
    drawn = draw(data.store, config, PlantedActivations(data))
    assert drawn is not None
    assert drawn.counts["adapter"][0]["judged"] == features
    for case in drawn.cases:
        check_honest(case, data, config)
    truth = np.array([so for case in drawn.cases for so in case.truth])
    for token in (begin, end):
        predictions = np.array(
            [token in window.tokens for case in drawn.cases for window in case.texts]
        )
        assert predictions[truth].mean() >= 0.15  # otherwise the check below is empty
        assert abs(np.mean(predictions == truth) - 0.5) <= 0.05


def test_silent_windows_are_drawn_uniformly_from_those_of_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [StoreText([3] * n, [7] * n) for n in (1, 4, 9, 5, 5, 12)]
    nothing = [np.zeros((1, len(text.tokens), 1), np.float32) for text in texts]
    data = make_store(tmp_path / "f", texts, nothing, ["w"] * 4)
    corpus = Corpus(data.store, DescribeConfig())
    result: Counter[tuple[int, int]] = Counter()
    for trial in range(400):
        positions = [
            (i, position) for i, t in enumerate(texts) for position in range(len(t.tokens))
        ]
        held = [place for place in positions if rng.random() < 0.15 * (trial % 3)]
        n = int(rng.integers(len(texts)))
        size = len(texts[n].tokens)
        start = int(rng.integers(size))
        length = int(rng.integers(1, size - start + 1))
        like = Window(n, start, (3,) * length, (True,) * length)
        wanted = {
            (i, position)
            for i, t in enumerate(texts)
            for position in range(len(t.tokens) - length + 1)
            if not any((i, p) in held for p in range(position, position + length))
            and (position == 0) == (start == 0)
            and (position + length == len(t.tokens)) == (start + length == size)
        }
        taken = corpus.to_positions(np.array(held, dtype=np.int64).reshape(-1, 2))
        windows = list(corpus.sample_negatives(taken, like, rng))
        assert all(len(w.tokens) == length and not any(w.fires) for w in windows)
        got = [(w.text, w.start) for w in windows]
        assert len(got) == len(set(got))
        assert set(got) == wanted
    like = Window(2, 1, (3, 3), (True, True))
    for _ in range(4000):
        window = next(corpus.sample_negatives(np.array([], dtype=np.int64), like, rng))
        result[window.text, window.start] += 1
    assert len(result) == 1 + 6 + 2 + 2 + 9  # texts longer than 3
    assert max(result.values()) <= 2 * min(result.values())
