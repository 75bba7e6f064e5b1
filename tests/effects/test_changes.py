"""The values of the page 'what changed' equal those of whole forwards of each model."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from run_files import overview

from fastadapt import UserError, load_run
from fastadapt.effects.ablation import first_texts
from fastadapt.effects.changes import ChangesConfig, changes
from fastadapt.effects.generate import MODELS, GenerateConfig, generate
from fastadapt.effects.trace import divergences, logits_of
from fastadapt.features.loading import LoadedRun
from fastadapt.features.store.schema import REGIONS
from fastadapt.interventions import scale_features

OLD = Path(__file__).parents[1] / "cli" / "old_files" / "finished"
CONFIG = ChangesConfig(texts=2, features=3, positions=2, prompts=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = shutil.copytree(OLD, tmp_path_factory.mktemp("changes") / "run")
    return load_run(folder, device="cpu")


@torch.no_grad()
def test_changes_are_those_of_whole_forwards(run: LoadedRun) -> None:
    assert run.store is not None
    values = changes(run, CONFIG)
    assert values is not None
    texts = list(first_texts(run.store, 2))
    kl: dict[str, list[torch.Tensor]] = {"hybrid": [], "adapter": []}
    for text in texts:
        ids = text.tokens.tolist()
        target = logits_of(run.models, "target", ids)[:-1]
        for name, parts in kl.items():
            parts.append(divergences(target, logits_of(run.models, name, ids)[:-1]))
    for name, parts in kl.items():
        assert values["kl"][name] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-4)
    assert values["positions"] == sum(len(part) for part in kl["hybrid"])

    first, second = values["disagreements"]
    assert first["kl"]["hybrid"] == pytest.approx(torch.cat(kl["hybrid"]).max().item(), rel=1e-4)
    kinds = set()
    for each in (first, second):
        text = next(t for t in texts if t.number == each["text"])
        t, ids = each["position"], text.tokens.tolist()
        kinds.add((ids[t], ids[t + 1]))
        assert each["region"] == REGIONS[text.regions[t]]
        target = logits_of(run.models, "target", ids[: t + 1])[-1:]
        for feature in each["features"]:
            with scale_features(run.model, {(feature["layer"], feature["feature"]): 0.0}):
                bare = run.model(input_ids=torch.tensor([ids[: t + 1]])).logits[0, -1:]
            rise = divergences(target, bare).item() - each["kl"]["adapter"]
            assert feature["delta_kl"] == pytest.approx(rise, rel=1e-2, abs=1e-4)
        shares = target[0].double().softmax(-1).topk(3).values.tolist()
        assert [share for _, share in each["likely"]["target"]] == pytest.approx(shares, rel=1e-4)
    assert len(kinds) == 2  # one place of each kind

    (response,) = values["responses"]
    prompt_length = int((texts[0].regions <= REGIONS.index("think start")).sum())  # opened
    prompt = texts[0].tokens[:prompt_length].tolist()
    generated = generate(run, prompt, GenerateConfig(MODELS, max_new_tokens=8))
    target_ids = generated[-1].tokens
    for each in generated:
        said = response["models"][each.model]
        n = said["agreeing_tokens"]
        assert said["tokens"] == len(each.tokens)
        assert each.tokens[:n] == target_ids[:n]
        assert each.tokens[n : n + 1] != target_ids[n : n + 1] or n == len(target_ids)

    shown = overview(values, features=2, positions=1)  # what an agent of the diffing toolkit reads
    strongest = values["features"][:2]
    assert [f["delta_kl"] for f in shown["features"]] == [f["delta_kl"] for f in strongest]
    example = strongest[0]["examples"][0]
    assert f"[[{example['token']}]]" in shown["features"][0]["example"]
    assert shown["disagreements"][0]["token"] == first["token"]


def test_changes_that_cannot_be_measured_are_refused(run: LoadedRun, tmp_path: Path) -> None:
    bare = load_run(shutil.copytree(OLD / "adapter", tmp_path / "bare"), device="cpu")
    with pytest.raises(UserError, match="features collect before fastadapt changes"):
        changes(bare)
    for name in ("texts", "features", "positions", "max_new_tokens"):
        impossible: Any = {name: 0}
        with pytest.raises(UserError, match=f"{name}: expected 1 or more, got 0"):
            ChangesConfig(**impossible)
    stop = Event()
    stop.set()
    assert changes(run, CONFIG, stop=stop) is None
