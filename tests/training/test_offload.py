"""Offload of frozen blocks gives the same bits, and gathers only the blocks in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from torch.distributed.tensor import DTensor

from fastadapt.cli.train import parse_train
from fastadapt.distributed.offload import group_of_one
from fastadapt.distributed.ranks import ALONE, Ranks
from fastadapt.errors import UserError
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import objective
from fastadapt.training import trainer
from fastadapt.training.checkpoint import load_latest
from fastadapt.training.config import TrainConfig
from fastadapt.training.planning.estimate import plan, remedies
from fastadapt.training.trainer import train

CPU = torch.device("cpu")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint, passed = load_latest(folder / "checkpoints")
    assert checkpoint is not None
    assert passed == []
    return {f"{g}.{n}": t for g, tensors in checkpoint.tensors.items() for n, t in tensors.items()}


@pytest.mark.parametrize(
    "policy",
    ["attention", *(pytest.param(policy, marks=pytest.mark.slow) for policy in ("none", "full"))],
)
def test_the_same_bits_and_resumption_with_and_without_offload(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, policy: str
) -> None:
    def run(name: str, offload: bool, steps: int, resume: bool = False) -> None:
        config = tiny_config(
            **{
                "objective.checkpoint": policy,
                "optimizer.accumulation": 2,
                "optimizer.max_steps": 6,
                "pair.offload": offload,
                "run.output": str(tmp_path / name),
            }
        )

        def stop_after_steps(record: dict) -> None:
            if record["kind"] == "train" and record["step"] == steps < 6:
                stop.set()

        stop = Event()
        train(config, resume=resume, sinks=[stop_after_steps], stop=stop)

    run("on device", False, 6)
    run("offloaded", True, 6)
    run("moved", True, 2)
    run("moved", False, 4, resume=True)
    run("moved", True, 6, resume=True)
    names = ("on device", "offloaded", "moved")
    on_device, offloaded, moved = (weights(tmp_path / name) for name in names)
    assert on_device.keys() == offloaded.keys() == moved.keys()
    for name, tensor in on_device.items():
        assert torch.equal(offloaded[name], tensor), name
        assert torch.equal(moved[name], tensor), name
    ours = (tmp_path / "offloaded" / "adapter" / "layer_1.safetensors").read_bytes()
    assert ours == (tmp_path / "on device" / "adapter" / "layer_1.safetensors").read_bytes()


def gathered(model: ReplacementModel) -> list[int]:
    """Return the blocks whose frozen weights are gathered."""
    return [
        i
        for i, block in enumerate(model.blocks)
        if any(not isinstance(p, DTensor) for p in block.parameters() if not p.requires_grad)
    ]


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_block_is_gathered_only_while_it_runs(policy: str) -> None:
    config, _ = parse_train(
        ["organism", "--pair.offload", "true", "--objective.checkpoint", policy]
    )
    with group_of_one(CPU, ALONE):
        model, feed = trainer.load_model_and_data(config, ALONE, CPU)
        at_once: list[list[int]] = []
        for mlp in model.mlps:
            mlp.register_forward_pre_hook(lambda *_: at_once.append(gathered(model)))
        batch, _ = feed.batch(feed.train, [0, 1])
        out = objective(model, batch, 2, config.objective)
        forward = len(at_once)
        assert gathered(model) == []
        out.loss.backward()
        assert gathered(model) == []
    # The running block and the prefetched next one.
    assert max(map(len, at_once)) <= 2
    assert {i for blocks in at_once for i in blocks} == {0, 1, 2, 3}
    assert (len(at_once) > forward) == (policy == "full")
    assert all(p.grad is not None for p in model.adapters.parameters())


def test_one_process_only(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(UserError, match=r"pair\.offload needs a single process"):  # noqa: SIM117
        with group_of_one(CPU, Ranks(0, 2)):
            pass
    config = tiny_config(**{"pair.offload": True, "optimizer.accumulation": 2})
    with pytest.raises(UserError, match=r"pair\.offload needs --gpus 1"):
        plan(config, gpus=2)


@pytest.mark.slow
def test_the_plan_moves_offloaded_weights_to_host_memory() -> None:
    config, _ = parse_train(["r1-distill-qwen-7b", "--objective.checkpoint", "attention"])
    offloaded = dataclasses.replace(config, pair=dataclasses.replace(config.pair, offload=True))
    full, less = plan(config, "h100"), plan(offloaded, "h100")
    moved = full.parts["frozen target"] + full.parts["frozen base MLPs"]
    moved -= less.parts["frozen target"]
    assert less.host_bytes == moved
    assert full.host_bytes == 0
    assert less.peak_bytes == full.peak_bytes - moved + less.parts["gathered blocks"]
    small = dataclasses.replace(full.device, name="a small GPU", memory_bytes=40_000_000_000)
    assert dict(remedies(config, dataclasses.replace(full, device=small)))["pair.offload true"] == (
        less.peak_bytes
    )
