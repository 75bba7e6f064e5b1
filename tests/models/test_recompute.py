"""Which of the encoder's codes are saved for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.transcoder import CodeLayout, should_save, transcoder


class SaveQuery(TorchDispatchMode):
    """Record whether the encoder's codes should be saved, before and after the op has run."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: tuple[bool, bool] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.fastadapt.encode.default:
            self.saved = should_save(func, args), should_save(func, args, output)
        return output


@pytest.mark.parametrize(
    ("plan", "active", "saved"),
    [
        (CodeLayout(dense=False), 1, (True, True)),
        (CodeLayout(dense=True), 1, (False, False)),
        (None, 1, (False, True)),  # before the op runs, codes count as dense
        (None, 64, (False, False)),
    ],
)
def test_sparse_codes_are_saved(
    plan: CodeLayout | None, active: int, saved: tuple[bool, bool]
) -> None:
    torch.manual_seed(0)
    x, W_enc, W_dec = torch.randn(1, 8, 16), torch.randn(64, 16), torch.randn(64, 16)
    b_enc = torch.full((64,), -1e3)
    b_enc[:active] = 1e3
    with SaveQuery() as query:
        transcoder(
            x,
            W_enc.requires_grad_(),
            b_enc,
            W_dec,
            torch.zeros(16),
            plan=plan,
            implementation="sparse",
        )
    assert query.saved == saved


def test_other_ops_are_not_saved() -> None:
    assert not should_save(torch.ops.aten.mm.default, (torch.ones(1, 1), torch.ones(1, 1)))
