"""Process logits between the matrix products with two Triton kernels, one per pass.

Pass 1 computes a row's largest logit m, log sum exp(z - m), and its first argmax. The same kernel
runs for the teacher, once per chunk, and for every student, so that equal logits have bitwise equal
statistics under any compiler. Pass 2 reads the teacher's and the student's logits again, computes
the token's results, and overwrites the student's logits with the gradient. No log-probabilities are
stored.

One program processes one token, over the vocabulary in blocks. Each lane of a block accumulates
separately, and lanes are reduced once per row in a fixed order. Without atomics and reductions
inside the loop, results are bitwise reproducible. Arithmetic is float32 without fused
multiply-adds, which a compiler could place differently for teacher and student.

V vocabulary size, C tokens of a chunk.
"""

# Kernel arguments and triton have no type annotations.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import Elementwise, Gradient


class Configuration(NamedTuple):
    """Launch settings of a row's program."""

    block: int  # columns per block, a power of 2
    warps: int


# By the logits' dtype: 8 columns per thread; no spills on sm_80 and sm_90.
CONFIGURATIONS = {
    torch.float32: Configuration(2048, 8),
    torch.bfloat16: Configuration(2048, 8),
    torch.float16: Configuration(2048, 8),
}


@triton.jit
def _tanh(x):
    """tanh with an error of at most one float32 unit, if the arithmetic rounds correctly.

    |x| < 0.75: y minus a continued fraction, so that y is hardly rounded. |x| < 1.5: the same for
    y = |x| - 1, with tanh(1 + y) = tanh 1 + tanh y (1 - tanh^2 1) / (1 + tanh 1 tanh y). Larger
    |x|: exponentials.
    """
    tanh_1: tl.constexpr = 0.7615941762924194  # tanh 1 rounded to float32, and the remainder:
    tanh_1_low: tl.constexpr = -2.0336655e-8
    slope: tl.constexpr = 0.41997434161402614  # 1 - tanh^2 1
    size = tl.abs(x)
    shifted = size >= 0.75
    y = tl.where(shifted, tl.minimum(size - 1.0, 0.5), size)
    square = y * y
    part = square * (315.0 + 14.0 * square) / (945.0 + square * (420.0 + 15.0 * square))
    small = y - y * part
    middle = tanh_1 + (small * slope / (1.0 + tanh_1 * small) + tanh_1_low)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    result = tl.where(size < 1.5, tl.where(shifted, middle, small), large)
    return tl.where(x < 0, -result, result)


@triton.jit
def _near_expm1(x):
    """e^x - 1 for |x| <= 1/4, from the series of x / (e^x - 1)."""
    square = x * x
    return x / (1.0 - 0.5 * x + square * (1.0 / 12.0 - square * (1.0 / 720.0)))


@triton.jit(do_not_specialize_on_alignment=["top_ptr", "log_total_ptr", "top1_ptr"])
def row_statistics_kernel(
    logits_ptr,
    top_ptr,
    log_total_ptr,
    top1_ptr,
    V,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 1: m = max z, log sum exp(z - m) and the first argmax of a row [V].

    The first two are stored separately: their sum would be rounded relative to m, and that error
    would enter every log-probability.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # of exp(z - top)
    first = lanes
    for start in range(0, V, BLOCK):
        columns = start + lanes
        inside = columns < V
        z = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = tl.where(inside, softcap * _tanh(z / softcap), float("-inf"))
        larger = z > top
        # The ratio of two infinities of equal sign is set to 1 here; the sum after the loop turns
        # rows without a distribution into NaN.
        ratio = tl.where(z == top, 1.0, tl.exp(-tl.abs(z - top)))
        total = tl.where(larger, total * ratio + 1.0, total + ratio)
        first = tl.where(larger, columns, first)
        top = tl.where(larger, z, top)
    row_top = tl.max(top, 0)
    row_total = tl.sum(total * tl.exp(top - row_top), 0)
    tl.store(top_ptr + row, row_top)
    tl.store(log_total_ptr + row, tl.log(row_total))
    tl.store(top1_ptr + row, tl.min(tl.where(top == row_top, first, V), 0))


@triton.jit(
    do_not_specialize_on_alignment=[
        "teacher_top_ptr",
        "teacher_log_total_ptr",
        "teacher_top1_ptr",
        "top_ptr",
        "log_total_ptr",
        "top1_ptr",
        "labels_ptr",
        "kl_ptr",
        "cross_entropy_ptr",
        "agrees_ptr",
    ]
)
def student_kernel(
    teacher_ptr,
    teacher_top_ptr,
    teacher_log_total_ptr,
    teacher_top1_ptr,
    logits_ptr,
    top_ptr,
    log_total_ptr,
    top1_ptr,
    labels_ptr,
    gradient_ptr,
    kl_ptr,
    cross_entropy_ptr,
    agrees_ptr,
    V,
    softcap,
    unit,
    CAPPED: tl.constexpr,
    LABELS: tl.constexpr,
    GRADIENT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 2: KL, cross-entropy, agreement; d kl / d logits, times ``unit``, overwrites the logits.

    ``NARROW``: the gradient's dtype has half the logits' size; its rows have the same distance in
    bytes. A block of the gradient then overlaps logits of the same and of earlier blocks, so all
    threads must have read their logits before any thread writes.
    """
    row = tl.program_id(0).to(tl.int64)
    teacher_ptr += row * V
    logits_ptr += row * V
    gradient_ptr += row * V * (2 if NARROW else 1)
    top_p = tl.load(teacher_top_ptr + row)
    log_total_p = tl.load(teacher_log_total_ptr + row)
    top_q = tl.load(top_ptr + row)
    log_total_q = tl.load(log_total_ptr + row)
    lanes = tl.arange(0, BLOCK)
    kl = tl.zeros([BLOCK], tl.float32)
    if LABELS:
        label = tl.load(labels_ptr + row)
        known = (label >= 0) & (label < V)
        z = tl.load(logits_ptr + label, mask=known, other=0.0).to(tl.float32)
        if CAPPED:
            z = softcap * _tanh(z / softcap)
        cross_entropy = log_total_q - (z - top_q)
        cross_entropy = tl.where(known, cross_entropy, float("nan"))
        tl.store(cross_entropy_ptr + row, tl.where(label == -100, 0.0, cross_entropy))
        if GRADIENT:
            tl.debug_barrier()  # all threads have read the label's logit before it is overwritten
    for start in range(0, V, BLOCK):
        columns = start + lanes
        inside = columns < V
        z_p = tl.load(teacher_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z_q = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:
            tanh_q = _tanh(z_q / softcap)
            z_p = tl.where(inside, softcap * _tanh(z_p / softcap), float("-inf"))
            z_q = tl.where(inside, softcap * tanh_q, float("-inf"))
        log_p = z_p - top_p - log_total_p
        log_q = z_q - top_q - log_total_q
        p = tl.exp(log_p)
        # If log p and log q are close, their difference d is computed from differences of logits,
        # which hardly round, and q - p = p (e^d - 1): two separate exponentials would cancel.
        gap = log_q - log_p
        near = tl.abs(gap) < 0.25
        between = (z_q - z_p) - (top_q - top_p) - (log_total_q - log_total_p)
        gap = tl.where(near, between, gap)
        kl -= tl.where(p == 0.0, 0.0, p * gap)
        if GRADIENT:
            gradient = tl.where(near, p * _near_expm1(gap), tl.exp(log_q) - p)
            if CAPPED:  # d cap tanh(z / cap) / dz = 1 - tanh^2
                gradient *= 1.0 - tanh_q * tanh_q
            if NARROW:
                tl.debug_barrier()
            gradient = (gradient * unit).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + columns, gradient, mask=inside)
    row_kl = tl.sum(kl, 0)
    tl.store(kl_ptr + row, row_kl)
    same = tl.load(teacher_top1_ptr + row) == tl.load(top1_ptr + row)
    tl.store(agrees_ptr + row, (same & (row_kl == row_kl)).to(tl.uint8))


def row_statistics(logits_CV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`row_statistics_kernel` on contiguous rows; float32 [C], float32 [C], int32 [C]."""
    C, V = logits_CV.shape
    top_C, log_total_C = (logits_CV.new_empty(C, dtype=torch.float32) for _ in range(2))
    top1_C = logits_CV.new_empty(C, dtype=torch.int32)
    block, warps = CONFIGURATIONS[logits_CV.dtype]
    if C:
        row_statistics_kernel[(C,)](
            logits_CV,
            top_C,
            log_total_C,
            top1_C,
            V,
            1.0 if softcap is None else softcap,
            CAPPED=softcap is not None,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return top_C, log_total_C, top1_C


def _teacher_pass(
    logits_CV: Tensor, softcap: float | None, buffer_CV: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the teacher's logits and their statistics."""
    return buffer_CV, *row_statistics(buffer_CV, softcap)


def _student_pass(
    teacher: tuple[Tensor, ...],
    logits_CV: Tensor,
    labels_C: Tensor | None,
    softcap: float | None,
    gradient: Gradient | None,
    kl_C: Tensor,
    cross_entropy_C: Tensor | None,
    top1_C: Tensor,
) -> None:
    """Fill kl, cross-entropy and top-1 agreement; write d kl / d logits over the logits."""
    C, V = logits_CV.shape
    if not C:
        return
    block, warps = CONFIGURATIONS[logits_CV.dtype]
    target = Gradient(logits_CV, 1.0) if gradient is None else gradient
    student_kernel[(C,)](
        *teacher,
        logits_CV,
        *row_statistics(logits_CV, softcap),
        labels_C,
        target.rows,
        kl_C,
        cross_entropy_C,
        top1_C.view(torch.uint8),
        V,
        1.0 if softcap is None else softcap,
        target.unit,
        CAPPED=softcap is not None,
        LABELS=labels_C is not None,
        GRADIENT=gradient is not None,
        NARROW=target.rows.dtype != logits_CV.dtype,
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )


TRITON = Elementwise(keeps_logits=True, teacher=_teacher_pass, student=_student_pass)
