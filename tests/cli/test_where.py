"""Output, resuming, options and errors of `fastadapt where`."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from fastadapt.errors import UserError
from fastadapt.evaluation.difference.result import read_result
from fastadapt.io.documents import DocumentError

FEW = ("--where.n", 4, "--statistics.resamples", 200)


def test_a_pair_is_measured_once_and_presented(
    tiny_pair: Path, recipe: Callable[..., Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    rows = [
        {"conversations": [{"from": "user", "value": text}, {"from": "assistant", "value": "w2"}]}
        for text in ("w1 " * 80, "w1 " * 300, "")
    ]
    data = (tiny_pair / "validation.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + data)
    settings = {"validation": str(tmp_path / "rows.jsonl"), "max_tokens": 200, "bad_rows": "skip"}
    path = recipe(**{f"data.{key}": value for key, value in settings.items()})
    command = ("where", path, *FEW, "--output", tmp_path / "out")
    outcome = fastadapt(*command)
    assert outcome.code == 0, outcome.err
    for reason in (
        "are longer than the context of the models, 64 tokens",
        "have more than data.max_tokens=200 tokens",
        "cannot be read",
    ):
        assert f"1 are left out, since they {reason}" in " ".join(outcome.out.split())
    folder = tmp_path / "out"
    result = read_result(folder / "where.json")
    assert [each["from_base"] for each in result["combinations"]][-1] == result["parts"]
    assert len(result["combinations"]) == 16
    assert result["texts"]["n"] == 4
    assert {p.name for p in (folder / "plots").iterdir()} == {
        f"{key}.png" for key in ("shapley-position", "kl-layer", "change-layer", "gamma-layer")
    }
    page = (folder / "report.html").read_text()
    for name in ("Where the difference lies", "Hybrids", "Layers", "Positions where"):
        assert name in outcome.out
        assert name in page
        assert name in (folder / "tables.md").read_text()
    assert result["verdict"] in outcome.out
    assert "hybrids: " in outcome.err

    stored = {path: path.stat().st_mtime_ns for path in (folder / "parts").iterdir()}
    again = fastadapt(*command)
    assert again.out == outcome.out
    assert "hybrids: " not in again.err
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    assert read_result(folder / "where.json") == result

    (folder / "where.json").write_text(json.dumps({**result, "layers": "none"}))
    with pytest.raises(DocumentError, match="layers"):
        read_result(folder / "where.json")


def test_one_text_is_measured_token_by_token(
    recipe: Callable[..., Path],
    fastadapt: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(recipe().read_text())
    pair = [f"--pair.{key}={value}" for key, value in values["pair"].items()]
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8")
    outcome = fastadapt("where", *pair, "--text", "text.txt")
    assert outcome.code == 0, outcome.err
    result = read_result(tmp_path / "runs" / "target-where-text" / "where.json")
    assert result["texts"]["n"] == 1
    profile = result["profile"]
    assert profile["tokens"] == ["w6", "w7", "w8"]
    assert len(profile["tokens"]) == len(profile["kl"]) == result["texts"]["predicted"]
    assert {each["position"] for each in result["positions"]} == set(
        range(1, result["texts"]["predicted"] + 1)
    )
    assert (tmp_path / "runs" / "target-where-text" / "plots" / "kl-token.png").is_file()


def test_a_run_is_a_pair_with_its_data(tmp_path: Path) -> None:
    from fastadapt.cli.where import parse_where
    from fastadapt.organism import resolve
    from fastadapt.training.config import load_config

    run = Path(__file__).parent / "old_files" / "finished"
    request, folder, overwrite = parse_where([str(run)])
    config = load_config(run / "config.yaml")
    assert folder == run / "where"
    assert not overwrite
    pair = (resolve(config.pair.target), resolve(config.pair.base))
    assert (request.pair.target, request.pair.base) == pair
    assert request.data == config.data
    typed = ["--data", "other.jsonl", "--data.family", "qwen", "--pair.dtype=float64"]
    request, folder, overwrite = parse_where([str(run), *typed, "--overwrite"])
    assert request.data is not None
    assert (request.data.validation, request.data.family) == ("other.jsonl", "qwen")
    assert request.pair.dtype == "float64"
    assert overwrite
    assert parse_where([str(run / "adapter")]) == parse_where([str(run)])
    shutil.copytree(run / "adapter", tmp_path / "shared")  # adapters without their run
    request, folder, _ = parse_where([str(tmp_path / "shared"), "--data=other.jsonl"])
    assert (request.pair.target, request.pair.base) == pair
    assert request.data is not None
    assert (request.data.validation, request.data.family) == ("other.jsonl", config.data.family)
    assert folder == tmp_path / "shared" / "where"


def test_presets_and_files_name_the_folder(recipe: Callable[..., Path]) -> None:
    from fastadapt.cli.where import parse_where

    request, folder, _ = parse_where(["organism", "--where.n", "7"])
    assert folder == Path("runs/organism-where")
    assert request.config.where.n == 7
    path = recipe()
    assert parse_where([str(path)])[1] == Path(f"runs/{path.stem}-where")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--where.n", "3"], "PAIR_OR_YAML is missing; presets: gated, organism"),
        (["organsim"], "no such preset; did you mean organism?"),
        (["EMPTY"], "is a folder without config.yaml and fastadapt.json"),
        (["PAIR"], r"data.validation is missing: give the texts \(--data\), or one \(--text\)"),
        (["PAIR", "--text", "tom", "--generate"], "data.validation is missing"),
        (["PAIR", "--data", "gone.jsonl"], "gone.jsonl"),
        (["TRUSTED"], "Trust in the code of a model is typed, never read from a file"),
        (["organism", "--where.n", "0"], "where.n: expected 1 or more, got 0"),
        (["organism", "--where.N", "1"], r"unknown option --where.N; did you mean --where.n\?"),
        (["organism", "--pair.dtype", "int8"], "pair.dtype must be one of"),
        (["organism", "--output", "FULL"], "holds files that are not an evaluation"),
    ],
)
def test_bad_requests_get_one_clear_error(
    argv: list[str],
    message: str,
    recipe: Callable[..., Path],
    fastadapt: Callable[..., Any],
    tmp_path: Path,
) -> None:
    values = yaml.safe_load(recipe().read_text())
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "notes.txt").write_text("mine")
    (tmp_path / "PAIR").write_text(yaml.safe_dump({"pair": values["pair"]}))
    trusted = {"pair": {**values["pair"], "trust_remote_code": True}}
    (tmp_path / "TRUSTED").write_text(yaml.safe_dump(trusted))
    words = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in argv]
    earlier = tmp_path / "out" / "parts" / "earlier"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("")
    words += ["--output", str(tmp_path / "out")] * ("FULL" not in argv)
    outcome = fastadapt("where", *words, "--overwrite")
    assert earlier.exists()
    assert outcome.code == 2
    assert outcome.err.count("error: ") == 1
    assert re.search(message, " ".join(outcome.err.split()))
    assert not (tmp_path / "out" / "where.json").exists()


@pytest.mark.slow
def test_the_embedded_pair_takes_less_than_two_minutes(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    before = time.process_time()
    outcome = fastadapt("where", "organism", "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert time.process_time() - before < 120
    whole = read_result(tmp_path / "out" / "where.json")["regions"]["all"]
    # A trial before this command existed, on other texts of the pair: 3.89 nats.
    assert abs(whole["kl"]["mean"] - 3.89) < 0.1
    trial = {"mlps": 0.46, "attention": 0.34, "embeddings": 0.22, "norms": -0.01}
    for part, share in trial.items():
        assert abs(whole["shapley"][part]["share"]["mean"] - share) < 0.015


@pytest.mark.slow
def test_hybrids_of_the_embedded_pair_answer_questions(
    fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    command = (
        *("where", "organism", *FEW, "--generate", "--output", tmp_path / "out"),
        *("--benchmarks.tasks", "[organism_math]", "--benchmarks.limit", 8),
        *("--sampling.max_new_tokens", 120, "--sampling.temperature", 0),
    )
    outcome = fastadapt(*command)
    assert outcome.code == 0, outcome.err
    result = read_result(tmp_path / "out" / "where.json")
    answers = {tuple(each["from_base"]): each for each in result["generation"]}
    assert len(answers) == 16
    parts = tuple(result["parts"])
    # The target reasons in writing, the base answers directly.
    assert answers[()]["length"]["mean"] > 2 * answers[parts]["length"]["mean"]
    assert answers[()]["accuracy"]["mean"] >= 0.5
    assert "Answers" in outcome.out


def test_questions_have_the_format_of_the_tokenizer(tmp_path: Path) -> None:
    from fastadapt.data.sequences import DataConfig
    from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig
    from fastadapt.evaluation.difference.locate import WhereConfig, WhereRequest, locate
    from fastadapt.models.pair import PairConfig

    def ask(few_shot: int) -> Any:
        request = WhereRequest(
            PairConfig("organism/target", "organism/base", device="cpu"),
            DataConfig("", "organism/validation"),
            generate=True,
            config=WhereConfig(benchmarks=BenchmarkConfig(few_shot=few_shot)),
        )
        assert request.data is not None
        assert request.data.family == "auto"
        stop = Event()
        stop.set()
        return locate(request, tmp_path / "out", lambda *_: None, stop)

    assert ask(0) is None  # stopped after the questions were checked
    message = "benchmarks.few_shot 30: target, organism_math, request .* context of 512 tokens"
    with pytest.raises(UserError, match=message):
        ask(30)
