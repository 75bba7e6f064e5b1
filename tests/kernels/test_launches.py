"""Budgets of launches on a GPU: kernels of Triton, and operations of torch that start one.

Also the bytes that the kernels of nmse read and write.
"""

from __future__ import annotations

from typing import Any

import executed
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.kernels.nmse import nmse
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


def launches(
    patch: pytest.MonkeyPatch,
    N: int,
    *,
    dense: bool,
    backward: bool,
    tanh_scale: float | None = None,
) -> list[str]:
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
        autograd._decode(*codes, W_dec, b_dec, x, norm, weight, tanh_scale, "triton")
        if backward:
            da, _ = autograd._decode_backward(
                g, c, *codes, W_dec, norm, weight, tanh_scale, True, True, "triton"
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
    with_tanh = launches(monkeypatch, N, dense=dense, backward=backward, tanh_scale=4.0)
    assert with_tanh == names


def test_launches_of_nmse(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.kernels.nmse.triton_nmse import nmse_backward_triton, nmse_triton

    x, target, mask = torch.randn(2, 7, D), torch.randn(2, 7, D), torch.ones(2, 7) > 0
    cotangent = torch.ones(1).expand(2)
    with Launches(monkeypatch) as calls:
        _, _, difference, factor = nmse_triton(x, target, mask, 1e-8, True)
        forward = len(calls.names)
        nmse_backward_triton(cotangent, difference, factor, mask)
    assert calls.names == ["triton row_sums", "triton sequence_sums", "triton scale_rows"]
    assert forward == 2


class Moved:
    """Counts the bytes that interpreted kernels load and store."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

        self.n_bytes = 0
        moved = self
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def count(ptrs: Any, mask: Any) -> None:
            size = _get_np_dtype(ptrs.get_element_ty()).itemsize
            moved.n_bytes += int(mask.data.sum()) * size

        def counted_load(self: Any, ptrs: Any, mask: Any, *arguments: Any) -> Any:
            count(ptrs, mask)
            return load(self, ptrs, mask, *arguments)

        def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *arguments: Any) -> Any:
            count(ptrs, mask)
            return store(self, ptrs, value, mask, *arguments)

        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_of_nmse(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """x, target and difference once in the forward pass, difference and gradient in the backward.

    At 7,500 tokens of width 3,584 in bfloat16: 0.161 and 0.108 GB. Beside them, 40 bytes a token.
    """
    B, T, width = 2, 3, 3584
    x, target = torch.randn(2, B, T, width).to(dtype)
    moved = Moved(monkeypatch)
    output = nmse(x.requires_grad_(), target, implementation="triton")
    forward, moved.n_bytes = moved.n_bytes, 0
    output.nmse.sum().backward()
    stream, tokens = x.nbytes, 40 * B * T
    assert 3 * stream <= forward <= 3 * stream + tokens
    assert 2 * stream <= moved.n_bytes <= 2 * stream + tokens
    moved.n_bytes = 0
    nmse(x.detach(), target, implementation="triton")
    assert 2 * stream <= moved.n_bytes <= 2 * stream + tokens


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
