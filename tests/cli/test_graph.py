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
    for head in ("through heads", "difference: features", "strongest paths", "Spearman"):
        assert head in outcome.out
    assert re.search(
        r"\n  [\d.]+%: (token|feature|\w+ bias) .* (raises|lowers) the target\n", outcome.out
    )
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


def sampled(path: Path, n_prompt: int = 8) -> list[Any]:
    """Write texts of the embedded pair as a file of responses, and return the responses."""
    from fastadapt.data.batches import collate
    from fastadapt.data.sequences import DataConfig, load_sequences
    from fastadapt.evaluation.generation.responses import Response, open_responses
    from fastadapt.evaluation.models_under_test import ModelSet
    from fastadapt.organism import resolve

    tokenizer = ModelSet.open([path.parent / "run"], device="cpu").model.pair.tokenizer
    data = DataConfig("", resolve("organism/validation"), max_validation=6)
    texts = load_sequences(data.validation, tokenizer, data, split="validation")
    batch = collate(list(texts), 0)
    written = []
    with open_responses(path, {}) as file:
        for i, (ids, real) in enumerate(zip(batch.input_ids, batch.real, strict=True)):
            tokens = ids[real].tolist()
            answer = tokens[n_prompt:]
            written.append(
                Response(
                    str(i), 0, 0, tokens[:n_prompt], answer, tokenizer.decode(answer), "eos", None
                )
            )
            file.add(written[-1])
    return written


def test_places_in_responses(run: Path, fastadapt: Callable[..., Any]) -> None:
    file = run.parent / "responses.jsonl"
    responses = sampled(file)
    find = ("graph", run, "--responses", file, "--stream", "target", "--device", "cpu")
    outcome = fastadapt(*find, "--at", "wait", "so")
    assert outcome.code == 0, outcome.err
    assert f"places in {len(responses)} responses" in outcome.out
    assert not (run / "graphs").exists() or "graph: " not in outcome.out
    n_places = int(re.search(r"(\d+) places", outcome.out)[1])  # type: ignore[index]
    assert n_places > 0
    later = fastadapt(*find, "--at", "wait", "so", "--after", "wait")
    assert int(re.search(r"(\d+) places", later.out)[1]) < n_places  # type: ignore[index]

    small = ("--at", "wait", "so", "--place", "0", "--nodes", 2)
    first = fastadapt(*find, *small)
    assert first.code == 0, first.err
    path = Path(first.out.splitlines()[-1].removeprefix("graph: "))
    document = json.loads(path.read_text())
    position = len(document["ids"]) - 1
    assert document["rows"][0]["position"] == position
    assert document["logits"][0][0]["string"].strip() in ("wait", "so")
    again = fastadapt(*find, *small)
    assert again.code == 0
    assert again.out.splitlines()[-1] == f"exists: {path}"

    for options, reason in (
        (("--at", "xyzzy"), "expected words that are tokens of the vocabulary, got ['xyzzy']"),
        (("--at", "so", "--place", "999"), "--place: expected numbers from 0 to"),
        (("--at", "so", "--above", "2"), "--above: expected more than 0 and at most 1, got 2"),
        (("--at", "so", "--token", "4"), "--token: a place gives the token"),
        ((), "--at: expected one or more words"),
    ):
        outcome = fastadapt(*find, *options)
        assert outcome.code == 2
        assert reason in outcome.err
    outcome = fastadapt("graph", run, PROMPT, "--at", "wait")
    assert "--at: expected with --responses" in outcome.err
    outcome = fastadapt("graph", run, PROMPT, "--responses", file)
    assert "expected one of PROMPT, --prompts, --responses" in outcome.err


def test_a_folder_of_prompts(run: Path, tmp_path: Path, fastadapt: Callable[..., Any]) -> None:
    folder, out = tmp_path / "prompts", tmp_path / "out"
    folder.mkdir()
    none = ("--nodes", 1, "--evidence.ablations", 0, "--device", "cpu", "--output", out)
    ask = ("graph", run, "--prompts", folder, "--token", "4", *none)
    assert "expected a folder with .txt files" in fastadapt(*ask).err
    (folder / "a.txt").write_text(PROMPT + "\n")
    assert fastadapt(*ask).out.count("graph: ") == 1
    (folder / "b.txt").write_text("tom has 5 apples")
    outcome = fastadapt(*ask)
    assert outcome.code == 0, outcome.err
    assert (outcome.out.count("exists: "), outcome.out.count("graph: ")) == (1, 1)
    assert len(list(out.glob("*.json"))) == 2
