"""Output and errors of `fastadapt graph`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from organism_runs import make_run

PROMPT = "tom has 3 apples"
SMALL = ("--nodes", 4, "--evidence.ablations", 4, "--evidence.copies", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("graph") / "run")


def test_a_graph_and_its_tables(run: Path, fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt("graph", run, PROMPT, "--token", "4", "--against", "5", *SMALL)
    assert outcome.code == 0, outcome.err
    (file,) = (run / "graphs").glob("*.json")
    document = json.loads(file.read_text())
    account = document["account"]
    change = account["with_adapters"] - account["hybrid"]
    parts = ("features", "decoder_biases", "errors", "coefficients", "remainder")
    assert change == pytest.approx(sum(account[name] for name in parts))
    assert abs(account["remainder"]) < 1e-5 * document["rows"][0]["size"]
    last = len(document["ids"]) - 1
    assert f"logit of ' 4' - ' 5' after ' apples' (position {last})" in outcome.out
    for head in ("through heads", "difference: features", "strength", "Spearman", "only these"):
        assert head in outcome.out
    for sample in ("strongest", "random"):
        assert re.search(rf"4 {sample} +│ +graph ", outcome.out)
    assert str(file.resolve()) in outcome.out

    again = fastadapt("graph", run, PROMPT, "--token", "4", "--against", "5", *SMALL)
    assert again.code == 2
    assert "exists. Replace it (--overwrite)" in again.err


def test_the_default_question(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.graphs.explain import token_ids
    from fastadapt.graphs.targets import most_different

    text = "<｜User｜>tom has 3 apples and gets 4 apples . how many now ?<｜Assistant｜><think>"
    path = tmp_path / "a.json"
    none = ("--nodes", 0, "--evidence.ablations", 0, "--device", "cpu", "--output", path)
    outcome = fastadapt("graph", run, text, *none)
    assert outcome.code == 0, outcome.err
    model = ModelSet.open([run], device="cpu").model
    place = most_different(model, token_ids(model, text))
    names = [repr(model.pair.tokenizer.decode([i])) for i in (place.token, place.against)]
    row = json.loads(path.read_text())["rows"][0]
    assert row["position"] == place.position
    for name in names:
        assert name.strip("' ") in row["name"]


def test_the_targets_own_text(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    path = tmp_path / "a.json"
    arguments = ("--feature", "3/2", "--stream", "target", "--output", path)
    outcome = fastadapt("graph", run, PROMPT, *arguments, *SMALL)
    assert outcome.code == 0, outcome.err
    document = json.loads(path.read_text())
    assert document["stream"] == "target"
    assert "evidence" not in document
    assert document["account"]["errors"] != 0


def test_what_graph_refuses(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    for arguments, reason in (
        (("--token", "xyzzy"), "expected one token of the vocabulary"),
        (("--nodes", -1), "--nodes: expected 0 or more, got -1"),
        (("--feature", "x"), "such as 2/17, got 'x'"),
        (("--stream", "base"), "--stream"),
    ):
        outcome = fastadapt("graph", run, PROMPT, *arguments, "--device", "cpu")
        assert outcome.code == 2
        assert reason in outcome.err
    assert fastadapt("graph", tmp_path, PROMPT).code == 2
