"""Language-model head and KL divergence of a teacher from several students, fused in one op."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.kernels.device import runs_triton

from .autograd import linear_kl_op
from .reference import linear_kl_reference

__all__ = ["LinearKLOutput", "linear_kl"]

_IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")


class LinearKLOutput(NamedTuple):
    """Results of :func:`linear_kl`, in nats and in the softmax dtype.

    The softmax dtype is float64 if an input or ``logits_dtype`` is float64, else float32.
    """

    kl: Tensor  #: [S], the only differentiable output
    token_kl: Tensor  #: [S,T]
    token_cross_entropy: Tensor | None  #: [S,T]; None without labels
    token_top1: Tensor  #: [S,T] bool: the student's most probable token is the teacher's


def linear_kl(
    hidden_teacher: Tensor,
    hidden_students: Tensor | Sequence[Tensor],
    head: Tensor,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    softcap: float | None = None,
    chunk_tokens: int = 1024,
    logits_dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> LinearKLOutput:
    """Compute KL(teacher || student) of next-token distributions from hidden states.

    The [T,V] logits never exist at once. Let z = head h (then softcap * tanh(z / softcap) if set),
    p = softmax(z of the teacher) and q_s = softmax(z of student s). For token t and student s::

        token_kl[s,t] = sum_v p_tv (log p_tv - log q_stv)
        kl[s]         = sum_t w_t token_kl[s,t] / sum_t w_t        (0 where sum_t w_t = 0)

    Terms with p = 0 count as 0. ``kl`` is once differentiable in ``hidden_students`` and ``head``;
    the teacher's distribution is a constant. The gradient is computed together with the values, if
    an input requires it and grad mode is on.

    Args:
        hidden_teacher: final hidden states (after the last norm), floating [T,D].
        hidden_students: [S,T,D], or S tensors [T,D], in the teacher's dtype.
        head: [V,D], any floating dtype, without bias.
        mask: [T], bool or floating weights w >= 0; None is all 1. Tokens of weight 0 give no
            gradient to ``hidden_students``, even if not finite; their token outputs are computed.
        labels: [T], int64 in 0..V-1, or -100 to ignore a token. If given, ``token_cross_entropy``
            is -log q at the label, and 0 for ignored tokens. Other labels raise on a CPU. On a GPU
            the check would synchronise, so they give NaN ("chunked", "triton").
        softcap: bound on the logits (Gemma 2), > 0.
        chunk_tokens: largest number of tokens whose logits exist at a time. Peak memory is two
            chunks of logits for any S; with "chunked", one of them is in the softmax dtype. On a
            GPU the chunks are of nearly equal size. The reference computes all tokens at once.
        logits_dtype: dtype that inputs are cast to for the product and that logits are rounded to.
            None is the softmax dtype, since near-equal distributions cancel in 16 bits. At
            V = 152,064, bfloat16 inputs and a KL of 7e-3, the gradient's relative error was 28%
            with bfloat16 logits, 3.2% with float16, and 0.16% with float32, which is the rounding
            of the bfloat16 result (benchmarks/bench_cases.py, on a CPU). On a GPU, 16-bit inputs
            with float32 logits use 16-bit products with float32 accumulation, for the logits and
            for the gradient of the hidden states. The gradient of the logits is then rounded to
            the 16-bit dtype.
        implementation: "reference" (dense PyTorch that defines the results), "chunked" (PyTorch,
            any device and dtype), "triton" (two Triton kernels between the library's products; a
            GPU, float32 softmax), or "auto": "triton" if it runs on the GPU, else "chunked".

    If several tokens are most probable, the lowest index counts. A token whose KL is NaN never
    agrees. NaN and infinite hidden states give NaN in their tokens and, if counted, in ``kl``.

    Returns:
        :class:`LinearKLOutput`. Equal inputs give bitwise equal results.

    Raises:
        TypeError, ValueError: an argument is not as above, or "triton" cannot run on it.

    Example:
        >>> hidden = torch.eye(4)
        >>> linear_kl(hidden, [hidden, 0 * hidden], torch.eye(4)).kl
        tensor([0.0000, 0.1180])
    """
    students = _stack(hidden_students)
    _validate(hidden_teacher, students, head, mask, labels)
    _validate_settings(softcap, chunk_tokens, logits_dtype, implementation)
    dtypes = (hidden_teacher.dtype, head.dtype, logits_dtype)
    softmax_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    logits_dtype = logits_dtype or softmax_dtype
    implementation = resolve_implementation(implementation, head.device.type, softmax_dtype)
    if mask is None:
        weights = hidden_teacher.new_ones(len(hidden_teacher), dtype=softmax_dtype)
    else:
        weights = mask.detach().to(softmax_dtype)
    teacher = hidden_teacher.detach()
    if implementation == "reference":
        with torch.autocast(head.device.type, enabled=False):
            return LinearKLOutput(
                *linear_kl_reference(
                    teacher, students, head, weights, labels, softcap, logits_dtype
                )
            )
    grad = torch.is_grad_enabled()
    kl, token_kl, token_cross_entropy, token_top1, *_ = linear_kl_op(
        teacher,
        students,
        head,
        weights,
        labels,
        softcap,
        chunk_tokens,
        logits_dtype,
        implementation,
        grad and students.requires_grad,
        grad and head.requires_grad,
    )
    return LinearKLOutput(
        kl,
        token_kl.detach(),
        None if labels is None else token_cross_entropy.detach(),
        token_top1,
    )


def _stack(hidden_students: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(hidden_students, Tensor):
        return hidden_students
    if not hidden_students:
        raise ValueError("hidden_students: expected at least one tensor [T,D], got none")
    for s, hidden in enumerate(hidden_students):
        _expect_tensor(f"hidden_students[{s}]", hidden)
        if hidden.shape != hidden_students[0].shape or hidden.dtype != hidden_students[0].dtype:
            first = hidden_students[0]
            raise ValueError(
                f"hidden_students[{s}]: expected {first.dtype} {list(first.shape)} like the first, "
                f"got {hidden.dtype} {list(hidden.shape)}"
            )
    return torch.stack(list(hidden_students))


def _validate(
    teacher: Tensor, students: Tensor, head: Tensor, mask: Tensor | None, labels: Tensor | None
) -> None:
    for name, tensor in (
        ("hidden_teacher", teacher),
        ("hidden_students", students),
        ("head", head),
    ):
        _expect_tensor(name, tensor)
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating dtype, got {tensor.dtype}")
    if teacher.ndim != 2:
        raise ValueError(f"hidden_teacher: expected [T,D], got {list(teacher.shape)}")
    T, D = teacher.shape
    if students.ndim != 3 or students.shape[1:] != teacher.shape:
        raise ValueError(f"hidden_students: expected [S,{T},{D}], got {list(students.shape)}")
    if students.dtype != teacher.dtype:
        raise TypeError(f"hidden_students: expected {teacher.dtype}, got {students.dtype}")
    if head.ndim != 2 or head.shape[1] != D or head.shape[0] < 1:
        raise ValueError(f"head: expected [V,{D}] with V >= 1, got {list(head.shape)}")
    for name, rows in (("mask", mask), ("labels", labels)):
        if rows is None:
            continue
        _expect_tensor(name, rows)
        if rows.shape != (T,):
            raise ValueError(f"{name}: expected [{T}], got {list(rows.shape)}")
    if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"mask: expected bool or a floating dtype, got {mask.dtype}")
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels: expected torch.int64, got {labels.dtype}")
    for name, other in (
        ("hidden_students", students),
        ("head", head),
        ("mask", mask),
        ("labels", labels),
    ):
        if other is not None and other.device != teacher.device:
            raise ValueError(f"{name}: expected device {teacher.device}, got {other.device}")


def _validate_settings(
    softcap: float | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype | None,
    implementation: str,
) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or a number > 0, got {softcap}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected an integer >= 1, got {chunk_tokens}")
    if logits_dtype is not None and not logits_dtype.is_floating_point:
        raise TypeError(f"logits_dtype: expected a floating dtype, got {logits_dtype}")
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: expected one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}"
        )


def resolve_implementation(
    implementation: str, device_type: str, softmax_dtype: torch.dtype
) -> str:
    """Replace "auto" by the implementation to run; raise if "triton" cannot run."""
    wide = softmax_dtype == torch.float64
    if implementation == "auto":
        on_gpu = device_type == "cuda" and runs_triton(device_type)
        return "triton" if on_gpu and not wide else "chunked"
    if implementation == "triton" and wide:
        raise ValueError(
            'implementation: "triton" computes in float32, got float64 among inputs and '
            'logits_dtype; use "auto" or "chunked"'
        )
    if implementation == "triton" and not runs_triton(device_type):
        raise ValueError(
            f'implementation: "triton" needs a GPU, got tensors on {device_type}; use "auto", or '
            "set TRITON_INTERPRET=1 to interpret the kernels (for tests)"
        )
    return implementation


def _expect_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
