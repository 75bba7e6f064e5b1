"""Which of the encoder's codes are kept for the backward pass, whenever torch asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.transcoder import SAVED_OPS, Plan, transcoder
from fastadapt.models.recompute import _keeps


class Asked(TorchDispatchMode):
    """What is kept of the encoder, asked before it ran and after."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: tuple[bool, bool] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in SAVED_OPS:
            before, after = object(), type("After", (), {"op_output": output})()
            self.kept = _keeps(False, before, func, *args), _keeps(False, after, func, *args)
        return output


@pytest.mark.parametrize(
    ("plan", "active", "kept"),
    [
        (Plan(dense=False), 1, (True, True)),
        (Plan(dense=True), 1, (False, False)),
        (None, 1, (False, True)),  # before it ran nobody knows: dense ones are not to be kept
        (None, 64, (False, False)),
    ],
)
def test_sparse_codes_are_kept(plan: Plan | None, active: int, kept: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    x, W_enc, W_dec = torch.randn(1, 8, 16), torch.randn(64, 16), torch.randn(64, 16)
    b_enc = torch.full((64,), -1e3)
    b_enc[:active] = 1e3
    with Asked() as asked:
        transcoder(
            x,
            W_enc.requires_grad_(),
            b_enc,
            W_dec,
            torch.zeros(16),
            plan=plan,
            implementation="sparse",
        )
    assert asked.kept == kept
