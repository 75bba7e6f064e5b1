"""Register ``torch.ops.fastadapt.linear_kl``: fake, autograd, FLOP and workspace formulas."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import CHUNKED
from .chunks import Elementwise, block_elements, chunk_rows, linear_kl_chunks


@torch.library.custom_op("fastadapt::linear_kl", mutates_args=())
def linear_kl_op(
    hidden_teacher: Tensor,
    hidden_students: Tensor,
    head: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    softcap: float | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    implementation: str,
    students_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`linear_kl_chunks`. Only the first result, kl, is differentiable.

    ``implementation`` is "chunked" or "triton". The flags select the gradients to compute in the
    forward pass.
    """
    with torch.autocast(head.device.type, enabled=False), torch.cuda.device_of(head):
        return linear_kl_chunks(
            _elementwise(implementation),
            hidden_teacher,
            hidden_students,
            head,
            weights,
            labels,
            softcap,
            chunk_tokens,
            logits_dtype,
            students_grad,
            head_grad,
        )


def _elementwise(implementation: str) -> Elementwise:
    if implementation == "triton":
        from .triton_kl import TRITON  # importing fastadapt must not import triton

        return TRITON
    return CHUNKED


@linear_kl_op.register_fake
def _fake(
    hidden_teacher: Tensor,
    hidden_students: Tensor,
    head: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    softcap: float | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    implementation: str,
    students_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    S, T, D = hidden_students.shape
    V = head.shape[0]
    return (
        weights.new_empty(S),
        weights.new_empty(S, T),
        weights.new_empty((0,) if labels is None else (S, T)),
        weights.new_empty((S, T), dtype=torch.bool),
        weights.new_empty(T),
        hidden_students.new_empty((S, T, D) if students_grad else (0,)),
        weights.new_empty((S, V, D) if head_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, scale, grad_students, grad_head = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scale, grad_students, grad_head)
    ctx.head_dtype = inputs[2].dtype
    ctx.computed = inputs[-2:]


@once_differentiable
def _backward(ctx: Any, grad_kl: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    scale_T, grad_students_STD, grad_head_SVD = ctx.saved_tensors
    students_grad, head_grad = ctx.computed
    grad_students = grad_head = None
    if grad_kl is not None and students_grad and ctx.needs_input_grad[1]:
        factor_ST1 = (grad_kl[:, None] * scale_T)[..., None]
        live = scale_T[:, None] != 0
        product = grad_students_STD * factor_ST1
        grad_students = torch.where(live, product, 0).to(grad_students_STD.dtype)
    if grad_kl is not None and head_grad and ctx.needs_input_grad[2]:
        grad_head = torch.einsum("s,svd->vd", grad_kl, grad_head_SVD).to(ctx.head_dtype)
    return None, grad_students, grad_head, *[None] * 8


linear_kl_op.register_autograd(_backward, setup_context=_setup_context)


def _flops(
    teacher: tuple[int, int],
    students: tuple[int, int, int],
    head: tuple[int, int],
    *arguments: Any,
    out_shape: Any = None,
) -> int:
    """Count the matrix products: logits of every stream, and one product per gradient."""
    students_grad, head_grad = arguments[-2:]
    S, T, D = students
    products = 1 + S + S * bool(students_grad) + S * bool(head_grad)
    return 2 * T * D * head[0] * products


FLOP_FORMULAS = {torch.ops.fastadapt.linear_kl: _flops}


def _workspace(
    device_type: str,
    teacher: Tensor,
    students: Tensor,
    head: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    softcap: float | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    *_: Any,
) -> int:
    """Return the bytes of the two buffers [C, V], of a block's temporaries, of hidden states."""
    T, D = teacher.shape
    n_tokens = chunk_rows(T, chunk_tokens, device_type)
    entries, wide = n_tokens * head.shape[0], weights.element_size()
    hidden = 2 * n_tokens * D * wide
    if device_type == "cuda" and wide == 4:  # Triton: the teacher's logits stay in their dtype
        return 2 * entries * logits_dtype.itemsize + hidden
    block = min(entries, block_elements(device_type))
    return entries * (logits_dtype.itemsize + wide) + 6 * block * wide + hidden


WORKSPACE_FORMULAS = {torch.ops.fastadapt.linear_kl.default: _workspace}
