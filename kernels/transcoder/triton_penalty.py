"""Functions of the sparsity penalty for kernels; see ``penalty.py``.

A kernel's constant SCALE is None for L1, whose code then contains none of this, or c of tanh.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def penalty_of(u, SCALE: tl.constexpr):
    """``φ(u)`` for u >= 0 in fp32."""
    cost = u
    if SCALE is not None:
        v = u * SCALE
        e = tl.exp(-2.0 * v)
        # 1 - e cancels near 0. There, Lambert's continued fraction for tanh, to the term v² / 9,
        # has a relative error below 2e-10.
        near = tl.minimum(v, 0.5)
        q = near * near
        above = tl.where(v < 0.5, near * (945.0 + q * (105.0 + q)), 1.0 - e)
        below = tl.where(v < 0.5, 945.0 + q * (420.0 + q * 15.0), 1.0 + e)
        cost = above / below
    return cost


@triton.jit
def penalty_slope(u, SCALE: tl.constexpr):
    """``φ'(u) = c / cosh²(c u)`` for u >= 0 in fp32; no cancellation where φ saturates."""
    e = tl.exp(-2.0 * SCALE * u)
    return 4.0 * SCALE * e / ((1.0 + e) * (1.0 + e))
