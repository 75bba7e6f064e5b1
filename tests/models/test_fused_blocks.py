"""Fused kernels in frozen blocks compute what transformers' modules compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.errors import RunError
from fastadapt.models.architectures import ARCHITECTURES
from fastadapt.models.fused_blocks import Implementation
from fastadapt.models.replacement import ReplacementModel
from fastadapt.models.self_check import check_traversal
from fastadapt.objective import ObjectiveConfig, objective

IDS = torch.tensor([[5, 9, 23, 7, 31, 8, 3], [8, 30, 4, 4, 17, 2, 2]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], dtype=torch.bool)
#: Architectures whose rotary embedding is not fused.
OTHER_ROTARY = ("gemma4_text", "glm4")
BATCH = Batch(IDS, REAL, torch.where(REAL, IDS, -100))


def adapted(pair: Any, trained: Any = None) -> ReplacementModel:
    model = ReplacementModel.create(pair, trained or AdapterConfig(24))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.adapters.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        for p in model.model.parameters():  # weights of norms are all 1 or 0 in a new model
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def step(model: ReplacementModel, implementation: Implementation) -> dict[str, Tensor]:
    """Return the losses and the gradients of a step."""
    model.fused.implementation = implementation
    model.zero_grad()
    out = objective(model, BATCH, 1, ObjectiveConfig(checkpoint="attention"))
    out.loss.backward()
    grads = {name: p.grad for name, p in model.adapters.named_parameters() if p.grad is not None}
    return {**out.metrics, **grads}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_the_modules_in_float64(
    architecture: str, make_pair: Callable[..., Any], float64_clean: None
) -> None:
    model = adapted(make_pair(architecture, "float64"))
    rotary = ["rotary"] * (architecture not in OTHER_ROTARY)
    assert model.fused.fused == {"norms", "mlps", *rotary}
    plain, fused = step(model, "off"), step(model, "reference")
    assert plain.keys() == fused.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_operation_is_replaced(
    architecture: str, make_pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused block runs no square, no sigmoid and no negation of its modules."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model = adapted(make_pair(architecture))
    model.fused.implementation = "triton"
    inputs = model.block_inputs(IDS, None)
    with torch.no_grad(), Names() as seen:
        model.block(0, inputs.hidden, inputs.arguments[0], "target")
    unfused = {"aten::pow", "aten::rsqrt", "aten::silu", "aten::gelu", "aten::neg", "aten::cat"}
    if architecture == "gemma4_text":  # norms without weights, per-layer inputs, another rotary
        unfused -= {"aten::pow", "aten::gelu", "aten::neg", "aten::cat"}
    if architecture == "glm4":
        unfused -= {"aten::neg", "aten::cat"}
    assert not unfused & set(seen.names)
    norms = {"gemma2": 4, "gemma3_text": 6, "gemma4_text": 7, "olmo2": 4}
    norms |= {"qwen3": 4, "qwen3_5_text": 4, "glm4": 4}
    assert seen.names.count("fastadapt::rms_norm") == norms.get(architecture, 2)
    assert seen.names.count("fastadapt::gated") == 1
    assert seen.names.count("fastadapt::rope") == (architecture not in OTHER_ROTARY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("triton", marks=pytest.mark.slow)]
)
def test_the_self_check_compares_with_the_modules(
    implementation: Implementation, architecture: str, dtype: str, make_pair: Callable[..., Any]
) -> None:
    """Errors of fused operations are within rounding; a wrong formula of norms is detected."""
    pair = make_pair(architecture, dtype)
    model = adapted(pair)
    model.fused.implementation = implementation
    check_traversal(model, BATCH)
    if implementation == "reference":
        pair = make_pair(architecture, dtype)
        pair.paths = replace(pair.paths, norm_offset=0.3 + pair.paths.norm_offset)
        wrong = adapted(pair)
        wrong.fused.implementation = implementation
        with pytest.raises(RunError, match="does not give the logits"):
            check_traversal(wrong, BATCH)


def test_off_without_a_gpu(make_pair: Callable[..., Any]) -> None:
    """On a CPU the modules' own operations run, bit for bit."""
    model = adapted(make_pair("qwen2"))
    assert model.fused.implementation == "auto"
    auto, off = step(model, "auto"), step(model, "off")
    assert all(torch.equal(auto[name], off[name]) for name in off)


def test_a_hook_on_an_activation_switches_the_product_off(make_pair: Callable[..., Any]) -> None:
    model = adapted(make_pair("qwen2"))
    model.fused.implementation = "reference"
    seen: list[Tensor] = []
    target: Any = model.mlps[0].target
    handle = target.act_fn.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad(), model.mode("target"):
        model(IDS)
        handle.remove()
        model(IDS)
    assert len(seen) == 1


def test_trained_norms_keep_their_own_forward(make_pair: Callable[..., Any]) -> None:
    model = adapted(make_pair("qwen2"), "norms")
    plain, fused = step(model, "off"), step(model, "reference")
    assert any("norm" in name for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_copy_runs_its_own_weights(make_pair: Callable[..., Any]) -> None:
    model = adapted(make_pair("qwen2"))
    model.fused.implementation = "reference"
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IDS).logits
        for p in other.model.parameters():
            p.zero_()
        assert torch.equal(model(IDS).logits, before)
        assert other.fused is model.fused
        assert not other(IDS).logits.any()


def test_other_models_of_the_class_do_not_change(make_pair: Callable[..., Any]) -> None:
    from transformers.models.qwen2 import modeling_qwen2

    before = modeling_qwen2.apply_rotary_pos_emb
    model = adapted(make_pair("qwen2"))
    model.fused.implementation = "triton"
    assert modeling_qwen2.apply_rotary_pos_emb is before
    assert "forward" not in vars(make_pair("qwen2").target.model.norm)
