"""Budgets of a step of the 7B pair: bytes that elementwise operations move, and launches.

Counted on fake tensors of the true shapes, at T = 7,500, an L0 of 10 and a cutoff of 14.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.step_models import PAPER, model_config, pair_config
from fastadapt.adapter.module import AdapterConfig
from fastadapt.batch import Batch
from fastadapt.models.replacement import ReplacementModel
from fastadapt.objective import ObjectiveConfig, objective
from fastadapt.training.planning.flops import Setup, fake_pair

#: Operations that launch nothing, beside views; fake tensors ask for their device by one.
NO_KERNEL = {
    "device",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "_unsafe_view",
    "lift_fresh",
}
PRODUCTS = {"mm", "addmm", "bmm", "addbmm", "baddbmm"}
OURS = {
    *("encode", "decode", "encode_backward", "decode_backward", "norms"),
    *("nmse", "nmse_backward", "linear_kl"),
}


class Traffic(TorchDispatchMode):
    """Sums launches and bytes of tensors that operations read and write, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in NO_KERNEL:
            return out
        kind = (
            "product" if name in PRODUCTS
            else "attention" if "scaled_dot_product" in name
            else "ours" if name in OURS
            else "elementwise"
        )  # fmt: skip
        tensors = {id(t): t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        moved = [*tensors.values(), *(t for t in tree_iter(out) if isinstance(t, Tensor))]
        self.launches[kind] += 1
        self.bytes[kind] += sum(map(_bytes, moved))
        return out


def _bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's memory; expanded dimensions count once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride else 1
    return entries * tensor.element_size()


def traffic(setup: Setup, n_layers: int, cutoff: int, fused: bool) -> Traffic:
    """Count one step, forward and backward."""
    with fake_pair(setup, n_layers) as pair:
        model = ReplacementModel.create(pair, setup.trained)
        model.fused.implementation = "triton" if fused else "off"
        ids = torch.zeros(1, setup.tokens, dtype=torch.int64)
        with Traffic() as counted:
            batch = Batch(ids, None, ids)
            objective(model, batch, cutoff, setup.objective, [10.0] * n_layers).loss.backward()
    return counted


def whole(setup: Setup, fused: bool) -> tuple[Counter[str], Counter[str]]:
    """Extrapolate launches and bytes to 28 layers and cutoff 14: both are linear in layers."""
    two, below, above = (traffic(setup, *depths, fused) for depths in ((2, 1), (3, 2), (3, 1)))
    launches, moved = Counter(two.launches), Counter(two.bytes)
    for name, total in (("launches", launches), ("bytes", moved)):
        for kind in total:
            first = getattr(two, name)[kind]
            steps = [getattr(more, name)[kind] - first for more in (below, above)]
            total[kind] = first + (PAPER.layers // 2 - 1) * sum(steps)
    return launches, moved


@pytest.mark.quick("fused")
@pytest.mark.parametrize(
    ("fused", "gigabytes", "launches"),
    [(True, 410, 3100), (False, 1150, 7600)],
    ids=("fused", "plain"),
)
def test_budget(
    fused: bool, gigabytes: int, launches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ObjectiveConfig(checkpoint="attention")
    adapter = AdapterConfig(PAPER.features)
    setup = Setup(model_config(PAPER), pair_config(PAPER), adapter, config, 1, tokens=7500)
    counts, moved = whole(setup, fused)
    total = sum(counts.values())
    with capsys.disabled():
        print(
            f" {'fused' if fused else 'plain'} blocks: {total:,} launches, elementwise operations "
            f"{counts['elementwise']:,} and {moved['elementwise'] / 1e9:.0f} GB "
        )
    assert moved["elementwise"] <= gigabytes * 1e9
    assert total <= launches
