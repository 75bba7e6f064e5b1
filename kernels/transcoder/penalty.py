"""Functions φ of the sparsity penalty ``Σ_t w_t Σ_i φ(u_ti)``, with ``u_ti = a_ti ‖W_dec,i‖₂``.

Inside the op, the function is the argument `tanh_scale`: None is L1, ``φ(u) = u``; a number c is
``φ(u) = tanh(c u)``.

Shape suffixes: N tokens, n some of them, F features, C codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Names for the argument ``penalty`` of :func:`fastadapt.kernels.transcoder.transcoder`.
PENALTIES = ("l1", "tanh")
# Entries of a dense a whose penalties are computed at once: few enough to stay in a cache and to
# need no buffer of a's size, and many enough for calls of torch.
ENTRIES = 2**18


class Penalty(NamedTuple):
    """Sparsity penalty; see :func:`fastadapt.kernels.transcoder.transcoder`."""

    kind: str = "l1"  #: one of :data:`PENALTIES`.
    scale: float | None = None  #: c of ``tanh``; None for ``l1``.


#: The penalty that is used if none is given.
L1 = Penalty()


def slopes_(u: Tensor, tanh_scale: float) -> Tensor:
    """Replace u by ``φ'(u) = c / cosh²(c u)``, in place.

    ``1 - tanh²`` would cancel where the penalty saturates. There, cosh overflows to infinity and
    the slope is 0.
    """
    return u.mul_(tanh_scale).cosh_().reciprocal_().square_().mul_(tanh_scale)


def dense_costs(a_NF: Tensor, norm_F: Tensor, tanh_scale: float) -> Tensor:
    """Return each token's ``Σ_i tanh(c u_ti)`` [N], in the norms' dtype."""
    cost_N, n = norm_F.new_empty(len(a_NF)), _rows_at_once(norm_F)
    for a_nF, cost_n in zip(a_NF.split(n), cost_N.split(n), strict=True):
        u_nF = a_nF.to(norm_F.dtype) * norm_F
        torch.sum(u_nF.mul_(tanh_scale).tanh_(), 1, out=cost_n)
    return cost_N


def dense_gradients(
    c: Tensor, a_NF: Tensor, norm_F: Tensor, weight_N: Tensor | None, tanh_scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``c w_t φ'(u_ti) ‖W_dec,i‖`` [N, F] in a's dtype, and ``Σ_t w_t φ'(u_ti) a_ti`` [F].

    `c` is the gradient of the penalty.
    """
    cost_NF, spent_F = torch.empty_like(a_NF), torch.zeros_like(norm_F)
    by_norm_F, n = c * norm_F, _rows_at_once(norm_F)
    for start in range(0, len(a_NF), n):
        rows = slice(start, start + n)
        a_nF = a_NF[rows].to(norm_F.dtype)
        slope_nF = slopes_(a_nF * norm_F, tanh_scale)
        if weight_N is not None:
            slope_nF *= weight_N[rows, None]
        spent_F += (slope_nF * a_nF).sum(0)
        cost_NF[rows] = slope_nF.mul_(by_norm_F)
    return cost_NF, spent_F


def _rows_at_once(norm_F: Tensor) -> int:
    return max(1, ENTRIES // max(1, len(norm_F)))
