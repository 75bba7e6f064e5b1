"""The share of a device's rate that a step reaches is timed on a real step, or is not stated."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.models.pair import PairConfig
from fastadapt.models.pretrained import shipped_config
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.organism import resolve
from fastadapt.training.planning.devices import MEASURED, Device
from fastadapt.training.planning.flops import Setup, count, random_pair
from fastadapt.training.planning.share import measured_share

CPU = Device("this CPU", "cpu", 16 * 2**30, 5e10, MEASURED)


def setup_of(target: object, n_features: int, tokens: int) -> Setup:
    pair = PairConfig("target", "base", dtype="float32", device="cpu")
    return Setup(target, pair, AdapterConfig(n_features), ObjectiveConfig(), 2, tokens)


@pytest.mark.slow
def test_the_share_is_the_rate_of_a_real_step() -> None:
    """The same step, timed here: the rates differ by noise."""
    from transformers import AutoConfig

    setup = setup_of(AutoConfig.from_pretrained(resolve("organism/target")), 128, 64)
    share = measured_share(setup, CPU)
    assert share is not None
    settings = replace(setup.objective, checkpoint="none")
    model = ReplacementModel.create(random_pair(setup, 2), setup.trained)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    seconds = []
    for _ in range(4):
        began = time.process_time()
        objective(model, Batch(ids, None, ids), 1, settings).loss.backward()
        seconds.append(time.process_time() - began)
    rate = count(replace(setup, objective=settings), 2, 1, 128.0) / min(seconds)
    assert share <= 2 * rate / CPU.flops_per_s
    assert share > 0


def test_a_model_too_large_to_time_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr("fastadapt.training.planning.share.random_pair", refuse)
    large = shipped_config("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    assert large is not None
    assert measured_share(setup_of(large, 8192, 7600), CPU) is None
