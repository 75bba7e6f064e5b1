"""Generation with scaled features equals generation with changed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import F, L, TinyRun, models_by_hand, random_adapters

from fastadapt import UserError, load_run
from fastadapt.adapter.files import save_adapters
from fastadapt.effects.generate import MODELS, GenerateConfig, generate
from fastadapt.effects.requests import factors_of, prompt_ids
from fastadapt.effects.run import LoadedRun

PROMPT = [31, 8]
SETTINGS = GenerateConfig(max_new_tokens=12)


def greedy(model: Any) -> list[int]:
    """Return a plain model's most likely tokens, one whole forward per token."""
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + 12 and ids[-1] != 1:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def tokens(run: LoadedRun, **request: Any) -> list[int]:
    factors = factors_of(run, **request)
    (response,) = generate(run, PROMPT, SETTINGS, factors)
    return response.tokens


@torch.no_grad()
def test_a_scaled_feature_is_a_scaled_row_of_the_decoder(
    tiny_run: TinyRun, float64_clean: None
) -> None:
    run = load_run(tiny_run.folder, dtype="float64", device="cpu")
    changes = 0
    whole = greedy(models_by_hand(tiny_run, random_adapters())["adapter"])
    assert tokens(run) == whole
    for layer, feature, factor in ((0, 1, 0.0), (1, 3, 0.0), (2, 5, 0.0), (2, 8, -2.0)):
        adapters: Any = random_adapters()
        adapters[layer].W_dec[feature] *= factor
        expected = greedy(models_by_hand(tiny_run, adapters)["adapter"])
        assert tokens(run, scale=[f"{layer}/{feature}={factor}"]) == expected
        if factor == 0:
            assert tokens(run, without=[f"{layer}/{feature}"]) == expected
        changes += expected != whole
    assert changes == 4  # features that change nothing would show nothing
    assert tokens(run) == whole  # the run is as before


def test_every_model_generates_as_by_hand(tiny_run: TinyRun, float64_clean: None) -> None:
    run = load_run(tiny_run.folder, dtype="float64", device="cpu")
    responses = generate(run, PROMPT, GenerateConfig(MODELS, max_new_tokens=12))
    models = models_by_hand(tiny_run, random_adapters())
    with torch.no_grad():
        expected = {name: greedy(models[name]) for name in MODELS}
    assert {each.model: each.tokens for each in responses} == expected
    assert len({tuple(ids) for ids in expected.values()}) == 4


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_without_features_and_bias_the_adapter_is_the_hybrid(
    tiny_run: TinyRun, bias: float
) -> None:
    names = {"target": tiny_run.target, "base": tiny_run.base}
    folder = tiny_run.folder.with_name("other")
    save_adapters(random_adapters(bias), folder / "adapter", names)
    run = load_run(folder, device="cpu")
    every = ",".join(f"{layer}/{i}" for layer in range(L) for i in range(F))
    (hybrid,) = generate(run, PROMPT, GenerateConfig(("hybrid",), max_new_tokens=12))
    assert (tokens(run, without=[every]) == hybrid.tokens) == (bias == 0)
    assert tokens(run) != hybrid.tokens


def test_a_token_that_the_base_lacks_is_refused(
    save_model: Callable[..., str], tmp_path: Path
) -> None:
    names = {
        "target": save_model("target", 0, vocab_size=48),
        "base": save_model("base", 1, vocab_size=40),
    }
    save_adapters(random_adapters(), tmp_path / "run" / "adapter", names)
    run = load_run(tmp_path / "run", device="cpu")
    generate(run, [45], GenerateConfig(("target", "hybrid"), max_new_tokens=1))
    with pytest.raises(UserError, match=r"^base: prompt: expected tokens below 40, .* token 45"):
        generate(run, [45], GenerateConfig(("base",)))


def test_requests_that_make_no_sense_are_refused(tiny_run: TinyRun) -> None:
    run = load_run(tiny_run.folder, device="cpu")
    for request, message in (
        (
            {"scale": ["0/1"]},
            "--scale: expected FEATURE=FACTOR, a finite factor, such as 2/17=0, got '0/1'",
        ),
        ({"scale": ["0/1=x"]}, "got '0/1=x'"),
        ({"scale": ["0/1=nan"]}, "got '0/1=nan'"),
        ({"scale": ["0-1/2=3"]}, "LAYER/NUMBER, such as 2/17, got '0-1/2'"),
        ({"without": ["hesitation"]}, "has no features yet.*features collect"),
        ({"without": ["0/1"], "scale": ["0/1=2"]}, "feature 0/1 is scaled twice"),
    ):
        with pytest.raises(UserError, match=message):
            factors_of(run, **request)
    with pytest.raises(UserError, match="layers 0 to 2 and features 0 to 11, got feature 12"):
        generate(run, PROMPT, SETTINGS, {(0, 12): 0.0})
    with pytest.raises(UserError, match="expected it among --models, got hybrid"):
        generate(run, PROMPT, GenerateConfig(("hybrid",)), {(0, 1): 0.0})
    with pytest.raises(UserError, match="--models: expected any of base, hybrid, adapter, target"):
        GenerateConfig(("replacement",))
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(run, [])
    with pytest.raises(UserError, match=r"no chat format recorded.*--plain"):
        prompt_ids(run.models, "w5 w6")
    with pytest.raises(UserError, match="prompt: expected a text, got none"):
        prompt_ids(run.models, "", plain=True)
