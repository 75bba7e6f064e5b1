"""Saved interventions can be evaluated, exported, served and changed again like any run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft_folders import peft_saver
from transformers import AutoModelForCausalLM

from fastadapt import serving
from fastadapt.adapter.files import adapter_digest, save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.cli.export import convert
from fastadapt.errors import ModelsChangedWarning, RunError, UserError
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.features.store.sets import FeatureSet, read_set
from fastadapt.interventions import Intervention, ablate, only, onto_target, scale_features
from fastadapt.interventions.files import intervene
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel
from fastadapt.models.sources.fingerprint import fingerprint
from fastadapt.models.trained_files import load_adapters

F = 24
IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ABLATE, ONLY, ONTO = (Intervention(kind) for kind in ("ablate", "only", "onto-target"))
ACTIVATIONS = {
    "relu": AdapterConfig(F),
    "topk": AdapterConfig(F, "topk", k=4),
    "batch_topk": AdapterConfig(F, "batch_topk", k=4.5),
    "jumprelu": AdapterConfig(F, "jumprelu", bandwidth=0.4, initial_threshold=0.15),
}


@pytest.fixture
def make_run(tmp_path: Path, save_model: Callable[..., str]) -> Callable[..., Path]:
    """``make_run(activation)``: write a run of a tiny pair with random adapters."""

    def make(
        activation: str = "relu",
        config: AdapterConfig | None = None,
        names: dict[str, Any] | None = None,
    ) -> Path:
        if names is None:
            names = {role: save_model(role, i) for i, role in enumerate(("target", "base"))}
        pair = ModelPair.load(PairConfig(**names, device="cpu"))
        model = ReplacementModel.create(pair, config or ACTIVATIONS[activation])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.adapters.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
            adapter: Any
            for adapter in model.adapters:
                if activation == "jumprelu":
                    adapter.threshold.abs_()
                if activation == "batch_topk":
                    adapter.update_threshold(torch.tensor(0.3))
        folder = tmp_path / "run"
        folder.mkdir()
        settings = {
            "pair": {**names, "device": "cpu"},
            "data": {"validation": "held-out.jsonl"},
            "optimizer": {"lr": 1e-3},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        metadata = {**names, "family": "r1-distill", "measured": {"l0_mean": 3.0}}
        metadata["weights"] = pair.weights
        save_adapters(model.adapters, folder / "adapter", metadata)
        return folder

    return make


def set_of(run: Path, *pairs: tuple[int, int]) -> FeatureSet:
    pairs = pairs or ((0, 0), (0, 5), *((2, i) for i in range(0, F, 2)))
    adapter = adapter_digest(run / "adapter")
    features = FeatureSet.from_pairs(pairs, adapter=adapter, shape=(3, F), expression="by hand")
    return replace(features, name="mine")


@torch.no_grad()
def logits(run: Path, mode: str = "run") -> torch.Tensor:
    students = ModelSet.open([run], names=["run"])
    with students.generating(mode) as model:
        return model(IDS).logits


def test_it_says_what_was_done_to_what(make_run: Callable, tmp_path: Path) -> None:
    run = make_run()
    features = set_of(run)
    out = intervene(run, tmp_path / "new" / "out", features, ABLATE)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "config.yaml", "set.json"]
    assert not list(out.parent.glob(".tmp-*"))
    card = json.loads((out / "adapter" / "fastadapt.json").read_text())
    before = json.loads((run / "adapter" / "fastadapt.json").read_text())
    (step,) = card["metadata"].pop("interventions")
    assert step == {
        "kind": "ablate",
        "set": {"name": "mine", "made": "by hand", "size": 14},
        "sha256": features.digest(),
        "run": str(run),
        "adapter": features.adapter,
    }
    assert "measured" not in card["metadata"]  # measured with the unchanged adapter
    del before["metadata"]["measured"]
    assert card == before
    assert read_set(out / "set.json") == features
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert sorted(config) == ["data", "pair"]
    assert config["pair"] == yaml.safe_load((run / "config.yaml").read_text())["pair"]
    # An evaluation names the change, and excludes the run from sweeps of trained adapters.
    student = ModelSet.open([out]).compared["out"]
    assert (student.description, student.variant) == ("adapter, ablate mine (14)", "changed")
    # The entry of onto-target has a scale.
    card = load_adapters(intervene(run, tmp_path / "onto", features, ONTO) / "adapter")[1]
    assert card["interventions"][0]["scale"] == -0.5
    assert card["base"] == card["target"]


@pytest.mark.parametrize("kind", [ABLATE, ONTO], ids=["ablate", "onto-target"])
@pytest.mark.parametrize("role", ["target", "base"])
def test_changed_weights_of_a_model_are_named(
    role: str, kind: Intervention, make_run: Callable, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    run = make_run()
    features = set_of(run)
    intervene(run, tmp_path / "before", features, kind)  # here a warning would be an error
    recorded = load_adapters(run / "adapter")[1]["weights"]
    folder = yaml.safe_load((run / "config.yaml").read_text())["pair"][role]
    file = Path(folder) / "model.safetensors"
    scaled = {name: 1.01 * tensor for name, tensor in load_file(file).items()}
    save_file(scaled, file, metadata={"format": "pt"})
    with pytest.warns(ModelsChangedWarning, match="was trained with other models") as warned:
        out = intervene(run, tmp_path / "after", features, kind)
    (message,) = (str(warning.message) for warning in warned)
    assert f"{role} {folder} has weights {fingerprint(folder, None)[:12]}" in message
    assert f"not {recorded[role][:12]}" in message
    assert message.count(" has weights ") == 1
    # The new run keeps the record of the training, so that its readers warn too.
    after = load_adapters(out / "adapter")[1]["weights"]
    trained = recorded["target"] if kind == ONTO else recorded["base"]
    assert after == {"target": recorded["target"], "base": trained}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_is_what_is_made_in_memory(
    activation: str, make_run: Callable, tmp_path: Path
) -> None:
    run = make_run(activation)
    features, whole = set_of(run), load_adapters(run / "adapter")[0]
    for kind, adapters in (
        (ABLATE, ablate(whole, features)),
        (ONLY, only(whole, features)),
        (Intervention("onto-target", 0.7), onto_target(whole, features, 0.7)),
    ):
        out = intervene(run, tmp_path / kind.kind, features, kind)
        saved, expected = load_adapters(out / "adapter")[0].state_dict(), adapters.state_dict()
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_run_onto_the_target_is_the_target(
    activation: str, make_run: Callable, tmp_path: Path
) -> None:
    run = make_run(activation)
    features = set_of(run)
    target = logits(run, "target")
    nothing = intervene(run, tmp_path / "0", features, Intervention("onto-target", 0.0))
    for mode in ("run", "hybrid", "target", "base"):
        assert torch.equal(logits(nothing, mode), target)
    out = intervene(run, tmp_path / "half", features, ONTO)
    assert torch.equal(logits(out, "hybrid"), target)
    students = ModelSet.open([run], names=["run"])
    with students.generating("run"), scale_features(students.model, features, -0.5, onto="target"):
        live = students.model(IDS).logits.detach()
    assert torch.equal(logits(out), live)
    assert not torch.equal(live, target)


def test_the_target_is_in_memory_once(make_run: Callable, tmp_path: Path) -> None:
    run = make_run()
    out = intervene(run, tmp_path / "out", set_of(run), ONTO)
    students = ModelSet.open([out])
    pair = students.model.pair
    assert all(
        mlp.base is mlp.target and mlp.base is base
        for mlp, base in zip(students.model.mlps, pair.base_mlps, strict=True)
    )
    frozen = {id(p) for p in students.model.parameters()}
    adapters = {id(p) for p in students.model.adapters.parameters()}
    plain = AutoModelForCausalLM.from_pretrained(students.config.target)
    assert len(frozen - adapters) == len(list(plain.parameters()))


@pytest.mark.parametrize("kind", [ABLATE, ONLY, ONTO])
def test_it_is_exported_and_served(kind: Intervention, make_run: Callable, tmp_path: Path) -> None:
    run = make_run("jumprelu")
    out = intervene(run, tmp_path / "out", set_of(run), kind)
    convert(str(out), str(tmp_path / "served"))
    served: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert isinstance(served, serving.AdaptedModel)
    generate: Any = served.generate
    students = ModelSet.open([out], names=["run"])
    with torch.no_grad():
        assert torch.equal(served(IDS).logits, logits(out))
        with students.generating("run") as model:
            written = model.generate(IDS, **GREEDY)
        assert torch.equal(generate(IDS, **GREEDY), written)
        # scale_features also works with a served model.
        features = set_of(out, (0, 1), (2, 4))
        with scale_features(served, features, -3.0), scale_features(students.model, features, -3.0):
            assert torch.equal(served(IDS).logits, students.model(IDS).logits)
        assert torch.equal(generate(IDS, **GREEDY), written)
        with (
            pytest.raises(UserError, match="does not hold the target's MLPs"),
            scale_features(served, features, 1.0, onto="target"),
        ):
            pass


def test_what_was_changed_is_changed_again(make_run: Callable, tmp_path: Path) -> None:
    run = make_run()
    a, b = set_of(run, (0, 1), (1, 7)), set_of(run, (1, 8), (2, 0))
    once = intervene(run, tmp_path / "once", a, ABLATE)
    twice = intervene(once, tmp_path / "twice", b, ABLATE)
    at_once = intervene(run, tmp_path / "at-once", a | b, ABLATE)
    assert adapter_digest(twice / "adapter") == adapter_digest(at_once / "adapter")
    history = load_adapters(twice / "adapter")[1]["interventions"]
    assert [step["set"]["size"] for step in history] == [2, 2]
    assert [step["run"] for step in history] == [str(run), str(once)]
    assert history[1]["adapter"] == adapter_digest(once / "adapter")


def test_bare_adapters_have_a_pair_too(make_run: Callable, tmp_path: Path) -> None:
    run = make_run()
    features = set_of(run)
    (run / "adapter").rename(tmp_path / "bare")
    for kind in (ABLATE, ONTO):
        out = intervene(tmp_path / "bare", tmp_path / kind.kind, features, kind)
        students = ModelSet.open([out], device="cpu")
        roles = (students.config.target, students.config.base)
        assert (roles[0] == roles[1]) == (kind is ONTO)


def test_what_cannot_be_done_leaves_nothing(make_run: Callable, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    features = set_of(run)
    other = replace(features, adapter="1" * 64)
    narrow = FeatureSet.from_pairs(
        [(0, 1)], adapter=features.adapter, shape=(3, 9), expression="narrow"
    )
    for wrong, message in (
        (other, "set 'mine' was selected from other adapters than"),
        (replace(features, features=()), "set 'mine' is empty"),
        (narrow, "expected 3 layers of 24 features, those of the adapter, got 3 of 9"),
    ):
        with pytest.raises(UserError, match=message):
            intervene(run, out, wrong, ABLATE)
    with pytest.raises(UserError, match="expected a run or a folder of adapters"):
        intervene(tmp_path / "none", out, features, ABLATE)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        intervene(run, tmp_path / "file" / "out", features, ABLATE)


def test_a_peft_target_is_no_base(
    make_run: Callable, save_model: Callable[..., str], tmp_path: Path
) -> None:
    """The saved run would name the PEFT folder as its base, and could not be loaded."""
    pytest.importorskip("peft")
    target, base, _ = peft_saver(tmp_path, save_model)()
    run = make_run(names={"target": target, "base": base})
    features = set_of(run)
    for source in (run, shutil.copytree(run / "adapter", tmp_path / "bare")):
        with pytest.raises(UserError, match=r"makes the target its own base, and .*peft is a PEFT"):
            intervene(source, tmp_path / "out", features, ONTO)
    assert not (tmp_path / "out").exists()
    out = intervene(run, tmp_path / "out", features, ABLATE)
    assert ModelSet.open([out]).config.base == base


def test_a_target_that_is_not_here_is_not_asked_for(
    make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of a hub id are changed without the hub, as those of a missing folder are."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = make_run()
    card = json.loads((run / "adapter/fastadapt.json").read_text())
    bare = Path(shutil.copytree(run / "adapter", tmp_path / "bare"))
    card["metadata"] |= {"target": "acme/not-here", "base": "acme/base-not-here"}
    (bare / "fastadapt.json").write_text(json.dumps(card))
    assert intervene(bare, tmp_path / "out", set_of(run), ONTO).is_dir()


def test_only_an_intervention_is_replaced(make_run: Callable, tmp_path: Path) -> None:
    run, out = make_run(), tmp_path / "out"
    features = set_of(run)
    out.mkdir()
    intervene(run, out, features, ABLATE)
    digest = adapter_digest(out / "adapter")
    with pytest.raises(UserError, match="already holds an intervention"):
        intervene(run, out, features, ONLY)
    assert adapter_digest(out / "adapter") == digest
    intervene(run, out, features, ONLY, overwrite=True)
    assert adapter_digest(out / "adapter") != digest
    mine = adapter_digest(run / "adapter")
    with pytest.raises(UserError, match="holds a file that no intervention wrote"):
        intervene(run, run, features, ABLATE, overwrite=True)
    assert adapter_digest(run / "adapter") == mine
    with pytest.raises(UserError, match="is the source of the intervention"):
        intervene(out, out, replace(features, adapter=adapter_digest(out / "adapter")), ABLATE,
                  overwrite=True)  # fmt: skip
    (out / "eval").mkdir()
    with pytest.raises(UserError, match=r"no intervention wrote \(eval\)"):
        intervene(run, out, features, ABLATE, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"no intervention wrote \(file\)"):
        intervene(run, tmp_path / "file", features, ABLATE, overwrite=True)


def test_what_has_no_features_is_told(make_run: Callable, tmp_path: Path) -> None:
    run = make_run("norms", "norms")
    with pytest.raises(UserError, match="an intervention needs transcoder adapters"):
        intervene(run, tmp_path / "out", set_of(run), ABLATE)
