"""Budgets of launches on a GPU: kernels of Triton, and operations of torch that start one."""

from __future__ import annotations

from typing import Any

import executed
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.transcoder import autograd, transcode

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or executed.STAGE is not None,
    reason="counts in Triton's interpreter",
)
D, F = 64, 512
#: Operations of torch that start no kernel.
VIEWS = {
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "flatten", "new_empty",
    "select", "slice", "split", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Lists launches; Triton's kernels are listed and do not run."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.names: list[str] = []
        launches = self

        def launch(self: Any, *_: Any, **__: Any) -> None:
            launches.names.append(f"triton {self.fn.__name__}")

        patch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name == "fastadapt::transcode":
            with self:
                return autograd._transcode(*args)
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(patch: pytest.MonkeyPatch, N: int, *, dense: bool, backward: bool) -> list[str]:
    """Return the launches of a call on N tokens, as its registered ops make them."""
    x, W_enc, W_dec = torch.randn(N, D), torch.randn(F, D), torch.randn(F, D)
    b_enc, b_dec, weight = torch.zeros(F), torch.zeros(D), torch.ones(N)
    g, c = torch.randn(N, D), torch.ones(())
    layout = (dense, None if dense else 4096)
    with Launches(patch) as calls:
        results = autograd._encode(
            x[None], W_enc, b_enc, None, weight, None, "relu", 0.0, 0.0, *layout, backward, "triton"
        )
        codes = results[: autograd.N_CODES]
        norm = autograd.norms(W_dec) if backward or N > autograd.SMALL else None
        autograd._decode(*codes, W_dec, b_dec, x, norm, weight, "triton")
        if backward:
            da, _ = autograd._decode_backward(
                g, c, *codes, W_dec, norm, weight, True, True, "triton"
            )
            need = [True, True, True, False]
            autograd._encode_backward(da, x[None], W_enc, None, None, *codes, 0.0, need, "triton")
            g.sum(0)
    return [*calls.names, "threshold"]  # of min_active, outside the ops


@pytest.mark.parametrize(
    ("N", "dense", "backward", "n"),
    [
        pytest.param(300, False, True, 18, id="step on codes"),
        pytest.param(300, True, True, 32, id="dense step"),
        pytest.param(300, False, False, 10, id="evaluation"),
        pytest.param(64, False, False, 10, id="evaluation of few tokens"),
    ],
)
def test_launches_with_statistics(
    N: int, dense: bool, backward: bool, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = launches(monkeypatch, N, dense=dense, backward=backward)
    assert len(names) == n, names


@pytest.mark.parametrize(
    ("activation", "N", "names"),
    [
        ("relu", 64, ["triton multiply_few_mark", "triton decode_flagged"]),
        ("threshold", 1, ["triton multiply_few_mark", "triton decode_flagged"]),
        ("jumprelu", 1, ["triton multiply_few_mark", "triton decode_flagged"]),
        ("topk", 1, ["triton multiply_few_mark", "triton select_rows", "triton decode_flagged"]),
        ("relu", 65, ["linear", "triton mark", "triton decode_flagged"]),
    ],
)
def test_launches_of_generation(
    activation: str, N: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    tensors = [torch.empty(s, dtype=dtype) for s in ((1, N, D), (F, D), (F,), (F, D), (D,))]
    settings: dict[str, dict[str, Any]] = {
        "relu": {},
        "threshold": {"activation": "batch_topk", "threshold": torch.tensor(0.1)},
        "topk": {"activation": "topk", "k": 3},
        "jumprelu": {
            "activation": "jumprelu",
            "threshold": torch.empty(F, dtype=dtype),
            "bandwidth": 0.1,
        },
    }
    with torch.no_grad(), Launches(monkeypatch) as calls:
        transcode(*tensors, **settings[activation], residual=tensors[0], implementation="triton")
    assert calls.names == names
