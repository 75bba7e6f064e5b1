"""`fastadapt contrast` on a trained run of the embedded pair; numbers have their own tests."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastadapt.evaluation.contrast.result import ContrastFile
from fastadapt.evaluation.generation.responses import Response, open_responses
from fastadapt.io.documents import check
from fastadapt.organism import NAMES

#: 16 features per layer, with a store of features.
FINISHED = Path(__file__).parent / "old_files" / "finished"
FEW = ("--n", 30, "--statistics.resamples", 200, "--device", "cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FINISHED, tmp_path / "run"))


def responses_of(n: int) -> list[str]:
    lines = NAMES["organism/validation"].read_text(encoding="utf-8").splitlines()[:n]
    return [json.loads(line)["conversations"][1]["value"] for line in lines]


def read_json(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "contrast.json").read_text())
    check(result, ContrastFile, "contrast.json")
    return result


def test_slips_are_contrasted_with_right_steps(
    run: Path, fastadapt: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("contrast", run, "--features", "0/5,2/9", "--draws", 2, "--scales", -1, *FEW)
    outcome = fastadapt(*command)
    assert outcome.code == 0, outcome.err
    result = read_json(run / "contrast")
    texts = responses_of(30)
    places = result["places"]
    assert (places["source"], places["texts"]) == ("slips", 30)
    assert places["labelled"]["all"] == sum(text.split().count("wait") for text in texts)
    assert places["texts_with_places"] == sum("wait" in text for text in texts)
    assert result["words"] == {"wait": [" wait"]}
    numbers = {model["name"]: model["kinds"]["all"] for model in result["models"]}
    assert list(numbers) == [
        *("target", "base", "hybrid", "adapter", "bias"),
        *("ablate 0/5,2/9", "ablate random like 0/5,2/9"),
        *("only 0/5,2/9", "only random like 0/5,2/9"),
        *("target + 0/5,2/9 × -1", "target + random like 0/5,2/9 × -1"),
    ]
    assert numbers["target"]["difference"]["low"] > 0
    assert abs(numbers["base"]["difference"]["mean"]) < 0.01
    for model in result["models"]:
        assert len(model["draws"]) == (2 if model["random"] else 0)
        assert len(model.get("densities", [])) == len(model["draws"])
        if model["random"]:
            mean = sum(model["draws"]) / 2
            assert mean == pytest.approx(model["kinds"]["all"]["labelled"]["mean"])
        for kind in ("all", "operation", "result"):
            values = model["kinds"][kind]
            difference = values["labelled"]["mean"] - values["matched"]["mean"]
            assert values["difference"]["mean"] == pytest.approx(difference)
    assert f"{100 * numbers['target']['labelled']['mean']:.1f}% [" in outcome.out
    assert "P(wait): slips with a wrong operation" in outcome.out
    (shares,) = {tuple(m["densities"]) for m in result["models"] if m["random"]}
    shown = ", ".join(f"{100 * share:.1f}%" for share in shares)
    tables = (run / "contrast" / "tables.md").read_text()
    assert f"as a share of the set's: 0/5,2/9 {shown}." in tables
    sets = [(each["set"], each["random"]) for each in result["recognition"]]
    assert sets == [("0/5,2/9", False), ("0/5,2/9", True)]
    assert set(result["recognition"][0]["kinds"]) == {"all", "operation", "result"}
    assert "Activity of the features against the labels" in outcome.out
    for name in ("contrast.json", "tables.md", "tables.tex", "plots", "report.html"):
        assert f"{name}: {(run / 'contrast' / name).resolve()}\n" in outcome.out
        assert (run / "contrast" / name).exists()

    # The same command reads the stored values, and no model.
    import fastadapt.evaluation.contrast.measure as measure

    monkeypatch.setattr(measure, "batch_of", None)
    assert fastadapt(*command).code == 0
    assert read_json(run / "contrast") == result


def test_features_of_whole_mlps_are_not_added_to_the_target(
    run: Path, fastadapt: Callable[..., Any]
) -> None:
    """All other models are read, before and after."""
    card = run / "adapter" / "fastadapt.json"
    values = json.loads(card.read_text())
    values["adapter"]["base_mlp"] = values["additive"] = False
    card.write_text(json.dumps(values))
    outcome = fastadapt("contrast", run, "--features", "0/5", "--draws", 0, *FEW)
    assert outcome.code == 0, outcome.err
    assert "No features are added to the target: " in outcome.out
    names = [model["name"] for model in read_json(run / "contrast")["models"]]
    assert names[-2:] == ["ablate 0/5", "only 0/5"]


def test_a_union_is_compared_with_its_parts(run: Path, fastadapt: Callable[..., Any]) -> None:
    sets = ("0/5,2/9", "0/5", "2/9", "1/3")
    outcome = fastadapt("contrast", run, "--features", *sets, "--draws", 0, "--scales", -1, *FEW)
    assert outcome.code == 0, outcome.err
    (measured,) = read_json(run / "contrast")["interactions"]
    assert (measured["set"], measured["parts"]) == ("0/5,2/9", ["0/5", "2/9"])
    assert "What sets of features do only together" in outcome.out


def test_words_are_contrasted_with_places_of_equal_entropy(
    run: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--places", "words", "--words", "Wait", "hmm", "--entropy", "hybrid")
    outcome = fastadapt("contrast", run, *words, *FEW, "--output", out)
    assert outcome.code == 0, outcome.err
    result = read_json(out)
    texts = [text.split() for text in responses_of(30)]
    counts = {word: sum(text.count(word) for text in texts) for word in ("hmm", "wait")}
    places = result["places"]
    assert places["labelled"] == {"all": sum(counts.values()), **counts}
    assert places["matched"] == places["labelled"]["all"]
    assert 0 < places["same_text"] <= places["matched"]
    assert places["entropy"]["model"] == "hybrid"
    assert abs(places["entropy"]["difference"]["mean"]) < 0.1
    for model in result["models"]:
        for group in ("labelled", "matched"):
            by_word = sum(model["words"][word][group]["mean"] for word in counts)
            assert by_word == pytest.approx(model["kinds"]["all"][group]["mean"])
    assert re.search(r"^model +┃ +wait, labelled", outcome.out, re.MULTILINE)


def test_responses_of_the_target_are_read(
    run: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    from fastadapt.effects.requests import prompt_ids, response_ids
    from fastadapt.effects.run import load_run

    models = load_run(run, device="cpu").models
    prompt = prompt_ids(models, "tom has 3 apples .")
    path = tmp_path / "responses.jsonl"
    with open_responses(path, {}) as file:
        for i, text in enumerate(responses_of(8)):
            ids = response_ids(models, text)
            file.add(Response(str(i), 0, 0, prompt, ids, text, "eos", None))
    command = ("contrast", run, "--responses", path, "--device", "cpu")
    outcome = fastadapt(*command, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    places = read_json(tmp_path / "out")["places"]
    assert (places["source"], places["texts"]) == ("words", 8)
    # The last token of a response is its end, which is left out.
    said = [text.split()[:-1].count("wait") for text in responses_of(8)]
    assert places["labelled"]["all"] == sum(said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--words", "zebra"), "one token of the pair's tokenizer, got 'zebra'; give others"),
        (("--words", "wait", "WAIT"), "words: expected one or more different words"),
        (
            ("--places", "words", "--words", "hydrazine"),
            r"none of 30 responses contains one of the words hydrazine",
        ),
        (("--n", "1"), r"no slip in 1 texts, so no position is labelled; give more texts \(--n\)"),
        (("--n", "0"), "n: expected 1 or more, got 0"),
        (("--features", "nobody"), "no set 'nobody'"),
        (("--features", "none.json"), "none.json.*empty"),
        (("--features", "2/17"), "features 0 to 15, got feature 17 of layer 2"),
        (("--scales", "some"), "--scales"),
        (("--caliper", "-1"), "caliper: expected 0 or more"),
        (("--responses", "absent.jsonl"), "absent.jsonl does not exist"),
    ],
)
def test_impossible_requests(
    run: Path,
    fastadapt: Callable[..., Any],
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = {"schema_version": 1, "name": "none", "adapter": "", "n_layers": 4, "n_features": 16}
    (tmp_path / "none.json").write_text(json.dumps({**empty, "made": "", "features": []}))
    earlier = run / "contrast" / "read" / "earlier"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("")
    outcome = fastadapt("contrast", run, "--overwrite", *FEW, *options)
    assert earlier.exists()
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.count("error: ") == 1
    assert re.search(message, " ".join(outcome.err.split())), outcome.err
    assert not (run / "contrast" / "contrast.json").exists()
