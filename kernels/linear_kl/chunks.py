"""Compute the head, KL and gradient in one pass, chunk by chunk of tokens.

Two buffers of [chunk, V] serve all streams. One holds the teacher's results, which all students
read. The other holds one student's logits, which their gradient then overwrites. Matrix products
are the library's; an :class:`Elementwise` processes the logits between them.

S students, T tokens, D width, V vocabulary size, C tokens of a chunk.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 2**19}  # of fp32 temporaries: 2 MiB, which fits in cache
_BLOCK_ELEMENTS_ELSEWHERE = 2**24
_TILE_ROWS = 128  # of a GPU's matrix products


class Elementwise(NamedTuple):
    """Row-wise processing of logits between the matrix products."""

    keeps_logits: bool  # the teacher's buffer holds logits; else values in the softmax dtype
    # (logits [C,V], softcap, buffer [C,V]) -> the teacher's tensors for the student's pass.
    # With ``keeps_logits``, ``buffer`` is ``logits``.
    teacher: Callable[[Tensor, float | None, Tensor], tuple[Tensor, ...]]
    student: "StudentPass"


class Gradient(NamedTuple):
    """Destination of d kl / d logits: the memory of the student's logits."""

    rows: Tensor  # [C,V]: a view of that memory, in the logits' dtype or in one of half its size
    unit: float  # scale of the stored values: 1 is stored as ``unit``


# (the teacher's tensors, logits [C,V], labels [C], softcap, gradient, kl [C], cross-entropy [C],
#  top1 [C])
StudentPass = Callable[
    [
        tuple[Tensor, ...],
        Tensor,
        Tensor | None,
        float | None,
        Gradient | None,
        Tensor,
        Tensor | None,
        Tensor,
    ],
    None,
]


def linear_kl_chunks(
    elementwise: Elementwise,
    teacher_TD: Tensor,
    students_STD: Tensor,
    head_VD: Tensor,
    weights_T: Tensor,
    labels_T: Tensor | None,
    softcap: float | None,
    chunk_tokens: int,
    logits_dtype: torch.dtype,
    students_grad: bool,
    head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute values and gradients in one pass over the tokens.

    Returns:
        kl [S], token_kl [S,T], token_cross_entropy [S,T] ([0] without labels), token_top1 [S,T];
        scale [T]: weight of each token's KL in kl;
        grad_students [S,T,D]: d token_kl / d hidden_students, 0 for tokens of weight 0 ([0] unless
        ``students_grad``), without ``scale``, so that a float16 result does not underflow;
        grad_head [S,V,D]: d kl / d head in the softmax dtype ([0] unless ``head_grad``).
    """
    S, T, D = students_STD.shape
    V = head_VD.shape[0]
    _check_labels(labels_T, V)
    labels_T = None if labels_T is None else labels_T.contiguous()
    new = weights_T.new_empty
    total = weights_T.sum()
    scale_T = torch.where(total == 0, 0, weights_T / total)
    token_kl = new(S, T)
    token_ce = new(0) if labels_T is None else new(S, T)
    token_top1 = new((S, T), dtype=torch.bool)
    grad_students = torch.empty_like(students_STD, memory_format=torch.contiguous_format)
    grad_students = grad_students if students_grad else students_STD.new_empty(0)
    grad_head = weights_T.new_zeros((S, V, D) if head_grad else (0,))

    chunk = chunk_rows(T, chunk_tokens, head_VD.device.type)
    # All streams use one buffer for the product, so equal hidden states give equal bits and KL 0.
    hidden_CD = teacher_TD.new_empty(chunk, D)
    logits_CV = new((chunk, V), dtype=logits_dtype)
    teacher_CV = torch.empty_like(logits_CV) if elementwise.keeps_logits else new(chunk, V)
    for start in range(0, T, chunk):
        rows = slice(start, min(start + chunk, T))
        n = rows.stop - start
        teacher_buffer, logits = teacher_CV[:n], logits_CV[:n]
        labels = None if labels_T is None else labels_T[rows]
        teacher_logits = teacher_buffer if elementwise.keeps_logits else logits
        _project(hidden_CD[:n].copy_(teacher_TD[rows]), head_VD, teacher_logits)
        teacher = elementwise.teacher(teacher_logits, softcap, teacher_buffer)
        gradient = None
        if students_grad or head_grad:
            gradient = _gradient_rows(logits, hidden_CD.dtype, head_VD)
        uncounted_C1 = (weights_T[rows] == 0)[:, None]
        for s in range(S):
            hidden = hidden_CD[:n].copy_(students_STD[s, rows])
            _project(hidden, head_VD, logits)
            elementwise.student(
                teacher,
                logits,
                labels,
                softcap,
                gradient,
                token_kl[s, rows],
                None if labels is None else token_ce[s, rows],
                token_top1[s, rows],
            )
            if gradient is not None and students_grad:
                grad = grad_students[s, rows]
                _project_back(gradient, head_VD, logits_dtype, grad)
                grad.masked_fill_(uncounted_C1, 0)
            if gradient is not None and head_grad:
                _add_head_gradient(gradient, hidden, scale_T[rows], grad_head[s])
    kl = torch.where(weights_T != 0, scale_T * token_kl, 0).sum(-1)
    return kl, token_kl, token_ce, token_top1, scale_T, grad_students, grad_head


def chunk_rows(T: int, chunk_tokens: int, device_type: str) -> int:
    """Return the tokens of every chunk but the last, which has the remainder.

    On a GPU, T tokens are divided into as few chunks of at most ``chunk_tokens`` as possible, all
    of nearly equal size, because a short last chunk reads the whole head for few tokens. Sizes are
    multiples of the rows of a product's tile; other sizes would add partly empty tiles. On a CPU,
    where products of other sizes have other bits, all chunks but the last are full.

    Example:
        >>> chunk_rows(2100, 1024, "cuda"), chunk_rows(2100, 1024, "cpu")
        (768, 1024)
    """
    T = max(1, T)
    full = min(chunk_tokens, T)
    if device_type != "cuda":
        return full
    n_chunks = math.ceil(T / full)
    tiles = math.ceil(T / n_chunks / _TILE_ROWS)
    return min(full, tiles * _TILE_ROWS)


def block_elements(device_type: str) -> int:
    """Return how many elements a block of temporaries holds on a device type."""
    return _BLOCK_ELEMENTS.get(device_type, _BLOCK_ELEMENTS_ELSEWHERE)


def row_blocks(tensor_CV: Tensor) -> list[slice]:
    """Divide rows into blocks small enough for elementwise temporaries."""
    C, V = tensor_CV.shape
    rows = max(1, block_elements(tensor_CV.device.type) // max(1, V))
    return [slice(start, min(start + rows, C)) for start in range(0, C, rows)]


def _check_labels(labels_T: Tensor | None, V: int) -> None:
    """Raise for labels outside the vocabulary on a CPU; a GPU would synchronise."""
    if labels_T is None or labels_T.device.type != "cpu":
        return
    wrong = ((labels_T < 0) | (labels_T >= V)) & (labels_T != -100)
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0])
        raise ValueError(f"labels: expected 0..{V - 1} or -100, got {int(labels_T[t])} at {t}")


def _gradient_rows(logits_CV: Tensor, hidden_dtype: torch.dtype, head_VD: Tensor) -> Gradient:
    """Return the destination of the gradient, in the dtype of the products that read it.

    Entries lie within -1..1; storing 1 as 2**15 keeps small entries from underflowing in float16.
    """
    if not _accumulates_wider(head_VD, hidden_dtype, logits_CV.dtype):
        return Gradient(logits_CV, 1.0)
    narrow = logits_CV.view(head_VD.dtype)[:, : logits_CV.shape[1]]
    return Gradient(narrow, 2.0**15 if head_VD.dtype == torch.float16 else 1.0)


def _project(hidden_CD: Tensor, head_VD: Tensor, out_CV: Tensor) -> None:
    """Write hidden @ head.T in ``out``'s dtype, without a copy of the whole head in that dtype."""
    dtype = out_CV.dtype
    if hidden_CD.dtype == head_VD.dtype == dtype:
        torch.mm(hidden_CD, head_VD.T, out=out_CV)
    elif _accumulates_wider(head_VD, hidden_CD.dtype, dtype):
        torch.mm(hidden_CD, head_VD.T, out_dtype=dtype, out=out_CV)
    else:
        hidden_CD = hidden_CD.to(dtype)
        for block in row_blocks(head_VD):
            torch.mm(hidden_CD, head_VD[block].to(dtype).T, out=out_CV[:, block])


def _project_back(gradient: Gradient, head_VD: Tensor, dtype: torch.dtype, out_CD: Tensor) -> None:
    """Write grad @ head, accumulated in ``dtype`` and rounded once to ``out``'s dtype."""
    grad_CV = gradient.rows
    if head_VD.dtype == dtype == out_CD.dtype:
        torch.mm(grad_CV, head_VD, out=out_CD)
    elif grad_CV.dtype != dtype:
        # Not a 16-bit product: torch lets the library add parts of the sum in the result's dtype.
        torch.div(torch.mm(grad_CV, head_VD, out_dtype=dtype), gradient.unit, out=out_CD)
    else:
        total_CD = grad_CV.new_zeros(out_CD.shape)
        for block in row_blocks(head_VD):
            total_CD.addmm_(grad_CV[:, block], head_VD[block].to(dtype))
        out_CD.copy_(total_CD)


def _add_head_gradient(
    gradient: Gradient, hidden_CD: Tensor, scale_C: Tensor, out_VD: Tensor
) -> None:
    """Add grad.T @ (scale * hidden) to ``out``, multiplied in ``out``'s dtype."""
    hidden_CD = hidden_CD.to(out_VD.dtype) * (scale_C / gradient.unit)[:, None]
    for block in row_blocks(out_VD):
        out_VD[block].addmm_(gradient.rows[:, block].to(out_VD.dtype).T, hidden_CD)


def _accumulates_wider(
    head_VD: Tensor, hidden_dtype: torch.dtype, logits_dtype: torch.dtype
) -> bool:
    """Return whether the device multiplies 16-bit matrices into float32 logits directly."""
    return (
        head_VD.device.type == "cuda"
        and head_VD.dtype == hidden_dtype
        and head_VD.dtype in (torch.float16, torch.bfloat16)
        and logits_dtype == torch.float32
    )
