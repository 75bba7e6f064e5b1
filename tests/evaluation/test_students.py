"""Runs are opened strictly, and each student is the model that its name says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.run_all import asked_of
from fastadapt.evaluation.benchmarks.runner import PUBLISHED, BenchmarkConfig
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import Students

IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])


def test_each_student_is_what_its_name_says(make_run) -> None:
    from transformers import AutoModelForCausalLM

    students = Students.open([make_run("a", 1), make_run("b", 2)])
    assert list(students.students) == ["base", "hybrid", "a", "b"]
    assert students.runs == ["a", "b"]
    logits = {}
    with torch.no_grad():
        for name in ("target", "base", "hybrid", "a", "b"):
            with students.generating(name) as model:
                logits[name] = model(IDS).logits
                assert model.generate(IDS, max_new_tokens=2).shape == (1, 8)
        for role in ("target", "base"):
            plain = AutoModelForCausalLM.from_pretrained(getattr(students.config, role))
            assert torch.equal(logits[role], plain(IDS).logits)
        for name in ("a", "b"):
            model = students.replacement(name)
            assert torch.equal(model(IDS).logits, logits[name])
            assert model.adapters is students.adapters(name)
    values = list(logits.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_the_base_shares_its_mlps_and_the_model_carries_what_it_did(make_run) -> None:
    students = Students.open([make_run("a", 1), make_run("b", 2)])
    before = students.model.adapters
    with students.generating("b"), students.base() as base:
        assert students.model.adapters is students.adapters("b")
        shared = [layer.mlp for layer in base.model.layers]
        assert all(m is n for m, n in zip(shared, students.model.pair.base_mlps, strict=True))
    assert students.model.adapters is before
    with pytest.raises(RuntimeError, match="inside"), students.generating("b"):
        raise RuntimeError("inside")
    assert students.model.adapters is before
    assert not any(p.requires_grad for p in students.adapters("a").parameters())


def test_what_a_run_says_of_itself(make_run) -> None:
    facts = {
        "objective": {"sparsity": 0.01, "bridge": 0.0},
        "measured": {"l0_mean": 3.5, "tokens": 1000},
    }
    run = make_run("a", 1, **facts)
    students = Students.open([run, run / "adapter"], ["one", "two"])
    student = students.students["one"].plain()
    assert student == {
        "name": "one",
        "kind": "transcoder",
        "run": str(run),
        "sparsity": 0.01,
        "bridge": 0.0,
        "l0": 3.5,
        "tokens": 1000,
        "changed": (),
    }
    assert students.family == "r1-distill"
    assert students.students["hybrid"].kind == "hybrid"
    assert students.config.dtype == "float32"
    assert Students.open([run], dtype="bfloat16", device="cpu").config.dtype == "bfloat16"


def test_fingerprints_know_models_and_adapters(make_run, tmp_path) -> None:
    run, other = make_run("a", 1), make_run("b", 2)
    shutil.copytree(run, tmp_path / "copy")
    students = Students.open([run, other, tmp_path / "copy"])
    told = {name: students.fingerprint(name) for name in students.students}
    assert told["a"] == told["copy"] != told["b"]
    assert told["base"] == told["hybrid"] != told["a"]
    assert Students.open([run]).fingerprint("a") == told["a"]
    assert Students.open([run], dtype="bfloat16").fingerprint("a") != told["a"]
    file = run / "adapter" / "layer_1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert students.fingerprint("a") != told["a"]
    file = Path(students.config.target) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert students.fingerprint("b") != told["b"]
    assert students.fingerprint("hybrid") != told["hybrid"]


def test_bad_runs(make_run, tmp_path) -> None:
    run = make_run("a", 1)
    with pytest.raises(UserError, match="at least one run"):
        Students.open([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: expected a run or a folder of adapters"):
        Students.open([tmp_path / "empty"])
    (tmp_path / "empty" / "config.yaml").write_text("pair: {}")
    with pytest.raises(UserError, match="this run is not finished: it has no adapter/ yet"):
        Students.open([run, tmp_path / "empty"])
    other = make_run("b", 2, "llama")
    with pytest.raises(UserError, match=r"b: expected a run of the pair of .*qwen2-target .*llama"):
        Students.open([run, other])
    shutil.copy(other / "config.yaml", run / "config.yaml")
    with pytest.raises(UserError, match=r"of another pair than their run.*qwen2.*llama"):
        Students.open([run])
    (run / "config.yaml").write_text("[")
    with pytest.raises(UserError, match=r"config\.yaml is no run's configuration"):
        Students.open([run])


def test_bad_names_and_dtypes(make_run, tmp_path) -> None:
    run, other = make_run("a", 1), make_run("b", 2)
    with pytest.raises(UserError, match=r"several runs are called 'a' .*name them"):
        Students.open([run, run])
    with pytest.raises(UserError, match="may not be called 'hybrid'"):
        Students.open([run], ["hybrid"])
    with pytest.raises(UserError, match=r"letters, digits and \._-\+=, got '\.\./x'"):
        Students.open([run], ["../x"])
    with pytest.raises(UserError, match="as many names as runs, got 1 for 2"):
        Students.open([run, other], ["x"])
    with pytest.raises(UserError, match="no run is called 'c'; there are a, b"):
        Students.open([run, other]).adapters("c")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["pair"]["dtype"] = "bfloat16"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"held in bfloat16, that of .* in float32"):
        Students.open([run, other])
    assert Students.open([run, other], dtype="float32").runs == ["a", "b"]


def test_how_to_ask_is_not_guessed(make_run) -> None:
    students = Students.open([make_run("a", family=None)])
    with pytest.raises(UserError, match=r"benchmarks: a does not say in which family's form"):
        asked_of(students, BenchmarkConfig(), SamplingConfig())
    asked = asked_of(Students.open([make_run("b")]), BenchmarkConfig(), SamplingConfig(seed=3))
    assert (asked.family, asked.tasks, asked.sampling.seed) == ("r1-distill", PUBLISHED, 3)
