"""Edges equal those of an independent linearized forward, in which each leaf is removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replay import IDS, Replay, randomised

from fastadapt.graphs.attribution import (
    KINDS,
    Leaves,
    Target,
    edges,
    unit_target,
)
from fastadapt.graphs.linear.heads import head_loadings
from fastadapt.graphs.linear.trace import record
from fastadapt.models.architectures import ARCHITECTURES

STREAMS = ("replacement", "target")  # ranks: test_ranks.py
RULED = [name for name, paths in ARCHITECTURES.items() if not paths.without_rules]


@pytest.mark.parametrize("architecture", RULED)
@pytest.mark.parametrize("stream", STREAMS)
def test_edges_equal_removal(architecture: str, stream: Any, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS, stream=stream, rows=4)
    leaves = Leaves(trace)
    last = int((leaves.layer[: leaves.n_features] == 2).nonzero()[-1])
    targets = [
        Target("", 6, model.head[3].detach()),
        unit_target(trace, leaves, last),
        unit_target(trace, leaves, last - 3),
    ]
    got = edges(trace, leaves, targets)
    x, final = Replay(model, IDS, stream).without_each(leaves, trace.errors)
    states = [final if t.layer is None else x[t.layer] for t in targets]
    for row, state, target in zip(got, states, targets, strict=True):
        values = state[:, target.position] @ target.direction
        whole = target.value(trace) - target.constant
        assert float(values[0]) == pytest.approx(whole, rel=1e-10)
        assert float((row - (values[0] - values[1:])).abs().max()) < 1e-10 * float(row.abs().sum())
        for kind in leaves.kind.unique():
            assert float(row[leaves.kind == kind].abs().max()) > 1e-6, KINDS[int(kind)]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3"])
def test_head_loadings_sum_to_the_edge(architecture: str, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS, rows=3)  # four heads in two passes
    leaves = Leaves(trace)
    target = Target("", 6, model.head[3].detach())
    everything = torch.arange(len(leaves))
    split = head_loadings(trace, leaves, target, everything)
    edge = edges(trace, leaves, [target])[0]
    torch.testing.assert_close(split.heads.sum((1, 2)) + split.direct, edge, atol=1e-12, rtol=1e-9)
    # Another position reaches the target through heads only.
    elsewhere = leaves.position != 6
    assert float(split.direct[elsewhere].abs().max()) < 1e-12
    assert float(split.direct[~elsewhere].abs().max()) > 1e-3
    # A leaf after a layer's attention does not pass its heads.
    for layer in range(3):
        later = (leaves.layer >= layer) & (leaves.kind != KINDS.index("attention bias"))
        assert float(split.heads[later][:, : layer + 1].abs().max()) < 1e-12


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_a_head_without_values_has_no_loading(
    architecture: str, make_pair: Callable[..., Any]
) -> None:
    model = randomised(make_pair(architecture, "float64"))
    with torch.no_grad():  # heads 2 of layer 1 write nothing
        attention: Any = model.blocks[1].self_attn
        attention.o_proj.weight.unflatten(1, (4, -1))[:, 2] = 0
    trace = record(model, IDS, rows=4)
    leaves = Leaves(trace)
    target = Target("", 6, model.head[3].detach())
    heads = head_loadings(trace, leaves, target, range(leaves.n_features)).heads
    assert float(heads[:, 1, 2].abs().max()) == 0
    assert float(heads[:, 1, [0, 1, 3]].abs().amax(0).min()) > 1e-6
