"""The plan against a tracker of living tensors: a step of the true shapes on fake tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from live_bytes import LiveBytes
from transformers import Qwen2Config

from fastadapt.batch import Batch
from fastadapt.models import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training import memory
from fastadapt.training.config import TrainConfig, from_dict
from fastadapt.training.shapes import Shapes
from fastadapt.training.work import Setup, fake_pair

LAYERS, TOKENS = 10, 10_000


def run_config(policy: str) -> TrainConfig:
    return from_dict(
        {
            "pair": {"target": "target", "base": "base", "dtype": "bfloat16"},
            "adapter": {"n_features": 8192},
            "objective": {"checkpoint": policy},
            "data": {"train": "train.jsonl", "validation": "validation.jsonl"},
            "optimizer": {"masters": False},
            "run": {"output": "out"},
        }
    )


def test_the_tracker_counts_what_lives() -> None:
    with LiveBytes() as live:
        a = torch.ones(1000)
        b = a.view(10, 100) * 2
        assert live.alive == 8000
        del a
        assert (live.alive, live.peak) == (4000, 8000)
        assert b.sum() == 2000


@pytest.mark.parametrize("policy", ["none", "attention", "full"])
@pytest.mark.parametrize("dense", [False, True], ids=["codes", "dense"])
def test_the_plan_is_what_lives(
    policy: str, dense: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the 7B pair's width, 10,000 tokens. What ops allocate within themselves is not seen."""
    made = ReplacementModel.block_inputs

    def without_masks(self, *args):
        # To transformers a fake tensor is one that is traced: it makes masks that a run has not.
        inputs = made(self, *args)
        for arguments in inputs.arguments:
            arguments["attention_mask"] = None
        return inputs

    monkeypatch.setattr(ReplacementModel, "block_inputs", without_masks)
    config = run_config(policy)
    model_config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=LAYERS,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
        tie_word_embeddings=False,
    )
    shapes = Shapes.of(config, model_config, TOKENS, "cuda")
    setup = Setup(model_config, config.pair, config.adapter, config.objective, 1, TOKENS)
    codes = 8192.0 if dense else shapes.codes_per_token * 0.999
    with fake_pair(setup, LAYERS) as pair:
        model = ReplacementModel.create(pair, config.adapter)
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        with LiveBytes() as live:
            for parameter in model.parameters():
                live.see(parameter.data)
            live.peak = weights = live.alive
            out = objective(model, Batch(ids, None, ids), 1, config.objective, [codes] * LAYERS)
            forward, live.peak = live.peak, live.alive
            out.loss.backward()
            backward, after = live.peak, live.alive
    fixed = memory._weights(shapes)
    assert weights == sum(fixed.values()) - fixed["moments"]  # which the optimiser makes
    counts = LAYERS * 8192 * 8  # of features, in the step's statistics
    gradients = LAYERS * memory._gradient(shapes) + counts
    assert after - weights == pytest.approx(gradients, rel=1e-4)
    phases = memory._phases(shapes, dense)
    planned_forward = max(phases["forward"], phases["head"]) - fixed["moments"]
    planned_backward = max(phases["backward"], phases["head, backward"]) - fixed["moments"]
    unseen = memory._op_scratch(shapes, 2, dense)
    with capsys.disabled():
        print(
            f" {policy}: forward {forward / 1e9:.2f} of {planned_forward / 1e9:.2f} GB planned, "
            f"backward {backward / 1e9:.2f} of {planned_backward / 1e9:.2f} "
        )
    assert forward <= planned_forward <= 1.05 * forward + memory._logits(shapes)
    assert backward <= planned_backward <= 1.05 * backward + unseen


def test_codes_are_the_smaller_the_sparser() -> None:
    shapes = Shapes.of(
        run_config("full"), Qwen2Config(num_hidden_layers=3, hidden_size=64), 500, "cuda"
    )
    sparse = [
        memory._kept_codes(dataclasses.replace(shapes, codes_per_token=n), 1, False)
        for n in (0.0, 1.0, 10.0)
    ]
    assert sparse == sorted(set(sparse))
    assert memory._kept_codes(shapes, 1, True) == 0
    kept = dataclasses.replace(shapes, checkpoint="none")
    assert memory._kept_codes(kept, 1, True) == 2 * 500 * 8192 * 2
