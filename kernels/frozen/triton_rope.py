"""Rotary position embedding of queries and keys in one launch, forward and backward.

A program rotates BLOCK_H heads of one token, so that the token's angles are read once for them::

    axis 0: token (b, t)      axis 1: blocks of heads, those of q before those of k

        columns  [ first R/2 | second R/2 | others ]
                     x1           x2         copied
        out1 = x1 cos1 - x2 sin1        (inverse: x1 cos1 + x2 sin2)
        out2 = x2 cos2 + x1 sin2        (inverse: x2 cos2 - x1 sin1)

Traffic: one read and one write of q and k. The inverse is the transpose, for the backward pass.

B sequences, T tokens, H heads, D width of a head, R columns that are rotated.
"""

# Kernel arguments and triton have no type annotations.
# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    head_stride,
    cos_ptr,
    sin_ptr,
    heads,
    H,
    D: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    half = tl.arange(0, BLOCK_R)
    turned = half < R // 2
    inside = (heads < H)[:, None] & turned[None, :]
    cos_1 = tl.load(cos_ptr + half, mask=turned, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + R // 2 + half, mask=turned, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + half, mask=turned, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + R // 2 + half, mask=turned, other=0.0).to(tl.float32)[None, :]
    source = x_ptr + heads[:, None] * head_stride + half[None, :]
    x_1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x_2 = tl.load(source + R // 2, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        out_1 = x_1 * cos_1 + x_2 * sin_2
        out_2 = x_2 * cos_2 - x_1 * sin_1
    else:
        out_1 = x_1 * cos_1 - x_2 * sin_1
        out_2 = x_2 * cos_2 + x_1 * sin_2
    dtype = out_ptr.dtype.element_ty
    out = out_ptr + heads[:, None] * D + half[None, :]
    tl.store(out, out_1.to(dtype), mask=inside)
    tl.store(out + R // 2, out_2.to(dtype), mask=inside)
    if R < D:
        columns = R + tl.arange(0, BLOCK_COPY)
        inside = (heads < H)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + heads[:, None] * head_stride + columns[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + heads[:, None] * D + columns[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    T,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    angle_batch_stride,
    angle_token_stride,
    H_Q: tl.constexpr,
    H_K: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_COPY: tl.constexpr,
):
    """Rotate BLOCK_H heads of q or of k of one token."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    angle = b * angle_batch_stride + t * angle_token_stride
    cos_ptr += angle
    sin_ptr += angle
    block = tl.program_id(1).to(tl.int64)
    blocks_of_q: tl.constexpr = (H_Q + BLOCK_H - 1) // BLOCK_H
    if block < blocks_of_q:
        heads = block * BLOCK_H + tl.arange(0, BLOCK_H)
        x_ptr = q_ptr + b * q_batch_stride + t * q_token_stride
        out_ptr = q_out_ptr + token * H_Q * D
        _rotate(
            x_ptr, out_ptr, q_head_stride, cos_ptr, sin_ptr, heads, H_Q, D, R, INVERSE,
            BLOCK_R, BLOCK_COPY,
        )  # fmt: skip
    else:
        heads = (block - blocks_of_q) * BLOCK_H + tl.arange(0, BLOCK_H)
        x_ptr = k_ptr + b * k_batch_stride + t * k_token_stride
        out_ptr = k_out_ptr + token * H_K * D
        _rotate(
            x_ptr, out_ptr, k_head_stride, cos_ptr, sin_ptr, heads, H_K, D, R, INVERSE,
            BLOCK_R, BLOCK_COPY,
        )  # fmt: skip


def rotate(
    q_BHTD: Tensor, k_BHTD: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Return rotated q and k; in memory they are [B, T, H, D]."""
    B, H_Q, T, D = q_BHTD.shape
    H_K, R = k_BHTD.shape[1], cos.shape[-1]
    q_out = q_BHTD.new_empty(B, T, H_Q, D)
    k_out = k_BHTD.new_empty(B, T, H_K, D)
    if B * T * D:
        q, k, cos, sin = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BHTD, cos, sin)
        )
        cos, sin = cos.expand(B, T, R), sin.expand(B, T, R)
        if sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        block_h = min(16, triton.next_power_of_2(max(H_Q, H_K)))
        with torch.cuda.device_of(q):
            rope_kernel[(B * T, triton.cdiv(H_Q, block_h) + triton.cdiv(H_K, block_h))](
                q,
                k,
                cos,
                sin,
                q_out,
                k_out,
                T,
                *q.stride()[:3],
                *k.stride()[:3],
                *cos.stride()[:2],
                H_Q=H_Q,
                H_K=H_K,
                D=D,
                R=R,
                INVERSE=inverse,
                BLOCK_H=block_h,
                BLOCK_R=max(1, triton.next_power_of_2(R // 2)),
                BLOCK_COPY=max(1, triton.next_power_of_2(D - R)),
                num_warps=4,
            )
    return q_out.transpose(1, 2), k_out.transpose(1, 2)
