"""The plain step of the benchmark computes the objective's losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.naive_step import NaiveStep
from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.models.pair import ModelPair
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("cutoff", [0, 1, 3])
def test_the_plain_step_equals_the_objective(
    cutoff: int, checkpoint: bool, make_pair: Callable[..., ModelPair]
) -> None:
    pair = make_pair("qwen2", dtype="float64")
    plain_pair = copy.deepcopy(pair)
    model = ReplacementModel.create(pair, AdapterConfig(24))
    adapter: Any
    with torch.no_grad():
        for adapter in model.adapters:
            adapter.W_dec.normal_(std=0.1)
    plain = NaiveStep(plain_pair, list(model.adapters), checkpoint=checkpoint)
    ids = torch.randint(3, 40, (1, 9))
    config = ObjectiveConfig(sparsity=0.03, nmse=0.7, bridge=1.3)
    ours = objective(model, Batch(ids, None, ids), cutoff, config)
    theirs = plain(ids, cutoff, config)
    ours.loss.backward()
    theirs["loss"].backward()
    for name in ("kl", "nmse", "sparsity"):
        torch.testing.assert_close(ours.metrics[name], theirs[name].detach(), rtol=1e-6, atol=0)
    for name in ("bridge_adapter_to_target", "bridge_target_to_adapter"):
        value = ours.metrics.get(name, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-6, atol=1e-12)
    for adapter, dense in zip(model.adapters, plain.adapted, strict=True):
        for name, parameter in adapter.named_parameters():
            torch.testing.assert_close(
                parameter.grad, dense.get_parameter(name).grad, rtol=1e-5, atol=1e-9
            )
