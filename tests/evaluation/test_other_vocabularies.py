"""A base whose vocabulary is not the target's: measured where it can be, left out with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import yaml

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.evaluation.benchmarks.run_all import run_models
from fastadapt.evaluation.benchmarks.runner import BenchmarkConfig
from fastadapt.evaluation.benchmarks.scores import summarise_benchmarks
from fastadapt.evaluation.faithfulness.outputs import measure_output
from fastadapt.evaluation.faithfulness.texts import Text
from fastadapt.evaluation.generation.sampling import SamplingConfig
from fastadapt.evaluation.models_under_test import ModelSet
from fastadapt.models.replacement import ModelPair, PairConfig, ReplacementModel


@pytest.fixture
def compared(tmp_path: Path, save_model: Callable[..., str]) -> Callable[..., ModelSet]:
    """Open a run whose target and base have the given numbers of embedding rows."""

    def make(target: int, base: int, words: str = "w", **changes: Any) -> ModelSet:
        pair: dict[str, Any] = {
            "target": save_model("target", 0, vocab_size=target, **changes),
            "base": save_model("base", 1, vocab_size=base, words=words, **changes),
        }
        config = PairConfig(**pair, device="cpu", dtype="float64")
        model = ReplacementModel.create(ModelPair.load(config), AdapterConfig(24))
        folder = tmp_path / "run"
        folder.mkdir()
        settings = {**pair, "device": "cpu", "dtype": "float64"}
        (folder / "config.yaml").write_text(yaml.safe_dump({"pair": settings}))
        save_adapters(model.adapters, folder / "adapter", {**pair, "family": "r1-distill"})
        return ModelSet.open([folder])

    return make


def by_hand(models: ModelSet, texts: Sequence[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the base's KL over the common tokens, and whether it names the target's token."""
    from transformers import AutoModelForCausalLM

    target, base = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
        for name in (models.config.target, models.config.base)
    )
    kl, agrees = [], []
    for text in texts:
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            z, y = (model(ids).logits[0, :-1] for model in (target, base))
        n = min(z.shape[-1], y.shape[-1])
        p, q = z[:, :n].log_softmax(-1), y[:, :n].log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agrees.append(z.argmax(-1) == y.argmax(-1))
    return torch.cat(kl), torch.cat(agrees)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("target", "base"), [(64, 40), (40, 64), (40, 40)])
def test_the_base_is_compared_over_the_tokens_that_both_have(
    target: int,
    base: int,
    tied: bool,
    compared: Callable[..., ModelSet],
    texts: list[Text],
    tmp_path: Path,
) -> None:
    models = compared(target, base, tie_word_embeddings=tied)
    measured = measure_output(models, texts, tmp_path / "out")
    kl, agrees = by_hand(models, texts)
    torch.testing.assert_close(measured["base"].kl, kl.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(measured["base"].agrees, agrees)
    note = models.notes.get("base", "")
    assert ("over the 40 tokens that both have" in note) == (target != base)


@pytest.mark.parametrize("case", ["added token", "other tokenizer"])
def test_a_base_that_cannot_read_the_texts_is_left_out(
    case: str, compared: Callable[..., ModelSet], texts: list[Text], tmp_path: Path
) -> None:
    if case == "added token":
        models = compared(64, 40)
        texts[0].ids[-1] = 45
        reason = r"token 45 ('w45'), and the base's embedding has 40 rows"
    else:
        models = compared(40, 40, words="v")
        reason = "37 token ids have other meanings for the base; id 3 is 'w3' for the target"
    measured = measure_output(models, texts, tmp_path / "out")
    assert set(measured) == {"hybrid", "run"}
    assert "The base is not measured: " in models.notes["base"]
    assert reason in models.notes["base"]
    if case == "added token":
        with models.base() as base, pytest.raises(UserError, match="token 45"):
            base(torch.tensor([texts[0].ids]))


@pytest.mark.quick("added marker")
@pytest.mark.parametrize("case", ["added marker", "other tokenizer"])
def test_a_base_that_cannot_read_prompts_has_no_benchmarks(
    case: str, compared: Callable[..., ModelSet], tmp_path: Path
) -> None:
    """With examples, the base reads plain text without markers, so that it has these modes."""
    added = case == "added marker"
    changes: dict[str, Any] = {} if added else {"words": "v"}
    models = compared(64 if added else 40, 40, architecture="llama", **changes)
    rows = [{"problem": f"w{i} w7", "answer": "3"} for i in range(2)]
    file = tmp_path / "math500.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BenchmarkConfig(
        tasks=("math500",),
        data=str(tmp_path),
        family={"user": ["w45 ", " "], "assistant": ["w46", ""], "thinking": ["", ""]},
        few_shot=1,
        sampling=SamplingConfig(max_new_tokens=2),
    )
    results = run_models(models, config, tmp_path / "out", lambda *_: None, Event())
    modes = {model: list(by_mode) for model, by_mode in results.items()}
    examples = ["1-shot", "1-shot, greedy"]
    assert modes["hybrid"] == ["sampled", *examples]
    assert modes.get("base", []) == (examples if added else [])
    assert list(models.notes) == [
        f"base, {mode}" for mode in modes["hybrid"] if mode not in modes.get("base", [])
    ]
    reason = "token 46 ('w46'), and the base's" if added else "other meanings for the base"
    assert all(reason in note for note in models.notes.values())
    measured = summarise_benchmarks(results)["math500"]
    assert {model: list(by_mode) for model, by_mode in measured.items()} == modes
