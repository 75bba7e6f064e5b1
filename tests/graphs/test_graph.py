"""Targets, expansion, influence and paths of graphs, against sums over dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from replay import IDS, randomised
from safetensors.torch import save_file

from fastadapt.errors import UserError
from fastadapt.graphs.attribution import Leaves, edges, unit_target
from fastadapt.graphs.graph import Graph, GraphConfig, grow
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.targets import (
    contrast,
    direction_of,
    final_state,
    logit,
    logits_of,
    most_different,
    named_feature,
)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # Gemma 2 caps its logits
@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_values_are_those_of_the_model(
    architecture: str, stream: Any, make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS, stream=stream, rows=3)
    with model.mode(stream), torch.no_grad():
        logits = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits_of(model, final_state(model, IDS, stream)), logits)
    direction = torch.randn(model.d_model, dtype=torch.float64)
    save_file({"direction": direction}, tmp_path / "d.safetensors")
    targets = [
        logit(trace, 7, 4),
        contrast(trace, 7, 11, 5),
        direction_of(trace, tmp_path / "d.safetensors", 3),
    ]
    state = final_state(model, IDS, stream)
    expected = [
        logits[4, 7] - logits[4].mean(),
        logits[5, 7] - logits[5, 11],
        state[3] @ direction,
    ]
    sums = edges(trace, Leaves(trace), targets).sum(1)
    for target, value, total in zip(targets, expected, sums, strict=True):
        assert target.value(trace) == pytest.approx(float(value), rel=1e-10)
        assert float(total) == pytest.approx(float(value), rel=1e-9, abs=1e-10)


def test_most_different(make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("llama", "float64"))
    with torch.no_grad(), model.mode("target"):
        y = model(IDS[None]).logits[0].log_softmax(-1)
    with torch.no_grad(), model.mode("hybrid"):
        z = model(IDS[None]).logits[0].log_softmax(-1)
    kl = (y.exp() * (y - z)).sum(-1)
    kl[y.argmax(-1) == z.argmax(-1)] = -1
    place = most_different(model, IDS)
    assert place.position == int(kl.argmax())
    assert place.kl == pytest.approx(float(kl.max()))
    assert (place.token, place.against) == (
        int(y[place.position].argmax()),
        int(z[place.position].argmax()),
    )
    same = [i for i in range(len(IDS)) if kl[i] < 0]
    for i in same[:1]:
        with pytest.raises(UserError, match=f"the same token at position {i}"):
            most_different(model, IDS, i)


def dense(graph: Graph) -> torch.Tensor:
    """Return the shares [1 + N, N] of every leaf in the target's row and in each feature's."""
    trace, leaves = graph.trace, graph.leaves
    into = [unit_target(trace, leaves, i) for i in range(leaves.n_features)]
    rows = torch.zeros(1 + len(leaves), len(leaves), dtype=torch.float64)
    target = graph.rows[0].target
    weights = edges(trace, leaves, [target, *into]).double()
    constants = torch.tensor([t.constant for t in [target, *into]], dtype=torch.float64).abs()
    weights = weights / (weights.abs().sum(1) + constants)[:, None]
    rows[: len(weights)] = weights
    return rows


def test_influence_equals_the_sum_over_all_paths(make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("qwen2", "float64"))
    trace = record(model, IDS, rows=5)
    graph = grow(trace, [logit(trace, 7, 6)], GraphConfig(nodes=10_000, top=10_000))
    share = dense(graph)
    step, total = share[0].abs(), share[0].abs().clone()
    for _ in range(3):
        step = step @ share[1:].abs()
        total += step
    got, of_rows = graph.influence()
    torch.testing.assert_close(got, total, rtol=1e-9, atol=1e-12)
    reached = int((total[: graph.leaves.n_features] > 0).sum())
    assert len(graph.rows) == 1 + reached
    flow = graph.flow()
    assert flow.pruned == pytest.approx(0, abs=1e-9)
    assert flow.tokens + flow.errors + flow.biases == pytest.approx(1)
    assert flow.tokens == pytest.approx(float(total[graph.leaves.mask("token")].sum()))
    assert 0 < flow.replacement < flow.completeness < 1
    assert float(of_rows[0]) == 1

    # The strongest path is the best of all products of shares.
    n = graph.leaves.n_features
    into, ends = share[:, :n].abs(), share[:, n:].abs()
    best = float(ends[0].max())
    one = (into[0] * ends[1 : n + 1].amax(1)).max()
    two = (into[0][:, None] * into[1 : n + 1] * ends[1 : n + 1].amax(1)[None]).max()
    strength, path = graph.paths(1)[0]
    assert abs(strength) == pytest.approx(max(best, float(one), float(two)))
    assert path[-1] >= n


def test_a_small_graph_accounts_for_what_it_leaves_out(make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("qwen2", "float64"))
    trace = record(model, IDS, stream="target", rows=2)
    target = contrast(trace, 7, 11, 6)
    whole = grow(trace, [target], GraphConfig(nodes=10_000, top=10_000))
    small = grow(trace, [target], GraphConfig(nodes=4, top=6))
    assert len(small.rows) == 5
    by_node = {row.node: row for row in whole.rows}
    for row in small.rows:
        other = by_node[row.node]
        left_out = other.weights[~torch.isin(other.sources, row.sources)]
        assert int((row.sources < small.leaves.n_features).sum()) <= 6
        assert int((row.sources >= small.leaves.n_features).sum()) == 6
        assert row.weights.abs().tolist() == sorted(row.weights.abs().tolist(), reverse=True)
        assert float(row.weights.sum()) + row.remainder + row.target.constant == pytest.approx(
            row.value
        )
        assert sum(row.sums) + row.target.constant == pytest.approx(row.value)
        assert row.sums == pytest.approx(other.sums)
        assert row.pruned == pytest.approx(float(left_out.abs().sum()))
        assert 0 < row.first_position < row.size
    flow = small.flow()
    assert flow.errors > 0
    assert flow.pruned > 0.1
    assert flow.tokens + flow.errors + flow.biases + flow.pruned == pytest.approx(1)
    first = small.rows[1].node
    sources = whole.rows[0].sources
    assert first == int(sources[sources < small.leaves.n_features][0])  # the largest direct edge


def test_bad_targets(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    model = randomised(make_pair("llama"))
    trace = record(model, IDS)
    with pytest.raises(UserError, match="such as 2/17, got '2-17'"):
        named_feature(trace, "2-17", 3)
    with pytest.raises(UserError, match="layers 0 to 2 and features 0 to 11, got 3/0"):
        named_feature(trace, "3/0", 3)
    with pytest.raises(UserError, match="another token than --token, got 7 twice"):
        contrast(trace, 7, 7, 3)
    save_file({"direction": torch.ones(3)}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match=r"expected \(16,\), got \(3,\)"):
        direction_of(trace, tmp_path / "d.safetensors", 3)
    with pytest.raises(UserError, match="--top: expected 1 or more, got 0"):
        GraphConfig(top=0)
