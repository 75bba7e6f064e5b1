"""Pairs whose vocabularies differ, and PEFT targets: train, evaluate, export, serve."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.effects.run import load_run

QUICK = ("--parts", "[outputs]", "--texts.n", 2, "--sampling.max_new_tokens", 6)


def save_target(pair: Path, folder: Path, kind: str) -> Path:
    """Save the tiny target with 8 added tokens, its rows padded to a multiple of 64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = pair / ("base" if kind == "peft" else "target")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<t{i}>" for i in range(8)])
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    if kind == "tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    if kind == "peft":
        from peft import LoraConfig, get_peft_model

        saved = ["embed_tokens", "lm_head"]
        settings: dict[str, Any] = {
            "r": 4,
            "target_modules": "all-linear",
            "modules_to_save": saved,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.quick("peft")
@pytest.mark.parametrize("kind", ["untied", "tied", "peft"])
def test_a_target_with_added_tokens(
    kind: str,
    tiny_pair: Path,
    recipe: Callable[..., Path],
    fastadapt: Callable[..., Any],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = save_target(tiny_pair, tmp_path / "target", kind)
    outcome = fastadapt("train", recipe(**{"pair.target": str(target)}))
    assert outcome.code == 0, outcome.err
    assert "note: 8 added tokens differ" in outcome.err
    run = tmp_path / "run"
    outcome = fastadapt("eval", run, *QUICK)
    assert outcome.code == 0, outcome.err
    result = json.loads((run / "eval" / "eval.json").read_text())
    measured = "base" in result["faithfulness"]
    assert ("over the 64 tokens that both have" in result["notes"]["base"]) == measured
    assert ("The base is not measured" in result["notes"]["base"]) != measured
    assert result["notes"]["base"] in outcome.out

    for prompt, named in (
        ("w1 w2", ["base", "hybrid", "adapter"]),
        ("<t3>", ["hybrid", "adapter"]),
    ):
        command = ("trace", run, prompt, "--plain", "--max_new_tokens", 0)
        outcome = fastadapt(*command, "--json")
        assert outcome.code == 0, outcome.err
        traced = json.loads(outcome.out)
        assert list(traced["kl"]) == named
        assert ("is not measured" in traced["notes"]["base"]) == ("base" not in named)
        assert traced["notes"]["base"] in fastadapt(*command).out

    model = load_run(run).model
    ids = torch.tensor([[7, 8, 66, 9]])
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.shape[-1] == 128
    outcome = fastadapt("export", run, "--output", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    served: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, expected)
        served.generate(ids, max_new_tokens=4, do_sample=False)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("<t3>")["input_ids"] == AutoTokenizer.from_pretrained(target)("<t3>")["input_ids"]


@pytest.mark.slow
def test_a_target_with_chat_markers_that_the_base_lacks(
    tiny_pair: Path, recipe: Callable[..., Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target")
    markers = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_tokens(markers, special_tokens=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair / "target")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "target")
    family = {
        role: [f"{markers[0]} {word} ", markers[1]]
        for role, word in (("user", "w1"), ("assistant", "w2"))
    }
    changed = {**family, "markers": markers, "thinking": ["", ""]}
    path = recipe(**{"pair.target": str(tmp_path / "target"), "data.family": changed})
    assert fastadapt("train", path).code == 0
    run, row = tmp_path / "run", {"problem": "w1 w2", "answer": "3"}
    (tmp_path / "math500.jsonl").write_text(json.dumps(row) + "\n")
    benchmark = ("--benchmarks.tasks", "[math500]", "--benchmarks.data", tmp_path)
    outcome = fastadapt("eval", run, *QUICK, "--parts", "[benchmarks]", *benchmark)
    assert outcome.code == 0, outcome.err
    result = json.loads((run / "eval" / "eval.json").read_text())
    assert list(result["benchmarks"]["math500"]) == ["target", "hybrid", "run"]
    assert "The base has no benchmarks (sampled): the texts contain token 65" in outcome.out
    assert fastadapt("features", "collect", run, "--n", 2).code == 0
    outcome = fastadapt(
        *("changes", run, "--texts", 1, "--features", 1, "--positions", 1, "--prompts", 1),
        *("--max_new_tokens", 2),
    )
    assert outcome.code == 0, outcome.err
    changes = json.loads((run / "changes.json").read_text())
    assert list(changes["responses"][0]["models"]) == ["hybrid", "adapter", "target"]
    assert "The base does not respond: the texts contain token 65" in changes["notes"][0]
    assert "The base does not respond" in (run / "changes.html").read_text()


@pytest.mark.slow
def test_the_base_is_the_one_that_the_adapter_names(
    tiny_pair: Path, recipe: Callable[..., Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    import yaml

    target = save_target(tiny_pair, tmp_path / "target", "peft")
    path = recipe(**{"pair.target": str(target)})
    values = yaml.safe_load(path.read_text())
    del values["pair"]["base"]
    path.write_text(yaml.safe_dump(values))
    outcome = fastadapt("train", path, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    outcome = fastadapt("train", path)
    assert outcome.code == 0, outcome.err
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert recorded["pair"]["base"] == str(tiny_pair / "base")


# --- a run knows its models -----------------------------------------------------------------------


@pytest.fixture
def moved_pair(tiny_pair: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pair whose weights a test may change."""
    return Path(shutil.copytree(tiny_pair, tmp_path / "pair"))


def scale_weights(model: Path) -> None:
    """Change all weights in place: the same names and shapes, other values."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    tensors = {name: 1.01 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("role", ["target", pytest.param("base", marks=pytest.mark.slow)])
def test_changed_weights_are_noticed(
    role: str,
    moved_pair: Path,
    recipe: Callable[..., Path],
    fastadapt: Callable[..., Any],
    tmp_path: Path,
) -> None:
    pair = {f"pair.{name}": str(moved_pair / name) for name in ("target", "base")}
    path, run = recipe(**pair), tmp_path / "run"
    assert fastadapt("train", path).code == 0
    summary = json.loads((run / "summary.json").read_text())
    card = json.loads((run / "adapter" / "fastadapt.json").read_text())
    assert set(summary["weights"]) == {"target", "base"}
    assert card["metadata"]["weights"] == summary["weights"]
    commands = (
        ("eval", run, *QUICK),
        ("features", "collect", run, "--n", 2),
        ("export", run, "--output", tmp_path / "out", "--overwrite"),
    )
    for command in commands:
        outcome = fastadapt(*command)
        assert outcome.code == 0, outcome.err
        assert "warning:" not in outcome.err

    scale_weights(moved_pair / role)
    said = f"{role} {moved_pair / role} has weights "
    for command in commands:
        outcome = fastadapt(*command, *(["--overwrite"] if command[0] == "features" else []))
        assert outcome.code == 0, outcome.err
        assert f"warning: {run} was trained with other models" in outcome.err
        assert said in outcome.err
        assert summary["weights"][role][:12] in outcome.err
    outcome = fastadapt("train", path, "--resume")
    assert outcome.code == 2
    assert "--resume: the run began with other models" in outcome.err
    assert said in outcome.err


@pytest.mark.slow
def test_a_changed_configuration_is_noticed(
    moved_pair: Path, recipe: Callable[..., Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    """Stored results of another configuration are not served, and those of the first are."""
    path = recipe(**{f"pair.{role}": str(moved_pair / role) for role in ("target", "base")})
    run = tmp_path / "run"
    assert fastadapt("train", path).code == 0

    def kl() -> float:
        outcome = fastadapt("eval", run, *QUICK, "--sampling.temperature", 0)
        assert outcome.code == 0, outcome.err
        warned = f"warning: {run} was trained with other models" in outcome.err
        assert warned == (file.read_text() != text)
        assert (f"target {file.parent} has configuration " in outcome.err) == warned
        result = json.loads((run / "eval" / "eval.json").read_text())
        return float(result["faithfulness"]["hybrid"]["kl"]["mean"])

    file = moved_pair / "target" / "config.json"
    text = file.read_text()
    before = kl()
    file.write_text(json.dumps({**json.loads(text), "rms_norm_eps": 0.5}))
    assert kl() != before
    outcome = fastadapt("train", path, "--resume")
    assert outcome.code == 2
    assert "--resume: the run began with other models: target" in outcome.err
    file.write_text(text)
    assert kl() == before


def test_features_of_an_earlier_adapter_are_refused(
    recipe: Callable[..., Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert fastadapt("train", recipe()).code == 0
    assert fastadapt("features", "collect", run, "--n", 2).code == 0
    assert fastadapt("features", "sets", run).code == 0
    assert fastadapt("train", recipe(), "--overwrite", "--optimizer.lr", "2e-2").code == 0
    for command in (
        ("features", "sets", run),
        ("features", "export", run),
        ("features", "select", run, "mine", "--random", 1),
        ("features", "check", run),
        ("features", "collect", run, "--n", 2),
    ):
        outcome = fastadapt(*command)
        assert outcome.code == 2, outcome.out
        assert "collected from other adapters than the run has now" in outcome.err
        assert "fastadapt features collect --overwrite" in outcome.err
    assert fastadapt("features", "collect", run, "--n", 2, "--overwrite").code == 0
    assert fastadapt("features", "sets", run).code == 0


def test_local_paths_are_stored_absolute(
    moved_pair: Path,
    recipe: Callable[..., Path],
    fastadapt: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(**{"pair.target": "pair/target", "pair.base": "pair/base"})
    assert fastadapt("train", path).code == 0
    metadata = json.loads((tmp_path / "run/adapter/fastadapt.json").read_text())["metadata"]
    assert metadata["target"] == str(moved_pair / "target")
    assert fastadapt("train", path, "--resume").code == 0
    shutil.rmtree(moved_pair)
    outcome = fastadapt("eval", tmp_path / "run", *QUICK)
    assert outcome.code == 2
    assert f"'{moved_pair / 'target'}' cannot be loaded: no such folder" in outcome.err


def test_the_tokenizer_may_come_from_elsewhere(
    moved_pair: Path, recipe: Callable[..., Path], fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    for file in (moved_pair / "target").glob("*token*"):
        file.unlink()
    changes = {"pair.target": str(moved_pair / "target")}
    changes["pair.tokenizer"] = str(moved_pair / "base")
    outcome = fastadapt("train", recipe(**changes))
    assert outcome.code == 0, outcome.err
    assert len(load_run(tmp_path / "run").pair.tokenizer) == 64
    assert fastadapt("export", tmp_path / "run", "--output", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_local_data_are_stored_absolute(
    tiny_pair: Path,
    recipe: Callable[..., Path],
    fastadapt: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A relative folder of data, such as chats/val, is never tried as a data set of the hub."""
    import yaml

    for name in ("train", "validation"):
        folder = tmp_path / "home" / "chats" / name
        folder.mkdir(parents=True)
        shutil.copy(tiny_pair / f"{name}.jsonl", folder / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "home")
    mixture = [{"source": "chats/train", "weight": 1}, {"source": str(tiny_pair / "train.jsonl")}]
    path = recipe(**{"data.train": mixture, "data.validation": "chats/validation"})
    assert fastadapt("train", path).code == 0
    run = tmp_path / "run"
    recorded = yaml.safe_load((run / "config.yaml").read_text())["data"]
    assert recorded["validation"] == str(tmp_path / "home" / "chats" / "validation")
    assert recorded["train"][0]["source"] == str(tmp_path / "home" / "chats" / "train")
    assert fastadapt("train", path, "--resume").code == 0
    monkeypatch.chdir(tmp_path)
    outcome = fastadapt("features", "collect", run, "--n", 2)
    assert outcome.code == 0, outcome.err
