"""Checks of ``judgements.json``, which are made before its contents are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from planted import PlantedActivations, planted
from stores import StoreData

from fastadapt.errors import UserError
from fastadapt.features.autointerp.classify import shares
from fastadapt.features.autointerp.describe import describe
from fastadapt.features.autointerp.judgements import (
    JSON,
    PLOTS,
    figures,
    file_names,
    read_judgements,
    tables,
    write_judgements,
)
from fastadapt.features.autointerp.judges.settings import ClassifyConfig, DescribeConfig
from fastadapt.features.autointerp.judges.without_llm import TokenJudge
from fastadapt.features.checking import check_store

Change = Callable[[dict[str, Any]], object]
CONFIG = DescribeConfig(units=2, samples=("top",))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreData, str]:
    """Return a store with the judgements of two judges, and the text of their file."""
    data = planted(tmp_path_factory.mktemp("judged") / "f", features=3, texts=60)
    described = describe(data.store, TokenJudge(), CONFIG, PlantedActivations(data))
    assert described is not None
    config = ClassifyConfig()
    result = {
        "judge": {"model": "other"},
        "settings": {"units": config.units, "min_density": config.min_density, "top": 5},
        "level": 0.95,
        "units": {"adapter": [{"judged": 1}] * 3},
        "invalid": 0,
        "shares": {"adapter": shares([], 3, config.statistics)},
    }
    write_judgements(data.store, "other", "classified", result)
    write_judgements(data.store, "other", "described", described)
    return data, (data.store.folder / JSON).read_text()


def _detected(other: dict[str, Any]) -> dict[str, Any]:
    return other["described"]["detection"]["adapter"]["top"]


#: Changes to the parts of the judge "other", and a key that the message must name.
DAMAGED: dict[str, tuple[Change, str]] = {
    "no settings": (lambda o: o["described"].pop("settings"), "settings"),
    "settings a number": (lambda o: o["described"].update(settings=5), "settings"),
    "kind": (
        lambda o: o["described"]["detection"].update(odd=o["described"]["detection"]["adapter"]),
        "detection",
    ),
    "kind that the store lacks": (
        lambda o: o["described"]["detection"].update(base=o["described"]["detection"]["adapter"]),
        "base",
    ),
    "level": (lambda o: o["described"].update(level="x"), "level"),
    "level of infinity": (lambda o: o["described"].update(level=1e999), "level"),
    "no units": (lambda o: o["classified"]["shares"]["adapter"].pop("units"), "units"),
    "units": (lambda o: o["classified"].update(units=3), "units"),
    "classes": (lambda o: o["classified"]["shares"]["adapter"]["shares"].pop("domain"), "shares"),
    "layers": (lambda o: o["classified"]["shares"]["adapter"]["layers"].pop(), "layers"),
    "sample": (
        lambda o: o["described"]["settings"].update(samples=["x/../../../y"]),
        "samples",
    ),
    "sample without scores": (
        lambda o: o["described"]["settings"].update(samples=["top", "uniform"]),
        "detection.adapter",
    ),
    "no samples": (lambda o: o["described"]["settings"].update(samples=[]), "samples"),
    "accuracy": (lambda o: _detected(o)["accuracy"].update(mean=7), "accuracy"),
    "accuracy of text": (lambda o: _detected(o)["accuracy"].update(mean="7"), "accuracy"),
    "layer": (lambda o: _detected(o).update(layers=[5]), "layers"),
    "part": (lambda o: o.update(described=[]), "described"),
    "surrogate": (lambda o: o["described"]["judge"].update(model="\ud800"), "surrogate"),
    "endless": (lambda o: o["described"]["settings"].update(other=1e999), "Out of range"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_errors_of_a_damaged_part_name_its_key(case: str, judged: tuple[StoreData, str]) -> None:
    change, key = DAMAGED[case]
    data, text = judged
    held = json.loads(text)
    change(held["judges"]["other"])
    _refused(data, json.dumps(held).replace("Infinity", "1e999"), key)


@pytest.mark.parametrize("name", ["", "x" * 1001, "a\x00b", "a\nb", "\ud800"], ids=ascii)
def test_invalid_names_of_judges_are_refused(name: str, judged: tuple[StoreData, str]) -> None:
    data, text = judged
    held = json.loads(text)
    held["judges"][name] = held["judges"].pop("other")
    _refused(data, json.dumps(held), "judges")

    class Odd(TokenJudge):
        pass

    Odd.name = name
    (data.store.folder / JSON).write_text(text)
    with pytest.raises(UserError, match="the name of the judge"):
        describe(data.store, Odd(), CONFIG, PlantedActivations(data))


def _refused(data: StoreData, text: str, key: str) -> None:
    """Assert that reading, describing and checking report the error, and change no file."""
    path = data.store.folder / JSON
    path.write_text(text)
    with pytest.raises(UserError, match=f"{JSON}.*{key}.*judge again"):
        read_judgements(data.store)
    with pytest.raises(UserError, match=key):
        describe(data.store, TokenJudge(), CONFIG, PlantedActivations(data))
    assert path.read_text() == text
    assert [entry.name for entry in check_store(data.store) if entry.wrong] == [JSON]


def test_written_judgements_are_read(judged: tuple[StoreData, str]) -> None:
    data, text = judged
    (data.store.folder / JSON).write_text(text)
    held = read_judgements(data.store)
    assert held == json.loads(text)
    assert len(tables(held)) == 3
    assert [entry for entry in check_store(data.store) if entry.wrong] == []


def test_judgements_of_another_collection_are_ignored(judged: tuple[StoreData, str]) -> None:
    data, text = judged
    held = json.loads(text)
    parts = held["judges"]["other"]
    parts["classified"] |= {"collected": "0" * 64}
    parts["classified"]["shares"]["adapter"]["layers"] = []
    del parts["described"]["collected"]
    (data.store.folder / JSON).write_text(json.dumps(held))
    assert list(read_judgements(data.store)["judges"]) == ["tokens"]


@pytest.mark.slow
def test_long_and_similar_names_of_judges_have_separate_plots(
    judged: tuple[StoreData, str],
) -> None:
    data, text = judged
    held = json.loads(text)
    part = held["judges"]["other"]["described"]
    (data.store.folder / JSON).write_text(text)
    judges = ["m/1", "m-1", "x" * 300, "x" * 299 + "y", "é" * 300, "a/../b"]
    for judge in judges:
        write_judgements(data.store, judge, "described", part)
    drawn = figures(read_judgements(data.store))
    names = {path.name for path in (data.store.folder / PLOTS).iterdir()}
    assert names == {f"{figure.key}.png" for figure in drawn}
    assert len(names) == len(drawn)
    assert all(len(name.encode()) <= 255 for name in names)


def test_plain_names_are_used_as_file_names() -> None:
    assert file_names(["tokens", "m/1"]) == {"tokens": "tokens", "m/1": "m-1"}


def test_a_folder_in_place_of_the_file_is_refused(judged: tuple[StoreData, str]) -> None:
    data, text = judged
    path = data.store.folder / JSON
    path.unlink()
    path.mkdir()
    try:
        with pytest.raises(UserError, match=JSON):
            read_judgements(data.store)
        assert [entry.name for entry in check_store(data.store) if entry.wrong] == [JSON]
    finally:
        path.rmdir()
        path.write_text(text)
