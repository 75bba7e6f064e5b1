"""Transcoders that compute the whole MLP: the base's MLP has no part in the replacement."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadapt.adapter.files import save_adapters
from fastadapt.adapter.module import AdapterConfig, TranscoderAdapter
from fastadapt.batch import Batch
from fastadapt.errors import UserError
from fastadapt.evaluation.runs import ComparedModel
from fastadapt.features.store.sets import FeatureSet
from fastadapt.graphs.linear.trace import record
from fastadapt.interop import hu2026
from fastadapt.interventions import onto_target, scale_features
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.trained_files import load_adapters, read_adapters
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.optimizer import AdapterOptimizer, OptimizerConfig

IDS = torch.tensor([[5, 9, 23, 7, 31, 8]])
CONFIG = AdapterConfig(24, base_mlp=False)


def model_of(pair: Any, config: AdapterConfig = CONFIG) -> ReplacementModel:
    model = ReplacementModel.create(pair, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


class Transcoder(torch.nn.Module):
    """The formula in dense PyTorch, as the MLP of a block: the oracle."""

    def __init__(self, adapter: TranscoderAdapter) -> None:
        super().__init__()
        self.weights = copy.deepcopy(adapter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = (x @ self.weights.W_enc.T + self.weights.b_enc).relu()
        return a @ self.weights.W_dec + self.weights.decoder_bias()


def plain(pair: Any, adapters: Any) -> Any:
    model = copy.deepcopy(pair.target)
    for layer, adapter in zip(model.model.layers, adapters, strict=True):
        layer.mlp = Transcoder(adapter)
    return model


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_it_is_the_target_with_transcoders_as_mlps(
    architecture: str, make_pair: Callable[..., Any]
) -> None:
    pair = make_pair(architecture)
    beside = model_of(copy.deepcopy(pair), replace(CONFIG, base_mlp=True))
    given = model_of(copy.deepcopy(pair)).adapters
    oracle, target = plain(pair, given), copy.deepcopy(pair.target)
    model = ReplacementModel(pair, given)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits)
        with model.mode("hybrid"), beside.mode("hybrid"):
            assert torch.equal(model(IDS).logits, beside(IDS).logits)
        with model.mode("target"):
            assert torch.equal(model(IDS).logits, target(IDS).logits)
        # Beside the base's MLP the same weights are another model.
        assert not torch.allclose(model(IDS).logits, beside(IDS).logits, atol=1e-2)
        for mlp in model.mlps:  # the base's MLP has no part in it
            for p in mlp.base.parameters():
                p.fill_(torch.nan)
        assert model(IDS).logits.isfinite().all()
        greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(IDS, **greedy), oracle.generate(IDS, **greedy))


def test_a_step_has_the_gradients_of_the_formula(make_pair: Callable[..., Any]) -> None:
    pair = make_pair("qwen2", "float64")
    given = model_of(copy.deepcopy(pair)).adapters
    student = plain(pair, given)
    with torch.no_grad():
        y = pair.target(IDS).logits[:, :-1].log_softmax(-1)
    kl = (y.exp() * (y - student(IDS).logits[:, :-1].log_softmax(-1))).sum(-1).mean()
    kl.backward()
    model = ReplacementModel(pair, given)
    gradients = []
    for policy in ("none", "full"):
        config = ObjectiveConfig(sparsity=0, nmse=0, bridge=0, checkpoint=policy)
        out = objective(model, Batch(IDS, None, IDS), 1, config)
        torch.testing.assert_close(out.loss, kl, rtol=1e-6, atol=0)
        assert 0 < float(out.metrics["l0"]) < 24
        out.loss.backward()
        gradients.append([p.grad for p in model.adapters.parameters()])
        model.adapters.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    names = dict(student.named_parameters())
    expected = [
        names[f"model.layers.{i}.mlp.weights.{name}"].grad
        for i, adapter in enumerate(model.adapters)
        for name, _ in adapter.named_parameters()
    ]
    for ours, theirs in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_it_learns_from_mlps_that_are_zero(make_pair: Callable[..., Any]) -> None:
    model = ReplacementModel.create(make_pair("qwen2"), CONFIG)
    assert all(not p.any() for n, p in model.adapters.named_parameters() if n.endswith("W_dec"))
    parameters = dict(model.adapters.named_parameters())
    optimizer, losses = AdapterOptimizer(parameters, OptimizerConfig(lr=1e-2)), []
    for step in range(8):
        out = objective(model, Batch(IDS, None, IDS), step % 4, ObjectiveConfig(sparsity=1e-4))
        out.loss.backward()
        losses.append(float(out.metrics["kl"]))
        optimizer.step(1e-2, optimizer.gradient_norm())
    assert losses[-1] < losses[0] / 2


def test_files_say_that_the_base_is_off(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of(make_pair("qwen2"))
    save_adapters(model.adapters, tmp_path, {"objective": {"sparsity": 0.1, "bridge": 1.0}})
    card = json.loads((tmp_path / "fastadapt.json").read_text())
    assert (card["additive"], card["adapter"]["base_mlp"]) == (False, False)
    assert "in place of the base MLP's" in card["hook_out"]
    again = ReplacementModel(make_pair("qwen2"), load_adapters(tmp_path)[0])
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    compared = ComparedModel.from_card("run", tmp_path, read_adapters(tmp_path)[1])
    assert compared.variant == "whole-mlp"
    assert compared.description == "transcoder of the whole MLP, λ=0.1"
    (tmp_path / "fastadapt.json").write_text(json.dumps({**card, "additive": True}))
    with pytest.raises(UserError, match=r"'additive' must be false for transcoders in place of"):
        load_adapters(tmp_path)
    del card["adapter"]["base_mlp"]  # a file of an earlier version
    (tmp_path / "fastadapt.json").write_text(json.dumps({**card, "additive": True}))
    earlier: Any = load_adapters(tmp_path)[0][0]
    assert earlier.config.base_mlp


def test_what_needs_the_base_refuses_it(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    model = model_of(make_pair("qwen2")).eval()
    features = FeatureSet.from_pairs([(0, 1)], adapter="0" * 64, shape=(3, 24), expression="hand")
    with pytest.raises(UserError, match=r"onto-target: these transcoders compute the whole"):
        onto_target(model.adapters, features)
    with (
        pytest.raises(UserError, match=r"onto-target: these transcoders compute the whole"),
        scale_features(model, features, -0.5, onto="target"),
    ):
        pass
    with scale_features(model, features, 0.0):  # removal has its usual meaning
        changed: Any = model.adapters[0]
        assert not changed.W_dec[1].any()
    with pytest.raises(UserError, match=r"graphs: expected adapters beside the base's MLPs"):
        record(model, [5, 9, 23])
    with pytest.raises(UserError, match=r"format hu2026 needs adapters beside the base's MLPs"):
        hu2026.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
