"""A trace equals plain transformers models assembled by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import F, L, TinyRun, kl_by_hand, models_by_hand, random_adapters, token_name

from fastadapt import UserError, load_run
from fastadapt.adapter.files import save_adapters
from fastadapt.effects.texts import trace_tables
from fastadapt.effects.trace import promotes, trace
from fastadapt.reporting.formatting import number

IDS = [5, 9, 23, 7, 31, 8, 11, 3, 39, 4]


@torch.no_grad()
def test_divergences_and_features_are_those_of_plain_models(
    tiny_run: TinyRun, float64_clean: None
) -> None:
    traced = trace(load_run(tiny_run.folder, dtype="float64", device="cpu"), IDS, 4)
    models = models_by_hand(tiny_run, random_adapters())
    logits = {name: model(torch.tensor([IDS])).logits[0] for name, model in models.items()}
    for name in ("base", "hybrid", "adapter"):
        kl = kl_by_hand(logits["target"], logits[name])
        assert (torch.tensor(traced.kl[name], dtype=torch.float64) - kl).abs().max() < 1e-10
        assert kl.min() > 1e-3  # models that agree would show nothing
    for name in models:
        shares, tokens = logits[name].softmax(-1).max(-1)
        assert [text for text, _ in traced.predicted[name]] == list(
            map(token_name, tokens.tolist())
        )
        expected = torch.tensor([share for _, share in traced.predicted[name]])
        torch.testing.assert_close(expected, shares.float(), rtol=1e-6, atol=0)
    fires = {(t, f.layer, f.feature): f for t, here in enumerate(traced.fires) for f in here}
    block: Any
    for layer, block in enumerate(models["adapter"].model.layers):
        dense = block.mlp.activations(block.mlp.seen[0])[0]
        norms = block.mlp.weights[2].norm(dim=1)
        assert {key[::2] for key in fires if key[1] == layer} == {
            tuple(place) for place in dense.nonzero().tolist()
        }
        for (token, _, feature), firing in fires.items():
            if firing.layer == layer:
                assert firing.value == pytest.approx(dense[token, feature].item(), rel=1e-9)
                size = (dense[token, feature] * norms[feature]).item()
                assert firing.contribution == pytest.approx(size, rel=1e-6)
    for here in traced.fires:
        sizes = [firing.contribution for firing in here]
        assert sizes == sorted(sizes, reverse=True)
    totals = traced.totals()
    assert len(totals) == len({firing.pair for here in traced.fires for firing in here})
    assert sum(f.value for f in totals) == pytest.approx(sum(f.value for f in fires.values()))


def test_the_base_is_left_out_on_request(tiny_run: TinyRun) -> None:
    run = load_run(tiny_run.folder, device="cpu")
    whole, part = trace(run, IDS), trace(run, IDS, base=False)
    assert list(part.kl) == ["hybrid", "adapter"]
    assert part == replace(
        whole,
        kl={name: whole.kl[name] for name in part.kl},
        predicted={name: whole.predicted[name] for name in part.predicted},
    )


@torch.no_grad()
@pytest.mark.parametrize(("target", "base"), [(48, 40), (40, 48)])
def test_a_base_with_other_tokens_is_compared_over_the_common_ones(
    target: int, base: int, save_model: Callable[..., str], tmp_path: Path
) -> None:
    names = {
        "target": save_model("target", 0, vocab_size=target),
        "base": save_model("base", 1, vocab_size=base),
    }
    save_adapters(random_adapters(), tmp_path / "run" / "adapter", names)
    run = load_run(tmp_path / "run", dtype="float64", device="cpu")
    traced = trace(run, IDS)
    models = models_by_hand(TinyRun(tmp_path / "run", **names), random_adapters())
    logits = {name: model(torch.tensor([IDS])).logits[0] for name, model in models.items()}
    kl = kl_by_hand(logits["target"][:, :40], logits["base"][:, :40])
    torch.testing.assert_close(
        torch.tensor(traced.kl["base"], dtype=kl.dtype), kl, rtol=1e-6, atol=0
    )
    assert "over the 40 tokens that both have" in traced.notes["base"]
    assert not trace(run, IDS, base=False).notes
    if target > base:
        added = trace(run, [*IDS, 45])
        assert list(added.kl) == ["hybrid", "adapter"]
        assert "token 45 ('w45'), and the base's embedding has 40 rows" in added.notes["base"]


@torch.no_grad()
def test_promoted_tokens_are_those_of_the_largest_logits(tiny_run: TinyRun) -> None:
    run = load_run(tiny_run.folder, device="cpu")
    pairs = [(layer, i) for layer in range(L) for i in range(0, F, 5)]
    texts = promotes(run, pairs, n=3)
    adapter: Any
    for layer, feature in pairs:
        adapter = run.model.adapters[layer]
        top = (run.model.head @ adapter.W_dec[feature]).topk(3).indices.tolist()
        assert texts[layer, feature] == list(map(token_name, top))


def test_texts_that_cannot_be_read_are_refused(tiny_run: TinyRun) -> None:
    run = load_run(tiny_run.folder, device="cpu")
    for ids, message in (
        ([], "at least one token, got none"),
        ([5] * 65, "at most 64 tokens, the model's context, got 65"),
        ([5, 40], "tokens below 40"),
    ):
        with pytest.raises(UserError, match=message):
            trace(run, ids)


def test_means_are_over_the_predicted_tokens_of_prompt_and_response(tiny_run: TinyRun) -> None:
    """The first token of the response is predicted by the last of the prompt, as in `eval`."""
    run = load_run(tiny_run.folder, dtype="float64", device="cpu")
    traced = trace(run, IDS, 4)
    head, rows = trace_tables(run, traced, top=2)[1]
    assert head[:2] == ["mean", "predicted tokens"]
    assert [row[:2] for row in rows] == [["prompt", "3"], ["response", "6"]]
    for column, kl in enumerate(traced.kl.values(), start=2):
        assert rows[0][column] == number(sum(kl[:3]) / 3)
        assert rows[1][column] == number(sum(kl[3:-1]) / 6)
