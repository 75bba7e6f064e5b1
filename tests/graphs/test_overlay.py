"""Transcoders in place of the base's MLPs: read from files, exact in graphs, refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from replay import IDS, randomised
from safetensors.torch import save_file

from fastadapt.errors import UserError
from fastadapt.graphs.attribution import KINDS, Leaves, Target, edges, unit_target
from fastadapt.graphs.evidence import EvidenceConfig, account, measure_evidence
from fastadapt.graphs.graph import GraphConfig, grow
from fastadapt.graphs.linear.overlay import TranscoderSet, unexplained_variance
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.targets import contrast
from fastadapt.interop.transcoder_sets import read_transcoder_set

F, D, LAYERS = 20, 16, 3
HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}


def write_set(folder: Path, *, skip: bool = True, threshold: bool = True, **changes: Any) -> Path:
    """Write a transcoder set with random weights in float64."""
    folder.mkdir()
    config = {"model_kind": "transcoder_set", "model_name": "org/base", **HOOKS, "scan": "x"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    draw = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=draw, dtype=torch.float64)

    for layer in range(LAYERS):
        tensors = {"W_enc": random(F, D), "b_enc": random(F), "W_dec": random(F, D)}
        tensors["b_dec"] = random(D)
        if skip:
            tensors["W_skip"] = random(D, D)
        if threshold:
            tensors["activation_function.threshold"] = random(F).abs()
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    return folder


@pytest.fixture
def base_set(tmp_path: Path) -> TranscoderSet:
    return read_transcoder_set(write_set(tmp_path / "set"))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stream", ["replacement", "target"])
def test_three_kinds_of_nodes_sum_to_every_value(
    skip: bool, stream: Any, tmp_path: Path, make_pair: Callable[..., Any]
) -> None:
    model = randomised(make_pair("gemma2", "float64"))
    base_set = read_transcoder_set(write_set(tmp_path / "set", skip=skip, threshold=skip))
    trace = record(model, IDS, stream=stream, rows=4, overlay=base_set)
    plain = record(model, IDS, stream=stream)
    assert torch.equal(trace.final, plain.final)  # the model itself does not change
    leaves = Leaves(trace)
    kinds = {KINDS[i] for i in leaves.kind.tolist()}
    assert {"feature", "base feature", "error"} <= kinds
    targets = [Target("", 6, model.head[3].detach())]
    targets += [unit_target(trace, leaves, i) for i in range(0, leaves.n_units, 5)]
    for target, row in zip(targets, edges(trace, leaves, targets), strict=True):
        whole = float(row.sum()) + target.constant
        assert abs(whole - target.value(trace)) < 1e-9 * float(row.abs().sum())
    # What a base feature writes counts as much as an adapter's feature of the same value and row.
    i = int((leaves.layer[: leaves.n_features] == 1).nonzero()[0])
    row = edges(trace, leaves, targets[:1])[0]
    units, rows = next((u, r) for u, r in leaves.groups if (u.kind, u.layer) == ("base feature", 1))
    adapter: Any = model.adapters[1]
    units.decoder[:] = adapter.W_dec[leaves.feature[i]]
    units.codes.values[:] = leaves.activation[i]
    again = edges(trace, leaves, targets[:1])[0]
    same = rows.start + (leaves.position[rows] == leaves.position[i]).nonzero()[:, 0]
    assert len(same) > 0
    for j in same.tolist():
        assert float(again[j]) == pytest.approx(float(row[i]), rel=1e-12)


def test_graph_account_and_evidence(base_set: TranscoderSet, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("llama", "float64"))
    trace = record(model, IDS, stream="target", rows=4, overlay=base_set)
    target = contrast(trace, 7, 11, 6)
    graph = grow(trace, [target], GraphConfig(nodes=40, top=300))
    assert {KINDS[int(graph.leaves.kind[row.node or 0])] for row in graph.rows[1:]} == {
        "feature",
        "base feature",
    }
    flow = graph.flow()
    assert flow.errors > 0
    assert flow.tokens + flow.errors + flow.biases + flow.pruned == pytest.approx(1)
    parts = account(trace, graph.rows[0])
    change = parts.with_adapters - parts.hybrid
    assert change == pytest.approx(sum(parts[2:]))
    evidence = measure_evidence(
        trace, graph.leaves, target, EvidenceConfig(ablations=5, resamples=200)
    )
    # The set changes what is predicted, and no measured effect.
    plain = record(model, IDS, stream="target", rows=4)
    other = measure_evidence(
        plain, Leaves(plain), target, EvidenceConfig(ablations=5, resamples=200)
    )
    effects = dict(zip(evidence.samples[1].nodes, evidence.samples[1].effects, strict=True))
    assert effects == pytest.approx(
        dict(zip(other.samples[1].nodes, other.samples[1].effects, strict=True))
    )


def test_unexplained_variance(base_set: TranscoderSet, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("llama", "float64"))
    trace = record(model, IDS)
    shares = unexplained_variance(model, base_set, trace.mlp_in)
    transcoder, x = base_set.layers[1], trace.mlp_in[1]
    z = x @ transcoder.W_enc.T + transcoder.b_enc
    assert transcoder.threshold is not None
    assert transcoder.W_skip is not None
    a = z * (z > transcoder.threshold)
    out = a @ transcoder.W_dec + transcoder.b_dec + x @ transcoder.W_skip.T
    y = model.mlps[1].base(x)
    expected = (y - out).square().sum() / (y - y.mean(0)).square().sum()
    assert shares[1] == pytest.approx(float(expected))
    nothing = [layer._replace(W_dec=layer.W_dec * 0, W_skip=None) for layer in base_set.layers]
    mean = [
        layer._replace(b_dec=model.mlps[i].base(trace.mlp_in[i]).mean(0))
        for i, layer in enumerate(nothing)
    ]
    assert unexplained_variance(model, TranscoderSet("", "", mean), trace.mlp_in) == pytest.approx(
        [1.0] * LAYERS
    )


def test_sets_that_are_refused(tmp_path: Path, make_pair: Callable[..., Any]) -> None:
    model = randomised(make_pair("llama", "float64"))
    good = read_transcoder_set(write_set(tmp_path / "good"))
    with pytest.raises(UserError, match="expected --stream replacement or target, got base"):
        record(model, IDS, stream="base", overlay=good)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="got ranks, whose MLPs are the target's"):
        record(model, IDS, stream="ranks", overlay=good)
    few = TranscoderSet("few", "org/other", good.layers[:2])
    with pytest.raises(UserError, match="3 layers of width 16, got 2 layers of width 16"):
        record(model, IDS, overlay=few)
    with pytest.raises(UserError, match=r"expected a folder with config\.yaml"):
        read_transcoder_set(tmp_path)
    for key, value, reason in (
        ("model_kind", "cross_layer_transcoder", "expected model_kind transcoder_set"),
        ("feature_input_hook", "hook_resid_mid", r"feature_input_hook mlp\.hook_in"),
        ("activation", "topk", "ReLU or JumpReLU, got activation 'topk'"),
    ):
        changes: Any = {key: value}
        with pytest.raises(UserError, match=reason):
            read_transcoder_set(write_set(tmp_path / key, **changes))
    (tmp_path / "good" / "layer_1.safetensors").unlink()
    with pytest.raises(UserError, match=r"layer_1\.safetensors is missing"):
        read_transcoder_set(tmp_path / "good")
    save_file({"W": torch.ones(2)}, tmp_path / "good" / "layer_1.safetensors")
    with pytest.raises(UserError, match="tensor W"):
        read_transcoder_set(tmp_path / "good")
