"""The rise of the KL without a feature equals that of models assembled by hand, in float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from by_hand import F, L, TinyRun, kl_by_hand, models_by_hand, random_adapters

from fastadapt import UserError, load_run
from fastadapt.effects.ablation import AblatedText, EffectsConfig, effects, first_texts
from fastadapt.effects.trace import divergences, logits_of
from fastadapt.features.checking import check_store
from fastadapt.features.store.details import read_details
from fastadapt.features.store.store import Store
from fastadapt.interventions import scale_features

OLD = Path(__file__).parents[1] / "cli" / "old_files" / "finished"
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
        one = text.without(pairs, slice(3, 4))
        torch.testing.assert_close(one, expected[3:4], rtol=0, atol=1e-10)
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
    torch.testing.assert_close(text.without(silent, slice(2, 3)), text.kl[2:3])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(text.without(every), text.kl)
    fired = {
        (layer, int(i))
        for layer, codes in enumerate(model.features(IDS[:2]))
        for i in codes.features
    }
    assert text.pairs == fired


# --- a store -------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A trained run of the embedded pair, with a store."""
    return Path(shutil.copytree(OLD, tmp_path / "run"))


@torch.no_grad()
def test_effects_in_the_store_are_means_over_predicted_tokens(finished: Path) -> None:
    config = EffectsConfig(features=("0/5", "3/11"), texts=2)
    rows = effects(finished, config=config, device="cpu")
    assert rows is not None
    run = load_run(finished, device="cpu")
    assert run.store is not None
    texts = [text.tokens.tolist() for text in first_texts(run.store, 2)]
    n = sum(len(ids) - 1 for ids in texts)
    for row, pair in zip(rows.to_pylist(), [(0, 5), (3, 11)], strict=True):
        assert (row["layer"], row["feature"], row["positions"]) == (*pair, n)
        rise = 0.0
        for ids in texts:
            target, whole = (logits_of(run.models, m, ids)[:-1] for m in ("target", "adapter"))
            with scale_features(run.model, {pair: 0.0}):
                bare = run.model(input_ids=torch.tensor([ids])).logits[0, :-1]
            rise += float((divergences(target, bare) - divergences(target, whole)).sum())
        assert row["delta_kl"] == pytest.approx(rise / n, rel=1e-3, abs=1e-6)
        assert abs(rise) > 0
    assert run.store.read("effects").to_pylist() == rows.to_pylist()
    assert [d.delta_kl for d in read_details(run.store, [(0, 5)])] == [rows["delta_kl"][0].as_py()]


def test_effects_on_the_same_texts_add_up(finished: Path) -> None:
    store = Store.open(finished)

    def measured() -> list[tuple[int, int]]:
        rows = store.read("effects").to_pylist()
        return [(row["layer"], row["feature"]) for row in rows]

    for names, texts, expected in (
        (("3/1", "0/5"), 2, [(0, 5), (3, 1)]),
        (("1/2", "0/5"), 2, [(0, 5), (1, 2), (3, 1)]),
        (("1/2",), 1, [(1, 2)]),  # other texts
    ):
        effects(finished, config=EffectsConfig(features=names, texts=texts), device="cpu")
        assert measured() == expected
    assert all(not file.wrong for file in check_store(store))
    stop = Event()
    stop.set()
    assert effects(finished, config=EffectsConfig(top=1), device="cpu", stop=stop) is None
    assert measured() == [(1, 2)]


def test_effects_that_cannot_be_measured_are_refused(finished: Path) -> None:
    for settings, message in (
        ({"top": 0}, "top: expected 1 or more"),
        ({"features": ("1.2",)}, "LAYER/NUMBER, such as 2/17"),
    ):
        with pytest.raises(UserError, match=message):
            EffectsConfig(**settings)
    with pytest.raises(UserError, match="feature: expected 0 to 15, got 16"):
        effects(finished, config=EffectsConfig(features=("1/16",)), device="cpu")
