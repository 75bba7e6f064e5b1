"""Compute the normalised squared error and its gradient with three Triton kernels.

Forward pass: ``row_sums`` reads x and target once, one program per token. It writes the token's
error and power and, for a gradient, the difference x - target. ``sequence_sums`` adds the errors
and powers of a sequence, one program per sequence. Backward pass: ``scale_rows`` multiplies the
difference by the sequence's factor. Sums are float32 in a fixed order, without atomics, so equal
inputs give equal bits.

The difference is saved, not references to x and target. Both ways move 5 elements per entry (3 in
the forward and 2 in the backward pass, or 2 and 3). A training step that recomputes its blocks has
the same peak memory with both: x is the saved input of the next block, and the target is as large
as the difference. Without recomputation the references need more, since they keep x alive: 1.1 GB
for 10 layers of 10,000 tokens at D = 3,584, counted on fake tensors. The caller may also change x
and target before the backward pass.

B sequences, T tokens, D width.
"""

# Kernel arguments and triton have no type annotations.
# mypy: disable-error-code="no-untyped-def, import-untyped"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import saved_share

#: Columns per block and warps: a thread reads 8 neighbouring columns.
ROWS = {"BLOCK": 1024, "num_warps": 4}
#: Tokens per block and warps.
SEQUENCES = {"BLOCK": 2048, "num_warps": 8}


@triton.jit(
    do_not_specialize=["T", "mask_stride_b", "mask_stride_t"],
    do_not_specialize_on_alignment=["mask_ptr", "error_ptr", "power_ptr", "ratio_ptr"],
)
def row_sums(
    x_ptr,
    target_ptr,
    mask_ptr,
    difference_ptr,
    error_ptr,
    power_ptr,
    ratio_ptr,
    T,
    D,
    x_stride_b,
    x_stride_t,
    x_stride_d,
    target_stride_b,
    target_stride_t,
    target_stride_d,
    mask_stride_b,
    mask_stride_t,
    eps,
    share,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a token's error Σ (x - target)^2, its power Σ target^2, and their ratio.

    ``GRADIENT``: also ``share`` times the difference, or 0 if the token is masked out.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    x_ptr += b * x_stride_b + t * x_stride_t
    target_ptr += b * target_stride_b + t * target_stride_t
    if GRADIENT:
        counted = tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t) != 0
        difference_ptr += row * D
    lanes = tl.arange(0, BLOCK)
    error = tl.zeros([BLOCK], tl.float32)
    power = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + lanes
        inside = columns < D
        wide = columns.to(tl.int64)
        x = tl.load(x_ptr + wide * x_stride_d, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + wide * target_stride_d, mask=inside, other=0.0)
        target = target.to(tl.float32)
        difference = x - target
        error += difference * difference
        power += target * target
        if GRADIENT:
            saved = tl.where(counted, share * difference, 0.0)
            saved = saved.to(difference_ptr.dtype.element_ty)
            tl.store(difference_ptr + columns, saved, mask=inside)
    row_error = tl.sum(error, 0)
    row_power = tl.sum(power, 0)
    tl.store(error_ptr + row, row_error)
    tl.store(power_ptr + row, row_power)
    width = tl.maximum(D, 1).to(tl.float32)
    ratio = tl.div_rn(tl.div_rn(row_error, width), tl.div_rn(row_power, width) + eps)
    tl.store(ratio_ptr + row, ratio)


@triton.jit(
    do_not_specialize=["T", "D", "mask_stride_b", "mask_stride_t"],
    do_not_specialize_on_alignment=["mask_ptr", "error_ptr", "power_ptr", "nmse_ptr", "factor_ptr"],
)
def sequence_sums(
    error_ptr,
    power_ptr,
    mask_ptr,
    nmse_ptr,
    factor_ptr,
    T,
    D,
    mask_stride_b,
    mask_stride_t,
    eps,
    twice,
    BLOCK: tl.constexpr,
):
    """Write a sequence's nmse, and ``twice`` / (entries * denominator), the gradient's factor."""
    b = tl.program_id(0).to(tl.int64)
    error_ptr += b * T
    power_ptr += b * T
    mask_ptr += b * mask_stride_b
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    error = tl.zeros([BLOCK], tl.float32)
    power = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        tokens = start + lanes
        place = mask_ptr + tokens.to(tl.int64) * mask_stride_t
        counted = tl.load(place, mask=tokens < T, other=0) != 0
        count += counted.to(tl.int32)
        error += tl.load(error_ptr + tokens, mask=counted, other=0.0)
        power += tl.load(power_ptr + tokens, mask=counted, other=0.0)
    entries = tl.maximum(tl.sum(count, 0).to(tl.int64) * D, 1).to(tl.float32)
    denominator = tl.div_rn(tl.sum(power, 0), entries) + eps
    tl.store(nmse_ptr + b, tl.div_rn(tl.div_rn(tl.sum(error, 0), entries), denominator))
    tl.store(factor_ptr + b, tl.div_rn(tl.div_rn(twice, entries), denominator))


@triton.jit(
    do_not_specialize=["T", "mask_stride_b", "mask_stride_t", "cotangent_stride"],
    do_not_specialize_on_alignment=["mask_ptr", "cotangent_ptr", "factor_ptr"],
)
def scale_rows(
    difference_ptr,
    mask_ptr,
    cotangent_ptr,
    factor_ptr,
    gradient_ptr,
    T,
    D,
    mask_stride_b,
    mask_stride_t,
    cotangent_stride,
    BLOCK: tl.constexpr,
):
    """Write difference * cotangent * factor, or 0 if the token is masked out."""
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    counted = tl.load(mask_ptr + b * mask_stride_b + t * mask_stride_t) != 0
    scale = tl.load(cotangent_ptr + b * cotangent_stride) * tl.load(factor_ptr + b)
    difference_ptr += row * D
    gradient_ptr += row * D
    lanes = tl.arange(0, BLOCK)
    for start in range(0, D, BLOCK):
        columns = start + lanes
        inside = columns < D
        difference = tl.load(difference_ptr + columns, mask=inside & counted, other=0.0)
        gradient = tl.where(counted, difference.to(tl.float32) * scale, 0.0)
        gradient = gradient.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + columns, gradient, mask=inside)


def nmse_triton(
    x_BTD: Tensor, target_BTD: Tensor, mask_BT: Tensor, eps: float, x_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of :func:`.chunked.nmse_chunked` in float32, in two launches."""
    B, T, D = x_BTD.shape
    error_BT, power_BT, ratio_BT = (x_BTD.new_empty((B, T), dtype=torch.float32) for _ in range(3))
    nmse_B, factor_B = (x_BTD.new_empty(B, dtype=torch.float32) for _ in range(2))
    difference = x_BTD.new_empty((B, T, D) if x_grad else (0,))
    share = saved_share(x_BTD.dtype)
    mask_BT = mask_BT.view(torch.uint8)
    if B * T:
        row_sums[(B * T,)](
            x_BTD,
            target_BTD,
            mask_BT,
            difference,
            error_BT,
            power_BT,
            ratio_BT,
            T,
            D,
            *x_BTD.stride(),
            *target_BTD.stride(),
            *mask_BT.stride(),
            eps,
            share,
            GRADIENT=x_grad,
            **ROWS,
        )
    if B:
        sequence_sums[(B,)](
            error_BT,
            power_BT,
            mask_BT,
            nmse_B,
            factor_B,
            T,
            D,
            *mask_BT.stride(),
            eps,
            2 / share,
            **SEQUENCES,
        )
    return nmse_B, ratio_BT, difference, factor_B


def nmse_backward_triton(
    cotangent_B: Tensor, difference_BTD: Tensor, factor_B: Tensor, mask_BT: Tensor
) -> Tensor:
    """Return the gradient of x, in its dtype, in one launch."""
    B, T, D = difference_BTD.shape
    gradient_BTD = torch.empty_like(difference_BTD)
    mask_BT = mask_BT.view(torch.uint8)
    if difference_BTD.numel():
        scale_rows[(B * T,)](
            difference_BTD,
            mask_BT,
            cotangent_B,
            factor_B,
            gradient_BTD,
            T,
            D,
            *mask_BT.stride(),
            cotangent_B.stride(0),
            **ROWS,
        )
    return gradient_BTD
