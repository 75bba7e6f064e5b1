"""The objective equals a naive float64 implementation of its formulas.

The naive implementation shares no code with the library. It copies the target, replaces its MLPs by
plain modules, and runs Hugging Face's forward for the output, for the hidden states and for each
bridge, one sequence at a time.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.adapter import coder
from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.kernels.transcoder import plan_for
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.recompute import POLICIES
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.traversal import Stream, side_by_side
from fastadapt.objective import ObjectiveConfig, draw_cutoff, objective

LAYERS, WIDTH, FEATURES, VOCABULARY = 3, 16, 24, 40
ACTIVATIONS = {
    "relu": AdapterConfig(FEATURES, "relu"),
    "topk": AdapterConfig(FEATURES, "topk", k=3),
    "batch_topk": AdapterConfig(FEATURES, "batch_topk", k=2.5),
    "jumprelu": AdapterConfig(FEATURES, "jumprelu", bandwidth=0.4, initial_threshold=0.15),
}


class NaiveMLP(nn.Module):
    """``MLP_base(x) + A(x)``, dense, by the formulas; stores penalty and L0 of its last call."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(self, base: nn.Module, adapter: Any, tanh_scale: float | None = None) -> None:
        super().__init__()
        self.base, self.config, self.tanh_scale = base, adapter.config, tanh_scale
        for name, p in adapter.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().clone()))

    def activate(self, z: Tensor) -> Tensor:  # z [T, F]: one sequence
        c = self.config
        if c.activation == "jumprelu":
            hard = z * (z > self.threshold)
            window = (z - self.threshold).abs() < c.bandwidth / 2
            slope = -(self.threshold.detach() / c.bandwidth) * window
            return hard + slope.detach() * (self.threshold - self.threshold.detach())
        a = z.clamp(min=0)
        if c.activation == "relu":
            return a
        rows, k = (a, int(c.k)) if c.activation == "topk" else (a.flatten()[None], c.k * len(a))
        is_largest = torch.zeros_like(rows, dtype=torch.bool)
        is_largest.scatter_(1, rows.topk(int(k), dim=1).indices, True)
        return (rows * is_largest).view_as(a)

    def forward(self, x: Tensor) -> Tensor:
        a = self.activate(x[0] @ self.W_enc.T + self.b_enc)
        costs = a * self.W_dec.norm(dim=1)
        if self.tanh_scale is not None:
            costs = (self.tanh_scale * costs).tanh()
        self.penalty = costs.sum() / len(a)
        self.active = (a > 0).sum().double() / len(a)
        return self.base(x) + (a @ self.W_dec + self.b_dec)[None]


def naive(
    target: Any,
    adapted: list[NaiveMLP],
    batch: Batch,
    cutoff: int,
    weights: ObjectiveConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return loss terms and gradients, computed one sequence and one model forward at a time."""
    originals = [layer.mlp for layer in target.model.layers]
    hidden: list[Tensor] = []

    def run(mlps: list[nn.Module], ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden.clear()
        handles = [
            layer.register_forward_hook(lambda _m, _i, out: hidden.append(out))
            for layer in target.model.layers
        ]
        for layer, mlp in zip(target.model.layers, mlps, strict=True):
            layer.mlp = mlp
        logits = target(input_ids=ids).logits[0]
        for handle in handles:
            handle.remove()
        return logits, list(hidden)

    def kl(clean: Tensor, logits: Tensor, counted: Tensor) -> Tensor:
        p, q = clean.log_softmax(-1), logits.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)[counted].mean()

    k = cutoff
    total: dict[str, Any] = {}
    predicted_rows = sum(bool((row[1:] != -100).any()) for row in batch.labels)
    for b, n in enumerate(batch.real.sum(1).tolist()):
        ids, labels = batch.input_ids[b : b + 1, :n], batch.labels[b, :n]
        counted = torch.cat([labels[1:] != -100, torch.tensor([False])])
        clean, h = run(originals, ids)
        logits, h_rep = run(list(adapted), ids)
        terms = {
            "nmse": sum(
                (a - t).pow(2).mean() / (t.pow(2).mean() + 1e-8)
                for a, t in zip(h_rep, h, strict=True)
            )
            / (LAYERS + 1),
            "nmse_token": sum(
                ((a - t).pow(2).mean(-1) / (t.pow(2).mean(-1) + 1e-8)).mean()
                for a, t in zip(h_rep, h, strict=True)
            )
            / (LAYERS + 1),
            "sparsity": weights.sparsity * sum(m.penalty for m in adapted),
            "l0": sum(m.active for m in adapted) / LAYERS * n,
        }
        scale = dict.fromkeys(("nmse", "nmse_token", "sparsity"), len(batch.labels))
        scale["l0"] = int(batch.real.sum())
        if counted.any():
            terms["kl"] = kl(clean, logits, counted)
            terms["top1_error"] = (logits.argmax(-1) != clean.argmax(-1))[counted].double().mean()
            if k > 0:
                mixed, _ = run([*adapted[:k], *originals[k:]], ids)
                terms["bridge_adapter_to_target"] = kl(clean, mixed, counted)
            if k < LAYERS:
                mixed, _ = run([*originals[:k], *adapted[k:]], ids)
                terms["bridge_target_to_adapter"] = kl(clean, mixed, counted)
        for name, value in terms.items():
            total[name] = total.get(name, 0) + value / scale.get(name, predicted_rows)
    for layer, mlp in zip(target.model.layers, originals, strict=True):
        layer.mlp = mlp
    total["loss"] = total["kl"] + weights.nmse * total["nmse"] + total["sparsity"]
    for name in ("bridge_adapter_to_target", "bridge_target_to_adapter"):
        total["loss"] = total["loss"] + weights.bridge * total.get(name, 0)
    parameters = {
        f"{i}.{name}": p
        for i, mlp in enumerate(adapted)
        for name, p in mlp.named_parameters()
        if not name.startswith("base.")
    }
    grads = torch.autograd.grad(total["loss"], list(parameters.values()), allow_unused=True)
    return {k: torch.as_tensor(v).detach() for k, v in total.items()}, {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def ragged_batch(seed: int = 0) -> Batch:
    """Return sequences of 9, 6 and 1 tokens with masked labels; the last predicts nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    real = torch.arange(9) < torch.tensor([[9], [6], [1]])
    labels = torch.where(real, ids, -100)
    labels[0, 1:4] = -100
    labels[1, 5] = -100
    return Batch(ids, real, labels)


def check(
    replacement: ReplacementModel,
    reference_target: Any,
    cutoff: int,
    config: ObjectiveConfig,
    batch: Batch,
    tolerance: float,
    naive_config: ObjectiveConfig | None = None,
) -> None:
    """Compare losses and gradients with a naive implementation's, by default of equal settings."""
    weights = naive_config or config
    adapted = [
        NaiveMLP(base, adapter, weights.penalty_scale)
        for base, adapter in zip(replacement.pair.base_mlps, replacement.adapters, strict=True)
    ]
    want, want_grads = naive(reference_target, adapted, batch, cutoff, weights)
    replacement.zero_grad()
    got = objective(replacement, batch, cutoff, config)
    got.loss.backward()
    assert set(got.metrics) == set(want)
    for name, value in want.items():
        error = abs(got.metrics[name] - value) / max(abs(value.item()), 1e-12)
        assert error < tolerance, f"{name} at cutoff {cutoff}: relative error {error:.1e}"
    for i, adapter in enumerate(replacement.adapters):
        for name, p in adapter.named_parameters():
            expected = want_grads[f"{i}.{name}"]
            assert p.grad is not None, f"{i}.{name} has no gradient"
            error = (p.grad - expected).norm() / expected.norm()
            assert expected.norm() > 0, f"{i}.{name}: the test's own gradient is zero"
            assert error < tolerance, f"{i}.{name} at cutoff {cutoff}: relative error {error:.1e}"


# Each architecture with one activation, and each activation with two architectures.
CASES = [(architecture, "relu") for architecture in ARCHITECTURES]
CASES += [(a, activation) for a in ("qwen2", "gemma2") for activation in list(ACTIVATIONS)[1:]]


@pytest.mark.parametrize(("architecture", "activation"), CASES)
def test_every_loss_and_gradient_equals_the_naive_ones(
    architecture: str, activation: str, make_pair: Callable[..., Any], float64_clean: None
) -> None:
    pair = make_pair(architecture, dtype="float64")
    target = copy.deepcopy(pair.target)
    replacement = make_replacement(pair, ACTIVATIONS[activation])
    config = ObjectiveConfig(sparsity=0.03, nmse=0.7, bridge=1.3, kl_chunk_tokens=5)
    for cutoff in range(LAYERS + 1):
        check(replacement, target, cutoff, config, ragged_batch(cutoff), 1e-10)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_tanh_penalty_equals_the_naive_one(
    activation: str, scale: float | None, make_pair: Callable[..., Any], float64_clean: None
) -> None:
    pair = make_pair("qwen2", dtype="float64")
    target = copy.deepcopy(pair.target)
    replacement = make_replacement(pair, ACTIVATIONS[activation])
    config = ObjectiveConfig(sparsity=0.03, penalty="tanh", penalty_scale=scale)
    assert config.penalty_scale == (4.0 if scale is None else scale)
    for cutoff in (0, 2):
        check(replacement, target, cutoff, config, ragged_batch(cutoff), 1e-10)
    other = replace(config, penalty="l1", penalty_scale=None)
    with pytest.raises(AssertionError, match="sparsity at cutoff 0: relative error"):
        check(replacement, target, 0, config, ragged_batch(0), 1e-10, naive_config=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": "l0"}, r"objective\.penalty must be one of l1, tanh, got 'l0'"),
        ({"penalty": "tanh", "sparsity": 0.0}, r"tanh has no weight with objective\.sparsity 0"),
        (
            {"penalty_scale": 4.0},
            r"objective\.penalty_scale is not used with penalty='l1', got 4\.0; omit",
        ),
        (
            {"penalty": "tanh", "penalty_scale": 0.0},
            r"objective\.penalty_scale must be a positive, finite number, got 0\.0",
        ),
    ],
)
def test_penalties_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**settings)


def without_mask(batch: Batch, width: int) -> Batch:
    """Return the batch padded to ``width``, as on a GPU: no model gets its mask."""
    more = width - batch.input_ids.shape[1]

    def widened(x: Tensor, value: int) -> Tensor:
        return nn.functional.pad(x, (0, more), value=value)

    ids, labels = widened(batch.input_ids, 2), widened(batch.labels, -100)
    return Batch(ids, widened(batch.real, False), labels, passes_mask=False)


@pytest.mark.parametrize(("architecture", "activation"), CASES)
def test_padding_without_a_mask_changes_no_loss_and_no_gradient(
    architecture: str, activation: str, make_pair: Callable[..., Any], float64_clean: None
) -> None:
    """Also in windows of attention that hold padding only, and for one sequence."""
    pair = make_pair(architecture, dtype="float64")
    target = copy.deepcopy(pair.target)
    replacement = make_replacement(pair, ACTIVATIONS[activation])
    config = ObjectiveConfig(sparsity=0.03, nmse=0.7, bridge=1.3, kl_chunk_tokens=5)
    batch = without_mask(ragged_batch(), 16)
    check(replacement, target, 1, config, batch, 1e-10)
    alone = Batch(batch.input_ids[:1], batch.real[:1], batch.labels[:1], passes_mask=False)
    check(replacement, target, 2, config, alone, 1e-10)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_of_padding_without_a_mask_are_finite(
    architecture: str, make_pair: Callable[..., Any]
) -> None:
    replacement = make_replacement(make_pair(architecture), ACTIVATIONS["relu"])
    batch, n = without_mask(ragged_batch(), 32), 0
    for passed in side_by_side(replacement, batch, [Stream("hybrid"), Stream("replacement")]):
        n += all(h.isfinite().all() for h in (passed.target, *passed.students))
    assert n == LAYERS


def test_the_model_gets_no_mask_of_padding(make_pair: Callable[..., Any]) -> None:
    """On a CPU a batch passes its mask, and its bits are those of before."""
    replacement: Any = make_replacement(make_pair("qwen2"), ACTIVATIONS["relu"])
    masks: list[Any] = []
    replacement.blocks[0].register_forward_pre_hook(
        lambda _m, _a, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    objective(replacement, without_mask(ragged_batch(), 16), 1, ObjectiveConfig())
    assert masks == [None, None]
    masks.clear()
    objective(replacement, ragged_batch(), 1, ObjectiveConfig())
    assert [mask.shape for mask in masks] == [(3, 1, 9, 9)] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_patches_both_implementations_agree_to_single_precision(
    activation: str, make_pair: Callable[..., Any]
) -> None:
    pair = make_pair("qwen2", dtype="float64")
    target = copy.deepcopy(pair.target)
    replacement = make_replacement(pair, ACTIVATIONS[activation])
    for cutoff in range(LAYERS + 1):
        check(replacement, target, cutoff, ObjectiveConfig(sparsity=0.03), ragged_batch(), 1e-6)


@pytest.mark.parametrize(
    "implementation", [pytest.param("reference", marks=pytest.mark.slow), "sparse"]
)
def test_checkpointing_changes_no_bit(implementation: str, make_pair: Callable[..., Any]) -> None:
    config = AdapterConfig(FEATURES, implementation=implementation)
    replacement: Any = make_replacement(make_pair("qwen2"), config)
    results: list[Any] = []
    for policy in POLICIES:
        replacement.zero_grad()
        out = objective(replacement, ragged_batch(), 1, ObjectiveConfig(checkpoint=policy))
        out.loss.backward()
        grads = [p.grad.clone() for p in replacement.adapters.parameters()]
        results.append((out.metrics, grads))
    for policies in itertools.product(POLICIES, repeat=LAYERS):
        replacement.zero_grad()
        out = objective(replacement, ragged_batch(), 1, ObjectiveConfig(), policies=policies)
        out.loss.backward()
        grads = [p.grad.clone() for p in replacement.adapters.parameters()]
        results.append((out.metrics, grads))
    (m1, g1), *others = results
    for m2, g2 in others:
        assert {k: v.item() for k, v in m1.items()} == {k: v.item() for k, v in m2.items()}
        assert all(torch.equal(a, b) for a, b in zip(g1, g2, strict=True))


@pytest.mark.parametrize("cutoff", range(LAYERS + 1))
@pytest.mark.parametrize("policy", POLICIES)
def test_one_traversal(cutoff: int, policy: str, make_pair: Callable[..., Any]) -> None:
    """Each layer runs one target and one replacement forward, and the bridges after the cutoff."""
    replacement: Any = make_replacement(make_pair("qwen2"), ACTIVATIONS["relu"])
    calls: list[tuple[int, str, int]] = []
    for i, block in enumerate(replacement.blocks):
        block.self_attn.register_forward_hook(
            lambda _m, _a, kwargs, _o, i=i, block=block: calls.append(
                (i, block.mlp.mode, len(kwargs["hidden_states"]))
            ),
            with_kwargs=True,
        )
    batch = ragged_batch()
    out = objective(replacement, batch, cutoff, ObjectiveConfig(checkpoint=policy))
    forward = list(calls)
    n = len(batch.input_ids)
    forks = 0 < cutoff < LAYERS
    for layer in range(LAYERS):
        suffix = forks and layer >= cutoff
        assert sorted(c[1:] for c in forward if c[0] == layer) == sorted(
            [("target", n), ("replacement", 2 * n if suffix else n)] + [("target", n)] * suffix
        )
    calls.clear()
    out.loss.backward()
    # The backward pass recomputes every block with a gradient once, in the same mode.
    again = sorted((i, mode) for i, mode, _ in calls)
    expected = [(layer, "replacement") for layer in range(LAYERS)]
    expected += [(layer, "target") for layer in range(cutoff, LAYERS) if forks]
    assert again == ([] if policy == "none" else sorted(expected))


def test_without_weight_the_bridges_are_not_run(make_pair: Callable[..., Any]) -> None:
    replacement: Any = make_replacement(make_pair("qwen2"), ACTIVATIONS["relu"])
    calls: list[int] = []
    for block in replacement.blocks:
        block.self_attn.register_forward_hook(lambda _m, _a, _o: calls.append(1))
    batch = ragged_batch()
    with torch.no_grad():
        bare = objective(replacement, batch, 1, ObjectiveConfig(bridge=0)).metrics
        assert len(calls) == 2 * LAYERS
        full = objective(replacement, batch, 1, ObjectiveConfig(bridge=1)).metrics
    assert not any(name.startswith("bridge") for name in bare)
    bridges = sum(value for name, value in full.items() if name.startswith("bridge"))
    torch.testing.assert_close(bare["loss"], full["loss"] - bridges)


def test_logits_can_be_rounded_as_in_the_released_code(make_pair: Callable[..., Any]) -> None:
    replacement = make_replacement(make_pair("qwen2"), ACTIVATIONS["relu"])
    exact = objective(replacement, ragged_batch(), 1, ObjectiveConfig()).metrics
    rounded = ObjectiveConfig(logits_dtype="bfloat16")
    coarse = objective(replacement, ragged_batch(), 1, rounded).metrics
    assert 0 < abs(coarse["kl"] - exact["kl"]) < 0.02 * exact["kl"]
    with pytest.raises(UserError, match=r"objective\.logits_dtype must be null or one of float32"):
        ObjectiveConfig(logits_dtype="int8")


@pytest.mark.parametrize("cutoff", range(LAYERS + 1))
def test_parity_with_the_released_precision(cutoff: int, make_pair: Callable[..., Any]) -> None:
    """bfloat16 weights and logits are as close to float64 as the released implementation.

    The released implementation runs separate passes with dense bfloat16 adapters, a softmax in
    bfloat16, and bridge weights of 2. Our softmax is in float32, of the same bfloat16 logits.
    """
    pair = make_pair("qwen2", dtype="bfloat16")
    target = copy.deepcopy(pair.target)
    replacement: Any = make_replacement(pair, ACTIVATIONS["relu"])
    parity = ObjectiveConfig(sparsity=0.03, bridge=2, first_cutoff=0, logits_dtype="bfloat16")
    batch = ragged_batch(cutoff)

    def mlps(dtype: torch.dtype) -> list[NaiveMLP]:
        pairs = zip(pair.base_mlps, replacement.adapters, strict=True)
        return [NaiveMLP(copy.deepcopy(base), adapter).to(dtype) for base, adapter in pairs]

    released, released_grads = naive(target, mlps(torch.bfloat16), batch, cutoff, parity)
    truth, true_grads = naive(target.double(), mlps(torch.float64), batch, cutoff, parity)
    ours = objective(replacement, batch, cutoff, parity)
    ours.loss.backward()
    grads = {n: p.grad for n, p in replacement.adapters.named_parameters()}
    assert {g.dtype for g in grads.values()} == {torch.bfloat16}
    eps = torch.finfo(torch.bfloat16).eps
    for name, value in truth.items():
        budget = 2 * (abs(released[name] - value) + eps * abs(value))
        assert abs(ours.metrics[name] - value) <= budget, name
    for name, value in true_grads.items():
        budget = 2 * ((released_grads[name] - value).norm() + eps * value.norm())
        assert (grads[name] - value).norm() <= budget, name


class Counted(TorchDispatchMode):
    """Count the calls of each op, and the matrix products by their shape ``[m, n]``."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.products: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops[func.name()] += 1
        if func.name() in ("aten::mm", "aten::addmm"):
            self.products[tuple(out.shape)] += 1
        return out


def test_what_the_backward_pass_recomputes(make_pair: Callable[..., Any]) -> None:
    """Dense codes are recomputed, attention under ``full`` only, sparse codes and down never."""
    encode, decode = "fastadapt::encode", "fastadapt::decode"
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    batch = ragged_batch()._replace(attention_mask=None)  # a mask selects another kernel
    tokens = batch.input_ids.numel()
    for policy, rate in itertools.product(POLICIES, (0.2, FEATURES)):
        pair = make_pair("qwen2")
        inner = pair.target.config.intermediate_size
        config = AdapterConfig(FEATURES, "topk", k=1, implementation="sparse")
        replacement = make_replacement(pair, config)
        with Counted() as forward:
            weights = ObjectiveConfig(checkpoint=policy, bridge=0)
            out = objective(replacement, batch, 1, weights, [rate] * LAYERS)
        with Counted() as backward:
            out.loss.backward()
        again = policy != "none"
        assert forward.ops[encode] == forward.ops[decode] == LAYERS
        assert forward.ops[attention] == 2 * LAYERS
        assert backward.ops[decode] == LAYERS * again
        assert backward.ops[encode] == LAYERS * (again and rate == FEATURES)
        assert backward.ops[attention] == LAYERS * (policy == "full")
        # Products [tokens, inner] are the gradient through down and the recomputed gate and up. The
        # first block has none: no gradient passes its MLP. (tests/training/test_work.py has down.)
        gate_and_up = 2 * (policy in ("attention", "full"))
        assert backward.products[tokens, inner] == (LAYERS - 1) * (1 + gate_and_up)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_products_of_the_mlp(architecture: str, make_pair: Callable[..., Any]) -> None:
    """Under ``mlp`` the backward pass repeats fewer products of [tokens, inner] than there are."""
    batch = ragged_batch()
    repeated: dict[str, int] = {}
    for policy in ("none", "mlp", "attention"):
        pair = make_pair(architecture)
        replacement = make_replacement(pair, ACTIVATIONS["relu"])
        weights = ObjectiveConfig(checkpoint=policy)
        out = objective(replacement, batch, 1, weights)
        with Counted() as backward:
            out.loss.backward()
        inner = pair.target.config.intermediate_size
        repeated[policy] = sum(
            n for (_, width), n in backward.products.items() if width in (inner, 2 * inner)
        )
    assert repeated["none"] == repeated["mlp"] < repeated["attention"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_call_has_the_plan_of_its_layer(
    policy: str, make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout is for all tokens of the call with padding; the recompute uses the same."""
    config = AdapterConfig(FEATURES, implementation="sparse")
    replacement = make_replacement(make_pair("qwen2"), config)
    seen: list[Any] = []
    transcoder = coder.transcoder

    def watched(*args: Any, plan: Any, **kwargs: Any) -> Any:
        seen.append(plan)
        return transcoder(*args, plan=plan, **kwargs)

    monkeypatch.setattr(coder, "transcoder", watched)
    rates = [0.2, 0.9, FEATURES]
    weights = ObjectiveConfig(checkpoint=policy)
    out = objective(replacement, ragged_batch(), 1, weights, rates)
    expected: list[Any] = [
        plan_for(rate, n_streams * 3 * 9, FEATURES, torch.float32, "cpu")
        for rate, n_streams in zip(rates, (1, 2, 2), strict=True)
    ]
    assert [call.plan for call in out.calls] == seen == expected
    assert [plan.dense for plan in expected] == [False, False, True]
    assert [call.n_streams for call in out.calls] == [1, 2, 2]
    out.loss.backward()
    assert sorted(seen) == sorted(expected * (1 if policy == "none" else 2))
    assert all(
        call.plan is None for call in objective(replacement, ragged_batch(), 1, weights).calls
    )


def test_plans_change_no_value(make_pair: Callable[..., Any]) -> None:
    replacement: Any = make_replacement(make_pair("qwen2"), AdapterConfig(FEATURES, "topk", k=1))
    results = []
    for rates in (None, [1.0] * LAYERS, [FEATURES] * LAYERS):
        replacement.zero_grad()
        out = objective(replacement, ragged_batch(), 1, ObjectiveConfig(sparsity=0.03), rates)
        out.loss.backward()
        results.append(
            [out.loss.detach(), *(p.grad.clone() for p in replacement.adapters.parameters())]
        )
    assert all(int(call.stats.n_codes) > 0 for call in out.calls)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)


def test_a_batch_is_the_mean_of_its_sequences(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("qwen2", dtype="float64")
    replacement = make_replacement(pair, ACTIVATIONS["batch_topk"])
    batch = ragged_batch()
    whole = objective(replacement, batch, 1, ObjectiveConfig()).metrics
    parts = []
    for b, n in enumerate([9, 6]):
        one = Batch(batch.input_ids[b : b + 1, :n], None, batch.labels[b : b + 1, :n])
        parts.append(objective(replacement, one, 1, ObjectiveConfig()).metrics)
    for name in ("kl", "bridge_adapter_to_target", "bridge_target_to_adapter", "top1_error"):
        mean = sum(p[name] for p in parts) / 2  # the third sequence predicts nothing
        assert math.isclose(whole[name], mean, rel_tol=1e-7), name


def test_new_adapters_leave_the_hybrid_unchanged(make_pair: Callable[..., Any]) -> None:
    """A new replacement equals the hybrid, and the bridges already have gradients."""
    pair = make_pair("qwen2")
    replacement = ReplacementModel.create(pair, AdapterConfig(FEATURES))
    batch = ragged_batch()
    with torch.no_grad(), replacement.mode("hybrid"):
        hybrid = replacement(batch.input_ids[:1]).logits
    with torch.no_grad(), replacement.mode("replacement"):
        ours = replacement(batch.input_ids[:1]).logits
    assert torch.equal(hybrid, ours)
    out = objective(replacement, batch, 2, ObjectiveConfig())
    out.loss.backward()
    assert out.metrics["sparsity"] == 0
    assert 0.3 * FEATURES < out.metrics["l0"] < 0.7 * FEATURES
    adapter: Any
    for adapter in replacement.adapters:
        assert adapter.W_dec.grad.norm() > 0
        assert torch.isfinite(adapter.W_enc.grad).all()


def test_cutoffs_are_uniform_and_reproducible() -> None:
    for first in (0, 1):
        config = ObjectiveConfig(first_cutoff=first)
        draws = [draw_cutoff(4, config, seed=42, step=s) for s in range(2000)]
        assert draws == [draw_cutoff(4, config, seed=42, step=s) for s in range(2000)]
        assert set(draws) == set(range(first, 5))
        expected = 2000 / (5 - first)
        assert all(abs(draws.count(k) - expected) < 5 * expected**0.5 for k in set(draws))
    assert draws != [draw_cutoff(4, config, seed=43, step=s) for s in range(2000)]


def test_a_cutoff_outside_the_model_is_refused(make_pair: Callable[..., Any]) -> None:
    replacement = make_replacement(make_pair("qwen2"), ACTIVATIONS["relu"])
    with pytest.raises(ValueError, match=r"cutoff must lie in 0\.\.3, got 4"):
        objective(replacement, ragged_batch(), 4, ObjectiveConfig())


def test_policies_of_another_number_of_layers_are_refused(make_pair: Callable[..., Any]) -> None:
    replacement = make_replacement(make_pair("qwen2"), ACTIVATIONS["relu"])
    with pytest.raises(ValueError, match="expected 3 policies, one per layer, got 2"):
        objective(replacement, ragged_batch(), 1, ObjectiveConfig(), policies=["none", "full"])


def make_replacement(pair: Any, config: AdapterConfig) -> ReplacementModel:
    """Return a replacement model with random adapters, so that no gradient is zero."""
    replacement = ReplacementModel.create(pair, config, seed=7)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        adapter: Any
        for adapter in replacement.adapters:
            for name in ("b_enc", "W_dec", "b_dec"):
                p = getattr(adapter, name)
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(0.15 * noise)
            if config.activation == "jumprelu":
                noise = torch.rand(FEATURES, generator=generator, dtype=torch.float64)
                adapter.threshold.copy_(0.05 + 0.2 * noise)
    replacement.adapters.train()
    return replacement
