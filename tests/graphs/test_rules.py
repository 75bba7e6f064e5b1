"""The rules change no output, conserve relevance, and give the gradient of the linearized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replay import IDS, randomised

from fastadapt.errors import UserError
from fastadapt.graphs.attribution import Leaves, Target, edges, unit_target
from fastadapt.graphs.linear.rules import carry, linearized
from fastadapt.graphs.linear.trace import record
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.replacement import ReplacementModel

MODES = ("target", "hybrid", "replacement")
STREAMS = ("replacement", "target")  # ranks: test_ranks.py
RULED = [name for name, paths in ARCHITECTURES.items() if not paths.without_rules]


@pytest.mark.parametrize("architecture", RULED)
@pytest.mark.parametrize("features", ["leaves", "linear"])
def test_no_bit_changes(architecture: str, features: Any, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture))
    for mode in MODES:
        with model.mode(mode):  # type: ignore[arg-type]
            plain = model(IDS[None]).logits
            with linearized(model, features):
                ruled = model(IDS[None]).logits
        assert torch.equal(plain, ruled)
        assert torch.equal(plain.signbit(), ruled.signbit())
    with model.mode("replacement"):
        assert torch.equal(model(IDS[None]).logits, plain)  # and no rule stays


@pytest.mark.parametrize("architecture", RULED)
@pytest.mark.parametrize("stream", STREAMS)
def test_relevance_is_conserved(
    architecture: str, stream: Any, make_pair: Callable[..., Any]
) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS, stream=stream, rows=3)
    leaves = Leaves(trace)
    assert leaves.n_features > 20
    targets = [unit_target(trace, leaves, i) for i in range(leaves.n_features)]
    targets += [Target("", 6, model.head[v].detach()) for v in (3, 11)]
    weights = edges(trace, leaves, targets)
    for target, row in zip(targets, weights, strict=True):
        value = target.value(trace)
        assert abs(float(row.sum()) + target.constant - value) < 1e-10 * float(row.abs().sum())
    values = torch.tensor([target.value(trace) for target in targets])[: leaves.n_features]
    torch.testing.assert_close(values, leaves.activation[: leaves.n_features].to(values))


def test_relevance_is_lost_by_injection_before_attention(make_pair: Callable[..., Any]) -> None:
    # The control of the test above: the encoder's row applied to the input of the block.
    model = randomised(make_pair("qwen2", "float64"))
    trace = record(model, IDS)
    leaves = Leaves(trace)
    target = unit_target(trace, leaves, leaves.n_features - 1)
    assert target.layer == 2
    embedding = trace.embedding[None].clone().requires_grad_()
    with linearized(model):
        h = embedding
        for layer, arguments in enumerate(model.block_inputs(IDS[None], None).arguments[:2]):
            h, _ = model.block(layer, h, arguments, "replacement")
    row = torch.autograd.grad(h[0, target.position] @ target.direction, embedding)[0]
    share = float((row * embedding.detach()).sum()) + target.constant
    assert abs(share - target.value(trace)) > 0.1 * abs(target.value(trace))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_gradient_through_active_features(architecture: str, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture, "float64"))
    direction = model.head[3].detach()
    trace = record(model, IDS, features="linear")
    leaves = Leaves(trace)
    total = edges(trace, leaves, [Target("", 6, direction)])[0]
    # The same by walking over the direct edges between features, layer by layer.
    trace = record(model, IDS, rows=2)
    n = leaves.n_features
    direct = edges(trace, leaves, [Target("", 6, direction)])[0, :n]
    between = edges(trace, leaves, [unit_target(trace, leaves, i) for i in range(n)])[:, :n]
    through = between / leaves.activation[:n, None]
    walked, step = direct.clone(), direct.clone()
    for _ in range(model.n_layers):
        step = step @ through
        walked += step
    assert float((total[:n] - direct).abs().max()) > 1e-3
    torch.testing.assert_close(walked, total[:n], rtol=1e-9, atol=1e-12)


def test_a_zero_has_quotient_zero() -> None:
    from fastadapt.graphs.linear.rules import held_quotient

    x = torch.tensor([0.0, 2.0, -0.0])
    assert held_quotient(x, torch.nn.functional.gelu(x) + 0).tolist()[::2] == [0.0, 0.0]


def test_carry_returns_the_bits_of_the_value() -> None:
    value = torch.tensor([-0.0, float("nan"), 1.5])
    out = carry(value, torch.zeros(3, requires_grad=True) * 2)
    assert out.signbit().tolist() == value.signbit().tolist()
    assert out.view(torch.int32).tolist() == value.view(torch.int32).tolist()


def test_bad_requests(make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("llama"))
    with (
        pytest.raises(UserError, match="one of leaves, linear, ranks, linear ranks, got 'x'"),
        linearized(model, "x"),  # type: ignore[arg-type]
    ):
        pass
    with pytest.raises(UserError, match="one of replacement, target, ranks, got 'base'"):
        record(model, IDS, stream="base")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at most 64 tokens, the model's context, got 65"):
        record(model, [3] * 65)
    with pytest.raises(UserError, match="token ids 0 to 39, got 40"):
        record(model, [3, 40])
    with pytest.raises(UserError, match=r"expected one or more token ids \[T\], got shape \[0\]"):
        record(model, [])
    for kind, part in (("qwen3_5_text", "linear attention"), ("gemma4_text", "embeddings")):
        other = randomised(make_pair(kind))
        with pytest.raises(UserError, match=f"graphs: architecture '{kind}' .* rule for .*{part}"):
            record(other, IDS)
    baseline = ReplacementModel.create(make_pair("llama"), "norms")
    with pytest.raises(UserError, match="run with transcoders, got a baseline"):
        record(baseline, IDS)
