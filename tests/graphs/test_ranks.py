"""Rank components of a LoRA as nodes: exact, and what the target's low-rank parts write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import peft_saver
from replay import IDS

from fastadapt.adapter.module import AdapterConfig
from fastadapt.errors import UserError
from fastadapt.graphs.ablation import Surgery, run_changed
from fastadapt.graphs.attribution import KINDS, Leaves, Target, edges, unit_target
from fastadapt.graphs.evidence import EvidenceConfig, account, measure_evidence
from fastadapt.graphs.graph import GraphConfig, grow
from fastadapt.graphs.linear import rules
from fastadapt.graphs.linear.heads import head_loadings
from fastadapt.graphs.linear.rules import linearized
from fastadapt.graphs.linear.trace import record
from fastadapt.graphs.targets import contrast
from fastadapt.models.pair import ModelPair, PairConfig
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.sources.low_rank import LowRankLinear

pytest.importorskip("peft")

#: Architecture and settings of the adapter.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2, dora": ("qwen2", {"use_dora": True}),
    "gemma2, mlp alone": ("gemma2", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "phi3": ("phi3", {}),
}


@pytest.fixture
def load(tmp_path: Path, save_model: Callable[..., str]) -> Callable[[str], ReplacementModel]:
    def loaded(case: str) -> ReplacementModel:
        target, base, _ = peft_saver(tmp_path, save_model)(*CASES[case])
        pair = ModelPair.load(PairConfig(target, base, device="cpu", dtype="float64"))
        return ReplacementModel.create(pair, AdapterConfig(4)).eval()

    return loaded


@pytest.mark.parametrize("case", CASES)
def test_components_are_exact(case: str, load: Callable[[str], ReplacementModel]) -> None:
    model = load(case)
    with model.mode("target"), torch.no_grad():
        plain = model(IDS[None]).logits
        with linearized(model, "ranks"):
            assert torch.equal(model(IDS[None]).logits, plain)
    trace = record(model, IDS, stream="ranks", rows=5)
    leaves = Leaves(trace)
    names = {units.name.split(".")[-1] for units in trace.units}
    low_rank = {
        name.split(".")[-1]
        for name, module in model.blocks.named_modules()
        if isinstance(module, LowRankLinear)
    }
    assert names == low_rank - {"q_proj", "k_proj"}
    assert {KINDS[i] for i in leaves.kind.tolist()}.isdisjoint({"feature", "error", "decoder bias"})
    targets = [Target("", 6, model.head[v].detach()) for v in (3, 11)]
    targets += [unit_target(trace, leaves, i) for i in range(0, leaves.n_units, 7)]
    for target, row in zip(targets, edges(trace, leaves, targets), strict=True):
        assert abs(float(row.sum()) - target.value(trace)) < 1e-9 * float(row.abs().sum())

    # The last thing that a block adds: value and decoder row, times the last norm's quotient.
    last = next(u for u in reversed(trace.units) if u.layer == 2)
    if last.writes.endswith("down_proj") and case.startswith(("llama", "qwen2")):
        rows = next(r for u, r in leaves.groups if u is last)
        quotient = (trace.final[6] / trace.hidden[-1][6]) * model.head[3]
        value = last.codes.values.view(len(IDS), -1)[6]
        got = edges(trace, leaves, targets[:1])[0, rows].view(len(IDS), -1)[6]
        torch.testing.assert_close(got, value * (last.decoder @ quotient), rtol=1e-9, atol=1e-12)
    split = head_loadings(trace, leaves, targets[0], range(leaves.n_units))
    whole = edges(trace, leaves, targets[:1])[0, : leaves.n_units]
    torch.testing.assert_close(split.heads.sum((1, 2)) + split.direct, whole)


def test_relevance_is_not_conserved_if_components_pass_gradients(
    load: Callable[[str], ReplacementModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The control of the test above.
    trace = record(load("llama"), IDS, stream="ranks")
    leaves = Leaves(trace)
    target = Target("", 6, trace.model.head[3].detach())
    monkeypatch.setattr(rules, "_constant_ranks", lambda layer, args, out: out)
    row = edges(trace, leaves, [target])[0]
    assert abs(float(row.sum()) - target.value(trace)) > 1e-3 * float(row.abs().sum())


def test_graphs_of_components(load: Callable[[str], ReplacementModel]) -> None:
    model = load("llama")
    trace = record(model, IDS, stream="ranks", rows=4)
    graph = grow(trace, [contrast(trace, 7, 11, 6)], GraphConfig(nodes=30, top=400))
    assert len(graph.rows) == 31
    flow = graph.flow()
    assert flow.errors == 0
    assert flow.tokens + flow.biases + flow.pruned == pytest.approx(1)
    depth = graph.leaves.depth
    for row in graph.rows[1:]:
        units = row.sources[row.sources < graph.leaves.n_units]
        assert bool((depth[units] < depth[row.node]).all())
    parts = account(trace, graph.rows[0])
    change = parts.with_adapters - parts.hybrid
    assert change == pytest.approx(sum(parts[2:]))
    assert parts.features == pytest.approx(float(graph.rows[0].sums[KINDS.index("rank component")]))


def measured(model: ReplacementModel) -> float:
    """Return a contrast of logits 7 and 11 of the target in transformers' own forward."""
    with model.mode("target"), torch.no_grad():
        logits = model(IDS[None]).logits[0, 6]
    return float(logits[7] - logits[11])


@contextmanager
def without(modules: dict[LowRankLinear, list[int]]) -> Iterator[None]:
    """Set columns of B to 0 inside the context."""
    before = {module: module.lora_B.clone() for module in modules}
    with torch.no_grad():
        for module, columns in modules.items():
            module.lora_B[:, columns] = 0
        yield
        for module, B in before.items():
            module.lora_B.copy_(B)


@pytest.mark.parametrize("case", CASES)
def test_ablated_components_are_removed_from_the_weights(
    case: str, load: Callable[[str], ReplacementModel]
) -> None:
    model = load(case)
    trace = record(model, IDS, stream="ranks")
    leaves, target = Leaves(trace), contrast(trace, 7, 11, 6)
    modules = {
        (layer, linear.name): linear.module
        for layer, of_layer in enumerate(trace.linears)
        for linear in of_layer
        if isinstance(linear.module, LowRankLinear)
    }
    plain, nothing = measured(model), torch.empty(0, dtype=torch.int64)
    everything = torch.arange(leaves.n_units)
    units, rows = leaves.groups[0]
    number = units.first + 1
    everywhere = rows.start + (leaves.feature[rows] == number).nonzero()[:, 0]
    with without({modules[units.layer, units.name]: [1]}):
        one = measured(model)
    with without({module: list(range(len(module.lora_A))) for module in modules.values()}):
        none = measured(model)
    got = run_changed(trace, leaves, target, Surgery([nothing, everywhere, everything]))
    assert got.tolist() == pytest.approx([plain, one, none], rel=1e-9)
    keep = Surgery([everything, nothing], keep=True)
    assert run_changed(trace, leaves, target, keep).tolist() == pytest.approx([plain, none])
    assert min(abs(one - plain), abs(none - plain)) > 1e-6

    # Held components stay as recorded, while all else reacts.
    recorded: dict[LowRankLinear, torch.Tensor] = {}

    def low(module: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        out = x @ module.lora_A.T @ module.lora_B.T
        return out if module.gain is None else out * module.gain

    def note(module: LowRankLinear, args: Any, out: Any) -> None:
        recorded[module] = low(module, args[0])

    hooks = [module.register_forward_hook(note) for module in modules.values()]
    measured(model)
    for hook in hooks:
        hook.remove()

    def hold(module: LowRankLinear, args: Any, out: Any) -> torch.Tensor:
        held = recorded[module]
        if module is modules[units.layer, units.name]:
            with without({module: [1]}):
                held = low(module, args[0])
        return out - low(module, args[0]) + held

    hooks = [module.register_forward_hook(hold) for module in modules.values()]
    expected = measured(model)
    for hook in hooks:
        hook.remove()
    got = run_changed(trace, leaves, target, Surgery([nothing, everywhere], held=True))
    assert got.tolist() == pytest.approx([plain, expected], rel=1e-9)
    assert abs(expected - one) > 1e-7 * abs(one)  # later components do react


@pytest.mark.parametrize("case", CASES)
def test_components_that_pass_gradients_are_no_leaves(
    case: str, load: Callable[[str], ReplacementModel]
) -> None:
    # The prediction goes through later components, so tokens and biases give the whole value.
    trace = record(load(case), IDS, stream="ranks")
    leaves, target = Leaves(trace), contrast(trace, 7, 11, 6)
    through = edges(replace(trace, features="linear ranks"), leaves, [target])[0]
    direct = edges(trace, leaves, [target])[0]
    value, size = target.value(trace), float(through.abs().sum())
    assert abs(float(through[leaves.n_units :].sum()) - value) < 1e-9 * size
    assert abs(float(direct[leaves.n_units :].sum()) - value) > 1e-4 * size  # the control


def test_evidence_of_components(load: Callable[[str], ReplacementModel]) -> None:
    trace = record(load("llama"), IDS, stream="ranks", rows=4)
    leaves, target = Leaves(trace), contrast(trace, 7, 11, 6)
    config = EvidenceConfig(ablations=40, copies=7, resamples=200)
    evidence = measure_evidence(trace, leaves, target, config)
    total = edges(replace(trace, features="linear ranks"), leaves, [target])[0, : leaves.n_units]
    strongest, _ = evidence.samples
    assert strongest.nodes == total.abs().topk(40).indices.tolist()
    for sample in evidence.samples:
        values = run_changed(
            trace, leaves, target, Surgery([torch.tensor([i]) for i in sample.nodes])
        )
        assert sample.effects == pytest.approx((values - measured(trace.model)).tolist())
    by_name = {line.predictor: line for line in strongest.correlations}
    assert by_name["graph"].spearman[1] > 0
    assert by_name["random"].spearman[1] < 0 < by_name["random"].spearman[2]
    assert evidence.curve.n[-1] == int((total != 0).sum())
    for column in evidence.curve[1:]:
        assert column[-1] == pytest.approx(1)


def test_a_target_without_low_rank_parts_is_refused(make_pair: Callable[..., Any]) -> None:
    model = ReplacementModel.create(make_pair("llama"), AdapterConfig(4)).eval()
    with pytest.raises(UserError, match="--stream ranks: expected a target that is a PEFT folder"):
        record(model, IDS, stream="ranks")
