"""Held-out measures, compared with plain forwards of the same three models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch, mean_share, token_weights
from fastadapt.data.batches import collate_whole
from fastadapt.errors import UserError
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.held_out import evaluate


def batches() -> list[Batch]:
    ids = torch.randint(3, 40, (3, 8), generator=torch.Generator().manual_seed(0))
    real = torch.arange(8) < torch.tensor([[8], [5], [3]])
    labels = torch.where(real, ids, -100)
    return [
        Batch(ids[:2], real[:2], labels[:2]),
        Batch(ids[2:, :3], None, labels[2:, :3]),
    ]


def adapted(pair: Any, config: AdapterConfig) -> ReplacementModel:
    model = ReplacementModel.create(pair, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        adapter: Any
        for adapter in model.adapters:
            adapter.W_dec.copy_(0.1 * torch.randn(adapter.W_dec.shape, generator=generator))
    return model


def test_measures_equal_plain_forwards(make_pair: Callable[..., Any]) -> None:
    model = adapted(make_pair("qwen2", dtype="float64"), AdapterConfig(24))
    got = evaluate(model, batches(), chunk_tokens=3)
    want: dict[str, list[torch.Tensor]] = {}
    fired = torch.zeros(3, 24)
    n_tokens = 0
    for batch in batches():
        for b, n in enumerate(batch.real.sum(1).tolist()):
            n_tokens += n
            ids = batch.input_ids[b : b + 1, :n]
            outputs = {}
            for mode in ("target", "hybrid", "replacement"):
                hidden: list[torch.Tensor] = []
                inputs: list[torch.Tensor] = []
                hooks = [
                    block.register_forward_hook(lambda _m, _i, out, to=hidden: to.append(out[0]))
                    for block in model.blocks
                ] + [
                    mlp.register_forward_pre_hook(lambda _m, x, to=inputs: to.append(x[0][0]))
                    for mlp in model.mlps
                ]
                with torch.no_grad(), model.mode(mode):
                    logits = model(ids).logits[0, :-1]
                for hook in hooks:
                    hook.remove()
                outputs[mode] = logits, hidden, inputs
            clean, h, _ = outputs["target"]
            for mode, name in (("hybrid", "hybrid"), ("replacement", "adapter")):
                logits, h_hat, _ = outputs[mode]
                p, q = clean.log_softmax(-1), logits.log_softmax(-1)
                want.setdefault(f"kl_{name}", []).append((p.exp() * (p - q)).sum(-1).mean())
                wrong = (clean.argmax(-1) != logits.argmax(-1)).double().mean()
                want.setdefault(f"top1_error_{name}", []).append(wrong)
                ratio = [
                    (a - t).pow(2).sum() / t.pow(2).sum() for a, t in zip(h_hat, h, strict=True)
                ]
                want.setdefault(f"nmse_{name}", []).append(torch.stack([ratio[0] * 0, *ratio]))
            adapter: Any
            for layer, (adapter, x) in enumerate(
                zip(model.adapters, outputs["replacement"][2], strict=True)
            ):
                fired[layer] += (x @ adapter.W_enc.T + adapter.b_enc > 0).sum(0)
    mean = {name: torch.stack(values).mean(0) for name, values in want.items()}
    for name in ("kl_hybrid", "kl_adapter", "top1_error_hybrid", "top1_error_adapter"):
        assert got[name] == pytest.approx(mean[name].item(), rel=1e-6), name
    assert got["nmse_per_layer"] == pytest.approx(mean["nmse_adapter"].tolist(), rel=1e-6)
    assert got["nmse_per_layer_hybrid"] == pytest.approx(mean["nmse_hybrid"].tolist(), rel=1e-6)
    assert got["nmse_mean"] == pytest.approx(mean["nmse_adapter"].mean().item(), rel=1e-6)
    recovered = 1 - mean["kl_adapter"] / mean["kl_hybrid"]
    assert got["kl_recovered_vs_hybrid"] == pytest.approx(recovered.item(), rel=1e-6)
    torch.testing.assert_close(torch.tensor(got["feature_density"]), fired / n_tokens)
    assert got["l0_per_layer"] == pytest.approx((fired / n_tokens).sum(1).tolist())
    assert got["n_dead_per_layer"] == (fired == 0).sum(1).tolist()
    assert (got["tokens"], got["sequences"]) == (16, 3)


def test_fresh_adapters_are_the_hybrid_and_mode_is_restored(make_pair: Callable[..., Any]) -> None:
    config = AdapterConfig(24, "batch_topk", k=1.5)
    model = ReplacementModel.create(make_pair("llama"), config)
    model.adapters.train()
    got = evaluate(model, batches())
    assert got["kl_adapter"] == got["kl_hybrid"] > 0
    assert got["kl_recovered_vs_hybrid"] == 0
    assert got["nmse_per_layer"] == got["nmse_per_layer_hybrid"]
    assert model.adapters.training


def of_lengths(*lengths: int) -> Batch:
    draw = torch.Generator().manual_seed(sum(lengths))
    return collate_whole([torch.randint(3, 40, (n,), generator=draw).tolist() for n in lengths])


LENGTHS = [(8, 5, 3), (4, 24), (12, 7, 31), (50,)]


def test_equal_predictions_have_no_error(make_pair: Callable[..., Any]) -> None:
    """The weights of all predictions sum to 1 up to rounding only, which must not show."""
    pair = make_pair("qwen2")
    for ours, theirs in zip(pair.target_mlps, pair.base_mlps, strict=True):
        theirs.load_state_dict(ours.state_dict())
    model = ReplacementModel.create(pair, AdapterConfig(24))
    several = [of_lengths(*lengths) for lengths in LENGTHS]
    sums = [token_weights(batch).predictions.sum().item() for batch in several]
    assert any(total != 1 for total in sums)  # 1 - the sum of agreeing weights would not be 0
    for batch in several:
        metrics = objective(model, batch, 1, ObjectiveConfig()).metrics
        got = evaluate(model, [batch])
        errors = (metrics["top1_error"].item(), got["top1_error_hybrid"], got["top1_error_adapter"])
        assert errors == (0, 0, 0)
    got = evaluate(model, several)
    assert (got["top1_error_hybrid"], got["top1_error_adapter"]) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_is_an_average_of_counts(dtype: torch.dtype) -> None:
    batch = of_lengths(4, 24, 31)
    hits = batch.input_ids % 3 == 0
    weighted = (token_weights(batch, dtype).predictions * hits).sum()
    torch.testing.assert_close(mean_share(batch, hits, dtype), weighted)
    assert mean_share(batch, torch.zeros_like(hits), dtype) == 0
    assert mean_share(batch, torch.ones_like(hits), dtype) == 1
    none = batch._replace(labels=torch.full_like(batch.labels, -100))
    assert mean_share(none, torch.ones_like(hits), dtype) == 0


def test_nothing_to_evaluate(make_pair: Callable[..., Any]) -> None:
    model = adapted(make_pair("qwen2"), AdapterConfig(24))
    with pytest.raises(UserError, match="no sequence has a token to predict"):
        evaluate(model, [])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_predictions_that_are_not_finite_have_no_top1(
    value: float, make_pair: Callable[..., Any]
) -> None:
    """``argmax`` of NaN is token 0 in both models, which is no agreement."""
    model: Any = adapted(make_pair("qwen2"), AdapterConfig(24))
    with torch.no_grad():
        model.adapters[-1].b_dec[0] = value
    got = evaluate(model, batches())
    assert math.isnan(got["top1_error_adapter"])
    assert not math.isfinite(got["kl_adapter"])
    assert 0 <= got["top1_error_hybrid"] <= 1
    assert math.isfinite(got["kl_hybrid"])
