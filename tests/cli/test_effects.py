"""Output of the commands about what features do, on a trained run of the embedded pair."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.adapter.module import TranscoderAdapter
from fastadapt.models.trained_files import load_adapters

#: 16 features per layer, with a store of features.
FINISHED = Path(__file__).parent / "old_files" / "finished"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FINISHED, tmp_path / "run"))


def test_the_strongest_features_are_listed_and_shown(
    run: Path, fastadapt: Callable[..., Any]
) -> None:
    listed = fastadapt("features", "show", run, "--top", 3)
    assert listed.code == 0, listed.err
    names = [line.split()[0] for line in listed.out.splitlines() if "│" in line]
    units = json.loads(fastadapt("features", "show", run, "--top", 3, "--json").out)
    assert names == [f"{u['layer']}/{u['feature']}" for u in units]
    sizes = [u["density"] * u["mean"] * u["norm"] for u in units]
    assert sizes == sorted(sizes, reverse=True)
    assert [u["rank"] for u in units] == [1, 2, 3]

    shown = fastadapt("features", "show", run, names[0], "3/11", "--examples", 2)
    assert shown.code == 0, shown.err
    assert f"Layer {units[0]['layer']}, feature {units[0]['feature']}\n" in shown.out
    assert "Layer 3, feature 11\n" in shown.out
    for token, _ in units[0]["promoted"]:
        assert token in shown.out
    assert shown.out.count("strongest examples") == 2
    assert shown.out.count("(text ") == 4


def test_a_card_in_python_is_that_of_the_terminal(run: Path, fastadapt: Callable[..., Any]) -> None:
    from fastadapt import load

    shown = fastadapt("features", "show", run, "2/3", "--examples", 3).out
    assert shown == f"{load(run).feature(2, 3, examples=3)!r}\n"


def test_features_are_ablated_by_name(
    run: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    selected = fastadapt("features", "select", run, "mine", "--features", "2/3", "0/1")
    assert selected.code == 0, selected.err
    for name, ablate in (("set", "mine"), ("names", "0/1,2/3")):
        outcome = fastadapt("intervene", run, "--ablate", ablate, "--output", tmp_path / name)
        assert outcome.code == 0, outcome.err
    for layer in range(4):
        files = [tmp_path / n / "adapter" / f"layer_{layer}.safetensors" for n in ("set", "names")]
        assert files[0].read_bytes() == files[1].read_bytes()
        same = files[0].read_bytes() == (run / "adapter" / files[0].name).read_bytes()
        assert same == (layer in (1, 3))


def test_without_any_feature_the_bias_remains(
    run: Path, fastadapt: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = fastadapt("intervene", run, "--only", "none", "--output", tmp_path / "bias")
    assert outcome.code == 0, outcome.err
    (adapters, metadata), (before, _) = map(
        load_adapters, (tmp_path / "bias" / "adapter", run / "adapter")
    )
    for ours, theirs in zip(adapters, before, strict=True):
        assert isinstance(ours, TranscoderAdapter)
        assert isinstance(theirs, TranscoderAdapter)
        assert not ours.W_dec.count_nonzero()
        assert theirs.W_dec.count_nonzero()
        assert torch.equal(ours.decoder_bias(), theirs.decoder_bias())
    (step,) = metadata["interventions"]
    assert (step["kind"], step["set"]["size"]) == ("only", 0)
    refused = fastadapt("intervene", run, "--ablate", "none", "--output", tmp_path / "other")
    assert refused.code == 2


PROMPT = "tom has 3 apples . first he buys 4 more . how many apples are left ?"
CPU = ("--device", "cpu")


def test_a_prompt_is_traced(run: Path, fastadapt: Callable[..., Any]) -> None:
    """The text is the rendered prompt and the target's response; numbers have their own tests."""
    command = ("trace", run, PROMPT, "--max_new_tokens", 6, *CPU)
    traced = json.loads(fastadapt(*command, "--json").out)
    assert traced["tokens"][1] == " <｜User｜>"
    assert traced["tokens"][traced["prompt_length"] - 2 :][:2] == [" <｜Assistant｜>", " <think>"]
    assert len(traced["ids"]) == traced["prompt_length"] + 6
    assert all(len(kl) == len(traced["ids"]) for kl in traced["kl"].values())
    # The response is the target's most likely one.
    following = [token for token, _ in traced["predicted"]["target"]][traced["prompt_length"] - 1 :]
    assert following[:6] == traced["tokens"][traced["prompt_length"] :]

    shown = fastadapt(*command, "--no_base")
    assert shown.code == 0, shown.err
    assert "KL of base" not in shown.out
    rows = [line.split("│") for line in shown.out.splitlines() if "│" in line]
    table = [row for row in rows if row[0].strip().isdigit()]
    assert [row[1].strip() for row in table] == [t.replace(" ", "␣") for t in traced["tokens"]]
    strongest = traced["fires"][5][0]
    assert f"{strongest['layer']}/{strongest['feature']} " in table[5][-1]

    given = fastadapt("trace", run, PROMPT, "--response", "<think> let me", "--json", *CPU)
    assert json.loads(given.out)["tokens"][-3:] == [" <think>", " let", " me"]
    unopened = (*command, "--no_base", "--json", "--prefill", "none")
    assert json.loads(fastadapt(*unopened).out)["prompt_length"] == traced["prompt_length"] - 1
    plain = fastadapt("trace", run, "tom has", "--plain", "--max_new_tokens", 0, "--json", *CPU)
    assert json.loads(plain.out)["tokens"][-2:] == [" tom", " has"]


def test_responses_are_generated_with_and_without_features(
    run: Path, fastadapt: Callable[..., Any]
) -> None:
    command = ("generate", run, PROMPT, "--max_new_tokens", 12, *CPU)
    outcome = fastadapt(*command, "--models", "adapter", "target", "--json")
    assert outcome.code == 0, outcome.err
    adapter, target = json.loads(outcome.out)
    assert (adapter["model"], target["model"]) == ("adapter", "target")
    alone = fastadapt(*command)
    assert alone.out == adapter["text"] + "\n"
    assert ("ended after 12 tokens" in alone.err) == (adapter["finish"] == "length")
    assert fastadapt("features", "select", run, "few", "--features", "0/5", "0/9").code == 0
    changed = [
        fastadapt(*command, "--json", *how).out
        for how in (
            ("--without", "few"),
            ("--without", "0/5", "0/9"),
            ("--scale", "0/5=0", "0/9=0"),
            ("--scale", "few=0"),
        )
    ]
    assert len(set(changed)) == 1
    stronger = fastadapt(*command, "--json", "--scale", "few=-40")
    assert json.loads(stronger.out)[0]["tokens"] != adapter["tokens"]


@pytest.mark.slow
def test_a_run_gets_its_page(run: Path, fastadapt: Callable[..., Any]) -> None:
    outcome = fastadapt(
        *("changes", run, "--texts", 2, "--features", 3, "--positions", 2, "--prompts", 1),
        *("--max_new_tokens", 8, *CPU),
    )
    assert outcome.code == 0, outcome.err
    changes = json.loads((run / "changes.json").read_text())
    page = (run / "changes.html").read_text()
    assert str(run / "changes.html") in outcome.out
    assert len(changes["layers"]) == 4
    assert sum(layer["share"] for layer in changes["layers"]) == pytest.approx(1)
    rises = [unit["delta_kl"] for unit in changes["features"]]
    assert rises == sorted(rises, reverse=True)
    assert len(rises) == 3
    assert len(changes["disagreements"]) == 2
    for each in changes["disagreements"]:
        assert each["kl"]["hybrid"] > changes["kl"]["hybrid"]
        assert each["token"] in page
    (response,) = changes["responses"]
    assert list(response["models"]) == ["base", "hybrid", "adapter", "target"]
    target = response["models"]["target"]
    assert target["differs"] == ""
    assert target["agreeing_tokens"] == target["tokens"]
    # An overwritten run has no page of its former adapter.
    config = run / "config.yaml"
    again = fastadapt(
        "train", config, "--run.output", run, "--overwrite", "--optimizer.max_steps", 1
    )
    assert again.code == 0, again.err
    assert not (run / "changes.html").exists()


REFUSED = {
    "no features": (("changes", "{bare}"), "has no features yet"),
    "no run": (("trace", "{run}/nothing", "hi"), "expected a run"),
    "an empty prompt": (("trace", "{run}", " "), "prompt: expected a text, got none"),
    "a long prompt": (("generate", "{run}", "tom " * 600), "context of"),
    "a model that is none": (
        ("generate", "{run}", "hi", "--models", "student"),
        "--models: expected any of base, hybrid, adapter, target, got 'student'",
    ),
    "a factor that is none": (
        ("generate", "{run}", "hi", "--scale", "2/3"),
        "--scale: expected FEATURE=FACTOR, a finite factor, such as 2/17=0, got '2/3'",
    ),
    "a set that is none": (("generate", "{run}", "hi", "--without", "few"), "no set 'few'"),
    "a feature that is none": (
        ("generate", "{run}", "hi", "--without", "2/16", *CPU),
        "layers 0 to 3 and features 0 to 15, got feature 16 of layer 2",
    ),
    "a feature that is scaled twice": (
        ("generate", "{run}", "hi", "--without", "2/3", "--scale", "2/3=2"),
        "feature 2/3 is scaled twice",
    ),
    "features of no model": (
        ("generate", "{run}", "hi", "--without", "2/3", "--models", "base"),
        "expected it among --models, got base",
    ),
    "an opening without a conversation": (
        ("generate", "{run}", "hi", "--plain", "--prefill", "thinking"),
        "leave out --plain",
    ),
    "no tokens": (("generate", "{run}", "hi", "--max_new_tokens", "0"), "max_new_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_said(
    case: str,
    run: Path,
    fastadapt: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the length of a prompt needs the models, which take minutes to load."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the models are loaded")

    if case != "a long prompt":
        monkeypatch.setattr("fastadapt.models.pair.ModelPair.load", load)
    argv, message = REFUSED[case]
    bare = tmp_path / "bare"
    shutil.copytree(run / "adapter", bare / "adapter")
    shutil.copy(run / "config.yaml", bare)
    outcome = fastadapt(*(text.format(run=run, bare=bare) for text in argv))
    assert outcome.code == 2, outcome.out
    assert message in " ".join(outcome.err.split())
    assert outcome.out == ""
