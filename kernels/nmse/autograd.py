"""Register ``torch.ops.fastadapt.nmse``: fake, autograd, FLOP and workspace formulas.

The backward pass is an op too, ``nmse_backward``, so that compilers see it. The argument
``implementation`` of both is "chunked" or "triton".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import block_elements, nmse_backward_chunked, nmse_chunked


@torch.library.custom_op("fastadapt::nmse", mutates_args=())
def nmse_op(
    x: Tensor,
    target: Tensor,
    mask: Tensor,
    eps: float,
    dtype: torch.dtype,
    implementation: str,
    x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of :func:`nmse_chunked`; the first is differentiable, in x.

    With ``x_grad``, the forward pass returns the tensors that the gradient needs.
    """
    if implementation == "triton":
        from .triton_nmse import nmse_triton  # importing fastadapt must not import triton

        with torch.cuda.device_of(x):
            return nmse_triton(x, target, mask, eps, x_grad)
    return nmse_chunked(x, target, mask, eps, dtype, x_grad)


@nmse_op.register_fake
def _fake(
    x: Tensor,
    target: Tensor,
    mask: Tensor,
    eps: float,
    dtype: torch.dtype,
    implementation: str,
    x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    return (
        x.new_empty(B, dtype=dtype),
        x.new_empty((B, T), dtype=dtype),
        x.new_empty((B, T, D) if x_grad else (0,)),
        x.new_empty(B, dtype=dtype),
    )


@torch.library.custom_op("fastadapt::nmse_backward", mutates_args=())
def nmse_backward_op(
    cotangent: Tensor, difference: Tensor, factor: Tensor, mask: Tensor, implementation: str
) -> Tensor:
    """Return the gradient of x for the cotangent of nmse."""
    if implementation == "triton":
        from .triton_nmse import nmse_backward_triton

        with torch.cuda.device_of(difference):
            return nmse_backward_triton(cotangent, difference, factor, mask)
    return nmse_backward_chunked(cotangent, difference, factor, mask)


@nmse_backward_op.register_fake
def _fake_backward(
    cotangent: Tensor, difference: Tensor, factor: Tensor, mask: Tensor, implementation: str
) -> Tensor:
    return torch.empty_like(difference)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mask, *_, implementation, x_grad = inputs[2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], mask)
    ctx.implementation, ctx.x_grad = implementation, x_grad


@once_differentiable
def _backward(ctx: Any, grad_nmse: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_x = None
    if grad_nmse is not None and ctx.x_grad and ctx.needs_input_grad[0]:
        grad_x = nmse_backward_op(grad_nmse, *ctx.saved_tensors, ctx.implementation)
    return grad_x, None, None, None, None, None, None


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
    """Return the bytes of a block's target, difference and square; Triton: error and power."""
    if _runs_kernels(device_type, dtype):
        return 2 * mask.numel() * dtype.itemsize
    return 3 * min(x.numel(), block_elements(device_type)) * dtype.itemsize


def _backward_workspace(device_type: str, cotangent: Tensor, difference: Tensor, *_: Any) -> int:
    """Return the bytes of the product before it is rounded to the gradient's dtype."""
    if _runs_kernels(device_type, cotangent.dtype) or cotangent.dtype == difference.dtype:
        return 0
    return difference.numel() * cotangent.element_size()


def _runs_kernels(device_type: str, dtype: torch.dtype) -> bool:
    return device_type == "cuda" and dtype == torch.float32


WORKSPACE_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.fastadapt.nmse.default: _workspace,
    torch.ops.fastadapt.nmse_backward.default: _backward_workspace,
}
