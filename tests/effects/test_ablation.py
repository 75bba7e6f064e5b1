"""The rise of the KL without a feature equals that of models assembled by hand, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import F, L, TinyRun, kl_by_hand, models_by_hand, random_adapters

from fastadapt import load_run
from fastadapt.effects.ablation import AblatedText

IDS = [5, 9, 23, 7, 31, 8, 11, 3, 39, 4]


@torch.no_grad()
def kl_of(models: dict[str, Any], name: str = "adapter") -> torch.Tensor:
    target, model = (models[n](torch.tensor([IDS])).logits[0] for n in ("target", name))
    return kl_by_hand(target, model)


@torch.no_grad()
def test_the_divergence_without_features_is_that_of_zeroed_rows(
    tiny_run: TinyRun, float64_clean: None
) -> None:
    run = load_run(tiny_run.folder, dtype="float64", device="cpu")
    text = AblatedText(run.model, IDS)
    models = models_by_hand(tiny_run, random_adapters())
    whole = kl_of(models)
    torch.testing.assert_close(text.kl, whole, rtol=0, atol=1e-10)
    hybrid = kl_of(models, "hybrid")
    torch.testing.assert_close(text.hybrid(), hybrid, rtol=0, atol=1e-10)
    requests = [[(layer, i)] for layer in range(L) for i in range(0, F, 3)]
    moved = 0
    for pairs in [*requests, [(0, 1), (2, 2), (2, 5)]]:
        adapters: Any = random_adapters()
        for layer, feature in pairs:
            adapters[layer].W_dec[feature] = 0
        expected = kl_of(models_by_hand(tiny_run, adapters))
        torch.testing.assert_close(text.without(pairs), expected, rtol=0, atol=1e-10)
        moved += bool((expected - whole).abs().max() > 1e-3)
    assert moved > len(requests) / 2  # features without an effect would show nothing
    torch.testing.assert_close(text.kl, whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_divergence_without_a_layer_is_that_of_the_bare_mlp(
    tiny_run: TinyRun, float64_clean: None
) -> None:
    text = AblatedText(load_run(tiny_run.folder, dtype="float64", device="cpu").model, IDS)
    for layer in range(L):
        adapters: Any = random_adapters()
        adapters[layer].W_dec.zero_()
        adapters[layer].b_dec.zero_()
        expected = kl_of(models_by_hand(tiny_run, adapters))
        torch.testing.assert_close(text.without_layer(layer), expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_feature_that_is_silent_changes_nothing(tiny_run: TinyRun) -> None:
    model = load_run(tiny_run.folder, device="cpu").model
    text = AblatedText(model, IDS[:2])
    every = {(layer, i) for layer in range(L) for i in range(F)}
    silent = every - text.pairs
    assert silent
    assert text.without(silent) is text.kl
    with pytest.raises(AssertionError):
        torch.testing.assert_close(text.without(every), text.kl)
    fired = {
        (layer, int(i))
        for layer, codes in enumerate(model.features(IDS[:2]))
        for i in codes.features
    }
    assert text.pairs == fired
