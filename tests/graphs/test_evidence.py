"""Accounts and ablations, against interventions on the model and forwards of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from replay import IDS, randomised

from fastadapt.errors import UserError
from fastadapt.graphs.ablation import Surgery, run_changed
from fastadapt.graphs.attribution import KINDS, Leaves, edges
from fastadapt.graphs.evidence import (
    EvidenceConfig,
    account,
    measure_evidence,
    ranks,
)
from fastadapt.graphs.graph import GraphConfig, grow
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.targets import contrast, named_feature
from fastadapt.interventions import scale_features


def measured(model: Any, target: Any, mode: Any = "replacement") -> float:
    """Return a contrast of logits 7 and 11 in transformers' own forward."""
    with model.mode(mode), torch.no_grad():
        logits = model(IDS[None]).logits[0, target.position]
    return float(logits[7] - logits[11])


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_the_account_is_complete(
    architecture: str, stream: Any, make_pair: Callable[..., Any]
) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS, stream=stream)
    graph = grow(trace, [contrast(trace, 7, 11, 5)], GraphConfig(nodes=0))
    row = graph.rows[0]
    parts = account(trace, row)
    assert parts.with_adapters == pytest.approx(measured(model, row.target, stream))
    assert parts.hybrid == pytest.approx(measured(model, row.target, "hybrid"))
    assert abs(parts.remainder) < 1e-10 * row.size
    change = parts.with_adapters - parts.hybrid
    assert change == pytest.approx(sum(parts[2:]))
    assert (parts.errors != 0) == (stream == "target")
    assert abs(parts.coefficients) > 1e-3
    assert parts.features == pytest.approx(row.sums[KINDS.index("feature")])


def test_nothing_but_features_is_left_without_a_change_of_coefficients(
    make_pair: Callable[..., Any],
) -> None:
    # The control of the test above: adapters that write nothing change no coefficient.
    model = randomised(make_pair("llama", "float64"))
    for adapter in model.adapters:
        adapter.requires_grad_(False)
        adapter.W_dec.zero_()  # type: ignore[operator]
        adapter.b_dec.zero_()  # type: ignore[operator]
    trace = record(model, IDS)
    graph = grow(trace, [contrast(trace, 7, 11, 5)], GraphConfig(nodes=0))
    parts = account(trace, graph.rows[0])
    assert parts.features == parts.decoder_biases == 0
    assert abs(parts.coefficients) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_surgery_equals_interventions(architecture: str, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS)
    leaves = Leaves(trace)
    target = contrast(trace, 7, 11, 6)
    strongest = int(leaves.activation[leaves.groups[0][1]].argmax())  # of layer 0
    feature = int(leaves.feature[strongest])
    everywhere = ((leaves.layer == 0) & (leaves.feature == feature)).nonzero()[:, 0]
    everything, nothing = torch.arange(leaves.n_features), torch.empty(0, dtype=torch.int64)
    plain = measured(model, target)
    with scale_features(model, {(0, feature): 0.0}):
        ablated = measured(model, target)
    every = [(layer, i) for layer in range(3) for i in range(model.n_features)]
    with scale_features(model, dict.fromkeys(every, 0.0)):
        biases = measured(model, target)
    got = run_changed(trace, leaves, target, Surgery([nothing, everywhere]))
    assert got.tolist() == pytest.approx([plain, ablated])
    keep = Surgery([everything, nothing], keep=True)
    assert run_changed(trace, leaves, target, keep).tolist() == pytest.approx([plain, biases])
    assert abs(ablated - plain) > 1e-5  # ten times the tolerance above

    # Held adapters do not react; after the last layer there is none that could.
    last = int((leaves.layer[: leaves.n_features] == 2).nonzero()[-1])
    sets = [nothing, everywhere, torch.tensor([last])]
    free = run_changed(trace, leaves, target, Surgery(sets))
    held = run_changed(trace, leaves, target, Surgery(sets, held=True))
    torch.testing.assert_close(held[[0, 2]], free[[0, 2]])
    assert abs(float(held[1] - free[1])) > 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_ablation_in_the_targets_own_text(architecture: str, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair(architecture, "float64"))
    trace = record(model, IDS, stream="target")
    leaves = Leaves(trace)
    target = contrast(trace, 7, 11, 6)
    strongest = int(leaves.activation[leaves.groups[0][1]].argmax())  # of layer 0
    feature = int(leaves.feature[strongest])
    everywhere = ((leaves.layer == 0) & (leaves.feature == feature)).nonzero()[:, 0]
    nothing = torch.empty(0, dtype=torch.int64)
    plain = measured(model, target, "target")

    def remove(layer: int) -> Any:
        adapter: Any = model.adapters[layer]

        def hook(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            z = args[0] @ adapter.W_enc[feature] + adapter.b_enc[feature]
            return out - z.relu()[..., None] * adapter.W_dec[feature]

        return hook

    added = [trace.mlp_out[i] - model.mlps[i].base(trace.mlp_in[i]) for i in range(3)]
    handle = model.mlps[0].register_forward_hook(remove(0))
    ablated = measured(model, target, "target")
    handle.remove()
    hooks = [
        mlp.register_forward_hook(lambda m, args, _, i=i: m.base(args[0]) + added[i])
        for i, mlp in enumerate(model.mlps)
    ]
    assert measured(model, target, "target") == pytest.approx(plain)  # nothing was changed
    hooks.append(model.mlps[0].register_forward_hook(remove(0)))
    expected = measured(model, target, "target")
    for hook in hooks:
        hook.remove()
    got = run_changed(trace, leaves, target, Surgery([nothing, everywhere]))
    assert got.tolist() == pytest.approx([plain, ablated])
    got = run_changed(trace, leaves, target, Surgery([nothing, everywhere], held=True))
    assert got.tolist() == pytest.approx([plain, expected])
    assert min(abs(ablated - plain), abs(expected - ablated)) > 1e-6


@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_evidence(stream: Any, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("qwen2", "float64"), features=24)
    trace = record(model, IDS, stream=stream, rows=4)
    leaves = Leaves(trace)
    target = contrast(trace, 7, 11, 6)
    config = EvidenceConfig(ablations=40, copies=7, resamples=200)
    evidence = measure_evidence(trace, leaves, target, config)
    linear = record(model, IDS, stream=stream, features="linear")
    total = edges(linear, leaves, [target])[0, : leaves.n_features]
    strongest, drawn = evidence.samples
    assert strongest.nodes == total.abs().topk(40).indices.tolist()
    assert len(set(drawn.nodes)) == 40
    for sample in evidence.samples:
        ablated = Surgery([torch.tensor([i]) for i in sample.nodes])
        values = run_changed(trace, leaves, target, ablated)
        assert sample.effects == pytest.approx((values - measured(model, target, stream)).tolist())
        by_name = {line.predictor: line for line in sample.correlations}
        for line in sample.correlations:
            for mean, low, high in line[1:]:
                assert -1 <= low <= mean <= high <= 1
        # The prediction is the edge through all paths.
        effects = torch.tensor(sample.effects, dtype=torch.float64)
        both = torch.stack([-total[sample.nodes], effects])
        assert by_name["graph"].pearson[0] == pytest.approx(float(torch.corrcoef(both)[0, 1]))
        both = torch.stack([ranks(row) for row in both])
        assert by_name["graph"].spearman[0] == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    # The graph agrees with the effects of the strongest features, and random numbers do not.
    by_name = {line.predictor: line for line in strongest.correlations}
    assert by_name["graph"].spearman[1] > 0
    assert by_name["random"].spearman[1] < 0 < by_name["random"].spearman[2]
    curve = evidence.curve
    # After the last attention, other positions do not reach the target: their edges are 0.
    assert curve.n[-1] == int((total != 0).sum())
    before = (leaves.position[: leaves.n_features] <= 6).sum()
    assert curve.n[-1] < before
    for column in curve[1:]:
        assert column[-1] == pytest.approx(1)
    again = measure_evidence(trace, leaves, target, config)
    assert again == evidence


def test_ranks_and_correlation() -> None:
    from fastadapt.graphs.evidence import _correlation

    x = torch.tensor([3.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    y = torch.tensor([1.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    assert ranks(x).tolist() == [1.5, 0, 1.5, 3]
    expected = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert float(_correlation(x, y)) == pytest.approx(float(expected))


def test_what_has_no_evidence(make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("llama"))
    trace = record(model, IDS)
    with pytest.raises(UserError, match="3 or more features before the target, got 0"):
        measure_evidence(trace, Leaves(trace), named_feature(trace, "0/3", 4))
    adapter: Any
    for adapter in model.adapters:
        adapter.W_dec.data.zero_()
    trace = record(model, IDS)
    with pytest.raises(UserError, match="different predictions by graph, got 0 for all 5 "):
        measure_evidence(trace, Leaves(trace), contrast(trace, 7, 11, 6), EvidenceConfig(5))
    for settings in ({"ablations": 2}, {"copies": 0}, {"resamples": 10}):
        with pytest.raises(UserError, match=r"expected .* or more"):
            EvidenceConfig(**settings)
