"""Register ``torch.ops.fastadapt.nmse``: fake, autograd, FLOP and workspace formulas."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import block_elements, nmse_chunked


@torch.library.custom_op("fastadapt::nmse", mutates_args=())
def nmse_op(
    x: Tensor, target: Tensor, mask: Tensor, eps: float, dtype: torch.dtype, x_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`nmse_chunked`. Only the first result is differentiable, in x.

    With ``x_grad``, the forward pass saves the tensors that the gradient needs.
    """
    return nmse_chunked(x, target, mask, eps, dtype, x_grad)


@nmse_op.register_fake
def _fake(
    x: Tensor, target: Tensor, mask: Tensor, eps: float, dtype: torch.dtype, x_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    return (
        x.new_empty(B, dtype=dtype),
        x.new_empty((B, T), dtype=dtype),
        x.new_empty((B, T, D) if x_grad else (0,)),
        x.new_empty(B, dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.x_grad = inputs[-1]


@once_differentiable
def _backward(ctx: Any, grad_nmse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    difference_BTD, factor_B = ctx.saved_tensors
    grad_x = None
    if grad_nmse is not None and ctx.x_grad and ctx.needs_input_grad[0]:
        grad_x = (difference_BTD * (grad_nmse * factor_B)[:, None, None]).to(difference_BTD.dtype)
    return grad_x, None, None, None, None, None


nmse_op.register_autograd(_backward, setup_context=_setup_context)


def _flops(x: tuple[int, int, int], *arguments: Any, out_shape: Any = None) -> int:
    """Count elementwise operations: a difference, two squares, two sums."""
    B, T, D = x
    return 5 * B * T * D


FLOP_FORMULAS = {torch.ops.fastadapt.nmse: _flops}


def _workspace(
    device_type: str,
    x: Tensor,
    target: Tensor,
    mask: Tensor,
    eps: float,
    dtype: torch.dtype,
    *_: Any,
) -> int:
    """Return the bytes of a block's target, difference and square."""
    return 3 * min(x.numel(), block_elements(device_type)) * dtype.itemsize


WORKSPACE_FORMULAS = {torch.ops.fastadapt.nmse.default: _workspace}
