"""Register ``torch.ops.fastadapt.rms_norm``, ``gated`` and ``rope`` with their backward ops.

The ops run the Triton kernels. Their fake implementations let plans and compilers trace them on any
device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastadapt.kernels.device import runs_triton

custom_op = torch.library.custom_op


def _check_runs(x: Tensor) -> None:
    if not runs_triton(x.device.type):
        raise ValueError(
            f'implementation: "triton" needs a GPU, got tensors on {x.device.type}; use "auto", or '
            "set TRITON_INTERPRET=1 to interpret the kernels (for tests)"
        )


@custom_op("fastadapt::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """Return the normalised rows, and each row's reciprocal root mean square, float32 [rows]."""
    _check_runs(x)
    from .triton_norm import forward  # importing fastadapt must not import triton

    return forward(x, weight, eps, offset, rounds_first)


@rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@custom_op("fastadapt::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> Tensor:
    """Return the gradient of ``x``."""
    from .triton_norm import backward

    return backward(grad, x, weight, rstd, offset)


@rms_norm_backward_op.register_fake
def _(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.offset, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


@once_differentiable
def _norm_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = rms_norm_backward_op(grad, *ctx.saved_tensors, ctx.offset)
    return dx, None, None, None, None


rms_norm_op.register_autograd(_norm_backward, setup_context=_norm_context)


@custom_op("fastadapt::gated", mutates_args=())
def gated_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``."""
    _check_runs(gate)
    from .triton_gated import forward

    return forward(gate, up, activation)


@gated_op.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


@custom_op("fastadapt::gated_backward", mutates_args=())
def gated_backward_op(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``gate`` and ``up``."""
    from .triton_gated import backward

    return backward(grad, gate, up, activation)


@gated_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _gated_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


@once_differentiable
def _gated_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_backward_op(grad, *ctx.saved_tensors, ctx.activation), None


gated_op.register_autograd(_gated_backward, setup_context=_gated_context)


@custom_op("fastadapt::rope", mutates_args=())
def rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return q and k rotated by the angles or, with ``inverse``, by the negative angles."""
    _check_runs(q)
    from .triton_rope import rotate

    return rotate(q, k, cos, sin, inverse)


@rope_op.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))  # type: ignore[return-value]


def _rope_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


@once_differentiable
def _rope_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    # A rotation's transpose is the rotation by the negative angle.
    return *rope_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


rope_op.register_autograd(_rope_backward, setup_context=_rope_context)
