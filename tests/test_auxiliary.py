"""The auxiliary loss trains dead features, and nothing else, on the residual of one layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.batch import Batch, Packing
from fastadapt.kernels.nmse import nmse
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import Auxiliary, ObjectiveConfig, draw_layer, objective

LAYERS, FEATURES, VOCABULARY = 3, 24, 40
TOPK = AdapterConfig(FEATURES, "topk", k=3)
ADAPTERS = {
    "topk": TOPK,
    "batch_topk": AdapterConfig(FEATURES, "batch_topk", k=2.5),
    "jumprelu": AdapterConfig(FEATURES, "jumprelu", bandwidth=0.4, initial_threshold=0.15),
    "whole MLP": dataclasses.replace(TOPK, base_mlp=False),
    "no bias, reference": dataclasses.replace(TOPK, bias=False, implementation="reference"),
}
DEAD = torch.arange(FEATURES) % 3 == 0
ON = ObjectiveConfig(auxiliary=0.5, auxiliary_k=2)
TRAINED = ("W_enc", "b_enc", "W_dec")


def ragged_batch() -> Batch:
    """Return sequences of 9, 6 and 1 tokens, padded with ids that the model knows."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) < torch.tensor([[9], [6], [1]])
    return Batch(ids, real, torch.where(real, ids, -100))


def replacement(pair: Any, config: AdapterConfig) -> Any:
    """Return a replacement model with random adapters, in which no gradient is zero."""
    model = ReplacementModel.create(pair, config, seed=7)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in model.adapters.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "W_enc" not in name:
                p.copy_((0.15 * noise).abs() if "threshold" in name else 0.15 * noise)
    return model.train()


def mlp_inputs(target: Any, batch: Batch, layer: int) -> list[Tensor]:
    """Return the inputs of an MLP of a plain model, one sequence at a time without padding."""
    seen: list[Tensor] = []
    mlp = target.model.layers[layer].mlp
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for ids, n in zip(batch.input_ids, batch.real.sum(1).tolist(), strict=True):
            target(input_ids=ids[None, :n])
    handle.remove()
    return seen


def naive(target: Any, model: Any, batch: Batch, layer: int, dead: Tensor, k: int) -> Tensor:
    """Return the loss by its formula, from the rows of dead features alone."""
    adapter, mlp = model.adapters[layer], model.mlps[layer]
    rows = dead.nonzero().flatten()
    losses = []
    for x in mlp_inputs(target, batch, layer):
        with torch.no_grad():
            error = mlp.target(x) - adapter.decode(adapter.encode(x))
            if adapter.config.base_mlp:
                error -= mlp.base(x)
        z = x @ adapter.W_enc[rows].T + adapter.b_enc[rows]
        values, places = z.topk(min(k, len(rows)), dim=-1)
        a = torch.zeros_like(z).scatter(-1, places, values.clamp(min=0))
        estimate = a @ adapter.W_dec[rows]
        losses.append((estimate - error).pow(2).mean() / (error.pow(2).mean() + 1e-8))
    return torch.stack(losses).mean()


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.adapters.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


def auxiliary_gradients(
    model: Any, batch: Batch, layer: int, dead: Tensor, policy: str = "full", cutoff: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the term of the objective and its gradients, by a difference of two weights."""
    by_weight = []
    for weight in (1.0, 3.0):
        config = dataclasses.replace(ON, auxiliary=weight, checkpoint=policy)
        out = objective(model, batch, cutoff, config, auxiliary=Auxiliary(layer, dead))
        by_weight.append(gradients(model, out.loss))
    low, high = by_weight
    return out.metrics["auxiliary"], {name: (high[name] - low[name]) / 2 for name in low}


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.usefixtures("float64_clean")
def test_the_term_equals_its_formula(config: AdapterConfig, make_pair: Callable[..., Any]) -> None:
    """Value and gradients, at each layer, with padding and behind, at and before the cutoff."""
    pair, batch = make_pair("qwen2", dtype="float64"), ragged_batch()
    target = copy.deepcopy(pair.target)
    model = replacement(pair, config)
    for layer, policy in enumerate(("none", "mlp", "full")):
        got, grads = auxiliary_gradients(model, batch, layer, DEAD, policy)
        want = naive(target, model, batch, layer, DEAD, 2)
        assert abs(got - want) < 1e-12
        expected = gradients(model, want)
        for name, gradient in grads.items():
            assert (gradient - expected[name]).abs().max() < 1e-11, name
        assert all(expected[f"{layer}.{name}"].abs().max() > 1e-3 for name in TRAINED)


@pytest.mark.usefixtures("float64_clean")
def test_the_gradient_is_that_of_finite_differences(make_pair: Callable[..., Any]) -> None:
    model = replacement(make_pair("qwen2", dtype="float64"), ADAPTERS["jumprelu"])
    with torch.no_grad():
        model.adapters[1].threshold[DEAD] = 100  # else they move the residual, a constant
    batch, dead = ragged_batch(), Auxiliary(1, DEAD)
    _, grads = auxiliary_gradients(model, batch, 1, DEAD)

    def loss() -> float:
        with torch.no_grad():
            return objective(model, batch, 1, ON, auxiliary=dead).metrics["auxiliary"].item()

    generator = torch.Generator().manual_seed(5)
    for name in TRAINED:
        p = getattr(model.adapters[1], name)
        step = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        step[~DEAD] = 0
        with torch.no_grad():
            p += 1e-6 * step
            above = loss()
            p -= 2e-6 * step
            below = loss()
            p += 1e-6 * step
        want = (grads[f"1.{name}"] * step).sum().item()
        assert abs((above - below) / 2e-6 - want) < 1e-6 * abs(want), name


def test_other_weights_get_exactly_the_gradient_that_they_have_without(
    make_pair: Callable[..., Any],
) -> None:
    """Bit for bit, under every policy, and with equal counts; dead features get another one."""
    model, batch = replacement(make_pair("qwen2"), TOPK), ragged_batch()
    for policy in POLICIES:
        off, on = (
            objective(
                model,
                batch,
                1,
                dataclasses.replace(ON, auxiliary=weight, checkpoint=policy),
                auxiliary=Auxiliary(2, DEAD),
            )
            for weight in (0.0, 3.0)
        )
        assert "auxiliary" not in off.metrics
        for a, b in zip(off.calls, on.calls, strict=True):
            assert torch.equal(a.stats.feature_counts, b.stats.feature_counts)
        without, other = gradients(model, off.loss), gradients(model, on.loss)
        for name, gradient in without.items():
            layer, _, part = name.partition(".")
            if layer == "2" and part in TRAINED:
                assert torch.equal(other[name][~DEAD], gradient[~DEAD]), (policy, name)
                assert not torch.equal(other[name][DEAD], gradient[DEAD]), (policy, name)
            else:
                assert torch.equal(other[name], gradient), (policy, name)


def test_without_dead_features_or_an_error_nothing_is_trained(
    make_pair: Callable[..., Any],
) -> None:
    model, batch, none = replacement(make_pair("qwen2"), TOPK), ragged_batch(), DEAD & ~DEAD
    off = gradients(model, objective(model, batch, 1, ObjectiveConfig()).loss)
    out = objective(model, batch, 1, ON, auxiliary=Auxiliary(1, none))
    assert out.metrics["auxiliary"] == 0
    for name, gradient in gradients(model, out.loss).items():
        assert torch.equal(gradient, off[name]), name

    pair = make_pair("qwen2")
    for mlp, layer in zip(pair.base_mlps, pair.target.model.layers, strict=True):
        mlp.load_state_dict(layer.mlp.state_dict())
    same = ReplacementModel.create(pair, TOPK)  # new adapters write nothing
    out = objective(same, batch, 1, ON, auxiliary=Auxiliary(1, DEAD))
    assert out.metrics["auxiliary"] == 0
    assert all(g.isfinite().all() for g in gradients(same, out.loss).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["reference", "sparse"])
@pytest.mark.parametrize("k", [2, 64], ids=["codes", "dense"])
def test_live_rows_have_gradients_of_exactly_0(
    implementation: str, dtype: torch.dtype, k: int
) -> None:
    """For any cotangent, and with NaN-free results where every bias is -inf."""
    torch.manual_seed(0)
    config = AdapterConfig(256, "topk", k=4, implementation=implementation)
    adapter = TranscoderAdapter(16, config, dtype=dtype)
    x, cotangent = torch.randn(2, 40, 16, dtype=dtype), torch.randn(2, 40, 16, dtype=dtype)
    padding = torch.arange(40).expand(2, 40) >= 33
    with torch.no_grad():
        adapter.W_dec.normal_()
    assert adapter._plan_at_most(k, x).dense == (k == 64)
    for dead in (torch.rand(256) < 0.3, torch.zeros(256, dtype=torch.bool)):
        adapter.zero_grad()
        out = adapter.estimate_residual(x, dead, k, padding)
        out.backward(cotangent)
        assert (out[padding] == 0).all()
        assert bool((out != 0).any()) == bool(dead.any())
        for name in TRAINED:
            grad = getattr(adapter, name).grad
            assert (grad[~dead] == 0).all(), name
            assert grad.isfinite().all(), name
            assert bool((grad[dead] != 0).any()) == bool(dead.any()), name
        assert adapter.b_dec.grad is None


def test_planted_dead_features_come_back_and_do_not_without() -> None:
    """Features with encoder rows too small to rank; their residual is features of a teacher."""
    generator = torch.Generator().manual_seed(0)
    config, planted = AdapterConfig(32, "topk", k=2), torch.arange(32) >= 16
    teacher = TranscoderAdapter(16, config, generator=generator)
    x = torch.randn(1, 128, 16, generator=generator)
    with torch.no_grad():
        teacher.W_dec.normal_(generator=generator)
        y, _ = teacher(x)
    start = TranscoderAdapter(16, config, generator=generator)
    with torch.no_grad():
        start.W_enc[planted] *= 0.02

    def trained(weight: float) -> tuple[int, float]:
        """Return how many planted features fire in the end, and the NMSE of the output."""
        adapter = copy.deepcopy(start)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            out, aux = adapter(x)
            estimate = adapter.estimate_residual(x, planted, 4)
            error = nmse(out, y).nmse.sum()
            (error + weight * nmse(estimate, y - out.detach()).nmse.sum()).backward()
            optimizer.step()
        return int(aux.stats.fired[planted].sum()), error.item()

    (none, without), (many, error) = trained(0.0), trained(0.1)
    assert none == 0
    assert many >= 8  # of 16
    assert error < 0.9 * without


def test_dead_features_of_relu_get_no_gradient() -> None:
    """Why a run refuses them: no pre-activation of theirs is positive."""
    adapter = TranscoderAdapter(16, AdapterConfig(FEATURES))
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapter.W_dec.normal_()
        adapter.b_enc[DEAD] = -10
        assert not (adapter.encode(x)[:, DEAD] > 0).any()
    adapter.estimate_residual(x, DEAD, 4).sum().backward()
    assert all((p.grad == 0).all() for p in (adapter.W_enc, adapter.b_enc, adapter.W_dec))


@pytest.mark.usefixtures("float64_clean")
def test_texts_in_one_row_count_as_texts_apart(make_pair: Callable[..., Any]) -> None:
    model, apart = replacement(make_pair("qwen2", dtype="float64"), TOPK), ragged_batch()
    n = apart.real.sum(1).tolist()
    ids = torch.cat([row[:size] for row, size in zip(apart.input_ids, n, strict=True)])[None]
    texts = torch.arange(3).repeat_interleave(torch.tensor(n))[None]
    positions = torch.cat([torch.arange(size) for size in n])[None]
    row = Batch(ids, None, ids, packing=Packing((tuple(n),), texts, positions))
    one, grads = auxiliary_gradients(model, row, 1, DEAD)
    other, expected = auxiliary_gradients(model, apart, 1, DEAD)
    assert abs(one - other) < 1e-12
    for name, gradient in grads.items():
        assert (gradient - expected[name]).abs().max() < 1e-11, name


def test_layers_are_uniform_and_reproducible() -> None:
    draws = [draw_layer(4, seed=42, step=s) for s in range(2000)]
    assert draws == [draw_layer(4, seed=42, step=s) for s in range(2000)]
    assert draws != [draw_layer(4, seed=43, step=s) for s in range(2000)]
    assert all(abs(draws.count(layer) - 500) < 5 * 500**0.5 for layer in range(4))


def test_a_weight_without_a_layer_is_refused(make_pair: Callable[..., Any]) -> None:
    model = replacement(make_pair("qwen2"), TOPK)
    with pytest.raises(ValueError, match=r"auxiliary: expected a layer, since its weight is 0\.5"):
        objective(model, ragged_batch(), 1, ON)
