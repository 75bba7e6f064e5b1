"""Classes by an endpoint: questions, tables and shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import serving
from planted import planted
from stores import StoreText, make_store

from fastadapt.errors import UserError
from fastadapt.features.autointerp.classify import classify, shares
from fastadapt.features.autointerp.judgements import read_judgements
from fastadapt.features.autointerp.judges.endpoint import open_judge
from fastadapt.features.autointerp.judges.settings import ClassifyConfig, JudgeConfig
from fastadapt.features.autointerp.judges.without_llm import TokenJudge


def by_layer(body: dict[str, Any], _: int) -> str:
    """Answer "language" for few marked words, "code" for many."""
    user = body["messages"][1]["content"]
    few = len(set(user.split("⟦")[1:])) and user.count("⟦ w6") >= 5
    name, sub = ("language", None) if few else ("domain", "code")
    return json.dumps({"reason": "r", "class": name, "subclass": sub})


def test_questions_have_examples_and_lens_and_classes_are_written(tmp_path: Path) -> None:
    data = planted(tmp_path / "f", features=10)
    config = ClassifyConfig(units=8)
    with serving(by_layer) as server:
        judge = open_judge(JudgeConfig(model="m/1", base_url=server.url), data.store)
        result = classify(data.store, judge, config)
        assert result is not None
        assert len(server.requests) == 24
        user = server.requests[0]["messages"][1]["content"]
        assert "Tokens made more likely: [" in user
        assert user.count("\n1. ") == 1
        assert "\n10. " in user
        assert classify(data.store, judge, config) == result
        assert len(server.requests) == 24
    rows = data.store.read("classes").to_pylist()
    assert len(rows) == 24
    assert {(r["class"], r["subclass"]) for r in rows} == {("language", None), ("domain", "code")}
    totals = result["shares"]["adapter"]
    assert totals["units"] == 24
    of_first = totals["layers"][0]["shares"]
    assert of_first["language"]["mean"] == 1.0
    assert of_first["language"]["low"] < 1.0
    assert totals["shares"]["domain"]["mean"] == totals["shares"]["domain: code"]["mean"]
    held = read_judgements(data.store)["judges"]["m/1"]["classified"]
    assert held["shares"] == result["shares"]
    assert "Classes by m/1" in (data.store.folder / "judgements.md").read_text()
    assert (data.store.folder / "judgements" / "class-domain-m-1.png").is_file()


def test_shares_are_counts_over_units() -> None:
    rows = [
        {"layer": 0, "class": "reasoning", "subclass": "output"},
        {"layer": 0, "class": "reasoning", "subclass": "simple input"},
        {"layer": 1, "class": "uninterpretable", "subclass": None},
        {"layer": 1, "class": "reasoning", "subclass": "output"},
    ]
    totals = shares(rows, 3, ClassifyConfig().statistics)
    means = {name: share["mean"] for name, share in totals["shares"].items()}
    assert means["reasoning"] == 0.75
    assert means["reasoning: output"] == 0.5
    assert means["uninterpretable"] == 0.25
    assert means["language"] == 0
    assert sum(means[c] for c in ("language", "domain", "reasoning", "uninterpretable")) == 1
    assert totals["layers"][2] == {"units": 0, "shares": totals["layers"][2]["shares"]}
    assert totals["layers"][2]["shares"]["domain"]["mean"] is None


def test_a_judge_without_a_model_is_refused(tmp_path: Path) -> None:
    data = planted(tmp_path / "f", features=2, texts=20)
    with pytest.raises(UserError, match=r"'tokens' cannot classify.*judge\.model"):
        classify(data.store, TokenJudge(), ClassifyConfig())


def test_a_store_without_activations_is_refused(tmp_path: Path) -> None:
    texts = [StoreText([1, 2, 3, 4], [7] * 4)]
    data = make_store(tmp_path / "f", texts, [np.zeros((1, 4, 2), np.float32)], ["a"] * 25)
    judge = open_judge(JudgeConfig(model="m", base_url="http://127.0.0.1:9/v1"), data.store)
    with pytest.raises(UserError, match="no unit to classify"):
        classify(data.store, judge, ClassifyConfig())
    assert not data.store.has("classes")


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"units": 0}, {"min_density": -1.0}, {"min_shown": 11}, {"kinds": ("x",)}):
        with pytest.raises(UserError, match=f"classify.{next(iter(wrong))}"):
            ClassifyConfig(**wrong)
